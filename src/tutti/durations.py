"""Times in steps, or in seconds ("0.4s"), which the frames a second of the data turn into steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import ceil, copysign, floor, isfinite
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import pydantic
from pydantic import BaseModel, Field, Tag

from tutti.errors import UserError

_FORM = r"^(?=.*[1-9])(\d{1,6}(?:\.\d{1,6})?) ?(ms|s)$"
_PAST_FORM = _FORM.replace(r"(\d", r"(-\d", 1)
_UNITS = {"s": Fraction(1), "ms": Fraction(1, 1000)}
MAX_STEPS = 1_000_000

Config = TypeVar("Config", bound=BaseModel)


class Seconds(str):
    """A time as it is written in a config, with its unit: "0.4s", "400ms"."""

    __slots__ = ()

    @property
    def value(self) -> Fraction:
        """The seconds, exactly."""
        number, unit = re.findall(_FORM, self.removeprefix("-"))[0]
        return Fraction(number) * _UNITS[unit] * (-1 if self.startswith("-") else 1)


def _checked(text: str, form: str = _FORM, like: str = "'0.4s' or '400ms'") -> Seconds:
    if re.fullmatch(form, text) is None:
        raise ValueError(f"expected steps, or a time with its unit as {like}, found '{text:.40}'")
    return Seconds(text)


def _checked_past(text: str) -> Seconds:
    return _checked(text, _PAST_FORM, "'-0.4s' or '-400ms'")


if TYPE_CHECKING:
    # Who reads a config that is in use finds numbers: `resolved` has put them in the place of times.
    Steps = ChunkSteps = PastStep = int
else:

    def _steps(least: int, most: int) -> Any:
        """The type of a number of steps from `least` to `most`, or of a time."""
        checked, pattern = (_checked, _FORM) if least > 0 else (_checked_past, _PAST_FORM)
        form = pydantic.WithJsonSchema({"type": "string", "pattern": pattern})
        plain = pydantic.PlainSerializer(str, return_type=str)  # YAML takes no subclass of str
        text = Annotated[str, pydantic.AfterValidator(checked), plain, form, Tag("seconds")]
        kind = pydantic.Discriminator(lambda given: "seconds" if isinstance(given, str) else "steps")
        return Annotated[Annotated[int, Field(ge=least, le=most), Tag("steps")] | text, kind]

    Steps, ChunkSteps, PastStep = _steps(1, MAX_STEPS), _steps(1, 4096), _steps(-MAX_STEPS, 0)


def in_steps(time: int | Seconds, fps: float) -> int:
    """The nearest number of steps at `fps` steps a second, at least 1, of a time that is past at most -1. A
    number of steps is itself."""
    if not isinstance(time, Seconds):
        return time
    return int(copysign(max(1, floor(abs(time.value) * Fraction(fps) + Fraction(1, 2))), time.value))


def paces(rates: Sequence[float]) -> tuple[Fraction, ...] | None:
    """Steps of each of several rates in one step of the highest, without infinite ones, which have no time;
    None if these are one rate."""
    highest = max((rate for rate in rates if isfinite(rate)), default=0.0)
    found = tuple(Fraction(rate) / Fraction(highest) if isfinite(rate) else Fraction(1) for rate in rates)
    return None if all(pace == 1 for pace in found) else found


def every_pace(rates: Sequence[float]) -> tuple[Fraction, ...]:
    """Those of `paces`, 1 each where these are one rate."""
    return paces(rates) or (Fraction(1),) * len(rates)


def in_own_steps(steps: int, pace: Fraction) -> int:
    """So many steps of the highest rate in steps of one of `pace`: the nearest number, none alone for 0."""
    return steps and int(copysign(max(1, floor(abs(steps) * pace + Fraction(1, 2))), steps))


def most_steps(own: int, pace: Fraction) -> int:
    """The inverse of `in_own_steps`: the most steps of the highest rate that are no more than `own`."""
    return ceil((own + Fraction(1, 2)) / pace) - 1


def times_in(config: BaseModel, key: str = "") -> Iterator[tuple[str, Seconds]]:
    """The times of a config, and of the configs in it, that are still in seconds, each with its key."""
    for name, value in dict(config).items():
        here = f"{key}.{name}" if key else name
        if isinstance(value, BaseModel):
            yield from times_in(value, here)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Seconds):
                yield here, one


def require_steps(config: BaseModel, key: str) -> None:
    """Raises: UserError if a time of the config at `key` is still in seconds."""
    for where, time in times_in(config, key):
        raise UserError(
            f"{where} is {time}, but the frames a second of the data are not known here.\n"
            "  cure: put steps in its place, or resolve the config first: "
            "config, _ = tutti.durations.resolved(config, fps)."
        )


def resolved(config: Config, fps: float, key: str = "") -> tuple[Config, list[str]]:
    """The config with every time in steps, and a line for each: "data.horizon 0.4s = 4 steps at 10 fps".

    Raises: UserError where steps are not allowed: two times that are the same number of them, or too many.
    """
    changes: dict[str, Any] = {}
    below: dict[str, BaseModel] = {}
    lines: list[str] = []
    for name, value in dict(config).items():
        here = f"{key}.{name}" if key else name
        if isinstance(value, BaseModel):
            inner, said = resolved(value, fps, here)
            below |= {name: inner} if said else {}
            lines += said
            continue
        several = value if isinstance(value, tuple) else (value,)
        if said := [f"{here} {_said(one, fps)}" for one in several if isinstance(one, Seconds)]:
            steps = tuple(in_steps(one, fps) for one in several)
            changes[name] = steps if isinstance(value, tuple) else steps[0]
            lines += said
    if changes:  # checked anew: what is allowed of times may not be of the steps
        try:
            config = type(config).model_validate(dict(config) | changes)
        except pydantic.ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join([key, *(str(part) for part in problem["loc"] if part in changes)])
            reason = str((problem.get("ctx") or {}).get("error", problem["msg"])).rstrip(".")
            said = "; ".join(lines)
            raise UserError(f"{said}.\n  {where}: {reason}.\n  cure: other times, or steps.") from None
    return (config.model_copy(update=below) if below else config), lines


def rising(offsets: tuple[Steps, ...]) -> tuple[Steps, ...]:
    """A validator: offsets rise and do not repeat. Times are judged once they are steps."""
    given: tuple[Any, ...] = offsets
    if not any(isinstance(one, Seconds) for one in given) and list(given) != sorted(set(given)):
        raise ValueError(f"{offsets} must rise and not repeat")
    return offsets


def _up_to_now(steps: tuple[PastStep, ...]) -> tuple[PastStep, ...]:
    if steps[-1:] != (0,):
        raise ValueError(f"{steps} must end with 0, the present")
    return steps


RisingSteps = Annotated[tuple[Steps, ...], pydantic.AfterValidator(rising)]
"""Offsets of one term."""
PastSteps = Annotated[
    tuple[PastStep, ...],
    Field(min_length=1, max_length=64),
    pydantic.AfterValidator(rising),
    pydantic.AfterValidator(_up_to_now),
]
"""Moments that are observed, the present last."""


def _said(time: Seconds, fps: float) -> str:
    """ "0.4s = 4 steps at 10 fps", and how long that really is where it is more than 1 % off."""
    steps = in_steps(time, fps)
    off = abs(steps / fps - time.value) > abs(time.value) / 100
    real = f" ({steps / fps:.3g}s)" if off else ""
    return f"{time} = {steps} step{'s' if abs(steps) > 1 else ''}{real} at {fps:g} fps"

"""What a search came to: every trial, the best first, the cost, and the verdicts of the confirmation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tutti.report.formatting import duration, percent

SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A trial: what it changed, the score of each rung that it reached (minus the error), its success as
    [k, n] where it was played, its value (None: ended before), and what it cost."""

    number: int
    control: str
    overrides: tuple[str, ...]
    params: dict[str, Any]
    rungs: dict[int, float]
    errors: dict[str, dict[str, float]]
    success: tuple[int, int] | None
    value: float | None
    steps: int
    seconds: float
    refused: str = ""

    @property
    def name(self) -> str:
        """The control's, or as in "trial 7"."""
        return self.control or f"trial {self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The whole search, the best trial first, those that ended early behind."""

    name: str
    whole_steps: int
    plays: bool
    trials: tuple[Tried, ...]
    verdicts: dict[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        """Steps of all trials, in whole trainings."""
        return sum(one.steps for one in self.trials) / self.whole_steps

    def best(self, count: int) -> list[Tried]:
        """The best that reached the top and are no control, those with the same values once, and none that
        is the default."""
        distinct: dict[tuple[str, ...], Tried] = {}
        for one in self.trials:
            if one.value is not None and not one.control and one.overrides:
                distinct.setdefault(one.overrides, one)
        return [*distinct.values()][:count]

    @property
    def sentences(self) -> list[str]:
        """What was found, what it cost, and what the confirmation says."""
        done = sum(one.value is not None for one in self.trials)
        seconds = duration(sum(one.seconds for one in self.trials))
        lines = [
            f"{len(self.trials)} trials, {done} to the top rung; they cost {self.cost:.1f} whole trainings "
            f"({seconds} on one thread each)."
        ]
        lines += [
            f"{self.trials[0].name} is first: {' '.join(self.trials[0].overrides) or 'the config as it is'}"
        ]
        lines += [f"{arm}: {one['text']}" for arm, one in self.verdicts.items()]
        if self.verdicts and all(one["verdict"] != "better" for one in self.verdicts.values()):
            lines.append("Nothing that was confirmed beats the default.")
        return lines


def rows_of(found: Found, most: int = SHOWN) -> list[tuple[str, str, str, str]]:
    """Name, value, steps and changes of the first trials."""
    return [
        (one.name, value_text(one, found.plays), f"{one.steps:,}", " ".join(one.overrides) or "none")
        for one in found.trials[:most]
    ]


def value_text(one: Tried, plays: bool) -> str:
    """Success as "7/8 (88 %)", or the error of the last rung."""
    if one.success is not None:
        k, n = one.success
        return f"{k}/{n} ({percent(k / n)})"
    if one.refused:
        return "refused"
    last = one.rungs.get(max(one.rungs, default=0))
    return "diverged" if last is None else f"error {-last:.4g}"

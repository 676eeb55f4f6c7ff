"""GR00T's meta/modality.json: names of slices of the state and the action, of cameras, and of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutti.data.conventions.config import ConventionsConfig, MotionConfig, MotionKind, RotationConfig
from tutti.data.conventions.rotations import RotationForm, size_of
from tutti.data.conventions.usual import ROTATIONS, is_hand
from tutti.data.episodes import VECTORS, Vector
from tutti.data.formats.errors import data_error
from tutti.data.formats.interface import MAX_DIM
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.features import Feature
from tutti.storage.reading import read_json, shown

TEXT_COLUMN = "task_index"
_DESCRIPTION = "task_description"
"""What the name of the annotation has in it that is the instruction; others are words such as "valid"."""
_KEYS, _LONGEST = ("state", "action", "video", "annotation"), 200
WHOLE: Mapping[Vector, str] = {"state": STATE, "action": ACTION}
"""The features that slices are of unless they say another."""
TOLD = "by meta/modality.json"
GUESSED: Mapping[MotionKind, str] = {
    "absolute": "guessed: the actions are near to the states of the next rows",
    "delta": "guessed: the actions are near to the changes of the state",
}
LOOKED_AT, FEWEST = 20_000, 20
"""Rows whose numbers are looked at, about, and those that it takes."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The numbers of a data set, and behind which rows the next one of the same episode lies."""

    states: Float32[np.ndarray, "n s"]
    actions: Float32[np.ndarray, "n a"]
    followed: Bool[np.ndarray, " n"]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    original_key: str | None = Field(None, max_length=_LONGEST)


class _Slice(_Entry):
    """The numbers [start, end) of a vector."""

    start: int = Field(ge=0)
    end: int = Field(gt=0, le=MAX_DIM)
    absolute: bool | None = None
    rotation_type: str | None = Field(None, max_length=40)

    @property
    def form(self) -> RotationForm | None:
        """That of a rotation; None for what is none, or is not read."""
        form = ROTATIONS.get(self.rotation_type or "")
        return form if form and size_of(form) == self.end - self.start else None

    @property
    def unit(self) -> str:
        """What a number of it is, as far as it is told."""
        told = (self.rotation_type, "relative" if self.absolute is False else None)
        return ", ".join(filter(None, told))


@dataclass(frozen=True, slots=True)
class _Part:
    """A slice, and its place in a vector that it is a part of."""

    name: str
    place: range
    said: _Slice

    @property
    def stem(self) -> str:
        """What state and action have in common: GR00T also calls changes "end_effector_position_relative"."""
        return self.name.removesuffix("_relative")


class Slice(Feature):
    """Some numbers of the feature `column`, from `start` on, under a name of their own."""

    column: str
    start: int


class Modality(BaseModel):
    """What is read of modality.json; `text` is the annotation that a source chose, if any."""

    model_config = ConfigDict(strict=True)

    state: dict[str, _Slice] = Field(default_factory=dict, max_length=1000)
    action: dict[str, _Slice] = Field(default_factory=dict, max_length=1000)
    video: dict[str, _Entry] = Field(default_factory=dict, max_length=1000)
    annotation: dict[str, _Entry] = Field(default_factory=dict, max_length=1000)
    text: str = ""

    def features(self, known: Mapping[str, Feature], what: str, whole: str) -> dict[str, Feature]:
        """The features of info.json, and beside them each slice of `what` ("state", "action") under its name:
        "left_arm", and as GR00T writes it "state.left_arm". `whole` is the vector that slices are of unless
        they say another; where its numbers have no names they get those of the slices.

        Raises: UserError for a slice that leaves its vector.
        """
        found: dict[str, Feature] = dict(known)
        names: dict[int, tuple[str, str]] = {}
        for name, part in getattr(self, what).items():
            column, width = part.original_key or whole, part.end - part.start
            size = known[column].shape if column in known else [0]
            if len(size) != 1 or not 0 < width <= part.end <= size[0]:
                raise data_error(
                    f"meta/modality.json: {what}.{name} is [{part.start}:{part.end}) of {column!r}.",
                    expected=f"numbers of a vector, which is {size} in meta/info.json",
                    cure="correct start, end and original_key.",
                )
            labels = [name] if width == 1 else [f"{name}[{place}]" for place in range(width)]
            units = [part.unit] * width
            for key in {name, f"{what}.{name}"} - known.keys():
                found[key] = Slice(
                    dtype=known[column].dtype,
                    shape=[width],
                    names=labels,
                    units=units,
                    column=column,
                    start=part.start,
                )
            if column == whole:
                names |= {part.start + place: (label, part.unit) for place, label in enumerate(labels)}
        if whole in known and names and not known[whole].names:
            size = known[whole].shape[0]
            told = [names.get(place, (f"{what}[{place}]", "")) for place in range(size)]
            given = {"names": [label for label, _ in told], "units": [unit for _, unit in told]}
            found[whole] = known[whole].model_copy(update=given)
        return found

    def camera(self, view: str) -> str:
        """The feature that a view's name stands for: itself where it is no name of a video here."""
        entry = self.video.get(view.removeprefix("video."))
        return (entry and entry.original_key) or view

    @property
    def text_column(self) -> str:
        """The column that says which of the tasks is the instruction of a row: of the annotations the chosen
        one, else a task's description."""
        for name in (self.text, *self.annotation):
            if name == self.text != "" or _DESCRIPTION in name:
                return self.annotation[name].original_key or f"annotation.{name}"
        return TEXT_COLUMN

    def reading(self, text: str) -> Modality:
        """The same with another annotation, by its name or column, as the instruction. Raises: UserError."""
        for name, entry in self.annotation.items():
            if text in (name, f"annotation.{name}", entry.original_key):
                return self.model_copy(update={"text": name})
        there = ", ".join(self.annotation) or "no annotation in meta/modality.json"
        cure = "leave sources.text out, or name one of these."
        raise data_error(f"sources.text: {text!r:.200} is no annotation.", found=there, cure=cure)

    def conventions(
        self,
        keys: Mapping[Vector, Sequence[str]],
        features: Mapping[Vector, Mapping[str, Feature]],
        rows: Rows | None = None,
    ) -> tuple[ConventionsConfig, dict[str, str], str]:
        """What it tells of the state and the action that these features are, by what each thing is told, and
        why the motion is not.

        Rotations are those of a `rotation_type` that is read. What moves the robot are the slices of the
        action that the state has too, but for grippers: targets where they are `absolute`, changes where they
        are not, unless the numbers of `rows` contradict. Where it is not said these tell.
        """
        parts = {what: self._parts(what, keys[what], features[what]) for what in VECTORS}
        said: dict[str, dict[str, Any]] = {
            what: {
                "rotation": tuple(
                    RotationConfig(dimensions=_span([one.place]), form=one.said.form)
                    for one in some
                    if one.said.form
                )
            }
            for what, some in parts.items()
        }
        by = {f"{what}.rotation": TOLD for what, one in said.items() if one["rotation"]}
        of_state, why = {one.stem: one for one in parts["state"]}, ""
        named = [one for one in parts["action"] if one.stem in of_state and not is_hand(one.name)]
        if moving := [(one, of_state[one.stem]) for one in named]:
            kind, how, why = _kind_of(moving, rows)
            if kind:
                spans = (_span([one.place for one in side]) for side in zip(*moving, strict=True))
                said["action"]["motion"] = MotionConfig(
                    kind=kind, **dict(zip(("dimensions", "state"), spans, strict=True))
                )
                by["action.motion"] = how
        return ConventionsConfig.model_validate(said), by, why

    def _parts(self, what: Vector, keys: Sequence[str], features: Mapping[str, Feature]) -> list[_Part]:
        """The slices of some features that are joined, in order."""
        found, begin = list[_Part](), 0
        slices = sorted(getattr(self, what).items(), key=lambda one: one[1].start)
        for key in keys:
            for name, one in slices:
                if isinstance(features[key], Slice) and key in (name, f"{what}.{name}"):
                    found.append(_Part(name, range(begin, begin + one.end - one.start), one))
                elif key == (one.original_key or WHOLE[what]):
                    found.append(_Part(name, range(begin + one.start, begin + one.end), one))
            begin += features[key].shape[0]
        return found

    def describe(self) -> str:
        """What it names, in a sentence for the user; empty where there is no modality.json."""
        parts = [
            f"{what}: "
            + ", ".join(
                f"{name} [{one.start}:{one.end})" + f" ({one.unit})" * bool(one.unit)
                for name, one in getattr(self, what).items()
            )
            for what in ("state", "action")
            if getattr(self, what)
        ]
        if self.video:
            parts.append("views: " + ", ".join(self.video))
        return shown(f"meta/modality.json names {'; '.join(parts)}", 1500, quoted=False) if parts else ""


def read_modality(folder: Path) -> Modality:
    """What `folder/meta/modality.json` says; nothing where there is no such file. Raises: UserError."""
    path = folder / "meta" / "modality.json"
    if not path.exists():
        return Modality()
    try:
        values = read_json(path, finite=True, links=True)
        return Modality.model_validate({key: values[key] for key in _KEYS if key in values})
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{path}: {shown('.'.join(map(str, first['loc'])), quoted=False)} is wrong."
        raise data_error(problem, expected=first["msg"], found=shown(first["input"])) from None


def _span(places: Sequence[range]) -> str:
    return f"{places[0].start}-{places[-1].stop - 1}"


def _misfit(moving: Sequence[tuple[_Part, _Part]]) -> str:
    """Why the slices of the action are not those of the state, in one run; empty if they are."""
    names = ", ".join(action.name for action, _ in moving)
    for side in zip(*moving, strict=True):
        if any(before.place.stop != after.place.start for before, after in pairwise(side)):
            return f"{names} do not lie one behind the other, in state and action alike"
    for action, state in moving:
        if any(one.said.rotation_type and not one.said.form for one in (action, state)):
            return f"{action.name} is a rotation in a form that is not read"
        plain, alike = (action.said.form, state.said.form).count(None), len(action.place) == len(state.place)
        if plain == 1 or (plain and not alike):
            return f"{action.name} has other numbers in the state than in the action"
    absolute = {action.said.absolute for action, _ in moving}
    return f"absolute is true, false or not said among {names}" if len(absolute) > 1 else ""


def _kind_of(moving: Sequence[tuple[_Part, _Part]], rows: Rows | None) -> tuple[MotionKind | None, str, str]:
    """Whether these slices of the action are targets for those of the state, or changes of them; how that is
    known; and why it is not."""
    if why := _misfit(moving):
        return None, "", why
    names, absolute = ", ".join(action.name for action, _ in moving), moving[0][0].said.absolute
    found = None if rows is None else _kind_by_numbers(moving, rows)
    if absolute is None:
        why = f"absolute is not said of {names}" + ", nor do the numbers tell" * (rows is not None)
        return (found, GUESSED[found], "") if found else (None, "", why)
    kind: MotionKind = "absolute" if absolute else "delta"
    # A change in other units than the state's would become another target.
    if rows is not None and (kind == "delta") != (found == "delta"):
        return None, "", f"{names}: {kind} by `absolute`, but not in units of the state by the numbers"
    return kind, TOLD, ""


def _kind_by_numbers(moving: Sequence[tuple[_Part, _Part]], rows: Rows) -> MotionKind | None:
    """Targets are near to the state of the next row, changes near to how it differs from that of their own:
    by medians over rows, three times as near as the other, and half of what the actions vary."""
    plain = [pair for pair in moving if not pair[0].said.form]
    here, there = (
        ([n for one in side for n in one.place] for side in zip(*plain, strict=True)) if plain else ([], [])
    )
    at = np.flatnonzero(rows.followed)
    at = at[:: max(1, len(at) // LOOKED_AT)]
    action, now, then = (
        values.astype(np.float64)
        for values in (rows.actions[at][:, here], rows.states[at][:, there], rows.states[at + 1][:, there])
    )
    known = np.isfinite(np.hstack([action, now, then])).all(axis=1)
    if not here or known.sum() < FEWEST:
        return None
    action, now, then = action[known], now[known], then[known]

    def middle(values: np.ndarray) -> float:
        return float(np.median(np.abs(values), axis=0).sum())

    off: dict[MotionKind, float] = {"absolute": middle(action - then), "delta": middle(action - (then - now))}
    varies: dict[MotionKind, float] = {
        "absolute": middle(action - np.median(action, axis=0)),
        "delta": middle(action),
    }
    near, far = sorted(off, key=lambda kind: off[kind])
    return near if 3 * off[near] <= off[far] and 2 * off[near] < varies[near] else None


def columns_of(features: Mapping[str, Feature], keys: Iterable[str]) -> dict[str, int]:
    """The columns of the data files that hold these features, each with its numbers in a row."""
    parts = ((key, features[key]) for key in keys)
    return {column: features[column].shape[0] for column in (_column(part, key) for key, part in parts)}


def part_of(
    feature: Feature, key: str, columns: Mapping[str, Float32[np.ndarray, "n _"]]
) -> Float32[np.ndarray, "n d"]:
    """The numbers of a feature in the columns of the data files."""
    start = feature.start if isinstance(feature, Slice) else 0
    return columns[_column(feature, key)][:, start : start + feature.shape[0]]


def _column(feature: Feature, key: str) -> str:
    return feature.column if isinstance(feature, Slice) else key

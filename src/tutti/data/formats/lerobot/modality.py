"""GR00T's meta/modality.json: names of slices of the state and the action, of cameras, and of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutti.data.formats.errors import data_error
from tutti.data.formats.interface import MAX_DIM
from tutti.data.formats.lerobot.features import Feature
from tutti.storage.reading import read_json, shown

TEXT_COLUMN = "task_index"
_DESCRIPTION = "task_description"
"""What the name of the annotation has in it that is the instruction; others are words such as "valid"."""
_KEYS, _LONGEST = ("state", "action", "video", "annotation"), 200


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
    def unit(self) -> str:
        """What a number of it is, as far as it is told."""
        told = (self.rotation_type, "relative" if self.absolute is False else None)
        return ", ".join(filter(None, told))


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

"""Finds the episodes in HDF5 files: which layout they have, where each lies, and what it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutti.data.formats.errors import data_error
from tutti.data.formats.hdf5.attributes import FileFacts, read_facts
from tutti.data.formats.hdf5.files import Array, HDF5File, OpenFiles
from tutti.data.formats.hdf5.layouts import EXPECTED, LAYOUTS, Layout, vector
from tutti.data.formats.hdf5.paths import by_number
from tutti.data.formats.interface import MAX_DIM, MAX_EDGE, Feature
from tutti.data.formats.pictures import picture_size
from tutti.errors import UserError
from tutti.storage.reading import shown

_DEMO = re.compile(r"demo_(\d{1,18})")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an episode lies: the number of its file, and its group; "" where it is the whole file. One whose
    steps cannot be counted has none, and says why when it is read."""

    file: int
    group: str
    length: int
    damage: UserError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What all episodes have in common: that of the first one that has actions, in the file `path`.

    `clock` is the vector that counts the steps; `passed_over` is neither picture nor vector.
    """

    path: Path
    layout: Layout
    facts: FileFacts
    features: Mapping[str, Feature]
    passed_over: tuple[str, ...]
    clock: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """The episodes of some files, and those that each filter of robomimic names, such as mask/train."""

    contents: Contents
    places: tuple[Place, ...]
    masks: Mapping[str, list[int]]


def read_index(files: OpenFiles) -> Index:
    """Opens every file once. Raises: UserError if the first is none of a known layout, no episode can be
    read, a file of many episodes cannot be opened, or a file was recorded otherwise than the first."""
    contents: Contents | None = None
    places: list[Place] = []
    masks: dict[str, list[int]] = {}
    for number in range(len(files.paths)):
        try:
            with files.use(number) as file:
                groups = list(_episodes(file))
                contents = contents or _contents(file, groups)
                contents.facts.check_same(read_facts(file, contents.layout), contents.path, file.path)
                for name, chosen in _masks(file, groups).items():
                    masks.setdefault(name, []).extend(len(places) + place for place in chosen)
                places += [_place(file, number, group, contents.clock) for group in groups]
        except UserError as error:
            if contents is None or not contents.layout.episodes:
                places.append(Place(number, "", 0, error))
            else:
                raise
        # How many episodes a file has that cannot be opened is known only where each is one.
        first = places[0].damage if places else None
        if first and contents and contents.layout.episodes and not places[0].group:
            raise first
    if contents is None or not any(place.length for place in places):
        raise next(place.damage for place in places if place.damage)
    return Index(contents=contents, places=tuple(places), masks=masks)


def _contents(file: HDF5File, groups: Sequence[str]) -> Contents:
    layout = _layout_of(file, groups[0])
    first = next((one for one in groups if file.has(join(one, layout.action))), groups[0])
    facts = read_facts(file, layout)
    features, passed_over = _features(file, first, layout, facts.controller)
    vectors = (key for key, feature in features.items() if feature.kind == "vector")
    return Contents(
        path=file.path,
        layout=layout,
        facts=facts,
        features=features,
        passed_over=tuple(passed_over),
        clock=layout.action if layout.action in features else next(vectors),
    )


def _place(file: HDF5File, number: int, group: str, clock: str) -> Place:
    try:
        array = file.array(join(group, clock))
        if not array.shape[0]:
            raise array.error("at least one step", "none")
        return Place(number, group, array.shape[0], None)
    except UserError as error:
        return Place(number, group, 0, error)


def join(group: str, key: str) -> str:
    return f"{group}/{key}" if group else key


def _episodes(file: HDF5File) -> Iterator[str]:
    """The groups of the episodes of a file. Raises: UserError if it has none."""
    for home in dict.fromkeys(layout.episodes for layout in LAYOUTS if layout.episodes):
        demos = [name for name in file.names(home) if _DEMO.fullmatch(name)]
        if demos:
            yield from (join(home, name) for name in sorted(demos, key=by_number))
            return
    if not any(file.has(mark) for layout in LAYOUTS if not layout.episodes for mark in layout.marks):
        found = ", ".join(file.names("")[:20]) or "an empty file"
        cure = "convert it to one of these, or to LeRobotDataset v3.0."
        raise data_error(f"{file.path}: no episodes.", expected=EXPECTED, found=found, cure=cure)
    yield ""


def _layout_of(file: HDF5File, group: str) -> Layout:
    """The first layout that has the episode where it lies, and one of whose marks is there."""
    for layout in LAYOUTS:
        if bool(layout.episodes) == bool(group) and any(file.has(join(group, mark)) for mark in layout.marks):
            return layout
    found = ", ".join(file.names(group)[:20]) or "an empty group"
    raise data_error(f"{file.path}: {group} is no episode.", expected=EXPECTED, found=found)


def _features(
    file: HDF5File, episode: str, layout: Layout, controller: str
) -> tuple[dict[str, Feature], list[str]]:
    """The features of an episode by their keys, pictures first; and what is neither picture nor vector.

    Raises: UserError if there is no vector, by which the steps are counted.
    """
    pictures: dict[str, Feature] = {}
    vectors: dict[str, Feature] = {}
    passed_over: list[str] = []
    for group in dict.fromkeys((*layout.groups, layout.pictures)):
        for name in file.names(join(episode, group)):
            key = join(group, name)
            if key in layout.without_steps:
                continue
            if (found := file.kind(join(episode, key))) is None:
                continue
            shape, dtype = found
            home = group == layout.pictures
            if home and layout.encoded and is_encoded(shape, dtype):
                pictures[key] = Feature(kind="picture", shape=_encoded_size(file.array(join(episode, key))))
            elif home and len(shape) == 4 and shape[3] == 3 and dtype == np.uint8:
                if max(shape[1:]) > MAX_EDGE or not all(shape[1:]):
                    raise data_error(f"{file.path}: {key} has pictures of {shape[1:3]} pixels.")
                pictures[key] = Feature(kind="picture", shape=shape[1:3])
            elif len(shape) in (1, 2) and dtype.kind in "biuf" and 0 < (shape[1:] or (1,))[0] <= MAX_DIM:
                vectors[key] = vector(key, (shape[1:] or (1,))[0], controller)
            else:
                passed_over.append(f"{key} {shape} {dtype}")
    if not vectors:
        raise data_error(f"{file.path}: {episode or 'it'} has no vectors.", expected=EXPECTED)
    return pictures | vectors, passed_over


def is_encoded(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> bool:
    """(T, bytes), or T texts of a fixed size."""
    return (len(shape) == 2 and dtype == np.uint8) or (len(shape) == 1 and dtype.kind == "S")


def _encoded_size(array: Array) -> tuple[int, int]:
    """Height and width of the first picture."""
    try:
        if not array.shape[0]:
            raise ValueError("there is none")
        return picture_size(array.read(0, 1)[0].tobytes())
    except UserError:
        raise
    except Exception as error:  # Pillow raises whatever damaged bytes lead to
        why = shown(str(error), 300, quoted=False)
        raise data_error(f"{array.path}: the first picture of {array.key} cannot be read: {why}.") from error


def _masks(file: HDF5File, groups: Sequence[str]) -> dict[str, list[int]]:
    """The filters of robomimic, such as mask/train: the places of the episodes that each names, in order."""
    found: dict[str, list[int]] = {}
    for name in file.names("mask"):
        key, places = f"mask/{name}", {group.rpartition("/")[2]: place for place, group in enumerate(groups)}
        if (kind := file.kind(key)) is None or len(kind[0]) != 1 or kind[1].kind != "S":
            continue
        named: Iterable[bytes] = file.array(key).read(0, kind[0][0]).tolist()
        chosen = {places.get(one.decode("utf-8", "replace")) for one in named}
        found[key] = sorted(place for place in chosen if place is not None)
    return found

"""Each kind of damage to a data set by itself, always the same one: refused by one message, never taken."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import damaged_sets
import numpy as np
import pytest
from damaged_sets import EDGE, LENGTHS, VIEWS, Case, write_sound
from independent_reader import DATA, EPISODES

from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.types import UserError

LONGEST_MESSAGE = 4000
REFUSED: dict[str, dict[str, list[tuple[Any, ...]]]] = {
    "image": {
        "times": [
            *(
                ("zero",),
                ("reversed",),
                ("swapped",),
                ("one", 1),
                ("late", 1),
                ("late", 0.3),
                ("scaled", 1.5),
            ),
            *(("nan",), ("inf",), ("huge",), ("negative",), ("all", 1.0)),
        ],
        "fps": [(5,), (20,), (0.5,), (True,), (1e18,), (1e308,), (1e-300,), (0,), ("10",), (10**300,), ({},)],
        "texts": [
            *(("odd", None), ("odd", ""), ("odd", "\t\n"), ("odd", 7), ("odd", ["a"]), ("odd", 1.5)),
            *(("odd", b"\xff\xfe"), ("odd", "x" * 4097), ("swapped",), ("equal",), ("longer", "!")),
            *(
                ("index", [0, 0, 2]),
                ("index", ["0", "1", "2"]),
                ("names", "task_index"),
                ("episodes", ["another"]),
            ),
        ],
        "task_index": [
            *(("zero",), ("reversed",), ("one",), ("episode",), ("range", 2**40), ("null",), ("type", str)),
            ("swap",),
        ],
        "rows": [
            (kind, without)
            for kind in ("reversed", "swapped", "rolled", "shuffled", "twice", "episodes")
            for without in ((), ("index",))
        ],
        "borders": [(step, lengths, 1, 1) for step in (-1, 1) for lengths in (0, 1)],
        "counts": [
            *(("totals", "total_frames", value) for value in (0, 10**9, 2**63, "4", True)),
            *(
                ("frame_index", 1),
                ("index", 1),
                ("episode_index", 1),
                ("length", 1),
                ("columns", "task_index"),
            ),
        ],
        "flipped": [(DATA, "cut"), (EPISODES, "empty"), ("meta/info.json", "lost"), (DATA, "lost")],
        "numbers_wrong": [("action", value) for value in (np.nan, np.inf, 1e300, None, "short", "null")],
        "picture": [
            *(("I;16",), ("float",), ("RGBA",), ("LA",), ("P",), ("L",), ("1",), ("CMYK",), ("grey jpeg",)),
            *(("GIF",), ("BMP",), ("TIFF",), ("PPM",), ("TGA",), ("ICO",), ("16 bit RGB",)),
            *(("turned",), ("small",), ("eps",), ("empty",), ("text",), ("svg",), ("cut",), ("null",)),
        ],
        "picture_column": [(kind,) for kind in ("text", "numbers", "lists", "none", "null", "paths")],
        "outside": [("up",), ("absolute",), ("dots",), ("format",)],
        "pattern": [
            *(("{chunk_index:0999999999d}",), ("{file_index:>1500000000}",), ("{x.foo}",), ("{x[0]}",)),
            *(("x" * 5000,), ("{",), ("{0}",), ("data/\x00.parquet",), (["data"],)),
        ],
        "sizes": [
            (key, shape)
            for key, shapes in {
                "action": ([2**31], [10**12], [0], [-1], [True], "3", [], [[3]]),
                VIEWS[0]: ([65535, 65535, 3], [10**6, 10**6, 3], [-1, 16, 3], [10**10, 2, 3], [16, 20, 4]),
            }.items()
            for shape in shapes
        ],
        "bomb": [
            *(("text", 10**6), ("png",), ("list", 10**6), ("frames",), ("picture", 10**7)),
            *(("info", "[" * 10**6), ("info", '{"fps": ' + "9" * 10**6 + "}")),
        ],
        "devices": [
            *((DATA, kind) for kind in ("fifo", "zero", "folder", "loop", "sparse", "dangling")),
            *(("meta/info.json", kind) for kind in ("fifo", "zero", "folder", "sparse")),
        ],
        "features": [
            *(
                ("odd", "action", 7),
                ("odd", VIEWS[0], {"dtype": "image"}),
                ("name", "observation.images.a/b"),
            ),
            *(
                ("whole", []),
                ("version", "v2.1"),
                ("version", None),
                ("robot", {}),
                ("twice", "fps"),
                ("deep",),
            ),
        ],
    },
    "video": {
        "times": [("zero",), ("reversed",), ("swapped",), ("one", 1), ("late", 1), ("nan",)],
        "spans": [
            *(
                (1, "early"),
                (-1, "early"),
                (1, "both"),
                (-1, "both"),
                (1, "swapped"),
                (1, "zero"),
                (1, "end", 2),
            ),
            *((1, "nan", np.nan), (1, "nan", 1e300), (1, "half"), (1, "past"), (1, "types", "x")),
        ],
        "fps": [(5,), (0.5,), (True,), (1e-300,)],
        "outside": [(1, "up"), (1, "absolute"), (1, "dots"), (0, "camera")],
        "videos": [(kind,) for kind in ("hls", "concat", "sdp", "empty", "text", "cut", "lost")],
    },
}


@dataclass
class Chosen(Case):
    """A case whose dice are told how to fall; what is not told is drawn."""

    told: list[Any] = field(default_factory=list)

    def pick(self, *values: Any) -> Any:
        fitting = [v for v in values if self.told and repr(v) == repr(self.told[0])]
        if fitting:
            self.told.pop(0)
            return fitting[0]
        return super().pick(*values)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sound")
    for storage in ("image", "video"):
        write_sound(home / storage, storage)
    return {storage: home / storage for storage in EDGE}


def read(folder: Path) -> list[Any]:
    """All that a training would read."""
    store = LeRobotStore(folder)
    pictures = [store.frames(view, np.arange(sum(LENGTHS))) for view in store.spec.views]
    return [store.states, store.actions, store.instruction_of, store.instructions, *pictures]


@pytest.mark.filterwarnings("ignore:Image size", "ignore:overflow")
@pytest.mark.parametrize(
    ("storage", "rule", "told"),
    [
        pytest.param(storage, rule, told, id=f"{storage}-{rule}-{'-'.join(f'{one!s:.12}' for one in told)}")
        for storage, rules in REFUSED.items()
        for rule, kinds in rules.items()
        for told in kinds
    ],
)
def test_it_is_refused(
    storage: str, rule: str, told: tuple[Any, ...], sound: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(sound[storage], tmp_path / "set")
    case = Chosen(folder, np.random.default_rng(1), storage, tmp_path / "outside", told=list(told))
    getattr(damaged_sets, f"_{rule}")(case)
    assert case.told == []  # all of it was asked for
    if rule == "texts" and told[0] == "odd":  # they would contradict the table of instructions
        case.columns(EPISODES, tasks=None)
    opened = {path: path.stat().st_atime_ns for path in case.reads}
    with pytest.raises(UserError) as caught:
        read(folder)
    assert len(str(caught.value)) < LONGEST_MESSAGE
    assert {path: path.stat().st_atime_ns for path in opened} == opened


def test_no_flipped_bit_changes_what_is_read(sound: dict[str, Path], tmp_path: Path) -> None:
    expected = read(sound["image"])
    refused = 0
    for seed in range(60):
        folder = shutil.copytree(sound["image"], tmp_path / str(seed))
        told = [DATA, "bit"]
        damaged_sets._flipped(
            Chosen(folder, np.random.default_rng(seed), "image", tmp_path / "outside", told=told)
        )
        try:
            found = read(folder)
        except UserError:
            refused += 1
            continue
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)
    assert refused > 0

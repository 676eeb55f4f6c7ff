"""Damaged and hostile Zarr stores: one message with store, array and cure; nothing is run."""

from __future__ import annotations

import json
import pickle
import resource
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import zarr_sets as sets
from tutti.data.formats.zarr.reader import ZarrReader
from tutti.data.sources import SourceConfig
from tutti.errors import UserError

MOST_BYTES, LONGEST_MESSAGE = 400 * 2**20, 2500


def read_everything(path: Path) -> None:
    source = {"path": str(path), "text": {"say": "push"}, "fps": 10, "format": "zarr"}
    store = SourceConfig.model_validate(source).open()
    for view in store.spec.views:
        store.frames(view, np.arange(store.spec.num_frames))
    assert store.fingerprint


def refusal(path: Path) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read_everything(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
    text = str(caught.value)
    assert len(text) < LONGEST_MESSAGE and path.name in text and "cure:" in text.lower(), text
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sets.write(tmp_path / "set.zarr", sets.diffusion())


DESCRIPTIONS: dict[str, Any] = {
    "format 3": {"zarr_format": 3},
    "objects": {"dtype": "|O"},
    "objects by pickle": {"dtype": "|O", "filters": [{"id": "pickle"}]},
    "pickle as filter": {"filters": [{"id": "pickle"}]},
    "pickle as compressor": {"compressor": {"id": "pickle"}},
    "an unknown compressor": {"compressor": {"id": "mine"}},
    "a compressor without name": {"compressor": {"level": 3}},
    "a compressor that is a list": {"compressor": [1]},
    "texts": {"dtype": "<U9"},
    "a struct": {"dtype": [["a", "<f4"]]},
    "times": {"dtype": "<M8[ns]"},
    "a dtype of megabytes": {"dtype": "<f" + "4" * 100_000},
    "no shape": {"shape": None},
    "a negative shape": {"shape": [-1, 2]},
    "half a row": {"shape": [1.5, 2]},
    "true rows": {"shape": [True, 2]},
    "no axes": {"shape": [], "chunks": []},
    "many axes": {"shape": [15] + [1] * 40, "chunks": [4] + [1] * 40},
    "other axes of chunks": {"chunks": [4]},
    "empty chunks": {"chunks": [0, 1]},
    "huge chunks": {"chunks": [2**30, 2**30]},
    "huge rows": {"shape": [15, 2**39], "chunks": [15, 1]},
    "fewer rows": {"shape": [14, 2]},
    "more rows": {"shape": [16, 2]},
    "another order": {"order": "K"},
    "a separator that leaves": {"dimension_separator": "/../"},
    "another compressor than is used": {"compressor": None},
    "another type than is used": {"dtype": "<f8"},
    "wider than is stored": {"shape": [15, 9]},
}


@pytest.mark.parametrize("damage", DESCRIPTIONS)
def test_a_description_that_is_wrong_is_named(folder: Path, damage: str) -> None:
    path = folder / "data/action/.zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | DESCRIPTIONS[damage]))
    assert "data/action" in refusal(folder)


FILES: dict[str, Callable[[Path], object]] = {
    "no json": lambda folder: (folder / "data/action/.zarray").write_text("{"),
    "no utf-8": lambda folder: (folder / "data/action/.zarray").write_bytes(b"\xff"),
    "a list": lambda folder: (folder / "data/action/.zarray").write_text("[]"),
    "nested": lambda folder: (folder / "data/action/.zarray").write_text("[" * 100_000),
    "megabytes": lambda folder: (folder / "data/action/.zarray").write_bytes(bytes(2**21)),
    "no ends": lambda folder: (folder / "meta/episode_ends/.zarray").unlink(),
    "format 3": lambda folder: (folder / "zarr.json").write_text('{"zarr_format": 3}'),
    "a chunk that is missing": lambda folder: (folder / "data/action/2.1").unlink(),
    "a chunk of nothing": lambda folder: (folder / "data/action/2.1").write_bytes(b""),
    "a chunk of noise": lambda folder: (folder / "data/action/2.1").write_bytes(b"noise" * 9),
    "a pickle": lambda folder: (folder / "data/action/2.1").write_bytes(pickle.dumps([1])),
    "a chunk cut short": lambda folder: (folder / "data/img/0.0.0.0").write_bytes(
        (folder / "data/img/0.0.0.0").read_bytes()[:100]),
    "a bomb": lambda folder: (folder / "data/img/0.0.0.0").write_bytes(zlib.compress(bytes(2**29), 9)),
    "gigabytes as a chunk": lambda folder: (folder / "data/action/2.1").open("wb").truncate(2**33),
    "a folder as a chunk": lambda folder: (
        (folder / "data/action/2.1").unlink(), (folder / "data/action/2.1").mkdir()),
    "NaN in a picture": lambda folder: sets.write_array(
        folder / "data/img", np.full((15, *sets.SIZE, 3), np.nan, np.float32)),
    "pictures from 0 to 1": lambda folder: sets.write_array(
        folder / "data/img", np.full((15, *sets.SIZE, 3), 0.5, np.float32)),
    "pictures beyond bytes": lambda folder: sets.write_array(
        folder / "data/img", np.full((15, *sets.SIZE, 3), 300, np.float32)),
    "NaN as action": lambda folder: sets.write_array(
        folder / "data/action", np.full((15, 2), np.nan, np.float32)),
}  # fmt: skip


@pytest.mark.parametrize("damage", FILES)
def test_a_file_that_is_wrong_is_named(folder: Path, damage: str) -> None:
    FILES[damage](folder)
    refusal(folder)


@pytest.mark.parametrize(
    "ends",
    [[5, 5, 15], [8, 5, 15], [0, 5, 15], [-3, 5, 15], [5, 8, 14], [5, 8, 2**60], [], [5.0, 8.0, 15.0]],
    ids=str,
)
def test_ends_that_cannot_be_are_refused(folder: Path, ends: list[float]) -> None:
    sets.write_array(folder / "meta/episode_ends", np.array(ends, None if ends else np.int64))
    refusal(folder)


def test_a_damaged_zip_is_refused(folder: Path, tmp_path: Path) -> None:
    path = sets.zipped(folder, tmp_path / "a.zarr.zip", zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    for content in (b"", b"x" * 500, whole[: len(whole) // 2], whole[:-1], pickle.dumps([1] * 99)):
        path.write_bytes(content)
        refusal(path)
    random, refused = np.random.default_rng(0), 0
    for _ in range(40):
        changed = bytearray(whole)
        for place in random.integers(0, len(whole), 4):
            changed[place] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(changed)
        try:
            read_everything(path)
        except UserError as error:
            refused += 1
            assert path.name in str(error)
    assert refused > 10


def test_names_that_would_leave_a_zip_are_names_alone(folder: Path, tmp_path: Path) -> None:
    path = sets.zipped(folder, tmp_path / "a.zarr.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../out", b"x")
        archive.writestr("data/../.zarray", b"{}")
        archive.writestr("/etc/x/.zarray", b"{}")
    with pytest.raises(UserError, match=r"data/\.\.: "):
        ZarrReader(path)
    assert not (tmp_path.parent / "out").exists()

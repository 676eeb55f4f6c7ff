"""A whole run with each kind of frame cache: the same bits where it says so, after a resume too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_same_data import config_of

from fixtures import squares_data
from tutti import pipeline
from tutti.config.run_config import RunConfig
from tutti.data.cache import choice
from tutti.storage.reading import read_json
from tutti.types import UserError

LAST = "checkpoints/step-000004"


def of_kind(home: Path, kind: str, **cache: object) -> RunConfig:
    given = config_of(home / "data")
    values = given.data.cache.model_dump() | {"kind": kind, "folder": home / "cache", **cache}
    data = type(given.data).model_validate(given.data.model_dump() | {"cache": values})
    return given.model_copy(update={"data": data})


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / LAST).glob("*.safetensors"))}


def interrupt(run: Path, copy: Path) -> Path:
    """A copy of a run as a kill after step 2 leaves it."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / LAST)
    book = read_json(copy / "stages.json")
    book["train"]["finished"] = False
    (copy / "stages.json").write_text(json.dumps(book))
    return copy


def test_runs_without_a_cache_and_of_jpeg_resume_to_their_bits_and_none_gives_those_of_raw(
    tmp_path: Path,
) -> None:
    squares_data.write(tmp_path / "data", squares_data.episodes(6))
    pipeline.train(of_kind(tmp_path, "raw"), tmp_path / "raw")
    for kind in ("none", "jpeg"):
        pipeline.train(of_kind(tmp_path, kind), tmp_path / kind)
        again = interrupt(tmp_path / kind, tmp_path / f"{kind} again")
        pipeline.train(of_kind(tmp_path, kind, threads=2, memory=1), again)
        assert weights(again) == weights(tmp_path / kind) != {}
    assert weights(tmp_path / "none") == weights(tmp_path / "raw") != weights(tmp_path / "jpeg")
    with pytest.raises(UserError, match=r"made with another config[\s\S]*data\.cache\.kind.*jpeg.*none"):
        pipeline.train(of_kind(tmp_path, "none"), tmp_path / "jpeg")
    with pytest.raises(UserError, match=r"data\.cache\.quality: 90 -> 50"):
        pipeline.train(of_kind(tmp_path, "jpeg", quality=50), tmp_path / "jpeg")


def test_a_resumed_run_takes_what_auto_chose_at_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares_data.write(tmp_path / "data", squares_data.episodes(6))
    monkeypatch.setattr(choice.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    pipeline.train(of_kind(tmp_path, "auto"), tmp_path / "run")
    assert read_json(tmp_path / "run" / "frame_cache.json") == {"kind": "none"}
    monkeypatch.undo()
    pipeline.train(of_kind(tmp_path, "auto"), interrupt(tmp_path / "run", tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(tmp_path / "run")
    assert not (tmp_path / "cache").exists(), "nothing was written"
    pipeline.train(of_kind(tmp_path, "auto"), tmp_path / "again", redo=True)
    assert read_json(tmp_path / "again" / "frame_cache.json") == {"kind": "raw"}

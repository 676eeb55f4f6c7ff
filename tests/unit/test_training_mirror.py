"""Checkpoints copied by fsspec: whole, verified, in the background; no failure stops a training."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fixtures.toy_training import Data, make_trainer
from tutti import pipeline
from tutti.config.run_config import RunConfig
from tutti.debug.replay import without_checkpoints
from tutti.debug.verify_resume import shorten
from tutti.distributed.world import ONE_PROCESS
from tutti.storage import manifest
from tutti.storage.checkpoint import checkpoints, find_checkpoint, verify
from tutti.training.checkpointing import Saver, mirror
from tutti.training.checkpointing.config import CheckpointsConfig
from tutti.training.checkpointing.mirror import copy_checkpoint
from tutti.types import UserError

URL = "memory://bucket/runs"


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(mirror, "PAUSE", 0.0)


def copies() -> dict[str, list[str]]:
    """The whole copies in the bucket, by the folder of their run."""
    found: dict[str, list[str]] = {}
    for path in sorted(list(MemoryFileSystem.store)):
        *_, run, step, name = path.split("/")
        if name == "state.json":
            found.setdefault(run, []).append(step)
    return found


def until(true: Callable[[], object], patience: float = 120.0) -> None:
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def copy_what_is_missing(run: Path) -> None:
    """As each training begins, and `tutti train` of a finished one."""
    with Saver(run, CheckpointsConfig(mirror=URL), ONE_PROCESS):
        pass


def written_to_the_store(patch: pytest.MonkeyPatch, losing: str = "") -> list[tuple[str, int]]:
    """File and bytes of each piece from now on; of each of the file `losing` the last byte is lost."""
    written: list[tuple[str, int]] = []
    real = MemoryFileSystem._open

    def opened(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        file: Any = real(self, path, mode, **options)
        name = Path(path).name
        if mode == "wb":
            whole = file.write

            def write(piece: bytes) -> int:
                written.append((name, len(piece)))
                return whole(piece[:-1] if name == losing else piece)

            file.write = write
            if "data" in options:
                written.append((name, len(options["data"])))
        return file

    patch.setattr(MemoryFileSystem, "_open", opened)
    return written


def test_checkpoints_are_copied_and_a_copy_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def wait(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == 15:
            until(copies)

    settings = {"mirror": URL, "every": 10}
    last = make_trainer(tmp_path / "run", checkpoints=settings, progress=wait).fit(Data())
    name = f"run-{(tmp_path / 'run' / 'tracking' / 'mirror.id').read_text()}"
    assert copies() == {name: ["step-000010", "step-000020"]}
    rescued = tmp_path / "rescued" / "checkpoints" / "step-000010"
    fsspec.filesystem("memory").get(f"/bucket/runs/{name}/step-000010", str(rescued), recursive=True)
    verify(find_checkpoint(tmp_path / "rescued"))
    again = make_trainer(tmp_path / "other", fork={"run": str(tmp_path / "rescued")}).fit(Data())
    for path in last.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_a_run_goes_on_in_its_folder_and_no_other_of_its_name_writes_there(tmp_path: Path) -> None:
    def train(home: str, **changes: Any) -> None:
        make_trainer(tmp_path / home / "run", checkpoints={"mirror": URL, "every": 0}, **changes).fit(Data())

    train("a")
    first = {path: bytes(file.getbuffer()) for path, file in MemoryFileSystem.store.items()}
    (name,) = copies()
    train("b", seed=1)  # another machine's, or this one's that has lost its disk
    train("a", steps=30)
    assert {path: bytes(MemoryFileSystem.store[path].getbuffer()) for path in first} == first
    (other,) = copies().keys() - {name}
    assert copies() == {name: ["step-000020", "step-000030"], other: ["step-000020"]}
    assert other.startswith("run-")


def test_a_slow_store_gets_the_newest_and_what_is_being_copied_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def slow(folder: Path, target: str) -> None:
        if folder.name == "step-000005":
            until((run / "checkpoints" / "step-000020").exists)
        copy_checkpoint(folder, target)

    monkeypatch.setattr(mirror, "copy_checkpoint", slow)
    make_trainer(run, checkpoints={"mirror": URL, "every": 5, "keep": 1}).fit(Data())
    ((_, steps),) = copies().items()
    assert {"step-000005", "step-000020"} <= {*steps} and "step-000010" not in steps


def test_a_store_that_fails_is_said_stops_no_training_and_gets_the_newest_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "tutti.training")
    run = tmp_path / "run"
    make_trainer(run, checkpoints={"mirror": "nowhere://bucket", "every": 0}).fit(Data())
    assert caplog.text.count("could not be copied to nowhere://bucket, it is tried again") == 2
    assert caplog.text.count("it has no copy there") == 1
    assert len(checkpoints(run)) == 1 and copies() == {}
    copy_what_is_missing(run)
    assert [*copies().values()] == [["step-000020"]]


def test_copies_that_the_end_did_not_wait_for_are_made_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, end = tmp_path / "run", threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "END_SECONDS", 0.01)
        patch.setattr(mirror, "copy_checkpoint", lambda folder, target: end.wait(60) and None)
        make_trainer(run, checkpoints={"mirror": URL, "every": 0}).fit(Data())
        end.set()
    assert "the same command makes it" in caplog.text and copies() == {}
    training = {"device": "cpu", "checkpoints": {"mirror": URL}}
    config = RunConfig.model_validate({"training": training, "data": {"sources": [{"path": str(tmp_path)}]}})
    monkeypatch.setattr(pipeline.RunFolder, "begin", lambda *_: False)  # it is finished
    monkeypatch.setattr(pipeline, "check_data", lambda *_: [])
    assert pipeline.train(config, run).name == "step-000020"
    assert [*copies().values()] == [["step-000020"]]


def test_what_is_read_back_is_compared_in_pieces_and_state_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_trainer(tmp_path / "run").fit(Data())
    store: Any = fsspec.filesystem("memory")
    with monkeypatch.context() as patch:
        written_to_the_store(patch, losing="model.safetensors")
        with pytest.raises(
            UserError, match=r"model\.safetensors: what was read back is not what was written"
        ):
            copy_checkpoint(folder, f"{URL}/a")
    assert not store.exists("/bucket/runs/a/state.json")

    monkeypatch.setattr(mirror, "PIECE", 1000)
    monkeypatch.setattr(manifest, "PIECE", 1000)
    written, read = written_to_the_store(monkeypatch), list[str]()
    whole = MemoryFileSystem.cat_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "cat_file",
        lambda self, path, *given: (read.append(path), whole(self, path, *given))[1],
    )
    copy_checkpoint(folder, f"{URL}/a")
    assert written[-1][0] == "state.json" and max(size for _, size in written[:-1]) == 1000
    assert {Path(path).name for path in read} == {"state.json"}
    listed = json.loads(store.cat_file("/bucket/runs/a/state.json"))
    assert listed == json.loads((folder / "state.json").read_text())
    written.clear()
    copy_checkpoint(folder, f"{URL}/a")  # whole already
    assert written == []
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        copy_checkpoint(folder, f"{URL}/b")


def test_a_copy_that_is_replaced_does_not_look_whole_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (make_trainer(tmp_path / str(seed), seed=seed).fit(Data()) for seed in (0, 1))
    store: Any = fsspec.filesystem("memory")
    copy_checkpoint(one, f"{URL}/a")
    with monkeypatch.context() as patch:
        written_to_the_store(patch, losing="optimizer.pt")
        with pytest.raises(UserError, match=r"optimizer\.pt"):
            copy_checkpoint(other, f"{URL}/a")
    assert store.exists("/bucket/runs/a/optimizer.pt") and not store.exists("/bucket/runs/a/state.json")
    copy_checkpoint(other, f"{URL}/a")
    store.get("/bucket/runs/a", str(tmp_path / "a"), recursive=True)
    verify(tmp_path / "a")
    assert (tmp_path / "a" / "state.json").read_bytes() == (other / "state.json").read_bytes()


def test_checks_of_a_training_are_copied_nowhere() -> None:
    config = RunConfig.model_validate({"training": {"checkpoints": {"mirror": URL}}})
    for checked in (shorten(config, 12)[0], without_checkpoints(config)):
        assert checked.training.checkpoints.mirror == "off"


def test_the_key_takes_addresses_alone() -> None:
    assert CheckpointsConfig(mirror="s3://bucket/runs").mirror == "s3://bucket/runs"
    for wrong in ("bucket", "/disk", "s3://", "S3://x"):
        with pytest.raises(ValueError, match="mirror"):
            CheckpointsConfig(mirror=wrong)

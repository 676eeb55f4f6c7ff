"""Checkpoints by all ranks, in a thread: what is taken is what is saved, and it is whole or absent."""

from __future__ import annotations

import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_training_checkpoint import file_size_limit
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from fixtures.checkpoints import load_latest
from fixtures.run_equality import content, leaves, unequal
from fixtures.toy_training import Data, make_trainer
from tutti.distributed.sharded_tensors import restore_tensors, strip_tensors
from tutti.distributed.world import ONE_PROCESS
from tutti.nested_dicts import merge
from tutti.storage import shards, tensors
from tutti.storage.checkpoint import Checkpoint, checkpoints, load, save, save_sharded
from tutti.training.checkpointing import saver as saving
from tutti.training.checkpointing.saver import Saver
from tutti.training.rng import rng_state
from tutti.types import UserError

MODES = [("whole", False), ("whole", True), ("sharded", False), ("sharded", True)]


def mode(form: str, background: bool) -> dict[str, Any]:
    return {"checkpoints": {"format": form, "background": background}}


def make(step: int) -> Checkpoint:
    moments = {0: {"step": torch.tensor(3.0), "momentum": torch.arange(6.0).view(2, 3)}, 1: {"count": 4}}
    return Checkpoint(
        step=step,
        tensors={"model": {"w": torch.full((3,), 0.1 * step), "scale": torch.tensor(2.0)}, "objective": {}},
        optimizer={"muon": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}},
        rng=rng_state(),
        state={"loader": {"position": step}},
        extra={"spec.json": "{}"},
    )


def test_a_state_is_taken_apart_and_put_together() -> None:
    state = {"muon": make(1).optimizer["muon"], "pairs": (torch.ones(2), [None, 3])}
    tensors: dict[str, Tensor] = {}
    frame = strip_tensors(state, "optimizer", tensors)
    assert sorted(tensors) == [
        *("optimizer/muon/state/0/momentum", "optimizer/muon/state/0/step"),
        "optimizer/pairs/0",
    ]
    assert not any(isinstance(leaf, Tensor) for leaf in leaves(frame).values())
    assert unequal(leaves(restore_tensors(frame, tensors)), leaves(state)) == []


def test_a_sharded_checkpoint_is_loaded_as_a_whole_one(tmp_path: Path) -> None:
    whole = load(save(tmp_path / "whole", make(7)))
    folder = save_sharded(tmp_path / "sharded", make(7), ONE_PROCESS)
    assert sorted(item.name for item in folder.iterdir()) == [
        *("optimizer.pt", "rng.pt", "shards", "spec.json", "state.json")
    ]
    sharded = load(folder)
    assert unequal(content(whole), content(sharded)) == []
    assert sharded.extra == whole.extra and sharded.step == 7
    assert {name.split("/")[0] for name in shards.index_of(folder / "shards")} == {"model", "optimizer"}


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "index.json"])
@pytest.mark.parametrize("how", ["shorter", "other", "gone"])
def test_damage_to_a_shard_is_found(tmp_path: Path, name: str, how: str) -> None:
    path = save_sharded(tmp_path, make(1), ONE_PROCESS) / "shards" / name
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "shorter" else bytes([data[0] ^ 1]) + data[1:])
    says = {"shorter": "truncated", "other": "checksum differs", "gone": "missing"}[how]
    with pytest.raises(UserError, match=rf"{name}: .*{says}.* Delete the folder .*step-000001 to"):
        load(path.parent.parent)


@pytest.mark.parametrize(("form", "background"), MODES)
def test_every_mode_saves_the_same_and_goes_on_to_the_same_bits(
    tmp_path: Path, form: str, background: bool
) -> None:
    settings: dict[str, Any] = {"steps": 12, "checkpoints": {"every": 4, "keep": 3}}
    make_trainer(tmp_path / "plain", **merge(settings, mode("whole", False))).fit(Data())
    make_trainer(tmp_path / "run", **merge(settings, mode(form, background))).fit(Data())
    folders = [checkpoints(tmp_path / name) for name in ("plain", "run")]
    assert [f.name for f in folders[0]] == [f.name for f in folders[1]] and len(folders[0]) == 3
    for one, other in zip(*folders, strict=True):
        assert unequal(content(load(one)), content(load(other))) == []

    for folder in folders[1][1:]:  # back to step 4, and on in the other format
        shutil.rmtree(folder)
    other_form = {"whole": "sharded", "sharded": "whole"}[form]
    make_trainer(tmp_path / "run", **merge(settings, mode(other_form, background))).fit(Data())
    last = load(folders[0][-1]), load(checkpoints(tmp_path / "run")[-1])
    assert unequal(*map(content, last)) == []


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_the_training_goes_on_while_a_checkpoint_is_written_and_what_is_written_is_of_its_step(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 9, "checkpoints": {"every": 3, "keep": 4}}
    settings |= {
        "optimizer": {"kind": "schedule_free"},
        "ema": "off",
        "schedule": {"kind": "constant", "warmup": 2},
    }
    make_trainer(tmp_path / "plain", **merge(settings, mode("whole", False))).fit(Data())

    may_write, written_at = threading.Event(), []
    write = Saver._write

    def slow(self: Saver, checkpoint: Checkpoint) -> None:
        assert may_write.wait(60)
        write(self, checkpoint)
        written_at.append(checkpoint.step)

    def progress(step: int, steps: int, latest: dict[str, float]) -> None:
        if step == 5:  # two updates after the checkpoint: it is not there yet
            assert checkpoints(tmp_path / "run") == [] and written_at == []
            may_write.set()

    monkeypatch.setattr(Saver, "_write", slow)
    make_trainer(tmp_path / "run", **merge(settings, mode(form, True)), progress=progress).fit(Data())
    assert written_at == [3, 6, 9]
    for one, other in zip(*(checkpoints(tmp_path / name) for name in ("plain", "run")), strict=True):
        assert unequal(content(load(one)), content(load(other))) == []


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_a_checkpoint_that_cannot_be_written_in_the_background_stops_the_training_soon(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed = Saver._write, threading.Event()

    def full(self: Saver, checkpoint: Checkpoint) -> None:
        if checkpoint.step < 6:
            return write(self, checkpoint)
        try:
            raise UserError("the disk is full")
        finally:
            failed.set()

    seen: list[int] = []

    def progress(step: int, steps: int, latest: dict[str, float]) -> None:
        seen.append(step)
        if step == 7:
            assert failed.wait(60)
            while not trainer.saver.failed:
                pass

    monkeypatch.setattr(Saver, "_write", full)
    trainer = make_trainer(
        tmp_path, steps=20, progress=progress, **merge({"checkpoints": {"every": 3}}, mode(form, True))
    )
    with pytest.raises(UserError, match="the disk is full"):
        trainer.fit(Data())
    assert seen[-1] in (6, 7)  # at the end of the next step, not at the next checkpoint
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000003"]


def test_memory_that_is_kept_for_copies_is_not_overwritten_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the page-locked copies of one checkpoint lie where those of the last one lay."""
    settings: dict[str, Any] = {"steps": 9, "checkpoints": {"every": 3, "keep": 4}}
    make_trainer(tmp_path / "plain", **merge(settings, mode("whole", False))).fit(Data())
    stager = DefaultStager(StagingOptions(False, False, False, False))
    write = Saver._write

    def slow(self: Saver, checkpoint: Checkpoint) -> None:
        time.sleep(0.5)
        write(self, checkpoint)

    monkeypatch.setattr(Saver, "_write", slow)
    monkeypatch.setattr(Saver, "_copy_to_cpu", lambda self, value: stager.stage(value))
    make_trainer(tmp_path / "run", **merge(settings, mode("sharded", True))).fit(Data())
    for one, other in zip(*(checkpoints(tmp_path / name) for name in ("plain", "run")), strict=True):
        assert unequal(content(load(one)), content(load(other))) == []


@pytest.mark.parametrize(("form", "background"), MODES)
def test_the_records_are_on_the_disk_before_the_checkpoint_is(
    tmp_path: Path, form: str, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the run goes on behind the checkpoint: a record before it would never be written."""
    synced: list[tuple[int, int]] = []
    sync = os.fsync

    def noted(file: int) -> None:
        found = os.fstat(file)
        synced.append((found.st_ino, found.st_size))
        sync(file)

    trainer = make_trainer(tmp_path, steps=4, **merge({"checkpoints": {"every": 0}}, mode(form, background)))
    monkeypatch.setattr(os, "fsync", noted)
    state = trainer.fit(Data()) / "state.json"
    places = {path: (path.stat().st_ino, path.stat().st_size) for path in (tmp_path / "records.jsonl", state)}
    records, finished = (synced.index(place) for place in places.values())
    assert records < finished


def test_no_rank_waits_for_the_first_one_whose_records_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_rank_zero(make: Any) -> Any:
        raise UserError("the disk is full")  # what it gives to all ranks

    saver = make_trainer(tmp_path, **mode("sharded", True)).saver
    saver.world = SimpleNamespace(for_checkpoint_thread=SimpleNamespace(on_rank_zero=on_rank_zero))  # pyright: ignore
    reached: list[int] = []
    monkeypatch.setattr(saving, "save_sharded", lambda *_: reached.append(1))
    saver._try(make(1), None)
    assert "the disk is full" in str(saver._error) and reached == []


def test_copies_in_memory_do_not_outlive_the_writing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **mode("sharded", True))
    copies = trainer.saver.collect({"a": torch.ones(3)})
    storage = weakref.ref(copies["a"])
    del copies
    assert storage() is None


@pytest.mark.parametrize("write", [save, partial(save_sharded, world=ONE_PROCESS)])
def test_a_save_that_is_cut_short_is_no_checkpoint_and_the_next_one_succeeds(
    tmp_path: Path, write: Callable[[Path, Checkpoint], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "checkpoints"

    def cut(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tutti.storage.checkpoint._finish", cut)  # as a kill would, right before the rename
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, make(2))
    assert [item.name for item in home.iterdir()] == [".partial-step-000002"]
    assert checkpoints(tmp_path) == [] and load_latest(tmp_path) is None
    write(tmp_path, make(2))
    assert [item.name for item in home.iterdir()] == ["step-000002"]
    assert load(home / "step-000002").step == 2


def test_a_shard_that_does_not_fit_on_the_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    big = Checkpoint(step=1, tensors={"model": {"w": torch.zeros(200_000)}}, optimizer={}, rng={}, state={})
    with (
        file_size_limit(100_000),
        pytest.raises(UserError, match=r"step-000001: cannot write, the disk .*full[\s\S]*free: .* [MGT]iB"),
    ):
        save_sharded(tmp_path, big, ONE_PROCESS)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_a_kill_has_left_half_written_is_removed_when_the_run_goes_on(tmp_path: Path) -> None:
    torn = tmp_path / "checkpoints" / ".partial-step-000777" / "shards"
    torn.mkdir(parents=True)
    (torn / "rank-00000.safetensors").write_bytes(b"half")
    make_trainer(tmp_path, steps=4, checkpoints={"every": 0}).fit(Data())
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


def test_shards_that_the_first_process_does_not_see_make_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*given: Any) -> Any:
        return {"rank-00001.safetensors": {"bytes": 5, "crc32": 1}}

    monkeypatch.setattr(shards, "write", elsewhere)
    with pytest.raises(UserError, match=r"rank-00001\.safetensors was written by another process but is not"):
        save_sharded(tmp_path, make(1), ONE_PROCESS)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_signal_in_the_midst_of_writing_shards_is_no_error_of_the_disk(
    kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **named: Any) -> Any:
        raise kind

    monkeypatch.setattr(shards.os, "fsync", interrupted)
    with pytest.raises(kind):
        save_sharded(tmp_path, make(1), ONE_PROCESS)
    monkeypatch.undo()
    folder = save_sharded(tmp_path, make(1), ONE_PROCESS)
    monkeypatch.setattr(tensors, "safe_open", interrupted)
    with pytest.raises(kind):
        load(folder)

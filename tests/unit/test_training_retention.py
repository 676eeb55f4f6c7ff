"""Which checkpoints stay, which is the best, and what a damaged one does to a run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fixtures.checkpoints import load_latest
from fixtures.toy_training import Data, config, make_trainer
from tutti.serving.policy import find_checkpoint
from tutti.storage.checkpoint import Checkpoint, checkpoints, save
from tutti.training.checkpointing.config import CheckpointsConfig, KeepBestConfig
from tutti.training.checkpointing.saver import retain
from tutti.training.records import MetricsWriter, read_records
from tutti.types import UserError


def make(run: Path, step: int, value: float | None = None) -> None:
    """A checkpoint, and a validation at its step if `value` is given."""
    if value is not None:
        with MetricsWriter(run, after_step=step) as writer:
            writer.write(step, "validation", {"valid/total": value})
    save(run, Checkpoint(step=step, tensors={"model": {"w": torch.ones(1)}}, optimizer={}, rng={}, state={}))


def steps(run: Path) -> list[int]:
    return [int(folder.name.split("-")[1]) for folder in checkpoints(run)]


def test_the_newest_and_every_so_many_steps_stay(tmp_path: Path) -> None:
    for step in range(10, 110, 10):
        make(tmp_path, step)
        retain(tmp_path, CheckpointsConfig(keep=2, keep_every=30))
    assert steps(tmp_path) == [30, 60, 90, 100]
    retain(tmp_path, CheckpointsConfig(keep=1))
    assert steps(tmp_path) == [100]


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)])
def test_the_best_is_marked_and_stays_and_of_equals_the_earliest(
    tmp_path: Path, mode: Any, best: int
) -> None:
    values = {1: 0.5, 2: 0.25, 3: 0.75, 4: float("nan"), 5: 0.25, 6: 0.75, 7: 0.5}
    for step, value in values.items():
        make(tmp_path, step, value)
        retain(tmp_path, CheckpointsConfig(keep=1, keep_best=KeepBestConfig(mode=mode)))
    assert steps(tmp_path) == [best, 7]
    marked = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert marked == {"step": best, "metric": "valid/total", "mode": mode, "value": values[best]}
    assert find_checkpoint(tmp_path, "best").name == f"step-{best:06d}"
    assert find_checkpoint(tmp_path).name == find_checkpoint(tmp_path, 7).name == "step-000007"
    with pytest.raises(UserError, match=rf"no checkpoint of step 5; there are {best}, 7"):
        find_checkpoint(tmp_path, 5)


def test_a_checkpoint_without_validation_is_no_candidate(tmp_path: Path) -> None:
    make(tmp_path, 1)
    retain(tmp_path, CheckpointsConfig(keep=1, keep_best=KeepBestConfig()))
    assert not (tmp_path / "checkpoints" / "best.json").exists()
    with pytest.raises(UserError, match=r"best\.json: missing\. .* training\.checkpoints\.keep_best="):
        find_checkpoint(tmp_path, "best")
    make(tmp_path, 2, 3.0)
    make(tmp_path, 3)
    retain(tmp_path, CheckpointsConfig(keep=1, keep_best=KeepBestConfig()))
    assert steps(tmp_path) == [2, 3]


def test_a_copy_that_somebody_has_put_beside_them_is_no_checkpoint_and_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        make(tmp_path, step)
        home = tmp_path / "checkpoints"
        shutil.copytree(
            home / f"step-{step:06d}", home / f"step-{step:06d}{'.bak' if step == 1 else '-copy'}"
        )
    assert steps(tmp_path) == [1, 2] and find_checkpoint(tmp_path).name == "step-000002"
    retain(tmp_path, CheckpointsConfig(keep=1))
    assert sorted(item.name for item in (tmp_path / "checkpoints").iterdir()) == [
        *("step-000001.bak", "step-000002", "step-000002-copy")
    ]


def test_a_training_keeps_what_its_config_asks_for(tmp_path: Path) -> None:
    keep = {"every": 4, "keep_every": 8, "keep_best": {"metric": "valid/action"}, "keep": 1}
    make_trainer(tmp_path, steps=20, checkpoints=keep, validation={"every": 2}).fit(Data())
    values = {r["step"]: r["valid/action"] for r in read_records(tmp_path) if r["kind"] == "validation"}
    best = min((4, 8, 12, 16, 20), key=lambda step: values[step])
    assert steps(tmp_path) == sorted({8, 16, 20, best})
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["step"] == best


@pytest.mark.parametrize(
    ("checkpoints", "validate_every", "message"),
    [
        ({"keep_every": 15}, 10, "keep_every is 15, but checkpoints.every is 10"),
        ({"keep_every": 10, "every": 0}, 10, "keep_every is 10, but checkpoints.every is 0"),
        ({"keep_best": {"metric": "loss/total"}}, 10, "'loss/total' is recorded by no validation"),
        ({"keep_best": {}}, 3, "checkpoints.every is 10 and validation.every is 3"),
        ({"keep_best": {}}, 0, "validation.every is 0"),
    ],
)
def test_what_could_never_be_kept_is_refused(
    checkpoints: dict[str, Any], validate_every: int, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config(checkpoints=checkpoints, validation={"every": validate_every})


def damage(run: Path, step: int) -> None:
    weights = run / "checkpoints" / f"step-{step:06d}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_as_if_it_had_never_been(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    settings: dict[str, Any] = {"steps": 20, "checkpoints": {"every": 5}}
    make_trainer(straight, **settings).fit(Data())
    make_trainer(hurt, **settings).fit(Data())
    damage(hurt, 20)
    with caplog.at_level(logging.WARNING, "tutti.training"):
        make_trainer(hurt, **settings).fit(Data())
    said = "\n".join(caplog.messages)
    assert "checkpoint step-000020 is damaged" in said and "going on from step-000015 instead" in said
    assert "truncated" in said and "Delete the folder" not in said
    folders = sorted(item.name for item in (hurt / "checkpoints").iterdir())
    assert folders == ["damaged-step-000020", "step-000015", "step-000020"]
    one, other = load_latest(straight), load_latest(hurt)
    assert one is not None and other is not None
    assert all(torch.equal(value, other.tensors["ema"][name]) for name, value in one.tensors["ema"].items())
    event = [record for record in read_records(hurt) if record["kind"] == "event"]
    assert event == [{"step": 15, "kind": "event", "fault/damaged_checkpoints": 1.0}]
    damage(hurt, 20)  # the same step once more: the first wreck stays
    make_trainer(hurt, **settings).fit(Data())
    assert (hurt / "checkpoints" / "damaged-step-000020-2").is_dir()


def test_without_a_whole_checkpoint_the_run_stops_and_nothing_is_renamed(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(Data())
    for step in (10, 20):
        damage(tmp_path, step)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints is whole(.|\n)*000020(.|\n)*000010"):
        make_trainer(tmp_path).fit(Data())
    assert steps(tmp_path) == [10, 20]


def test_a_step_that_was_being_written_when_the_machine_died_is_not_taken(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit(Data())
    (tmp_path / "checkpoints" / "step-000020" / "state.json").unlink()
    make_trainer(tmp_path).fit(Data())
    assert steps(tmp_path) == [10, 20]

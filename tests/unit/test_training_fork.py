"""A fork: the other run goes on to the same bits, under settings of its own, and is only read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from fixtures.run_equality import content, differing, killed_and_resumed, records
from fixtures.toy_training import Data, config, make_trainer
from tutti.config.run_config import load_config
from tutti.runs.build import with_parent_data
from tutti.storage.checkpoint import checkpoints
from tutti.training.checkpointing.config import ForkConfig
from tutti.training.checkpointing.recovery import source_of
from tutti.training.records import MetricsWriter
from tutti.types import UserError

SETTINGS: dict[str, Any] = {
    "steps": 12,
    "log_every": 2,
    "checkpoints": {"every": 4, "keep": 5},
    "validation": {"every": 6},
}


def extra(**data: Any) -> dict[str, str]:
    """What a checkpoint says of model and data."""
    return {
        "config.yaml": yaml.safe_dump(
            {"model": {"depth": 2}, "data": {"horizon": 5, "sources": ["a"]} | data}
        ),
        "spec.json": json.dumps({"views": ["front"]}),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 4, 8 and 12."""
    run = tmp_path_factory.mktemp("source")
    make_trainer(run, files=extra(), **SETTINGS).fit(Data())
    assert [folder.name for folder in checkpoints(run)] == [f"step-{s:06d}" for s in (4, 8, 12)]
    return run


def forked(source: Path, step: int | str = "latest", **changes: Any) -> dict[str, Any]:
    return {"files": extra(), **SETTINGS, "fork": {"run": str(source), "step": step}, **changes}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_with_the_same_settings_it_equals_the_run_that_was_not_left(tmp_path: Path, optimizer: str) -> None:
    settings = SETTINGS | {"optimizer": {"kind": optimizer}}
    make_trainer(tmp_path / "a", **settings).fit(Data())
    settings["fork"] = {"run": str(tmp_path / "a"), "step": 4}
    make_trainer(tmp_path / "b", **settings).fit(Data())
    one, other = content(tmp_path / "a"), content(tmp_path / "b")
    assert differing(tmp_path / "a", tmp_path / "b") == ["records"] and one.keys() == other.keys()
    first, *rest = records(tmp_path / "b")
    assert first == {"step": 4, "kind": "event", "optim/fork_step": 4.0}
    assert rest == [record for record in records(tmp_path / "a") if record["step"] > 4]


def test_it_cools_down_under_its_own_schedule_and_the_other_run_is_only_read(
    tmp_path: Path, source: Path
) -> None:
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    schedule = {"kind": "wsd", "warmup": 3, "decay_from": 8}
    trainer = make_trainer(tmp_path, **forked(source, 8, steps=16, log_every=1, schedule=schedule))
    trainer.fit(Data())
    factors = [r["optim/lr_factor"] for r in records(tmp_path) if r["kind"] == "train"]
    assert factors == pytest.approx([1.0 - n / 8 for n in range(8)])
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert trainer.config.fork != "off" and trainer.config.fork.step == 8


def test_a_new_learning_rate_is_used(tmp_path: Path, source: Path) -> None:
    """The checkpoint's optimiser state holds the other run's rates and decays; they do not come back."""
    changes = {"optimizer": {"kind": "adamw", "lr": 0.5, "weight_decay": 0.3}, "log_every": 1}
    changes["schedule"] = {"kind": "constant", "warmup": 3}
    trainer = make_trainer(tmp_path, **forked(source, 8, **changes))
    trainer.fit(Data())
    assert records(tmp_path)[1]["optim/lr"] == 0.5
    groups = trainer.optimizer.optimizers["adamw"].param_groups
    assert {group["lr"] for group in groups} == {0.5} and groups[0]["weight_decay"] == 0.3


def test_a_fork_is_resumed_from_its_own_checkpoints_and_keeps_to_its_step(tmp_path: Path) -> None:
    """Killed before its first checkpoint; meanwhile the other run goes on, so `latest` would be another."""
    run = tmp_path / "a"
    make_trainer(run, **SETTINGS | {"steps": 8}).fit(Data())
    settings = SETTINGS | {"fork": {"run": str(run)}, "steps": 20}
    make_trainer(tmp_path / "straight", **settings).fit(Data())
    killed_and_resumed(tmp_path / "killed", (2, 7), **settings)
    assert differing(tmp_path / "straight", tmp_path / "killed") == []
    assert records(tmp_path / "killed")[0]["optim/fork_step"] == 8.0
    killed_and_resumed(tmp_path / "late", (2,), **settings | {"steps": 12})
    make_trainer(run, **SETTINGS).fit(Data())
    assert records(tmp_path / "late")[0]["optim/fork_step"] == 8.0


def test_a_jump_of_the_rate_is_said_with_the_cure(
    tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = {"kind": "wsd", "warmup": 3, "decay": 0.2}
    with caplog.at_level(logging.WARNING, "tutti.training"):
        make_trainer(tmp_path, **forked(source, 8, schedule=schedule)).fit(Data())
    assert any(
        "from 0.667 to 1 at step 8" in r.getMessage() and "decay_from=8" in r.getMessage()
        for r in caplog.records
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": extra(horizon=9)}, r"data\.horizon: 5 -> 9"),
        ({"files": extra() | {"spec.json": json.dumps({"views": ["left"]})}}, r'spec\.views: \["front'),
        ({"optimizer": {"kind": "muon"}}, r'training\.optimizer\.kind: "adamw" -> "muon"'),
        ({"ema": "off"}, r'training\.ema: 0\.999 -> "off"'),
        ({"seed": 7}, r"training\.seed: 0 -> 7"),
        ({"fork": {"run": "nowhere"}}, "there is no checkpoint of a run in nowhere"),
        ({"steps": 12}, "steps is 12, but the fork begins at step 12"),
    ],
)
def test_what_cannot_go_on_is_refused(
    tmp_path: Path, source: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, **forked(source, **{"steps": 16} | changes)).fit(Data())


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 5; it has those of 4, 8, 12"):
        make_trainer(tmp_path, **forked(source, 5)).fit(Data())
    with pytest.raises(ValidationError, match=r"Raise training\.steps"):
        config(fork={"run": str(source), "step": 40})


def test_without_data_of_its_own_it_reads_what_the_other_run_has_recorded(tmp_path: Path) -> None:
    (tmp_path / "a" / "dataset").mkdir(parents=True)
    key = f"training.fork.run={tmp_path / 'a'}"
    found = with_parent_data(load_config(None, [key]))
    assert [source.path for source in found.data.sources] == [tmp_path / "a" / "dataset"]
    named = load_config(None, [key, "data.sources=[{path: mine}]"])
    assert with_parent_data(named) == named
    assert with_parent_data(load_config()) == load_config()


def test_data_elsewhere_and_other_lengths_are_no_difference(tmp_path: Path, source: Path) -> None:
    moved = extra(sources=["b"], prefetch=3)
    make_trainer(tmp_path, **forked(source, 8, steps=9, files=moved, accumulation=2)).fit(Data())
    assert [r["step"] for r in records(tmp_path) if r["kind"] == "train"] == [9]


def test_an_interrupted_fork_keeps_to_the_step_that_it_began_at(tmp_path: Path) -> None:
    trunk, run = tmp_path / "trunk", tmp_path / "fork"
    for step in (5, 10):
        (trunk / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    fork = ForkConfig(run=str(trunk))
    assert source_of(fork, run).name == "step-000010"
    with MetricsWriter(run) as writer:
        writer.write(5, "event", {"optim/fork_step": 5.0})
    assert source_of(fork, run).name == "step-000005"

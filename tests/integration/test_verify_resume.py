"""Kill -9 in the middle of real trainings: proved exact, and a state that no checkpoint keeps is found."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import kill_resume
import numpy as np
import pytest
import torch

from tutti.config.run_config import RunConfig, build_config
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.debug import kill_harness as killable
from tutti.debug.kill_harness import Kill
from tutti.debug.verify_resume import kill_plan, print_verification, prove_resume, shorten
from tutti.objectives.term import Model, Term, TermValue
from tutti.types import Batch, Features, UserError

VIEW = "observation.images.front"


class Forgetful(Term):
    """Weighs more at each call, and keeps the number of calls where no checkpoint finds it."""

    def __init__(self, model: Model, **term: Any) -> None:
        super().__init__(**term)
        self.calls = 0

    def compute(self, features: Features, batch: Batch, model: Any) -> TermValue:
        self.calls += 1
        return TermValue(value=features.readout.square().mean() * (1 + 0.1 * self.calls), metrics={})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)

    def episode(number: int) -> EpisodeRecord:
        return EpisodeRecord(
            images={VIEW: random.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)},
            states=random.normal(size=(10, 3)).astype(np.float32),
            actions=random.normal(size=(10, 2)).astype(np.float32),
            instruction=("go left", "go right")[number % 2],
        )

    folder = tmp_path_factory.mktemp("verify") / "data"
    return write_lerobot(folder, [episode(n) for n in range(8)], fps=10, views=(VIEW,), robot_type="dot")


def config(dataset: Path, **sections: Any) -> RunConfig:
    """A tiny run of 50 steps; sections are replaced key by key."""
    values: dict[str, Any] = {
        "data": {"sources": [{"path": str(dataset)}], "horizon": 3, "batch_size": 4, "image_size": 16},
        "model": {
            "vision": {"stem": {"channels": [8, 8, 8], "strides": [1, 1, 2]}, "width": 16, "heads": 2},
            "language": {"width": 16, "depth": 1, "heads": 2},
            "fusion": {"width": 16, "depth": 1, "heads": 2},
            "action": {"hidden": 16},
        },
        "objective": {"align": {"weight": 0.3}, "recon": None, "state": None},
        "training": {"steps": 50, "threads": 1, "device": "cpu", "schedule": {"kind": "wsd", "warmup": 5}},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return build_config(values, "the test")


def test_a_run_with_threads_accumulation_and_phases_resumes_exactly(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(
        dataset,
        data={"prefetch": 3},
        training={"accumulation": 2, "optimizer": {"kind": "muon"}, "ema": 0.9},
        strategy={"kind": "two_stage"},
    )
    found = prove_resume(run, tmp_path / "run", kills=2)
    assert found.exact and found.kills == 2 and found.found.num_values > 20_000
    assert {"model", "ema", "optimizer", "random states", "loader", "records.jsonl"} <= set(
        found.found.values
    )
    assert found.found.values["windows of each batch"] == 12 * 2 * 4
    print_verification(found)
    said = capsys.readouterr().out
    assert "training.checkpoints.every: 200 -> 3" in said and "0 of " in said and "resumes exactly" in said
    assert not (tmp_path / "run").exists()


def test_state_that_no_checkpoint_keeps_is_found_and_named(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    term = {"kind": f"{__name__}:Forgetful", "weight": 0.5}
    run = config(dataset, objective={"align": None, "forgetful": term}, data={"prefetch": 0})
    assert __name__ in sys.modules
    found = prove_resume(run, tmp_path / "run", steps=6, kills=1)
    assert not found.exact and found.found.first is not None
    assert found.found.differing["model"] > 0 and found.found.differing["windows of each batch"] == 0
    assert found.found.first.name.startswith("model/") and found.found.first.count > 0
    print_verification(found)
    assert "The first (undisturbed, killed and resumed): model/" in capsys.readouterr().out


def test_a_training_that_fails_is_said_and_not_taken_for_a_kill(dataset: Path, tmp_path: Path) -> None:
    impossible = config(dataset, data={"horizon": 99})
    with pytest.raises(UserError, match=r"The training failed: data\.horizon is 99"):
        prove_resume(impossible, tmp_path / "run", steps=4, kills=1)


@pytest.mark.slow
def test_a_rank_killed_at_a_time_and_all_of_them_resume_exactly(dataset: Path, tmp_path: Path) -> None:
    """The first kill is survived by torchrun's own restart, after the second the command is started anew."""
    run = config(dataset, training={"parallel": {"kind": "fsdp"}, "ema": 0.9})
    found = prove_resume(run, tmp_path / "run", steps=6, kills=2, processes=2)
    assert found.exact and found.kills == 2
    assert found.found.values["windows of each batch"] == 6 * 2  # half of a batch of 4 each
    assert found.found.values["windows of each batch, rank 1"] == 6 * 2


@pytest.mark.slow
def test_a_training_on_two_processes_that_fails_is_said_and_not_taken_for_a_kill(
    dataset: Path, tmp_path: Path
) -> None:
    impossible = config(dataset, data={"horizon": 99}, training={"parallel": {"kind": "ddp"}})
    with pytest.raises(UserError, match=r"on 2 processes failed: (rank 0: )?data\.horizon is 99"):
        prove_resume(impossible, tmp_path / "run", steps=4, kills=1, processes=2)


def test_kills_come_at_different_steps_from_the_seed_and_hit_each_process_in_no_fixed_order() -> None:
    plan = kill_plan(12, 5, seed=3)
    steps = [kill.step for kill in plan]
    assert steps == sorted(set(steps)) and steps[0] >= 1 and steps[-1] < 12
    assert all(0 <= kill.share < 1 and kill.rank == 0 for kill in plan)
    assert plan == kill_plan(12, 5, seed=3) != kill_plan(12, 5, seed=4)
    moments = [[(kill.step, kill.share) for kill in kill_plan(12, 5, 3, count)] for count in (1, 2)]
    assert moments[0] == moments[1]
    ranks = [[kill.rank for kill in kill_plan(12, 6, seed, 2)] for seed in range(8)]
    assert all(sorted(one) == [0, 0, 0, 1, 1, 1] for one in ranks) and len(set(map(tuple, ranks))) > 4


@pytest.mark.parametrize("kills", [1, 2])
def test_the_last_kill_resumes_from_a_checkpoint(kills: int) -> None:
    for seed in range(20):
        *others, last = kill_plan(6, kills, seed)
        assert last.step >= 3 and last.patient
        assert all(not kill.patient and kill.step < last.step for kill in others)
    assert not kill_plan(3, 1, seed=0)[0].patient  # there will be none


def test_a_patient_kill_waits_until_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = threading.Event()
    monkeypatch.setattr(killable.os, "kill", lambda *_: killed.set())
    for kill, waits in ((Kill(3, 0.5), False), (Kill(3, 0.5, patient=True), True)):
        killed.clear()
        killer = killable.Killer(tmp_path, kill, lambda: None)
        killer(3, 6, {})
        assert killed.wait(0.3 if waits else 20) != waits
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    assert killed.wait(20)


def test_a_kill_that_would_come_after_the_end_comes_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(killable.os, "kill", lambda *_: told.append(1))
    late = killable.Killer(tmp_path, Kill(5, 1e7), lambda: told.append(0))
    late(4, 6, {})
    late(5, 6, {})
    assert told == [] and late._timer is not None
    late.finish()
    assert told == [0, 1]
    late._timer.join(20)
    assert not late._timer.is_alive()  # it would kill for good, when the test is long over
    killable.Killer(tmp_path, None, lambda: told.append(0)).finish()
    assert told == [0, 1]


def test_what_is_shortened_is_said_and_the_rest_stays(dataset: Path) -> None:
    balancing = {"kind": "shares", "start": 10, "steps": 30}
    short, changes = shorten(config(dataset, balancing=balancing), 12)
    assert {"training.steps: 50 -> 12", "training.schedule.warmup: 5 -> 1"} <= set(changes)
    assert 'balancing.start: 10 -> "warmup"' in changes
    assert (
        short.model == config(dataset).model
        and short.training.optimizer == config(dataset).training.optimizer
    )


def test_what_cannot_be_checked_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer kills than steps"):
        prove_resume(config(dataset), tmp_path, steps=3, kills=3)
    with pytest.raises(UserError, match="there are no data yet"):
        prove_resume(config(dataset, data={"sources": []}), tmp_path / "run")


def test_the_benchmark_in_short(tmp_path: Path) -> None:
    """One of its modes with two kills, as `benchmarks/kill_resume.py` publishes it."""
    threads = torch.get_num_threads()
    given = ["--points", "2", "--steps", "6", "--only", "K gradients"]
    assert kill_resume.main([*given, "--output", str(tmp_path / "result")]) == 0
    assert torch.get_num_threads() == threads
    text = (tmp_path / "result.md").read_text()
    assert "| all | 2 |" in text and "2 kills; 0 of " in text

"""`training.evaluate_every`: what plays changes no bit of the training, and the best by success is kept."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fixtures import ranks_training, squares_data, squares_world
from fixtures.checkpoints import load_latest
from fixtures.ranks import on_ranks
from fixtures.run_equality import Killed, content, records, unequal
from fixtures.squares_data import MODEL, TRAINING
from fixtures.toy_training import Data, config, make_trainer
from tutti import pipeline
from tutti.distributed.world import world
from tutti.storage.checkpoint import checkpoints, find_checkpoint, step_of
from tutti.training.checkpointing import Judge
from tutti.types import UserError

RATES = {5: 0.25, 10: 0.75, 15: 0.5, 20: 0.5}


def judge(*events: tuple[int, str]) -> tuple[Judge, list[int]]:
    """One that draws from every random state. For each of `events`, when it comes to that step, Ctrl-C is
    pressed, or its process is killed."""
    left, seen = [*events], list[int]()

    def play(checkpoint: Path, ends: Callable[[], bool]) -> dict[str, float] | None:
        step = step_of(checkpoint)
        assert load_latest(checkpoint.parent.parent) is not None, "the checkpoint is whole"
        assert torch.rand(1) + np.random.rand() + random.random() < 3
        seen.append(step)
        event = left.pop(0)[1] if left and left[0][0] == step else ""
        if event == "kill":
            raise Killed
        if event:
            os.kill(os.getpid(), signal.SIGINT)
        return None if ends() else {"success/mean": RATES[step], "success/push": RATES[step]}

    return play, seen


def test_a_training_that_is_evaluated_is_the_same_to_the_last_bit_and_keeps_its_best(tmp_path: Path) -> None:
    make_trainer(tmp_path / "without", evaluate_every=5).fit(Data())  # nobody judges it
    playing, seen = judge((5, "Ctrl-C"), (5, "Ctrl-C"), (10, "kill"), (20, "Ctrl-C"))
    settings: dict[str, Any] = {"evaluate_every": 5, "checkpoints": {"every": 3, "keep": 1}, "judge": playing}
    for ending in (KeyboardInterrupt, KeyboardInterrupt, Killed, KeyboardInterrupt):
        with pytest.raises(ending):
            make_trainer(tmp_path / "with", **settings).fit(Data())
    make_trainer(tmp_path / "with", **settings).fit(Data())
    assert seen == [5, 5, 5, 10, 10, 15, 20, 20], "what was interrupted is played again, and nothing else"
    assert unequal(content(tmp_path / "with"), content(tmp_path / "without")) == []
    played = [one for one in records(tmp_path / "with") if one["kind"] == "evaluation"]
    assert [(one["step"], one["success/push"]) for one in played] == [*RATES.items()]
    others = [one for one in records(tmp_path / "with") if one["kind"] != "evaluation"]
    assert others == records(tmp_path / "without")
    assert [step_of(one) for one in checkpoints(tmp_path / "with")] == [10, 20]
    assert find_checkpoint(tmp_path / "with", "best").name == "step-000010"


def on_two(run: str) -> list[int]:
    """The ranks that were asked to play."""
    asked: list[int] = []

    def play(checkpoint: Path, ends: Callable[[], bool]) -> dict[str, float]:
        asked.append(world().ranks.rank)
        return {"success/mean": 0.5}

    trainer = ranks_training.trainer_of(Path(run), {"steps": 4, "evaluate_every": 2})
    trainer.playing = replace(trainer.playing, judge=play)
    trainer.fit(ranks_training.Data(None))
    return asked


def test_of_several_ranks_the_first_one_plays(tmp_path: Path) -> None:
    assert on_ranks(2, on_two, str(tmp_path)) == [[0, 0], []]
    assert [one["step"] for one in records(tmp_path) if one["kind"] == "evaluation"] == [2, 4]


def test_checkpoints_play_the_suite_on_starts_that_the_score_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares_world.register(monkeypatch)
    squares_data.write(tmp_path / "data", squares_data.episodes(6))
    (tmp_path / "data" / "recording.json").write_text(json.dumps({"seeds": [600_010, 600_020]}))
    evaluation = {"suite": "squares", "episodes": 3, "max_decisions": 4, "workers": 1}

    def train(run: str, **training: Any) -> Path:
        section = {"batch_size": 2, "image_size": 16, "validation_fraction": 0.3}
        settings = TRAINING | {"evaluate_episodes": 2} | training
        made = squares_data.config(
            tmp_path / "data", data=section, model=MODEL, training=settings, evaluation=evaluation
        )
        pipeline.train(made, tmp_path / run)
        return tmp_path / run

    with pytest.raises(UserError, match=r"training\.evaluate_first_seed: .*600010"):
        train("wrong", evaluate_every=2, evaluate_first_seed=600_009)
    without, played = train("without"), train("with", evaluate_every=2)
    assert unequal(content(without), content(played)) == []
    rollouts = sorted(one.relative_to(played / "training_evaluations") for one in played.rglob("policy/*/*"))
    assert [str(one) for one in rollouts[:4]] == [
        f"step-000002/policy/{task}/{seed}.json" for task in ("blue", "red") for seed in (600_000, 600_001)
    ]
    assert len(rollouts) == 8
    kept = [one for one in records(played) if one["kind"] == "evaluation"]
    assert [one["step"] for one in kept] == [2, 4]
    for one in kept:
        assert one["success/mean"] == pytest.approx((one["success/red"] + one["success/blue"]) / 2)
    assert json.loads((played / "checkpoints" / "best.json").read_text())["metric"] == "success/mean"
    with pytest.raises(ValueError, match="both play the seeds 1001 to 1002"):
        train("wrong", evaluate_every=2, evaluate_first_seed=1001)


def test_success_is_no_measure_where_nothing_plays() -> None:
    with pytest.raises(ValidationError, match="evaluate_every is 0"):
        config(checkpoints={"keep_best": {"metric": "success/mean", "mode": "max"}})

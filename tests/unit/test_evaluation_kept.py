"""What an evaluation may not mix up: processes of one environment, results of before, suites that changed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import pytest
from test_evaluation_batched import Many, config

from fixtures.line_world import LineWorld, LineWorlds, Policies
from tutti.evaluation.closed_loop import batched
from tutti.evaluation.closed_loop.evaluate import evaluate
from tutti.evaluation.closed_loop.rollouts import PlannedRollout, RolloutSpec, RolloutWorker
from tutti.evaluation.closed_loop.videos import INDEX, encode, videos_of
from tutti.evaluation.folder import AGAINST, RESULTS, EvaluationFolder, JudgedPolicy
from tutti.recording import recorder
from tutti.suites.gym import PUSHT


class Alone(LineWorld):
    """Only one may be open in a process, for which `place` stands."""

    open: ClassVar[dict[int, int]] = {}
    place: ClassVar[int] = 0

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.home = self.place
        self.open[self.home] = self.open.get(self.home, 0) + 1
        assert self.open[self.home] == 1, "a second environment in one process"

    def close(self) -> None:
        self.open[self.home] -= 1


class OneAProcess(LineWorlds):
    @property
    def one_a_process(self) -> bool:
        return True

    def make(self, task: str) -> Alone:
        return Alone(task)


def in_turns(function: Any, count: int, next_job: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
    """`run_jobs` with `count` workers in this process, each with its own copy of the function."""
    copies = [type(function)(function._suite) for _ in range(count)]
    while jobs := [(one, job) for one in range(count) if (job := next_job(one)) is not None]:
        for worker, job in jobs:
            Alone.place = worker
            yield worker, copies[worker](job)
    for one in copies:
        one.close()


@pytest.mark.parametrize("how", ["batched", "one by one", "recording"])
def test_a_process_holds_no_second_environment_where_it_may_not(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package of ALOHA keeps its start in a global variable."""
    monkeypatch.setattr(Alone, "open", {})
    suite: Any = OneAProcess()
    if how == "batched":
        monkeypatch.setattr(batched, "run_jobs", in_turns)
        settings = config(batch_size=4, workers=3, controls={"expert": 0, "noop": 0, "no_image": 0})
        assert len(evaluate(Many(), settings, suite).rollouts) > 15 and len(Alone.open) == 3
    elif how == "one by one":
        own: dict[str, Any] = {"actions_per_query": 2, "max_decisions": 5, "folder": None}
        worker = RolloutWorker(RolloutSpec(policy=Policies(), environments=suite, **own))
        worker([PlannedRollout("expert", task, 3, "go") for task in ("left", "right", "left")])
        worker.close()
    else:
        for task in ("left", "right", "left"):
            recorder._simulations.of(suite, task)
        recorder._simulations.close()
    assert set(Alone.open.values()) == {0}


def test_a_gymnasium_suite_that_looks_or_judges_otherwise_has_another_fingerprint() -> None:
    """So that rollouts of before are not counted as its own."""
    changes: dict[str, Any] = {
        **{"success": "terminated", "distance": "coverage", "state_keys": ("", "agent_pos"), "fps": 20.0},
        **{"view_keys": {"top": "other"}, "arguments": {"obs_type": "state"}, "image_size": 64},
        "absolute_actions": False,
    }
    suites = [PUSHT, *(replace(PUSHT, **{key: value}) for key, value in changes.items())]
    assert len({suite.fingerprint for suite in suites}) == len(suites)


@pytest.mark.parametrize(("fps", "seconds"), [(20.0, 2.5), (20 / 11, 22.0), (0.4, 100.0)])
def test_videos_play_in_real_time_at_any_rate(fps: float, seconds: float) -> None:
    pictures = np.zeros((40, 16, 16, 3), np.uint8)
    with av.open(io.BytesIO(encode(pictures, fps)), "r") as video:
        assert video.duration is not None and video.duration / 1e6 == pytest.approx(seconds, rel=0.03)


def test_an_evaluation_that_goes_on_drops_the_comparison_of_before(tmp_path: Path) -> None:
    policy = JudgedPolicy(checkpoint="step-1", weights="ema", files="f", fingerprint="p")
    one = EvaluationFolder(tmp_path)
    with one.locked():
        one.begin(config(), policy, "world")
        (tmp_path / "policy").mkdir()
        one.write(RESULTS, {})
        one.finish()
    one.write(AGAINST, {"verdict": "better"})
    with one.locked():
        assert not one.begin(config(workers=2), policy, "world")[0] and (tmp_path / AGAINST).exists()
        assert one.begin(config(episodes=9), policy, "world")[0] and not (tmp_path / AGAINST).exists()


def test_videos_of_before_are_not_told_again(tmp_path: Path) -> None:
    assert videos_of(tmp_path) == []
    for name in ("now.mp4", "before.mp4"):
        (tmp_path / name).write_bytes(b"")
    index = [{"file": "now.mp4"}, {"file": "../before.mp4"}, {"file": "gone.mp4"}]
    (tmp_path / INDEX).write_text(json.dumps({"videos": index[:1] + index[2:]}))
    assert videos_of(tmp_path) == [tmp_path / "now.mp4"]

"""The judge on the real simulator: expert and no-op on reach, videos that decode, suites fitted to a
policy.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from fixtures.line_world import Policies
from tutti.evaluation.closed_loop.rollouts import (
    Condition,
    PlannedRollout,
    Rollout,
    RolloutSpec,
    RolloutWorker,
)
from tutti.evaluation.closed_loop.videos import choose, rollout_videos
from tutti.suites.registry import find_suite, fit_suite
from tutti.types import DataSpec, UserError

SUITE = find_suite("metaworld-8")
SPEC = DataSpec(
    views=("observation.images.left", "observation.images.right"),
    image_size=48,
    state_dim=4,
    action_dim=4,
    horizon=8,
    vocab_size=300,
    text_length=8,
    embodiments=("sawyer",),
    fps=SUITE.fps,
)


def play(*conditions: Condition, limit: int = 60) -> list[Rollout]:
    spec = RolloutSpec(
        policy=Policies(), environments=SUITE, actions_per_query=4, max_decisions=limit, folder=None
    )
    with closing(RolloutWorker(spec)) as worker:
        planned = [PlannedRollout(c, "reach", seed, "reach") for c in conditions for seed in (1000, 1001)]
        return list(worker(planned).values())


def test_expert_reaches_where_the_noop_does_not_and_replays_exactly() -> None:
    expert, noop = play("expert")[:2], play("noop", limit=20)
    assert [r.success for r in expert] == [True, True]
    assert [r.success for r in noop] == [False, False]
    assert [r.start for r in expert] == [r.start for r in noop]
    assert expert[0].start != expert[1].start
    assert [r.to_json() for r in play("expert")] == [r.to_json() for r in expert]
    simulation = SUITE.make("reach")
    for rollout in expert:
        simulation.reset(rollout.seed)
        for action in rollout.actions:
            assert not simulation.success
            simulation.step(action)
        assert simulation.success


def test_suite_takes_the_policys_views_in_its_order_and_refuses_another_rate_or_arm() -> None:
    fitted = fit_suite(SUITE, SPEC)
    assert fitted.views == ("left", "right") and fitted.tasks == SUITE.tasks
    assert fit_suite(SUITE, replace(SPEC, state_dim=0)) == fitted, "a policy may act without the state"
    assert fit_suite(SUITE, SPEC, image_size=80).image_size == 80
    other = replace(SPEC, fps=80.0, state_dim=14, action_dim=7, views=("observation.images.ceiling",))
    with pytest.raises(UserError, match="does not fit the suite metaworld-8") as refused:
        fit_suite(SUITE, other)
    for said in (
        *("(of sawyer)", "actions a second: the policy has 80, the suite 20"),
        *(
            "numbers of a state: the policy has 14, the suite 4",
            "numbers of an action: the policy has 7, the",
        ),
        *("views: 'ceiling' is not a camera view. Known: right", "evaluation.suite=none"),
    ):
        assert said in str(refused.value), said
    with pytest.raises(UserError, match="actions a second") as refused:
        fit_suite(SUITE, replace(SPEC, fps=80.0))
    assert "numbers of" not in str(refused.value)


@pytest.mark.simulation
def test_videos_show_a_success_and_a_failure(tmp_path: Path) -> None:
    played = play("expert")[0], play("noop", limit=6)[1]
    as_policy = [replace(rollout, condition="policy") for rollout in played]
    assert choose(as_policy) == as_policy
    assert choose(as_policy, per_task=1) == as_policy[:1]
    paths = rollout_videos(as_policy, SUITE, tmp_path, image_size=64, workers=1)
    index = json.loads((tmp_path / "index.json").read_text())["videos"]
    assert [(entry["file"], entry["success"]) for entry in index] == [
        (paths[0].name, True),
        (paths[1].name, False),
    ]
    for path, rollout in zip(paths, as_policy, strict=True):
        content = path.read_bytes()
        assert content.index(b"moov") < content.index(b"mdat"), "plays while loading"
        with av.open(str(path)) as video:
            stream = video.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height) == (128, 64)
            pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
        assert len(pictures) == rollout.decisions + 1 + 10
        assert np.std(pictures[0]) > 10, "something is to be seen"
    before = [path.stat().st_mtime_ns for path in paths]
    rollout_videos(as_policy, SUITE, tmp_path, image_size=64, workers=1)
    assert [path.stat().st_mtime_ns for path in paths] == before, "finished videos are kept"

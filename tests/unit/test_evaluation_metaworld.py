"""The judge on the real simulator: expert and no-op on reach, videos that decode, suites fitted to a
policy.
"""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from fixtures.line_world import Policies
from tutti.evaluation.closed_loop.rollouts import Rollout, RolloutBlock, RolloutSpec, RolloutWorker
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


def play(*conditions: str, limit: int = 60) -> list[Rollout]:
    environments = SUITE
    spec = RolloutSpec(
        policy=Policies(), environments=environments, actions_per_query=4, max_decisions=limit, folder=None
    )
    worker = RolloutWorker(spec)
    starts = ((1000, "reach"), (1001, "reach"))
    try:
        return [r for c in conditions for r in worker(RolloutBlock(task="reach", condition=c, starts=starts))]  # type: ignore[arg-type]
    finally:
        worker.close()


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


def test_suite_takes_the_policys_views_in_its_order() -> None:
    fitted = fit_suite(SUITE, SPEC)
    assert fitted.views == ("left", "right")
    assert fitted.tasks == SUITE.tasks
    assert fit_suite(SUITE, SPEC, image_size=80).image_size == 80


def test_policy_of_another_rate_or_arm_is_refused() -> None:
    for field, value, says in (("fps", 80.0, "at 80 actions a second"), ("action_dim", 7, "7 action values")):
        other = DataSpec(**{name: getattr(SPEC, name) for name in SPEC.__slots__} | {field: value})
        with pytest.raises(UserError, match=says):
            fit_suite(SUITE, other)


@pytest.mark.simulation
def test_videos_show_a_success_and_a_failure(tmp_path: Path) -> None:
    as_policy = [
        Rollout(**{name: getattr(r, name) for name in Rollout.__slots__} | {"condition": "policy"})
        for r in (play("expert")[0], play("noop", limit=6)[1])
    ]
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

"""Four sources in four formats, of three robots and of none, train one model that serves each robot."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import format_sets, pair_sets
from fixtures import squares_data as world
from fixtures.ranks import on_ranks
from fixtures.run_equality import Killed, differing, records
from fixtures.torchrun import start
from tutti.config.run_config import RunConfig, to_yaml
from tutti.data.loader import Loader
from tutti.distributed.world import world as ranks
from tutti.evaluation.open_loop import measure_open_loop
from tutti.runs.build import build_training
from tutti.serving.export import export_policy
from tutti.serving.policy import Policy
from tutti.training.records import read_records
from tutti.types import UserError

DOT, PANDA, WATCHED = 0, 1, 2
FRONT, MIRROR = world.VIEWS


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A dot of two views, a Panda with one of them and more numbers of state and action, a third robot that
    is only watched, and pictures with texts."""
    home = tmp_path_factory.mktemp("robots")
    dot = world.write(home / "dot", world.episodes(8))
    panda = format_sets.write_robomimic(home / "panda" / "demos.hdf5", world.episodes(8, 1))
    watched = format_sets.write_zarr(home / "watched", world.episodes(6, 2))
    pairs = pair_sets.write(home / "pairs", "tar", 12)
    views = {"front": format_sets.FRONT}
    sources: list[dict[str, Any]] = [
        {"path": dot, "views": {"front": FRONT, "mirror": MIRROR}, "name": "dot"},
        {"path": panda, "views": views, "name": "panda", "embodiment": "panda"}
        | {"action": ["actions", "obs/robot0_gripper_qpos"]},
        {"path": watched, "views": {"front": "camera_0", "mirror": "camera_1"}, "name": "watched"}
        | {"fps": 10, "text": {"say": "look"}, "labels": {"actions": False}, "embodiment": "watched"},
        {"path": pairs, "name": "pairs", "answer": "text"},
    ]
    return world.config(
        dot,
        data={"sources": [{**one, "path": str(one["path"])} for one in sources]}
        | {"horizon": "0.4s", "batch_size": 8, "image_size": 16, "cache": {"folder": str(home)}},
        model={**world.MODEL, "embodiment": "projection"},
        objective={
            "state": {"offsets": [2]},
            "recon": None,
            "inverse": {"kind": "inverse_dynamics", "offset": 2},
            "answer": {"kind": "next_token"},
        },
        training=world.TRAINING
        | {"steps": 6, "checkpoints": {"every": 3}, "validation": {"every": 3}, "log_every": 2},
    )


def test_a_mixture_of_robots_trains_resumes_and_is_measured(config: RunConfig, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def kill(step: int, steps: int, latest: dict[str, float]) -> None:
        if step == 5:
            raise Killed

    built = build_training(config, straight)
    spec = built.data.spec
    assert spec.embodiments == ("dot", "panda", "watched") and spec.views == ("front", "mirror")
    assert (spec.state_dim, spec.action_dim, spec.state_names) == (9, 5, ())
    built.fit()
    with pytest.raises(Killed):
        build_training(config, killed).fit(kill)
    build_training(config, killed).fit()
    assert differing(straight, killed) == []
    last = [record for record in read_records(straight) if "loss/total" in record][-1]
    known = {key for key in last if "/raw@" in key}
    assert {f"loss/action/raw@{name}" for name in ("dot", "panda")} <= known
    assert last["data/epochs@pairs"] > 0 and last["loss/align/raw"] > 0 and last["loss/state/raw@watched"] > 0
    assert last["loss/answer/raw@pairs"] == pytest.approx(last["loss/answer/raw"])

    data = built.data
    policy = Policy.load(straight, "raw")
    errors = measure_open_loop(
        policy.model, data.measured(), data.normalizer, data.tokenizer, data.windows.instructions
    )
    assert [one.name for one in errors.embodiments] == ["dot", "panda"]
    assert sum(one.windows for one in errors.embodiments) == errors.overall.windows
    for one in errors.embodiments:
        assert 0 < one.normalised.chunk < 10
    export_policy(straight, tmp_path / "export")
    _require_own_robots(Policy.load(tmp_path / "export", "raw"))


def drawn_on_ranks(config: RunConfig, run: str, until: int | None = None) -> list[list[int]]:
    """The windows of each update of a training on these ranks, those of this rank, killed after `until`."""
    found: list[list[int]] = []

    def stop(step: int, steps: int, latest: dict[str, float]) -> None:
        if step == until:
            raise Killed

    def take(self: Loader) -> Any:
        batch = following(self)
        found.append(batch.window.tolist())
        return batch

    following = Loader.__next__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "__next__", take)
        training = build_training(config, Path(run))
        with pytest.raises(Killed) if until else nullcontext():
            training.fit(stop)
    ranks().max(0)  # a checkpoint that another rank was still writing is there now
    return found


def test_two_ranks_are_given_the_same_order_and_record_the_same_losses(
    config: RunConfig, tmp_path: Path
) -> None:
    alone, both, killed = (tmp_path / name for name in ("alone", "both", "killed"))
    expected = drawn_on_ranks(config, str(alone))
    first, second = on_ranks(2, drawn_on_ranks, config, str(both))
    assert [one + other for one, other in zip(first, second, strict=True)] == expected
    on_ranks(2, drawn_on_ranks, config, str(killed), 5)
    again = on_ranks(2, drawn_on_ranks, config, str(killed))
    assert [one + other for one, other in zip(*again, strict=True)] == expected[3:]
    assert differing(both, killed) == []
    data = build_training(config, alone).data
    pairs = set(data.windows.rows_of(3, data.windows.sources[3].store.episodes).tolist())
    shares = [[len(pairs & {*own}) for own in each] for each in (first, second)]
    assert any(a != b for a, b in zip(*shares, strict=True)) and all(map(any, shares))
    one, other = records(alone), records(both)
    assert all(
        any(key in record for record in one) for key in ("loss/action/raw@panda", "loss/answer/raw@pairs")
    )
    for mine, theirs in zip(map(dict, one), map(dict, other), strict=True):
        assert mine.pop("kind") == theirs.pop("kind")
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_torchrun_trains_the_same_as_the_ranks_of_the_tests(config: RunConfig, tmp_path: Path) -> None:
    both, started = tmp_path / "both", tmp_path / "started"
    on_ranks(2, drawn_on_ranks, config, str(both))
    (tmp_path / "robots.yaml").write_text(to_yaml(config))
    process = start(tmp_path / "robots.yaml", started, [])
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "ddp over 2 processes" in output, output
    assert differing(both, started) == []


def _require_own_robots(policy: Policy) -> None:
    """Each robot gives its own views and numbers, and gets its own."""
    picture = np.zeros((20, 20, 3), np.uint8)
    both = {"front": picture, "mirror": picture}
    dot = policy.predict(both, np.zeros(2), "go", embodiment="dot")
    panda = policy.predict({"front": picture}, np.zeros(9), "go", embodiment="panda")
    assert (dot.shape, panda.shape) == ((4, 3), (4, 5)) and not np.array_equal(dot, panda[:, :3])
    assert policy.robot("panda").spec.state_names[:3] == ("x", "y", "z")
    for embodiment in (None, "watched", "pandas"):
        with pytest.raises(UserError, match="embodiment: expected one of dot, panda, got"):
            policy.predict(both, np.zeros(2), "go", embodiment=embodiment)
    with pytest.raises(UserError, match=r"mirror.* is no view"):
        policy.predict(both, np.zeros(9), "go", embodiment="panda")
    with pytest.raises(UserError, match="expected 9 numbers"):
        policy.predict({"front": picture}, np.zeros(2), "go", embodiment="panda")

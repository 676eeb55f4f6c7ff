"""Other control rates: what is resampled is what scipy makes of the poses, and time stays time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fixtures import squares_data
from fixtures.poses import Walk, decoded, encoded, recorded, write_poses
from tutti.data.checks import check_rows
from tutti.data.checks.recordings import Recordings
from tutti.data.conventions.config import KEPT, CanonicalConfig, ConventionsConfig
from tutti.data.conventions.store import apply
from tutti.data.episodes import Episode, EpisodeStore, StoreSpec
from tutti.data.sources import check_lengths
from tutti.durations import in_own_steps, most_steps, paces
from tutti.runs.build import with_steps
from tutti.types import DataNeeds, UserError

FORMS = ("quaternion_xyzw", "axis_angle")


class Numbers(EpisodeStore):
    """Episodes of nothing but numbers; the picture of a row is its number."""

    def __init__(self, made: list[tuple[ConventionsConfig, np.ndarray, np.ndarray]], fps: float) -> None:
        self.name, ends = "numbers", np.cumsum([len(states) for _, states, _ in made])
        self.states = np.concatenate([states for _, states, _ in made])
        self.actions = np.concatenate([actions for _, _, actions in made])
        sizes = {"state_dim": self.states.shape[1], "action_dim": self.actions.shape[1]}
        self.spec = StoreSpec(
            views=("front",),
            image_shapes=((8, 8),),
            fps=fps,
            num_frames=len(self.states),
            embodiment="arm",
            **sizes,
        )
        self.instructions = ("go",)
        self.instruction_of = np.zeros(len(self.states), np.int64)
        self.episodes = tuple(
            Episode(n, int(end) - len(one[1]), len(one[1]), "go")
            for n, (end, one) in enumerate(zip(ends, made, strict=True))
        )

    def frames(self, view: str, rows: np.ndarray) -> np.ndarray:
        return np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (len(rows), 8, 8, 3))


def smooth(seed: int, steps: int) -> Walk:
    """A walk in small steps, as a robot does: no turn is longer than half."""
    walk, random = Walk(seed, steps), np.random.default_rng(seed)
    walk.positions = np.cumsum(random.normal(size=(steps + 1, 3)) / 10, axis=0)
    turns, now = Rotation.from_rotvec(random.normal(size=(steps + 1, 3)) / 10), Rotation.identity()
    found = []
    for turn in turns:
        found.append(now := turn * now)
    walk.rotations = Rotation.concatenate(found)
    return walk


def every(walk: Walk, count: int) -> Walk:
    """The same walk, of which each so many-th state is seen."""
    few = Walk(0, walk.steps // count)
    few.positions, few.rotations = walk.positions[::count], walk.rotations[::count]
    few.open = walk.open[count - 1 :: count]  # the command that is in force when the step ends
    return few


MOTIONS: list[dict[str, Any]] = [
    {"kind": "absolute"},
    {"kind": "delta", "scale": 0.05},
    {"kind": "delta", "frame": "hand", "scale": 2.0},
]


@pytest.mark.parametrize("motion", MOTIONS, ids=["absolute", "delta", "hand"])
@pytest.mark.parametrize("canonical", [KEPT, CanonicalConfig(actions="delta", rotation="rotation_6d")])
def test_a_third_of_the_rate_is_the_walk_of_every_third_state(
    motion: dict[str, Any], canonical: CanonicalConfig
) -> None:
    walks = [smooth(number, steps) for number, steps in enumerate((12, 9))]
    said, _, _ = recorded(walks[0], motion, *FORMS)
    fast = apply(Numbers([recorded(walk, motion, *FORMS) for walk in walks], 30.0), said, canonical, 10.0)
    slow = Numbers([recorded(every(walk, 3), motion, *FORMS) for walk in walks], 10.0)
    assert apply(slow, said, canonical) is slow
    assert [episode.length for episode in fast.episodes] == [4, 3] and fast.spec.fps == 10
    # A state's gripper is that of its time, a command's the one in force when the step ends.
    np.testing.assert_allclose(fast.states[:, :-1], slow.states[:, :-1], atol=1e-5)
    assert fast.states[:, -1].tolist() == np.concatenate([walk.open[::3] for walk in walks]).tolist()
    np.testing.assert_allclose(fast.actions, slow.actions, atol=2e-5)
    assert fast.frames("front", np.arange(7))[:, 0, 0, 0].tolist() == [0, 3, 6, 9, 12, 15, 18]


@pytest.mark.parametrize("motion", MOTIONS, ids=["absolute", "delta", "hand"])
@pytest.mark.parametrize("rates", [(10.0, 25.0), (30.0, 20.0), (29.97, 10.0)])
def test_changes_that_are_split_or_summed_lead_where_the_recorded_ones_lead(
    motion: dict[str, Any], rates: tuple[float, float]
) -> None:
    old, new = rates
    walk = smooth(3, 60)
    said, states, actions = recorded(walk, motion, *FORMS)
    store = apply(Numbers([(said, states, actions)], old), said, KEPT, new)
    count = store.spec.num_frames
    assert count == min(int(59 / old * new + 1e-6) + 1, int(60 / old * new + 1e-6))
    # Where the robot is after the last action: at the time `count / new`, between two recorded states.
    time = count / new * old
    low = min(int(time), 59)
    share = time - low
    place = (1 - share) * walk.positions[low] + share * walk.positions[low + 1]
    turn = walk.rotations[low] * Rotation.from_rotvec(
        share * (walk.rotations[low].inv() * walk.rotations[low + 1]).as_rotvec()
    )
    moves, turns = store.actions[:, :3].astype(np.float64), decoded(store.actions[:, 3:6], FORMS[1])
    if motion["kind"] == "absolute":
        found, turned = moves[-1], turns[-1]
    else:
        found, turned = walk.positions[0].copy(), walk.rotations[0]
        for move, one in zip(moves * motion["scale"], turns, strict=True):
            hand = motion.get("frame") == "hand"
            found += turned.apply(move) if hand else move
            turned = turned * one if hand else one * turned
    np.testing.assert_allclose(found, place, atol=1e-4)
    assert (turned * turn.inv()).magnitude() < 1e-4
    # Never a gripper between open and closed, nor a quaternion that jumps to its negative.
    assert set(np.unique(store.actions[:, -1])) <= {0.0, 1.0} >= set(np.unique(store.states[:, -1]))
    quaternions = store.states[:, 3:7]
    np.testing.assert_allclose(np.linalg.norm(quaternions, axis=1), 1, atol=1e-5)


def test_what_nothing_is_said_of_and_what_is_not_known_is_never_averaged() -> None:
    walk = smooth(1, 9)
    said, states, actions = recorded(walk, MOTIONS[1], *FORMS)
    actions[4] = np.nan
    gone = apply(Numbers([(said, states, actions)], 30.0), said, KEPT, 10.0)
    assert np.isnan(gone.actions).any(axis=1).tolist() == [False, True, False]
    angles = np.array([[3.1], [-3.1], [3.1], [-3.1]], np.float32)
    move = ConventionsConfig.model_validate({"action": {"motion": {"kind": "absolute", "dimensions": "0-0"}}})
    free = Numbers([(move, np.hstack([np.arange(4.0)[:, None], angles]).astype(np.float32), angles)], 10.0)
    made = apply(free, move, KEPT, 20.0)
    np.testing.assert_allclose(made.states[:, 0], np.arange(7) / 2)
    assert set(np.unique(np.abs(made.states[:, 1]))) == {np.float32(3.1)}


@pytest.mark.parametrize("form", ["axis_angle", "euler_xyz", "quaternion_wxyz", "rotation_6d"])
def test_a_recording_that_counts_on_beyond_half_a_turn_goes_on(form: Any) -> None:
    angles = np.linspace(2.9, 9.9, 71)
    values = angles[:, None] * np.array([0, 0, 1])
    if form == "quaternion_wxyz":
        values = np.stack([np.cos(angles / 2), *np.zeros((2, 71)), np.sin(angles / 2)], axis=1)
    elif form == "rotation_6d":
        values = encoded(Rotation.from_rotvec(values), form)
    span = f"1-{values.shape[1]}"
    said = ConventionsConfig.model_validate(
        {
            "state": {"rotation": {"dimensions": span, "form": form}},
            "action": {"motion": {"kind": "absolute", "dimensions": "0-0"}},
        }
    )
    states = np.hstack([angles[:, None], values]).astype(np.float32)
    for rate in (25.0, 7.0):
        made = apply(Numbers([(said, states, states[:, :1])], 10.0), said, KEPT, rate)
        rows = np.arange(len(made.states)) * 10 / rate
        expected = np.stack([np.interp(rows, np.arange(71), column) for column in values.T], axis=1)
        np.testing.assert_allclose(made.states[:, 1:], expected, atol=2e-3)


def test_a_resampled_set_says_all_that_the_recorded_one_says() -> None:
    walk = recorded(smooth(0, 12), MOTIONS[0], *FORMS)
    store = Numbers([walk], 30.0)
    store.view_names, store.format, store.usual, store.answers = ("wrist",), "toy", walk[0], ("yes",)
    made = apply(store, walk[0], KEPT, 10.0)
    own = {"spec", "episodes", "states", "actions", "instruction_of", "remarks", "converted", "known_digests"}
    for name in EpisodeStore.__annotations__.keys() - own:
        assert getattr(made, name) is getattr(store, name), name
    assert made.views == ("wrist",)


def test_the_same_episodes_are_held_out_and_the_content_is_another() -> None:
    made = [recorded(smooth(n, 12), MOTIONS[0], *FORMS) for n in range(3)]
    stores = [apply(Numbers(made, 30.0), made[0][0], KEPT, rate) for rate in (None, 10.0, 15.0)]
    assert stores[0].identities == stores[1].identities == stores[2].identities
    assert len({store.fingerprint for store in stores}) == 3


def test_steps_of_another_rate() -> None:
    assert paces([10.0, float("inf"), 10.0]) is None
    found = paces([30.0, 10.0, float("inf")])
    assert found is not None
    assert [[in_own_steps(k, pace) for pace in found] for k in (0, 1, 24, -8)] == [
        [0, 0, 0],
        [1, 1, 1],
        [24, 8, 24],
        [-8, -3, -8],
    ]
    for pace in (found[0], found[1], paces([50.0, 12.0])[1]):  # pyright: ignore[reportOptionalSubscript]
        for own in range(1, 30):
            most = most_steps(own, pace)
            assert in_own_steps(most, pace) <= own < in_own_steps(most + 1, pace)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One world recorded at 30 and at 10 steps a second."""
    home, walks = tmp_path_factory.mktemp("rates"), [smooth(n, 36) for n in range(3)]
    found = [
        write_poses(home / name, some, MOTIONS[1], *FORMS, fps=fps)
        for name, some, fps in (("fast", walks, 30), ("slow", [every(walk, 3) for walk in walks], 10))
    ]
    return found


def bundle(sets: list[dict[str, Any]], home: Path, keep: list[Any], **data: Any) -> Any:
    sources = [one | {"resample": how} for one, how in zip(sets, keep, strict=True)]
    given = {"horizon": "0.4s", "batch_size": 4, "image_size": 16, "validation_fraction": 0.0, **data}
    config = squares_data.config(home, data={"sources": sources, **given, "cache": {"folder": str(home)}})
    return with_steps(config, say=False).data.build(DataNeeds(futures=(3,), states=(6,)))


def test_sources_brought_to_one_rate_are_one_data_set(sets: list[dict[str, Any]], tmp_path: Path) -> None:
    data = bundle(sets, tmp_path, [10.0, "keep"])
    assert ((data.spec.fps, data.spec.horizon) == (10, 4) and data.served is None) or data.served.sources
    first, second = (data.windows.rows_of(n, s.store.episodes) for n, s in enumerate(data.windows.sources))
    one, other = data.windows.gather(first), data.windows.gather(second)
    np.testing.assert_allclose(one.actions, other.actions, atol=1e-4)
    np.testing.assert_array_equal(one.action_mask, other.action_mask)
    assert any("30 steps a second are resampled to 10" in line for line in data.windows.remarks)


def test_kept_rates_share_the_time_of_chunks_futures_and_states(
    sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    data = bundle(sets, tmp_path, ["keep", "keep"])
    assert (data.spec.fps, data.spec.horizon) == (30, 12)
    first, second = (data.windows.rows_of(n, s.store.episodes) for n, s in enumerate(data.windows.sources))
    slow, fast = data.windows.gather(second[:1]), data.windows.gather(first[:1])
    assert slow.action_mask[0].any(dim=1).tolist() == [True] * 4 + [False] * 8
    assert fast.action_mask.all()
    later = data.windows.gather(second[1:3])  # 0.1 s is one row there, 0.2 s two
    np.testing.assert_array_equal(slow.futures[3].observation.state[0], later.observation.state[0])
    np.testing.assert_array_equal(slow.later_states.values[0, 0], later.observation.state[1])
    said = [line for line in data.windows.remarks if "of the actions in its chunks are masked" in line]
    assert len(said) == 2 and "slow: 10 steps a second; 75 %" not in said[0] and "slow: 10" in said[1]
    share = float(1 - data.windows.chunks(second)[1].any(dim=2).float().mean())
    assert f"{100 * share:.0f} %" in said[1]
    assert data.served is not None
    assert data.windows.horizon == 12 and not check_rows(Recordings.of_bundle(data, {}))
    long = bundle(sets, tmp_path, ["keep", "keep"], horizon=36)  # 12 rows of the slow one, which it has
    assert "too_long" not in {one.kind for one in check_rows(Recordings.of_bundle(long, {}))}
    with pytest.raises(UserError, match=r"data.horizon is 38, .*12 frames at 10 a second, 37 at 30"):
        check_lengths(data.parts[::-1], DataNeeds(), 38, (0,))
    robots = [(one.fps, one.horizon) for one in data.served.sources]
    assert robots == [(30, 12), (10, 4)]
    assert data.served.spec(data.spec, 1).fps == 10 and data.served.spec(data.spec, 1).horizon == 4


def test_rates_that_nothing_is_said_of_are_refused(sets: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"differ in fps.*\n.*30.*\n.*10.*\n.*sources.resample=RATE"):
        bundle(sets, tmp_path, ["auto", "keep"])
    with pytest.raises(UserError, match=r"do not say how its actions move the robot.*\n.*motion.*\n.*keep"):
        bundle([sets[0] | {"conventions": "none"}, sets[1]], tmp_path, [10.0, "keep"])
    with pytest.raises(UserError, match=r"episode 0 has 12 steps at 10 a second, 1 at 1 .*\n.*2 or more"):
        bundle(sets[1:], tmp_path, [1.0])

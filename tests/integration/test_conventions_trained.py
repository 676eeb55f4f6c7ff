"""Data sets of two conventions in one training: one form is learned, each robot is answered in its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fixtures import squares_data, squares_world
from fixtures.poses import STEPS, Walk, decoded, recorded, write_poses
from tutti import pipeline
from tutti.config.run_config import RunConfig
from tutti.data.config import DataConfig
from tutti.data.conventions import store as conventions
from tutti.data.sources import check_compatible, open_parts, stores_of
from tutti.runs.build import build_data
from tutti.runs.play import Player
from tutti.serving.export import export_policy
from tutti.serving.exports.lerobot import export_to_lerobot
from tutti.serving.factory import CheckpointPolicyFactory
from tutti.serving.policy import Policy, find_checkpoint
from tutti.storage.manifest import CONVENTIONS, SPEC, size_of
from tutti.training.checkpointing.config import InitFromConfig
from tutti.training.checkpointing.data_files import data_differences
from tutti.types import DataNeeds, UserError

FIRST: tuple[Any, ...] = ({"kind": "absolute"}, "quaternion_wxyz", "euler_xyz")
SECOND: tuple[Any, ...] = ({"kind": "delta", "frame": "hand", "scale": 0.05}, "euler_ZYX", "axis_angle")
CANONICAL = {"rotation": "rotation_6d", "actions": "relative"}
HORIZON = 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    home, walks = tmp_path_factory.mktemp("poses"), [Walk(number) for number in range(4)]
    return [write_poses(home / name, walks, *how) for name, how in (("first", FIRST), ("second", SECOND))]


class Arm(squares_world.Squares):
    """A pose that no action changes, seen from the front."""

    @property
    def state(self) -> np.ndarray:
        return recorded(Walk(0), *SECOND)[1][0]

    def step(self, action: np.ndarray) -> None:
        assert action.shape == (7,)

    def render(self) -> np.ndarray:
        return super().render()[:1]


@dataclass(frozen=True)
class Arms(squares_world.SquaresSuite):
    """Of a robot that is recorded in the second convention, at 10 steps a second."""

    robot: ClassVar[str] = "arm"
    state_dim: ClassVar[int] = 7
    action_dim: ClassVar[int] = 7

    def make(self, task: str, image_size: int | None = None, samples: int = 0) -> Arm:
        return Arm(task)


def config(sources: list[dict[str, Any]], **data: Any) -> RunConfig:
    data = {"sources": sources, "canonical": CANONICAL, "horizon": HORIZON, **data}
    return squares_data.config(
        Path(sources[0]["path"]),
        data={"batch_size": 4, "image_size": 16, "validation_fraction": 0.0, **data},
        model=squares_data.MODEL,
        objective={"align": None, "recon": None, "state": None},
        training={**squares_data.TRAINING, "steps": 2, "checkpoints": {"every": 0}},
    )


@pytest.fixture(scope="module")
def run(sources: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    pipeline.train(config(sources), folder)
    return folder


@pytest.mark.parametrize("actions", ["absolute", "delta", "relative"])
def test_the_same_poses_are_the_same_numbers_in_whatever_convention(
    sources: list[dict[str, Any]], actions: str, tmp_path: Path
) -> None:
    data = config(sources, canonical={**CANONICAL, "actions": actions}, cache={"folder": str(tmp_path)}).data
    bundle = data.build(DataNeeds())
    first, second = (
        bundle.windows.rows_of(number, one.store.episodes)
        for number, one in enumerate(bundle.windows.sources)
    )
    batches = [bundle.windows.gather(rows) for rows in (first, second)]
    np.testing.assert_array_equal(batches[0].action_mask, batches[1].action_mask)
    np.testing.assert_allclose(batches[0].actions, batches[1].actions, atol=1e-5)
    np.testing.assert_allclose(batches[0].observation.state, batches[1].observation.state, atol=1e-5)
    spec = bundle.spec
    assert (spec.state_dim, spec.action_dim) == (10, 10)
    # A chunk, back in data units, is what scipy makes of the poses.
    kind = actions
    chunk = bundle.normalizer.undo_action(batches[0].actions.numpy()[0])
    walk = Walk(0, steps=STEPS)
    expected = walk.actions(kind, "rotation_6d")[:HORIZON]
    np.testing.assert_allclose(chunk[:, :9], expected, atol=2e-5)
    np.testing.assert_allclose(chunk[:, 9], walk.open[:HORIZON], atol=1e-6)
    stats = bundle.normalizer.stats["arm"].action
    inside = batches[0].actions.numpy()[batches[0].action_mask.numpy()].reshape(-1, 10)
    assert np.abs(inside).max() < 1.5  # the statistics are those of what is learned
    assert (stats.min[9], stats.max[9]) == (0, 1)


def test_a_policy_answers_each_robot_in_its_own_convention(run: Path, tmp_path: Path) -> None:
    export = export_policy(run, tmp_path / "export")
    policies = [Policy.load(export, convention=number) for number in (0, 1)]
    plain = Policy.load(export, convention="learned")
    assert (policies[0].spec.state_dim, policies[0].spec.action_dim) == (8, 7)
    assert (policies[1].spec.state_dim, policies[1].spec.action_dim) == (7, 7)
    assert (plain.spec.state_dim, plain.spec.action_dim) == (10, 10)
    picture, walk = np.zeros((16, 16, 3), np.uint8), Walk(2)
    learned_state = np.hstack([walk.states("rotation_6d"), walk.open[:, None]])[1].astype(np.float32)
    learned = plain.predict(picture, learned_state, "go there").astype(np.float64)
    p, q = walk.positions[1], walk.rotations[1]
    targets, turns = p + learned[:, :3], decoded(learned[:, 3:9], "rotation_6d") * q
    for policy, (motion, state_form, action_form) in zip(policies, (FIRST, SECOND), strict=True):
        state = recorded(walk, motion, state_form, action_form)[1][1]
        actions = policy.predict(picture, state, "go there").astype(np.float64)
        moves, rotations = actions[:, :3], decoded(actions[:, 3:6], action_form)
        if motion["kind"] == "delta":  # follow them, as that robot would
            place, turn, found, turned = p, q, [], []
            for move, rotation in zip(moves, rotations, strict=True):
                place, turn = place + turn.apply(0.05 * move), turn * rotation
                found.append(place)
                turned.append(turn)
            moves = np.array(found)
            rotations = type(q).concatenate(turned)
        np.testing.assert_allclose(moves, targets, atol=1e-4)
        assert (rotations * turns.inv()).magnitude().max() < 1e-4
        np.testing.assert_allclose(actions[:, 6], 1 - 2 * learned[:, 9], atol=1e-5)


def test_a_policy_plays_in_the_numbers_and_at_the_rate_of_its_robot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squares_world.register(monkeypatch, Arms(views=("front",)))
    walks = [Walk(number) for number in range(4)]
    sources = [
        write_poses(tmp_path / str(fps), walks, *SECOND, fps=fps) | {"resample": "keep"} for fps in (10, 30)
    ]
    made = config(sources, canonical={"rotation": "rotation_6d"}, horizon="0.2s")
    controls = dict.fromkeys(("expert", "noop", "no_image", "wrong_instruction"), 0)
    played = {"suite": "squares", "episodes": 1, "max_decisions": 3, "videos_per_task": 0, "workers": 1}
    settings = made.evaluation.model_validate(played | {"actions_per_query": 1, "controls": controls})
    often = {"evaluate_every": 2, "evaluate_episodes": 1}
    changed = {"evaluation": settings, "training": made.training.model_copy(update=often)}
    pipeline.train(made.model_copy(update=changed), tmp_path / "run")
    spec = json.loads((find_checkpoint(tmp_path / "run") / SPEC).read_text())
    assert (spec["state_dim"], spec["action_dim"], spec["fps"], spec["horizon"]) == (10, 10, 30, 6)
    assert len([*(tmp_path / "run" / "training_evaluations").rglob("*.json")]) == 2
    folder = pipeline.evaluate(tmp_path / "run", overrides=['evaluation.actions_per_query="0.1s"'])
    protocol = json.loads((folder / "results.json").read_text())["protocol"]
    assert (protocol["chunk"], protocol["executed"]) == (2, 1)
    assert Player.of(tmp_path / "run").suite.fps == 10
    squares_world.register(monkeypatch, Arms(views=("front",), fps=30.0))
    with pytest.raises(UserError, match="actions a second: the policy has 10, the suite 30"):
        pipeline.evaluate(tmp_path / "run", name="fast")


def test_an_export_says_whose_convention_it_answers_in(run: Path, tmp_path: Path) -> None:
    first, second = (export_policy(run, tmp_path / str(robot), robot=robot) for robot in (0, 1))
    about = [json.loads((folder / "export.json").read_text()) for folder in (first, second)]
    assert [len(one["inputs"]["state"]) for one in about] == [8, 7]
    assert about[0]["conventions"]["action.motion"] == "dimensions 0-5: absolute, of state 0-6"
    assert about[1]["conventions"]["action.gripper"] == "dimension 6: -1 open, 1 closed"
    assert about[0]["outputs"]["actions"][6]["max"] == 1  # as recorded: closed
    state = recorded(Walk(1), *SECOND)[1][0]
    picture = np.zeros((16, 16, 3), np.uint8)
    np.testing.assert_array_equal(
        Policy.load(second).predict(picture, state, "go"),
        Policy.load(first, convention=1).predict(picture, state, "go"),
    )
    export_to_lerobot(run, tmp_path / "lerobot", robot=1)
    config = json.loads((tmp_path / "lerobot" / "config.json").read_text())
    features = config["input_features"]["observation.state"], config["output_features"]["action"]
    assert [one["shape"] for one in features] == [[7], [7]]  # as that robot has them, not as they are learned
    prints = {CheckpointPolicyFactory(folder).fingerprint for folder in (first, second)}
    assert len(prints) == 2  # they are evaluated apart
    with pytest.raises(UserError, match=r"robot: .*\(0 poses0/first, 1 poses0/second\), found 2"):
        export_policy(run, tmp_path / "third", robot=2)
    with pytest.raises(UserError, match=r"state: rotation, dimensions 3-6, is .*length 1"):
        Policy.load(first).predict(picture, np.zeros(8, np.float32), "go")


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"closed": 1.0', '"closed": -1.0'),
        lambda text: text.replace('"dimensions": "3-5"', '"dimensions": "3-9"'),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"rotation_6d"', '"quaternion_wxyz"'),
        lambda text: text[: len(text) // 2],
    ],
)
def test_a_damaged_file_of_conventions_is_refused(edit: Any, run: Path, tmp_path: Path) -> None:
    folder = export_policy(run, tmp_path / "export")
    path = folder / CONVENTIONS
    path.write_text(edit(path.read_text()))
    about = json.loads((folder / "export.json").read_text())
    about["files"][CONVENTIONS] = size_of(path.read_bytes(), "sha256")
    (folder / "export.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"conventions\.json: cannot be used"):
        Policy.load(folder)


def test_a_run_with_other_conventions_does_not_go_on(
    run: Path, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    other = config(sources, canonical={**CANONICAL, "rotation": "quaternion_wxyz"})
    longer = {"training": other.training.model_copy(update={"steps": 4})}
    with pytest.raises(UserError, match=r"data\.canonical\.rotation: .*rotation_6d.* -> .*quaternion_wxyz"):
        pipeline.train(other.model_copy(update=longer), copy)
    edited = [{**sources[0], "conventions": json.loads(json.dumps(sources[0]["conventions"]))}, sources[1]]
    edited[0]["conventions"]["action"]["gripper"] |= {"open": 1.0, "closed": -1.0}
    with pytest.raises(UserError, match=r"data\.sources\.0\.conventions\.action\.gripper"):
        pipeline.train(config(edited), copy)


def test_a_run_without_conventions_keeps_none(tmp_path: Path) -> None:
    home = squares_data.write(tmp_path / "data", squares_data.episodes(6))
    made = squares_data.config(
        home, data={"batch_size": 2}, model=squares_data.MODEL, training={**squares_data.TRAINING, "steps": 2}
    )
    pipeline.train(made, tmp_path / "run")
    assert not list((tmp_path / "run").rglob(CONVENTIONS))


def opened(sources: list[dict[str, Any]], **canonical: Any) -> Any:
    data = DataConfig.model_validate({"sources": sources, "canonical": canonical})
    return check_compatible(open_parts(data.sources, data.canonical))


def test_sources_in_two_conventions_are_not_mixed_unless_they_become_one(
    sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    walks = [Walk(9)]
    alike = [
        write_poses(tmp_path / name, walks, {"kind": kind}, "euler_xyz", "euler_xyz")
        for name, kind in (("a", "absolute"), ("d", "delta"))
    ]
    turned = write_poses(tmp_path / "t", walks, {"kind": "absolute"}, "euler_xyz", "axis_angle")
    silent = {"path": alike[0]["path"], "conventions": "none"}
    for pair, words in (
        (alike, "of the action, at the motion"),
        ([alike[0], turned], "at the rotation 3"),
        ([alike[0], silent], "at the gripper 6"),
    ):
        with pytest.raises(UserError, match=words) as error:
            opened(pair)
        assert "expected:" in str(error.value) and "data.canonical" in str(error.value)
    assert opened(alike, actions="absolute").action_dim == 7
    assert opened([alike[0], turned], rotation="quaternion_xyzw").action_dim == 8
    with pytest.raises(UserError, match="no source names a rotation"):
        opened([silent], rotation="rotation_6d")


def test_numbers_that_cannot_be_are_refused_with_their_place(tmp_path: Path) -> None:
    walk = Walk(0)
    walk.open[3] = 1.5
    source = write_poses(tmp_path / "far", [Walk(1), walk], {"kind": "absolute"}, "euler_xyz", "euler_xyz")
    with pytest.raises(UserError) as error:
        opened([source])
    said = str(error.value)
    assert all(
        word in said
        for word in (
            str(tmp_path / "far"), "sources.conventions.state.gripper, dimension 6,", "episode 1, row 3",
            "1 such", "expected: 0 to 0.08", "found:    0.12", "cure:", "sources.exclude=[1]",
        )
    ), said  # fmt: skip
    assert opened([{**source, "exclude": [1]}]).action_dim == 7
    zero = {**source, "exclude": [1]}
    zero["conventions"] = json.loads(json.dumps(source["conventions"]))
    zero["conventions"]["state"]["rotation"] = {"dimensions": "2-5", "form": "quaternion_xyzw"}
    zero["conventions"]["action"].pop("motion")
    with pytest.raises(UserError, match=r"rotation, dimensions 2-5, .*\n.*quaternion_xyzw of length 1"):
        opened([zero], rotation="rotation_6d")
    assert opened([zero]).state_dim == 7  # it is kept, and its length is no matter


def test_statistics_of_another_form_are_not_kept(
    run: Path, sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    begin = {"run": str(run), "statistics": "kept"}
    same, other = config(sources), config(sources, canonical={"rotation": "matrix", "actions": "relative"})
    training = same.training.model_copy(update={"init_from": InitFromConfig.model_validate(begin)})
    bundle = build_data(same.model_copy(update={"training": training}), tmp_path / "same")
    assert bundle.normalizer.to_dict() == build_data(same, tmp_path / "own").normalizer.to_dict()
    moved = config(sources, canonical={**CANONICAL, "frame": "hand"})
    for made, words in ((other, "dimensions"), (moved, r"another form.*\n.*frame: .*base.* -> .*hand")):
        with pytest.raises(UserError, match=words):
            build_data(made.model_copy(update={"training": training}), tmp_path / "other")


def test_a_checkpoint_notices_other_conventions_by_itself() -> None:
    def texts(closed: int) -> dict[str, str]:
        gripper = {"dimension": 0, "open": 1, "closed": closed}
        said = {"canonical": {}, "sources": [{"name": "a", "conventions": {"action": {"gripper": gripper}}}]}
        return {SPEC: "{}", CONVENTIONS: json.dumps(said)}

    assert data_differences(texts(0), texts(0)) == []
    assert data_differences(texts(0), texts(-1)) == ["conventions.sources.0.action.gripper.closed: 0 -> -1"]
    (line, *_) = data_differences({SPEC: "{}"}, texts(0))
    assert line.startswith("conventions.canonical: (absent)")


def test_many_rows_are_learned_in_blocks_to_the_same_numbers(
    sources: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned() -> list[np.ndarray]:
        data = config(sources).data
        stores = stores_of(open_parts(data.sources, data.canonical))
        return [values for store in stores for values in (store.states, store.actions)]

    whole = learned()
    monkeypatch.setattr(conventions, "BLOCK", 10)  # rows; episodes of 7 stay whole
    for mine, theirs in zip(learned(), whole, strict=True):
        np.testing.assert_array_equal(mine, theirs)

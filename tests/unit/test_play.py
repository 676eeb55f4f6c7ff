"""`tutti play`: a policy acts where it is told to, what it does is a moving picture, mistakes are told.

And how the policy that comes with Tutti is made, and the picture of one scene and two sentences.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import picture_obey
import pytest
import release_policy
from PIL import Image
from typer.testing import CliRunner

from fixtures import squares_data, squares_world
from fixtures.rendering import require_rendering
from tutti import pipeline
from tutti.cli.app import app
from tutti.config import files
from tutti.evaluation.closed_loop.videos import BAND, GAP, HELD, encode_gif, told
from tutti.runs.play import Player, play_policy, write_pictures
from tutti.serving.policy import Policy
from tutti.suites.metaworld.suite import METAWORLD_8
from tutti.types import UserError

EVALUATION = {
    "suite": "squares",
    "episodes": 2,
    "first_seed": 1000,
    "max_decisions": 12,
    "actions_per_query": 2,
    "workers": 1,
    "videos_per_task": 0,
    "controls": {"expert": 0, "noop": 2, "no_image": 0, "wrong_instruction": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares_data.train(tmp_path_factory.mktemp("trained"), EVALUATION)


@pytest.fixture(autouse=True)
def squares(monkeypatch: pytest.MonkeyPatch) -> None:
    squares_world.register(monkeypatch)


def play(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["play", *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_run_checkpoint_and_export_play_the_same_and_say_where_the_picture_is(
    trained: Path, tmp_path: Path
) -> None:
    checkpoint = next((trained / "run" / "checkpoints").iterdir())
    said: list[str] = []
    for number, policy in enumerate((trained / "run", checkpoint, trained / "export")):
        code, text = play(str(policy), "--task", "blue", "--task", "red", "--to", str(tmp_path / str(number)))
        assert code == 0
        said.append(text.partition(" blue, ")[2].replace(f"{tmp_path}/{number}/", ""))
        assert len(list((tmp_path / str(number)).iterdir())) == 2
    assert said[0] == said[1] == said[2]
    assert re.match(
        r'start 1000, told "to the blue square": (success after \d+|no success in 12) decisions -> blue-',
        said[0],
    )


def test_each_form_shows_the_rollout_from_its_start_to_its_end(trained: Path, tmp_path: Path) -> None:
    ((rollout, paths),) = play_policy(trained / "run", ("red",), to=tmp_path, forms=("gif", "mp4"))
    gif, mp4 = paths
    size = 2 * squares_data.SIZE + GAP, squares_data.SIZE + BAND
    with Image.open(gif) as picture:
        assert picture.size == size and picture.info["loop"] == 0
        assert 1 < getattr(picture, "n_frames", 1) <= rollout.decisions + 1
    with av.open(str(mp4)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert (frames[0].shape[1], frames[0].shape[0]) == size
    assert len(frames) >= rollout.decisions + 1
    again = play_policy(trained / "run", ("red",), to=tmp_path / "again")
    assert again[0][1][0].read_bytes() == gif.read_bytes()


def test_a_sentence_chooses_its_scene_and_a_scene_takes_any_sentence(trained: Path, tmp_path: Path) -> None:
    player = Player.of(trained / "run")
    assert [(one.task, one.seed) for one in player.plan((), "Move to the BLUE  square", None)] == [
        ("blue", 1000)
    ]
    (other,) = player.plan(("red",), "move to the blue square", 7)
    assert (other.task, other.told, other.seed) == ("red", "blue", 7)
    assert [one.task for one in player.plan((), None, None)] == ["red"]
    run, sentence = str(trained / "run"), "to the red square"
    code, text = play(run, sentence, "--task", "blue", "--to", str(tmp_path))  # said without its option
    assert code == 0 and f'told "{sentence}"' in text
    assert "give one of them" in play(run, sentence, "--instruction", "another")[1]
    assert [one.task for one in player.plan(("all",), "dance", None)] == ["red", "blue"]
    assert [one.instruction for one in player.plan(("red",), None, None)] == ["to the red square"]


def test_the_goal_is_that_of_the_scene_where_the_sentence_is_of_another_task(
    trained: Path, tmp_path: Path
) -> None:
    _, text = play(str(trained / "run"), "-t", "red", "-i", "to the blue square", "--to", str(tmp_path))
    assert "(its goal is red; the sentence is one of blue)" in text


def test_new_words_and_starts_of_the_training_are_noted(trained: Path, tmp_path: Path) -> None:
    code, text = play(
        str(trained / "run"), "-i", "dance to the square!", "--seed", "5003", "--to", str(tmp_path)
    )
    assert code == 0
    assert "! 'dance': in no training sentence of the suite squares." in text
    assert "! start 5003 is among those of the training" in text
    _, text = play(str(trained / "run"), "-i", "Go to the Blue square", "--to", str(tmp_path))
    assert "! " not in text


def test_mistakes_name_what_is_known(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(trained / "run")
    assert play(run, "--task", "rde") == (
        2,
        "error: --task rde: not a task of the suite squares. Known: red, blue, or all. Did you mean 'red'?",
    )
    assert "no letters in it" in play(run, "-i", "???", "--to", str(tmp_path))[1]
    assert "no such run" in play(str(tmp_path / "nowhere"))[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "released_policy", lambda: tmp_path / "none")
    code, text = play()
    assert code == 2 and text.startswith("error: No policy is named, none comes with this installation")


def test_without_a_simulator_it_is_said_before_the_policy_is_read(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NotInstalled(squares_world.SquaresSuite):
        def check_rendering(self) -> None:
            raise UserError("The simulator is not installed. Install it with: pip install ...")

    squares_world.register(monkeypatch, NotInstalled())
    monkeypatch.setattr("tutti.runs.play.CheckpointPolicyFactory", None)
    with pytest.raises(UserError, match="simulator is not installed"):
        play_policy(trained / "run")


def test_a_policy_without_a_simulator_is_told_what_measures_it(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("suite: squares", "suite: none"))
    with pytest.raises(UserError, match="no simulator is known"):
        Player.of(run)


def test_a_rollout_longer_than_the_simulator_plays_is_refused_as_an_evaluation_refuses_it(
    trained: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("max_decisions: 12", "max_decisions: 51"))
    for refuses in (Player.of, pipeline.evaluate):
        with pytest.raises(UserError, match=r"max_decisions is 51, .* after 50 control steps"):
            refuses(run)


def test_where_no_policy_is_named_the_released_one_acts_then_that_of_the_demo(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "released_policy", lambda: trained / "none")
    shutil.copytree(trained / "run", tmp_path / "runs" / "demo")
    assert "policy runs/demo/checkpoints/" in play("--task", "red")[1]
    monkeypatch.setattr(files, "released_policy", lambda: trained / "export")
    assert f"policy {trained}/export, suite squares" in play("--task", "red")[1]
    assert list((tmp_path / "play").glob("red-*-1000-*.gif"))


def test_a_released_policy_with_a_changed_byte_does_not_act(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(trained / "export", tmp_path / "export")
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(files, "released_policy", lambda: copy)
    code, text = play()
    assert code == 2 and "model.safetensors: damaged, its checksum differs." in text


def test_a_start_that_is_solved_already_is_one_picture(trained: Path, tmp_path: Path) -> None:
    ((rollout, _),) = play_policy(trained / "run", ("red",), to=tmp_path / "whole")
    solved = replace(rollout, actions=rollout.actions[:0], decisions=0, success=True)
    paths = write_pictures(squares_world.SquaresSuite(), solved, tmp_path, ("gif", "mp4"))
    with Image.open(paths[0]) as picture:
        assert getattr(picture, "n_frames", 1) == 1
    assert paths[1].stat().st_size > 0


@pytest.mark.parametrize("text", ["go", "open the tap " * 40, "\u00e9" * 300, ""])
def test_any_sentence_fits_its_band(text: str) -> None:
    frames = np.full((3, 2, 120, 120, 3), 77, np.uint8)
    pictures = told(frames, text, success=True)
    assert pictures.shape == (3, 120 + BAND, 240 + GAP, 3)
    band = pictures[0, :BAND]
    assert not (band[:, -5:] > 100).any() and not (band[:2] > 100).any() and not (band[-2:] > 100).any()
    assert (pictures[:, BAND:, :120] == 77).all()
    assert (pictures[-1, :BAND] != pictures[0, :BAND]).any()  # whether it succeeded
    with Image.open(io.BytesIO(encode_gif(pictures, 20.0))) as gif:
        assert gif.info["duration"] == 1000 * HELD[0] + 50  # the second picture is the first again


def test_a_release_holds_what_a_policy_needs_with_sums_and_a_card_of_its_own_scores(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, to = shutil.copytree(trained / "run", tmp_path / "run"), tmp_path / "released" / "demo"
    assert release_policy.main([str(run), "--to", str(to)]) == 2  # it has not been evaluated
    assert not to.exists()
    pipeline.evaluate(run)
    pipeline.report(run)
    assert release_policy.main([str(run), "--to", str(to)]) == 0
    assert release_policy.main([str(run), "--to", str(to)]) == 2  # it exists
    release_policy.check_release(to)
    assert (
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=to, check=False).returncode
        == 0
    )
    assert {path.name for path in to.iterdir()} == {
        *("README.md", "SHA256SUMS", "config.yaml", "export.json", "model.safetensors", "normalizer.json"),
        *("spec.json", "starts.json", "tokenizer.json"),
    }
    shutil.rmtree(run)
    assert Policy.load(to).spec.views
    monkeypatch.setattr(files, "released_policy", lambda: to)
    assert play("--task", "blue", "--to", str(tmp_path / "play"))[0] == 0
    card = (to / "README.md").read_text()
    assert re.search(r"\| blue \| [0-2]/2 \[\d+ to \d+ %\] \| [0-2]/2 \[", card)
    assert "starts 5000 to 5005" in card and "starts 1000 to 1001, which training did not have" in card
    assert "With the wrong instruction, success on red and blue goes from" in card
    (to / "README.md").write_text(card.replace("Apache", "Other"))
    with pytest.raises(UserError, match=r"not as SHA256SUMS says: README\.md"):
        release_policy.check_release(to)


def test_the_policy_that_comes_with_tutti_is_whole_and_small() -> None:
    folder = files.released_policy()
    release_policy.check_release(folder)
    assert release_policy.size(folder) <= release_policy.MOST


@pytest.mark.simulation
def test_two_tasks_have_one_start_and_move_alike() -> None:
    require_rendering()
    scene, other = (METAWORLD_8.make(task) for task in picture_obey.TASKS)
    other.reset(3)
    picture_obey.same_start(scene, other, 5)
    for action in ((0.5, 1, -1, -1), (1, -1, 0, 1), (0, 1, -1, 0)):
        for one in (scene, other):
            one.step(np.array(action, np.float32))
        np.testing.assert_allclose(scene.save_physics(), other.save_physics(), rtol=0, atol=1e-9)


def test_panels_end_together_and_the_shorter_one_waits() -> None:
    long, short = (np.full((count, 4, 6, 3), count, np.uint8) for count in (5, 2))
    short[-1] = 99
    both = picture_obey.beside([long, short])
    assert both.shape == (5, 4, 12 + picture_obey.GAP, 3)
    assert both[:, 0, -1, 0].tolist() == [2, 99, 99, 99, 99] and (both[:, 0, 0] == 5).all()

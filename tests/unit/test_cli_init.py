"""`tutti init`: four questions, or none, and a config that the doctor accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fixtures import pair_sets, squares_data
from fixtures.format_sets import write_robomimic
from tutti.cli.app import app
from tutti.config.run_config import load_config


def run(*arguments: str, answers: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), input=answers)
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_with_yes_every_guess_is_taken_and_the_doctor_accepts_it() -> None:
    squares_data.write(Path("set"), squares_data.episodes(8))
    code, said = run("init", "set", "--yes", "--to", "squares.yaml")
    assert (code, said) == (0, "Written: squares.yaml. Next: tutti doctor squares.yaml")
    text = Path("squares.yaml").read_text()
    assert text.startswith("# Trains on set (lerobot, ") and text.count("\n# ") > 6
    config = load_config(Path("squares.yaml"))
    assert config.name == "squares" and config.evaluation.suite == "none"
    assert (config.data.horizon, config.data.image_size) == (squares_data.LENGTH // 4, squares_data.SIZE)
    code, said = run("data", "check", "squares.yaml")
    assert code == 0 and "Nothing is wrong" in said, said
    quick = squares_data.config(Path("set")).sections("model", "objective", "training")
    quick["data"] = {"image_size": squares_data.SIZE, "horizon": 4, "batch_size": 16, "prefetch": 0}
    del quick["objective"]["state"]["gripper"]  # as it was guessed
    Path("quick.yaml").write_text(yaml.safe_dump({"base": "squares.yaml", "name": "quick", **quick}))
    code, said = run("doctor", "quick.yaml", "--updates", "2")
    assert code in (0, 1) and "Reach, phase" in said and "error:" not in said
    code, said = run("init", "set", "--yes", "--to", "squares.yaml")
    assert code == 2 and "there is such a file already" in said


def test_answers_win_over_guesses_and_are_checked() -> None:
    write_robomimic(Path("set.hdf5"), squares_data.episodes(4))
    answers = "obs/agentview_image\nnone\n\nopen the drawer\n"
    code, said = run("init", "set.hdf5", answers=answers)
    assert code == 0 and [f"{number}. W" in said for number in (1, 2, 3, 4)] == [True] * 4, said
    source = load_config(Path("mine.yaml")).data.sources[0]
    assert source.views == ("obs/agentview_image",) and (source.state, source.action) == ("none", "auto")
    assert source.wanted.say == "open the drawer"
    assert source.open().instructions == ("open the drawer",)
    code, said = run("init", "set.hdf5", "--to", "b.yaml", answers="\n\nobs/agentview_image\n\n")
    assert code == 2 and "sources.action is a picture" in said and not Path("b.yaml").exists()
    assert run("init", "set.hdf5", "--to", "2026.yaml", "--yes")[0] == 0
    assert load_config(Path("2026.yaml")).name == "2026"  # which YAML takes for a number
    for name in ("b.json", "-b.yaml"):
        assert run("init", "set.hdf5", f"--to={name}", "--yes")[0] == 2
    assert run("init", "nowhere", "--yes")[0] == 2
    code, said = run("init", str(pair_sets.write(Path("pairs"), "lines")), "--yes", "--to=c.yaml")
    assert code == 2 and "train beside a robot's data set" in said

"""Evaluations of one policy side by side: extended, never mixed, and of a policy without its run and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures import squares_data, squares_world
from fixtures.squares_data import MODEL, TRAINING
from tutti import pipeline
from tutti.evaluation.folder import EvaluationFolder
from tutti.runs.folder import RunFolder
from tutti.runs.play import Player
from tutti.types import UserError

EVALUATION = {
    "suite": "squares",
    "episodes": 3,
    "first_seed": 1000,
    "max_decisions": 4,
    "workers": 1,
    "videos_per_task": 0,
    "controls": {"expert": 1, "noop": 1, "no_image": 1, "wrong_instruction": 1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squares_data.train(tmp_path_factory.mktemp("trained"), EVALUATION)


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    squares_world.register(monkeypatch)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def records(folder: Path) -> dict[str, int]:
    """When each rollout's record was written."""
    return {str(one.relative_to(folder)): one.stat().st_mtime_ns for one in folder.glob("*/*/*.json")}


def evaluate(policy: Path, *overrides: str, **options: Any) -> Path:
    return pipeline.evaluate(policy, overrides=[f"evaluation.{one}" for one in overrides], **options)


def test_more_starts_keep_those_that_were_played(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = evaluate(home / "run")
    assert folder == home / "run" / "evaluation"
    first, seconds = records(folder), RunFolder(home / "run").seconds["evaluate"]
    assert len(first) == 2 * (3 + 4) and (folder / "open_loop.json").is_file()
    evaluate(home / "run", "episodes=7")
    now = records(folder)
    assert {name: now[name] for name in first} == first, "nothing is played twice"
    assert len(now) == len(first) + 2 * 4
    found = results(folder)
    assert found["resumed"] == len(first)
    seeds = [one["seed"] for one in found["rollouts"] if (one["task"], one["condition"]) == ("red", "policy")]
    assert seeds == list(range(1000, 1007)), "the same seeds come first"
    assert RunFolder(home / "run").config().evaluation.episodes == 7
    assert RunFolder(home / "run").seconds["evaluate"] >= seconds
    assert "goes on: evaluation.episodes: 3 -> 7" in capsys.readouterr().out


def test_fewer_starts_count_the_first_ones_and_keep_the_rest(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = evaluate(home / "run")
    before = records(folder)
    evaluate(home / "run", "episodes=2")
    assert records(folder) == before
    assert results(folder)["scores"]["policy"]["tasks"][0]["episodes"] == 2
    assert "2 rollouts of starts or tasks that are not asked for now are kept" in capsys.readouterr().out
    evaluate(home / "run", "episodes=3", "tasks=[red]")
    assert [one["task"] for one in results(folder)["scores"]["policy"]["tasks"]] == ["red"]
    assert "7 rollouts of starts" in capsys.readouterr().out
    evaluate(home / "run", "tasks=suite")
    assert records(folder) == before


def test_videos_and_workers_never_play_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = evaluate(home / "run")
    before = records(folder)
    evaluate(home / "run", "videos_per_task=1")
    index = json.loads((folder / "videos" / "index.json").read_text())["videos"]
    assert [one["task"] for one in index] == ["red", "blue"]
    capsys.readouterr()
    evaluate(home / "run", "workers=2")
    assert "done before, kept" in capsys.readouterr().out
    evaluate(home / "run")
    assert records(folder) == before


def test_the_suites_limit_is_its_own_wherever_it_is_played_and_not_that_of_a_demonstration(
    home: Path,
) -> None:
    path = home / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["record"] |= {"suite": "squares", "max_decisions": 3}
    values["evaluation"]["max_decisions"] = "suite"
    path.write_text(yaml.safe_dump(values))
    assert Player.of(home / "run").spec.max_decisions == 50
    assert results(evaluate(home / "run"))["protocol"]["max_decisions"] == 50


WRONG = {
    "first_seed=2000": ("evaluation.first_seed: 1000 -> 2000", "first_seed-2000"),
    "max_decisions=3": ("max_decisions: 4 -> 3", "max_decisions-3"),
    "split=train": ("split", "split-train"),
    "actions_per_query=1": ("actions_per_query: 2 -> 1", "actions_per_query-1"),
    "weights=raw": ("policy: step-000004, ema -> step-000004, raw", "raw"),
    "checkpoint=2": ("policy: step-000004, ema -> step-000002, ema", "step-000002"),
    "suite=none": ("evaluation.suite", "suite-none"),
}


def test_what_makes_rollouts_wrong_is_refused_and_another_name_keeps_both(home: Path) -> None:
    run = home / "run"
    folder = evaluate(run)
    before, made = records(folder), (folder / "results.json").read_bytes()
    for override, (said, name) in WRONG.items():
        with pytest.raises(UserError, match="another evaluation") as refused:
            evaluate(run, override)
        assert said in str(refused.value) and f"(--name {name})" in str(refused.value)
        other = evaluate(run, override, "episodes=1", name=name)
        assert other == run / "evaluations" / name
        evaluate(run, name=name)  # goes on with what it was made with
    assert records(folder) == before and (folder / "results.json").read_bytes() == made
    assert RunFolder(run).config().evaluation.first_seed == 1000
    policies = {
        name: results(run / "evaluations" / name)["protocol"]["policy"] for name in ("raw", "step-000002")
    }
    assert policies == {"raw": "step-000004, raw", "step-000002": "step-000002, ema"}
    assert results(run / "evaluations" / "first_seed-2000")["protocol"]["seed_first"] == 2000


def test_another_policy_or_simulator_is_never_mixed_in_and_redo_plays_everything(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "run"
    folder = evaluate(run)
    before = records(folder)
    evaluate(run, redo=True)
    again = records(folder)
    assert again.keys() == before.keys() and all(again[name] > before[name] for name in before)
    assert "starting again: --redo" in capsys.readouterr().out
    squares_world.register(monkeypatch, squares_world.SquaresSuite(fingerprint="squares 2"))
    evaluate(run)
    assert "kept" in (said := capsys.readouterr().out) and "simulator: squares 1 -> squares 2" in said
    with pytest.raises(UserError, match="simulator: squares 1 -> squares 2"):
        evaluate(run, "episodes=4")
    squares_world.register(monkeypatch)
    last = run / "checkpoints" / "step-000004"
    shutil.rmtree(last)
    shutil.copytree(run / "checkpoints" / "step-000002", last)  # the same name, another policy
    with pytest.raises(UserError, match=r"policy: step-000004, ema -> step-000002, ema\n"):
        evaluate(run)
    assert records(folder) == again
    evaluate(run, redo="if changed")
    assert all(records(folder)[name] > again[name] for name in again)


def test_other_versions_keep_what_is_finished_and_do_not_extend_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(home / "run")
    monkeypatch.setattr("tutti.serving.factory.__version__", "99")
    evaluate(home / "run")
    assert "kept" in (said := capsys.readouterr().out) and "other versions of torch or Tutti" in said
    with pytest.raises(UserError, match="other versions of torch or Tutti"):
        evaluate(home / "run", "episodes=4")


def test_an_interrupted_evaluation_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fragile(squares_world.SquaresSuite):
        def make(self, task: str, image_size: int | None = None, samples: int = 0) -> squares_world.Squares:
            if task == "blue":
                raise UserError("the power went out")
            return super().make(task)

    squares_world.register(monkeypatch, Fragile())
    with pytest.raises(UserError, match="power"):
        evaluate(home / "run")
    played = records(home / "run" / "evaluation")
    squares_world.register(monkeypatch)
    with pytest.raises(UserError, match="first_seed: 1000 -> 2000"):
        evaluate(home / "run", "first_seed=2000")
    folder = evaluate(home / "run")
    assert results(folder)["resumed"] == len(played) == 7


@pytest.mark.parametrize("kind", ["export", "copied", "inside"])
def test_a_policy_is_judged_without_its_data(
    home: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    in_run = results(evaluate(home / "run"))
    checkpoint = home / "run" / "checkpoints" / "step-000004"
    policy = {"export": home / "export", "copied": home / "alone", "inside": checkpoint}[kind]
    if kind == "copied":
        shutil.copytree(checkpoint, policy)
    if kind != "inside":
        shutil.rmtree(home / "run")
    folder = evaluate(policy)
    own = home / "run" / "evaluations" / "step-000004" if kind == "inside" else Path(f"{policy}-evaluation")
    assert folder == own
    assert (folder / "open_loop.json").is_file() == (kind == "inside")
    assert ("open-loop errors are left out" in capsys.readouterr().out) == (kind != "inside")
    found = results(folder)
    assert found["scores"] == in_run["scores"]
    assert found["protocol"] == in_run["protocol"], "also the starts that it was trained on"
    assert found["protocol"]["trained_seeds"] == ["5000 to 5005"]
    with pytest.raises(UserError, match=r"overlap the demonstrations' \(seeds 5000 to 5005\)"):
        evaluate(policy, "first_seed=5003", name="guarded")
    assert evaluate(policy, "episodes=1", to=home / "else") == home / "else"
    evaluate(policy, "episodes=2", to=home / "else")
    with pytest.raises(UserError, match=r"\(--to FOLDER\)"):
        evaluate(policy, "first_seed=0", to=home / "else")


def test_a_policy_of_before_says_that_its_starts_are_not_known(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((home / "export" / "export.json").read_text())
    del about["files"]["starts.json"]
    (home / "export" / "export.json").write_text(json.dumps(about))
    folder = evaluate(home / "export", "episodes=1")
    assert "starts of the training data are not known" in capsys.readouterr().out
    assert results(folder)["protocol"]["starts_not_known"] == [str(home / "export" / "starts.json")]


def test_what_cannot_be_evaluated_is_refused_with_the_cure(home: Path) -> None:
    export = home / "export"
    for options, said in (
        ({"name": "a/b"}, "--name"),
        ({"name": "mine", "to": home / "x"}, "Give one of them"),
        ({"to": home / "run"}, "no folder of an evaluation: it holds"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate(export, **options)
    with pytest.raises(UserError, match="lies in no run"):
        evaluate(export, "suite=none")
    with pytest.raises(UserError, match="holds the moving average alone"):
        evaluate(export, "weights=raw")
    with pytest.raises(UserError, match=r"(?s)does not fit the suite metaworld-8.*state.*action.*front"):
        evaluate(export, "suite=metaworld-8")
    with pytest.raises(UserError, match="no checkpoint here"):
        evaluate(home / "data")
    with pytest.raises(UserError, match=r"evaluation\.checkpoint"):
        evaluate(export, "checkpoint=best")
    assert not Path(f"{export}-evaluation").exists(), "nothing is left behind"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"policy": 3}', '{"config": {"episodes": "x"}}'])
def test_a_torn_or_foreign_manifest_is_named_with_the_cure(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json.*Delete"):
        EvaluationFolder(tmp_path)


def test_settings_of_another_version_are_named_with_the_cure(home: Path) -> None:
    path = evaluate(home / "run", "episodes=1") / "evaluation.json"
    values = json.loads(path.read_text())
    values["config"]["gone"] = 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"evaluation\.json.*gone.*Delete"):
        evaluate(home / "run")
    values["config"].pop("gone")
    values["config"].pop("videos_per_task")  # a key that is younger has its default
    path.write_text(json.dumps(values))
    evaluate(home / "run")


def test_a_policy_without_a_state_is_judged_too(home: Path) -> None:
    source = {"path": str(home / "data"), "state": "none"}
    section = {"sources": [source], "batch_size": 2, "image_size": 16, "validation_fraction": 0.3}
    objective = {"state": None}
    config = squares_data.config(
        home / "data",
        data=section,
        model=MODEL,
        training=TRAINING,
        objective=objective,
        evaluation=EVALUATION | {"episodes": 1},
    )
    pipeline.train(config, home / "blind")
    folder = evaluate(home / "blind")
    assert results(folder)["scores"]["policy"]["tasks"][0]["episodes"] == 1
    assert (folder / "open_loop.json").is_file()


def test_training_again_deletes_every_evaluation_of_the_run(home: Path) -> None:
    evaluate(home / "run", "episodes=1")
    evaluate(home / "run", "episodes=1", name="raw")
    pipeline.train(RunFolder(home / "run").config(), home / "run", redo=True)
    assert not (home / "run" / "evaluation").exists() and not (home / "run" / "evaluations").exists()

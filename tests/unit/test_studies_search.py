"""`tutti tune --space`: what is proposed, ASHA's rungs, resumption, the page, the command."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from typer.testing import CliRunner

from fixtures import squares_data
from fixtures.small_searches import SPACE, in_this_process, space
from fixtures.squares_world import SquaresSuite
from tutti.cli.app import app
from tutti.config.run_config import RunConfig, build_config
from tutti.evaluation.config import EvaluationConfig
from tutti.evaluation.statistics.comparison import compare_arms
from tutti.nested_dicts import merge
from tutti.report.svg.trials import Axis, Dot, parallel_chart, response_chart
from tutti.storage.files import exclusive_lock
from tutti.studies.tune import Screening
from tutti.studies.tune import search as searching
from tutti.studies.tune import trial as trying
from tutti.studies.tune.found import Found, Tried
from tutti.studies.tune.screen import cell_config
from tutti.studies.tune.search import check, collect, search_keys
from tutti.studies.tune.space import ParameterConfig, load_space
from tutti.studies.tune.trial import CONTROL, FOLDER, RUNGS, TRIALS, Search, run_trial, suggested
from tutti.studies.tune.worker import OWNER, finished, give_back_dead, open_study
from tutti.suites import registry
from tutti.suites.environment import Suite
from tutti.types import UserError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    data = squares_data.write(tmp_path_factory.mktemp("data") / "set", squares_data.episodes(8))
    training = {"steps": 9, "schedule": {"warmup": 1}}
    return squares_data.config(data, training=training, data={"batch_size": 4})


def memory(**changes: Any) -> optuna.Study:
    return optuna.create_study(direction="maximize", **changes)


# --- the space


def test_a_space_proposes_what_it_names_and_only_where_it_holds() -> None:
    wanted = space(
        parameters={
            "model.fusion.depth": {"low": 1, "high": 3, "integer": True},
            "strategy.steps": {"low": 0.1, "high": 0.5, "when": {"strategy.kind": "action_only"}},
            "data.augmentation": {"choices": [{"kind": "none"}, {"kind": "colour"}]},
        }
    )
    study = memory(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = [dict(text.split("=", 1) for text in suggested(study.ask(), wanted)) for _ in range(30)]
    for one in seen:
        assert 1e-4 <= float(one["training.optimizer.lr"]) <= 1e-1
        assert json.loads(one["model.fusion.depth"]) in (1, 2, 3)
        assert json.loads(one["data.augmentation"]) in ({"kind": "none"}, {"kind": "colour"})
        assert ("strategy.steps" in one) == (one["strategy.kind"] == '"action_only"')
    low = sum(float(one["training.optimizer.lr"]) < 3e-3 for one in seen)
    assert 5 < low < 25  # half by factors, one of 33 by differences


def test_rungs_end_with_the_whole_training() -> None:
    assert space(rungs=3).rung_steps(900) == [100, 300, 900]
    assert space(rungs=3, reduction=2).rung_steps(1301) == [325, 650, 1301]
    with pytest.raises(UserError, match=r"need more than training\.steps 8"):
        space(rungs=3).rung_steps(8)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"parameters": {"a.b": {"low": 1}}}, "expected low and high, or choices"),
        ({"parameters": {"a.b": {"low": 2, "high": 1}}}, "low 2 is not below high 1"),
        ({"parameters": {"a.b": {"low": 0, "high": 1, "log": True}}}, "log needs a low above 0"),
        ({"parameters": {"training.steps": {"low": 1, "high": 2}}}, "training.steps is no key to search"),
        ({"parameters": {"a.b": {"choices": [1], "when": {"c.d": 1}}}}, "names c.d, which is not above it"),
        ({"controls": {"default": []}}, "'default' is always there"),
        ({"controls": {"long": ["training.steps=99"]}}, "controls.long: training.steps is no key to search"),
        (
            {"controls": {"late": ["evaluation.first_seed=9000"]}},
            "controls.late: evaluation.first_seed is no",
        ),
        ({"parameters": {"evaluation": [{"episodes": 1}]}}, "parameters: evaluation is no key to search"),
        ({"parameters": {"training": [{"steps": 4}]}}, "parameters: training is no key to search"),
        ({"parameters": {"training.threads": [1, 2]}}, "parameters: training.threads is no key to search"),
        ({"trails": 3}, "trails is not a key. Did you mean 'trials'?"),
    ],
)
def test_mistakes_in_a_space_name_the_key(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(merge(SPACE, changes)))
    with pytest.raises(UserError) as error:
        load_space(path)
    assert problem in str(error.value)


def test_what_does_not_fit_the_config_is_refused_before_anything_runs(
    config: RunConfig, tmp_path: Path
) -> None:
    wrong = space(parameters={"model.fusion.dept": {"low": 1, "high": 2, "integer": True}})
    with pytest.raises(UserError, match=r"parameters\.model\.fusion\.dept: override .*1 mistake"):
        check(Search(config=config, space=wrong, home=tmp_path))
    with pytest.raises(UserError, match=r"controls\.no-align: the config with override"):
        check(
            Search(
                config=config, space=space(controls={"no-align": ["objective.aling.weight=0"]}), home=tmp_path
            )
        )
    plays = config.model_copy(update={"evaluation": type(config.evaluation)(first_seed=500_002)})
    with pytest.raises(UserError, match="plays starts 500000 to 500003, the confirmation 500002 to"):
        check(Search(config=plays, space=space(confirm={}), home=tmp_path))
    check(Search(config=plays, space=space(confirm={"evaluation": {"first_seed": 7}}), home=tmp_path))


# --- searches


def test_a_real_search_is_made_resumed_and_shown(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(searching, "run_cells", in_this_process)
    run = tmp_path / "run"
    first = search_keys(config, space(), run)
    home = run / "tune" / "tiny"
    assert not [*home.rglob("step-*")]  # neither of the best nor of those that ended early
    assert len(first.trials) == 3 and [t.control for t in first.trials if t.control] != []
    assert {"default", "no-align"} <= {one.control for one in first.trials}
    top = [one for one in first.trials if one.value is not None]
    assert top and all(one.steps == 9 and set(one.rungs) == {3, 9} for one in top)
    assert [one.value for one in top] == sorted((one.value or 0.0 for one in top), reverse=True)
    for one in first.trials:
        assert (
            one.steps in (3, 9) and one.rungs[max(one.rungs)] == -one.errors[str(max(one.rungs))]["executed"]
        )
        if one.steps == 3:  # a third goes on: it was not among the best when it came there
            better = [other for other in first.trials if other.rungs[3] >= one.rungs[3]]
            assert len(better) > 1 or one.number > 0
    assert first.cost == sum(one.steps for one in first.trials) / 9
    result = json.loads((home / "results.json").read_text())
    assert result["cost"] == first.cost and len(result["trials"]) == 3
    page = (home / "report.html").read_text()
    assert page.count("<svg") == 4 and "Parallel" not in page and "no-align" in page
    assert "whole trainings" in " ".join(capsys.readouterr().out.split())

    again = search_keys(config, space(trials=4), run)
    assert len(again.trials) == 4 and all(one in again.trials for one in first.trials)
    assert "3 trials found, 1 to do" in capsys.readouterr().out
    code = CliRunner().invoke(app, ["tune", "nowhere.yaml", "--space", "s.yaml", "--rate"])
    assert code.exit_code == 2 and "say what to tune" in code.output.replace("\n", " ")


def test_a_trial_that_was_killed_goes_on_from_where_it_was(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Search(config=config, space=space(), home=tmp_path)
    storage = f"journal:{tmp_path / 'log'}"
    study = open_study(made, storage)
    trial = study.ask()
    assert trial.user_attrs[CONTROL] == "default"
    trial.set_user_attr(OWNER, "worker-another-host-0")
    living = study.ask()
    living.set_user_attr(OWNER, "worker-living-0")
    for owner in ("worker-another-host-0", "worker-living-0"):
        (tmp_path / owner).mkdir()
    with exclusive_lock(tmp_path / "worker-living-0"):
        assert give_back_dead(study, tmp_path) == 1 and give_back_dead(study, tmp_path) == 0
    assert finished(open_study(made, storage)) == 0
    again = study.ask()
    assert again.number == trial.number and again.user_attrs[CONTROL] == "default"
    study.tell(living.number, state=TrialState.FAIL)  # no-align: an error ended its process
    waiting = open_study(made, storage).get_trials(states=(TrialState.WAITING,))
    assert [one.user_attrs[CONTROL] for one in waiting] == ["no-align"]
    value = run_trial(again, made)
    kept = json.loads((tmp_path / TRIALS / again.user_attrs[FOLDER] / RUNGS).read_text())
    assert value == -kept["9"]["executed"]
    other = memory().ask({})  # the same folder: nothing is trained or measured again
    other.set_user_attr(CONTROL, "default")
    monkeypatch.setattr(trying, "build_training", None)  # whoever trains again, fails
    assert run_trial(other, made) == value


def test_trials_of_the_same_values_are_trained_played_and_charged_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first has ended and left no checkpoint, and the second is pruned or played."""
    monkeypatch.setitem(registry.SUITES, "squares", cast(Suite, SquaresSuite()))
    playing = config.model_copy(update={"evaluation": EvaluationConfig(suite="squares", max_decisions=3)})
    wanted = space(evaluation={"episodes": 2, "first_seed": 500_000})
    made = Search(config=playing, space=wanted, home=tmp_path)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    study = memory(sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner)

    def trial(**attrs: Any) -> optuna.Trial:
        study.enqueue_trial({}, user_attrs={CONTROL: "default", **attrs})
        return study.ask()

    first = trial()
    value = run_trial(first, made)
    study.tell(first, value)
    assert not list((tmp_path / TRIALS / first.user_attrs[FOLDER]).rglob("step-*"))
    monkeypatch.setattr(trying, "build_training", None)  # whoever trains again, fails
    second = trial()
    assert run_trial(second, made) == value
    study.tell(second, value)
    for _ in range(4):  # better ones at the first rung
        better = study.ask()
        better.report(0.0, 1)
        better.should_prune()
        study.tell(better, 1.0)
    third = trial()
    with pytest.raises(optuna.TrialPruned):
        run_trial(third, made)
    study.tell(third, state=TrialState.PRUNED)
    told = {one.number: one for one in collect(made, study).trials}
    assert [told[n].steps for n in (first.number, second.number, third.number)] == [9, 0, 0]
    assert set(told[third.number].rungs) == {3}


def test_what_a_trial_measured_is_found_by_all_that_it_depends_on(config: RunConfig, tmp_path: Path) -> None:
    """Other rungs, scores, starts or data are another search: nothing measured before is mixed in."""
    changes: dict[str, dict[str, Any]] = {
        **{"rungs": {"rungs": 1}, "reduction": {"reduction": 2}, "score": {"score": {"valid/action": 1.0}}},
        "starts": {"evaluation": {"first_seed": 600_000}},
    }
    made = [Search(config=config, space=space(**one), home=tmp_path) for one in ({}, *changes.values())]
    made.append(replace(made[0], data="other"))
    folders = {one.folder_of(one.trial_config([])).name for one in made}
    assert len(folders) == len(made) == len({one.key for one in made})
    same = Search(config=config, space=space(trials=9, jobs=2), home=tmp_path)
    assert same.key == made[0].key and same.folder_of(same.trial_config([])).name in folders


def test_a_trial_waits_for_another_process_with_the_same_values(config: RunConfig, tmp_path: Path) -> None:
    made = Search(config=config, space=space(), home=tmp_path)
    trial = memory().ask()
    trial.set_user_attr(CONTROL, "default")
    folder = made.folder_of(made.trial_config([]))
    folder.mkdir(parents=True)
    ended = threading.Event()

    def run() -> None:
        run_trial(trial, made)
        ended.set()

    with exclusive_lock(folder):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert not ended.wait(0.3) and not (folder / RUNGS).exists()
    assert ended.wait(60)


def test_a_base_that_keeps_its_best_checkpoint_can_be_searched_and_screened(
    config: RunConfig, tmp_path: Path
) -> None:
    best = {"metric": "valid/action"}
    values = merge(
        config.model_dump(mode="json"),
        {
            "training": {"evaluate_every": 3, "validation": {"every": 3}, "checkpoints": {"keep_best": best}},
            "evaluation": {"suite": "metaworld-8", "checkpoint": "best"},
        },
    )
    base = build_config(values, "the base")
    trial = Search(config=base, space=space(), home=tmp_path).trial_config([])
    cell = cell_config(base, tmp_path, Screening(share=1.0), 1e-3, 5)
    for one in (trial, cell):
        assert one.training.evaluate_every == 0 and one.evaluation.checkpoint == "latest"


def test_a_search_stays_inside_its_space_and_confirms_what_differs() -> None:
    edges = space(parameters={"training.optimizer.lr": {"low": 0.00123446, "high": 0.00123454}})
    study = memory(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        values = dict(text.split("=", 1) for text in suggested(study.ask(), edges))
        assert 0.00123446 <= float(values["training.optimizer.lr"]) <= 0.00123454
    for wrong in ({"low": 0.5, "high": 2}, {"low": 1, "high": 2.5}, {"low": 0, "high": 2, "log": True}):
        with pytest.raises(ValueError, match=r"whole numbers|low above 0"):
            ParameterConfig(**wrong, integer=True)
    a, b = ("a=1",), ("b=2",)
    trials = (
        *(tried(1, 0.9, overrides=a), tried(2, 0.8, overrides=b), tried(3, 0.7, overrides=a)),
        *(tried(4, 0.6, overrides=()), tried(5, 0.5, control="default", overrides=("c=3",))),
    )
    found = Found(name="s", whole_steps=9, plays=True, trials=trials)
    assert [one.number for one in found.best(5)] == [1, 2]


def test_values_that_do_not_go_together_and_a_score_that_is_not_measured_end_a_trial(
    config: RunConfig, tmp_path: Path
) -> None:
    wanted = space(controls={"late": ["training.schedule.warmup=9"]}, score={"valid/metric/nothing": 1.0})
    made, study = Search(config=config, space=wanted, home=tmp_path), memory()
    for control, problem in (("late", "never reach its peak"), ("default", "is not measured in this trial")):
        study.enqueue_trial({}, user_attrs={CONTROL: control})
        trial = study.ask()
        with pytest.raises(optuna.TrialPruned):
            run_trial(trial, made)
        study.tell(trial, state=TrialState.PRUNED)
        assert problem in trial.user_attrs["refused"]
    told = collect(made, study).trials
    assert all(one.refused and one.value is None for one in told)
    assert {one.control: one.steps for one in told} == {
        "late": 0,
        "default": 3,
    }  # what was trained is charged


# --- what is shown


def tried(number: int, value: float | None, **changes: Any) -> Tried:
    plain: dict[str, Any] = {
        **{"control": "", "overrides": (f"a={number}",), "params": {"a": float(number)}, "rungs": {9: -0.5}},
        **{"errors": {}, "success": None, "steps": 9, "seconds": 2.0},
    }
    return Tried(number=number, value=value, **plain | changes)


def test_the_verdicts_of_the_confirmation_are_told_and_that_nothing_beats_the_default() -> None:
    trials = (
        tried(3, 0.75, success=(6, 8)),
        tried(0, 0.5, control="default", success=(4, 8)),
        tried(1, None),
    )
    of = Found(name="s", whole_steps=9, plays=True, trials=trials)
    assert [one.number for one in of.best(5)] == [3] and of.cost == 3.0
    wins = [[[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 0, 1]]]
    base = [[[0, 0, 0, 0], [0, 1, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 0]]]
    comparison = compare_arms(base, wins)
    told = replace(of, verdicts={"best-1": {"verdict": comparison.verdict, "text": "better: +1"}})
    assert comparison.verdict == "better" and "Nothing that was confirmed" not in " ".join(told.sentences)
    for verdict in ("unresolved", "better before Holm"):
        short = replace(of, verdicts={"best-1": {"verdict": verdict, "text": "t"}})
        assert short.sentences[-1] == "Nothing that was confirmed beats the default."


def test_charts_place_ranges_by_value_and_choices_by_order() -> None:
    axes = [Axis(name="x.rate", log=True), Axis(name="kind", labels=('"a"', '"b"'))]
    dots = [
        Dot(places=[0.001, '"b"'], value=50.0, interval=(20.0, 80.0), top=True, strong=True, tip="<one>"),
        Dot(places=[0.1, '"a"'], value=0.0, interval=None, top=False, strong=False, tip="two"),
        Dot(places=[None, '"a"'], value=10.0, interval=None, top=True, strong=False, tip="three"),
    ]
    chart = response_chart(axes[0], 0, dots, unit="success, %", help="")
    assert chart.svg.count("<circle") == 2 and "&lt;one&gt;" in chart.svg
    assert response_chart(axes[1], 1, dots, unit="u", help="").svg.count("<circle") == 3
    lines = parallel_chart("all", axes, dots, unit="success, %", help="").svg
    assert lines.count("<polyline") == 3
    assert sorted(len(line.split('"')[0].split()) for line in lines.split('points="')[1:]) == [2, 3, 3]

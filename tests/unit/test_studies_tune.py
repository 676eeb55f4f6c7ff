"""tutti tune: the verdict on made-up errors, a real screening, resume, ends, bad inputs, the doctor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fixtures.studies import base, write_data
from fixtures.toy_training import until_written
from tutti.cli.app import app
from tutti.config.run_config import RunConfig, build_config
from tutti.nested_dicts import merge
from tutti.runs.build import BuiltTraining, build_training
from tutti.runs.screened_rates import find_screened, rate_findings, record_folder
from tutti.storage.checkpoint import folder_of
from tutti.studies.cells import RESULT
from tutti.studies.pool import Work
from tutti.studies.tune import Screening, cell, judge_rates, screen, screen_rate
from tutti.studies.tune.cell import RateCell, held_out, run_cell
from tutti.training.validation import ValidationConfig
from tutti.types import UserError

QUICK = Screening(halvings=2, seeds=1, share=0.2, jobs=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "set")


def config(data: Path, /, **changes: Any) -> RunConfig:
    """Sixty steps of the smallest run, a quarter of its episodes held out."""
    values = merge(
        base(data), {"name": "tiny", "data": {"validation_fraction": 0.25}, "training": {"steps": 60}}
    )
    return build_config(merge(values, changes), "the test")


# --- the verdict


def test_the_best_rate_has_the_lowest_mean_and_seeds_say_what_is_noise() -> None:
    """The errors of benchmarks/results/learning_rate.md: the highest rate is worse."""
    found = judge_rates(
        {
            0.01: (0.3359, 0.3268),
            0.005: (0.2902, 0.2959),
            0.0025: (0.2888, 0.2872),
            0.00125: (0.2940, 0.2925),
        }
    )
    assert (found.best, found.within_noise) == (0.0025, (0.00125, 0.0025, 0.005))
    assert found.noise_known and found.edge == 0 and 0.005 < found.tolerance < 0.015


def test_what_a_seed_does_to_all_rates_alike_is_no_noise() -> None:
    """Seeds far apart, differences of rates the same for each: nothing but the least tolerance is left."""
    found = judge_rates({4.0: (1.0, 2.0), 2.0: (0.9, 1.9), 1.0: (0.95, 1.95)})
    assert found.within_noise == (2.0,) and found.tolerance == pytest.approx(0.014)
    noisy = judge_rates({4.0: (1.0, 1.9), 2.0: (0.9, 1.9), 1.0: (1.05, 1.8)})
    assert noisy.within_noise == (1.0, 2.0, 4.0)


def test_the_tolerance_by_hand() -> None:
    """Residuals of +-0.05: s^2 = 4 * 0.05^2 / 1 and t_0.95 of one degree of freedom is 6.314."""
    found = judge_rates({2.0: (1.1, 0.9), 1.0: (1.0, 1.0)})
    assert found.tolerance == pytest.approx(6.3138 * 0.1 * 1.0, rel=1e-4)


def test_one_seed_knows_no_noise_and_a_percent_counts_as_equal() -> None:
    found = judge_rates({4.0: (1.02,), 2.0: (1.0,), 1.0: (1.009,), 0.5: (2.0,)})
    assert (found.best, found.within_noise, found.noise_known) == (2.0, (1.0, 2.0), False)


def test_a_rate_near_divergence_says_nothing_of_the_noise_and_one_beyond_it_is_out() -> None:
    calm = {2.0: (1.0, 1.1), 1.0: (1.05, 1.14), 0.5: (1.2, 1.31)}
    wild = judge_rates({8.0: (0.1, None), 4.0: (2.0, 40.0), **calm})
    assert wild.tolerance == judge_rates(calm).tolerance and wild.best == 2.0


@pytest.mark.parametrize(("best", "edge"), [(4.0, 1), (2.0, 0), (1.0, -1)])
def test_a_best_rate_at_an_end_is_said(best: float, edge: int) -> None:
    assert judge_rates({rate: (1.0 + (rate != best),) for rate in (4.0, 2.0, 1.0)}).edge == edge
    with pytest.raises(UserError, match=r"No rate from 1 to 4 gave a finite error\. .*--from 0\.5"):
        judge_rates({4.0: (None,), 1.0: (float("nan"),)})


# --- screenings


def in_this_process(work: Mapping[RateCell, Work], *_: Any, **__: Any) -> list[str]:
    for one in work:
        run_cell(one.folder)
    return []


def by_formula(error: Callable[[float, int], float | None], made: list[RateCell]) -> Callable[..., list[str]]:
    """Cells whose error is a formula of rate and seed."""

    def run(work: Mapping[RateCell, Work], *_: Any, **__: Any) -> list[str]:
        made.extend(work)
        for one in work:
            value = error(one.rate, one.seed)
            values = {} if value is None else {"valid/action": value, "valid/metric/state/key_l1": value / 2}
            (one.folder / RESULT).write_text(json.dumps({"seconds": 1.5, **values}))
        return []

    return run


def test_a_real_screening_is_written_said_and_found_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "run_cells", in_this_process)
    monkeypatch.setattr(screen, "MAX_MORE", 0)
    made, run = config(data), tmp_path / "runs" / "tiny"
    found = screen_rate(made, run, QUICK)
    assert [one.rate for one in found.tried] == [0.002, 0.001, 0.0005]
    assert (found.steps, found.whole_steps, found.seeds) == (12, 60, (0,))
    errors = {one.errors["valid/action"][0] or 0.0: one.rate for one in found.tried}
    assert len(errors) == 3 and found.verdict.best == errors[min(errors)] and min(errors) > 0
    assert all(len(one.errors) == 1 and one.seconds > 0 for one in found.tried)
    (home,) = (run / "tune").iterdir()
    said = " ".join(capsys.readouterr().out.split())
    use = f"Use it: training.optimizer.lr={found.verdict.best:g}"
    assert use in said and "Cost: 3 trainings of 12 steps, 0.6 times the training's own 60" in said
    assert not list(home.rglob("*.safetensors")), "no weights are left"
    monkeypatch.setattr(screen, "run_cells", None)
    assert screen_rate(made, run, QUICK).tried == found.tried, "nothing is trained again"


class Killed(BaseException):
    pass


def test_a_cell_that_is_killed_goes_on_to_the_same_errors(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once between two checkpoints, once when its last step is saved and its result is not."""
    made = screen.cell_config(config(data), tmp_path, QUICK, 0.001, 0)
    checkpoints = made.training.checkpoints.model_copy(update={"every": 5})
    training = made.training.model_copy(update={"checkpoints": checkpoints})
    cells = [
        RateCell(rate=0.001, seed=0, steps=10, folder=tmp_path / name) for name in ("straight", "killed")
    ]
    for one in cells:
        own = training.model_copy(update={"validation": ValidationConfig(every=10)})
        one.describe(made.model_copy(update={"training": own}))
    straight, killed = cells
    run_cell(straight.folder)
    for last in (7, 12):

        def build(config: RunConfig, folder: Path, last: int = last) -> BuiltTraining:
            built = build_training(config, folder)
            fit = built.fit

            def die(step: int, *_: Any) -> None:
                if step == last:
                    until_written(folder, last // 5 * 5)
                    raise Killed

            monkeypatch.setattr(built, "fit", lambda _: fit(die))
            return built

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(cell, "build_training", build)
            run_cell(killed.folder)
    assert killed.result() is None and folder_of(killed.folder, 10).is_dir()
    run_cell(killed.folder)
    results = [one.result() for one in cells]
    assert results[0] is not None and results[1] is not None
    assert results[0]["valid/action"] == results[1]["valid/action"] > 0


def test_a_rate_at_which_a_training_is_not_finite_is_out(data: Path, tmp_path: Path) -> None:
    one = RateCell(rate=1e30, seed=0, steps=12, folder=tmp_path / "cell")
    one.describe(screen.cell_config(config(data), tmp_path, QUICK, one.rate, one.seed))
    run_cell(one.folder)
    result = one.result()
    assert result is not None and result.keys() == {"seconds"}


@pytest.mark.parametrize(
    ("optimum", "rates", "best"),
    [
        (0.001, [0.002, 0.001, 0.0005], 0.001),
        (0.008, [0.016, 0.008, 0.004, 0.002, 0.001, 0.0005], 0.008),
        (0.0001, [0.002, 0.001, 0.0005, 0.00025, 0.000125, 6.25e-05], 0.000125),
        (1.0, [0.016, 0.008, 0.004, 0.002, 0.001, 0.0005], 0.016),
    ],
)
def test_the_rates_go_on_beyond_an_end_and_no_further_than_three(
    optimum: float, rates: list[float], best: float, data: Path, tmp_path: Path
) -> None:
    made: list[RateCell] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "run_cells", by_formula(lambda rate, _: abs(rate - optimum) + 1e-3, made))
        found = screen_rate(config(data), tmp_path / "tiny", QUICK)
    assert [one.rate for one in found.tried] == rates == sorted({one.rate for one in made}, reverse=True)
    assert len(made) == len(rates), "each is trained once"
    assert found.verdict.best == best and found.verdict.edge == (optimum == 1.0)
    assert ("a better one may lie beyond it" in found.sentences[0]) == (optimum == 1.0)


def test_seeds_share_and_from_are_taken_and_a_failure_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[RateCell] = []
    monkeypatch.setattr(screen, "run_cells", by_formula(lambda rate, seed: 1 + rate + seed / 10, made))
    monkeypatch.setattr(screen, "MAX_MORE", 0)
    muon = config(data, seed=5, training={"optimizer": {"kind": "muon"}})
    wanted = Screening(rate="adamw_lr", highest=0.004, halvings=1, seeds=3, share=0.5)
    found = screen_rate(muon, tmp_path / "tiny", wanted)
    assert (found.key, found.steps) == ("training.optimizer.adamw_lr", 30)
    assert [(one.seed, one.rate) for one in made] == [(s, r) for s in (5, 6, 7) for r in (0.004, 0.002)]
    assert found.tried[1].errors["valid/metric/state/key_l1"] == pytest.approx((0.751, 0.801, 0.851))
    assert "state/key_l1" in capsys.readouterr().out
    made_config = screen.cell_config(muon, tmp_path, wanted, 0.004, 6)
    assert made_config.training.optimizer.model_dump()["adamw_lr"] == 0.004
    assert (made_config.seed, made_config.data.seed, made_config.training.threads) == (6, 6, 1)
    assert made_config.training.steps == 60, "the schedule is that of the whole training"
    monkeypatch.setattr(
        screen, "run_cells", lambda *_, **__: ["rate 0.002, seed 0 (exit 2); the end of log:"]
    )
    with pytest.raises(UserError, match=r"^trainings that failed: 1\n\nrate 0\.002, seed 0"):
        screen_rate(config(data), tmp_path / "other", QUICK)


def test_of_a_validation_only_finite_errors_of_that_step_count(tmp_path: Path) -> None:
    values = {"valid/action": 0.5, "valid/total": 1.0, "valid/metric/state/key_l1": 0.1}
    lines = [
        {"step": 10, "kind": "validation", **values},
        {"step": 20, "kind": "validation", **values, "valid/action": 0.25},
        {"step": 20, "kind": "train", "loss/total": 1.0},
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert held_out(tmp_path, 20) == {"valid/action": 0.25, "valid/metric/state/key_l1": 0.1}


@pytest.mark.parametrize(
    ("changes", "wanted", "message"),
    [
        (
            {"data": {"validation_fraction": 0.0}},
            {},
            r"no held-out episodes .* data\.validation_fraction=0\.05",
        ),
        (
            {},
            {"rate": "adamw_lr"},
            r"adamw_lr cannot be screened: optimizer\.kind adamw has no adamw_lr\. Leave --which",
        ),
        (
            {"training": {"schedule": {"warmup": 12}}},
            {},
            r"--share 0\.2 is 12 of training\.steps 60, within",
        ),
        ({"training": {"fork": {"run": "runs/a"}}}, {}, r"a fork goes on .* training\.fork=off"),
        ({"strategy": {"kind": "two_stage"}}, {}, r"where the action does not count"),
        ({"data": {"sources": []}}, {}, "there are no data yet"),
    ],
)
def test_what_cannot_be_screened_is_refused_with_the_key_and_the_cure(
    changes: dict[str, Any], wanted: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        screen_rate(config(data, **changes), tmp_path / "tiny", replace(QUICK, **wanted))
    assert not list(tmp_path.rglob("cells"))


def test_a_schedule_free_optimizer_can_be_screened(data: Path) -> None:
    training = {
        "optimizer": {"kind": "schedule_free"},
        "ema": "off",
        "schedule": {"kind": "constant", "warmup": 2},
    }
    screen.check_config(config(data, training=training), QUICK)


def test_the_command_says_what_it_lacks() -> None:
    result = CliRunner().invoke(app, ["tune", "configs/demo.yaml"])
    assert result.exit_code == 2 and "tutti tune --rate CONFIG" in " ".join(result.output.split())


# --- what the doctor says


def test_the_doctor_knows_what_was_screened_for_which_config(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the run itself and by others beside it, whatever their name, steps and seed."""
    monkeypatch.setattr(screen, "run_cells", by_formula(lambda rate, _: 1 + abs(rate - 1e-3), []))
    run = tmp_path / "runs" / "tiny"
    (hint,) = rate_findings(config(data), run)
    assert (hint.kind, hint.severity) == ("rate_not_screened", "hint") and "tutti tune --rate" in hint.cure
    found = screen_rate(config(data), run, Screening(halvings=2, seeds=1, highest=4e-3))
    assert found.verdict.best == 1e-3
    assert rate_findings(config(data), run) == []
    other = config(
        data,
        name="b",
        seed=3,
        training={"steps": 500, "optimizer": {"lr": 1e-3}, "gradients": {"clip_norm": 1.0}, "ema": "off"},
        evaluation={"episodes": 2},
    )
    assert rate_findings(other, run.parent / "b") == []
    (run.parent / "broken" / "tune" / record_folder(other, run).name).mkdir(parents=True)
    (run.parent / "broken" / "tune" / record_folder(other, run).name / "rate.json").write_text('{"best": 1')
    assert find_screened(other, run.parent / "b") == found
    (worse,) = rate_findings(config(data, training={"optimizer": {"lr": 1.0}}), run)
    assert worse.kind == "rate_not_the_best" and "training.optimizer.lr=0.001" in worse.cure
    assert rate_findings(config(data, training={"fork": {"run": "runs/a"}}), run) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"optimizer": {"kind": "muon"}}},
        {"training": {"optimizer": {"weight_decay": 0.2}}},
        {"training": {"accumulation": 2}},
        {"data": {"batch_size": 8}},
        {"model": {"fusion": {"width": 64}}},
        {"objective": {"align": None}},
        {"strategy": {"kind": "two_stage"}},
    ],
)
def test_another_optimizer_model_batch_or_objective_is_another_question(
    changes: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    assert record_folder(config(data, **changes), tmp_path) != record_folder(config(data), tmp_path)


def test_other_data_are_another_question_and_another_path_is_not(data: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(data)
    assert record_folder(config(tmp_path / "moved"), tmp_path) == record_folder(config(data), tmp_path)
    more = write_data(tmp_path / "more", per_task=5)
    assert record_folder(config(more), tmp_path) != record_folder(config(data), tmp_path)

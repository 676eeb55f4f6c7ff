"""Budgets and cells: what a step costs in each phase, the steps that it leaves, folders named by content."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fixtures.studies import cell, make_study, trained, write_data
from tutti.config.run_config import RunConfig
from tutti.data.sources import SourceConfig
from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.runs.folder import RunFolder
from tutti.studies import costs as costs_module
from tutti.studies.cells import arm_config, cell_config, plan_cells, training_hash
from tutti.studies.compare import read_plan, share_data
from tutti.studies.config import BudgetConfig, StudyConfig, load_study
from tutti.studies.costs import (
    StepCost,
    StepMeter,
    affordable_steps,
    in_turns,
    measure_costs,
    ratio_of,
    step_meter,
)
from tutti.types import UserError

SOURCES = (SourceConfig(path=Path("/data/set")),)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def config_of(data: Path, *overrides: str, steps: int = 20) -> RunConfig:
    study = make_study(data, arms={"end_to_end": [], "arm": overrides or ["training.gradients.clip_norm=2"]})
    sources = (SourceConfig(path=data),)
    return cell_config(study, "arm", level="base", seed=0, steps=steps, sources=sources)


@pytest.fixture
def meter(data: Path, folder: Path) -> Iterator[Callable[..., StepMeter]]:
    """Makes the meter of an arm with these overrides."""
    with ExitStack() as stack:
        yield lambda *overrides: stack.enter_context(step_meter(config_of(data, *overrides), folder))


def cost(flops: float = 1.0, samples: int = 4, ratio: float | None = None) -> StepCost:
    return StepCost(flops=flops, samples=samples, parameters=1, time_ratio=ratio)


# --- steps for a budget


@pytest.mark.parametrize(
    ("kind", "arm", "expected"),
    [
        ("steps", cost(8.0, 8, 1.25), 1000),
        ("samples", cost(8.0, 8, 1.25), 500),
        ("flops", cost(8.0, 8, 1.25), 1250),
        ("time", cost(8.0, 8, 1.25), 800),
        ("flops", cost(50000.0), 1),
    ],
)
def test_budget_gives_an_arm_the_baselines_total_over_its_own_cost(
    kind: Any, arm: StepCost, expected: int
) -> None:
    found = affordable_steps(BudgetConfig(kind=kind), 1000, {"base": cost(10.0, 4, 1.0), "arm": arm}, "base")
    assert found == {"base": 1000, "arm": expected}


def test_times_are_taken_in_turns_after_an_uncounted_one_and_compared_within_a_round() -> None:
    turns: list[str] = []

    def timer(name: str) -> Any:
        return lambda: turns.append(name) or float(len(turns))

    assert in_turns({"a": timer("a"), "b": timer("b")}, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert turns == ["a", "b"] * 3
    assert ratio_of([2.0, 20.0, 900.0], [1.0, 10.0, 100.0]) == 2.0


# --- what a step costs


def test_stretches_end_with_phases_with_terms_and_with_calibration(meter: Callable[..., StepMeter]) -> None:
    assert [stretch.steps for stretch in meter().stretches] == [20]
    weight = "objective.align.weight={start: 1, end: 0, schedule: linear, end_at: 0.5}"
    balancing = ("balancing.start=2", "balancing.steps=3", "objective.recon.share=0.1")
    own = meter(weight, *balancing, "strategy.kind=warmup_then_joint", "strategy.first_share=0.1")
    assert [(stretch.at, stretch.steps) for stretch in own.stretches] == [(1, 2), (3, 3), (7, 5), (15, 10)]


def test_flops_are_the_phases_own_weighted_by_their_steps(meter: Callable[..., StepMeter]) -> None:
    whole, alone = meter(), meter("strategy.kind=action_only")
    staged = meter("strategy.kind=two_stage_frozen", "strategy.first_share=0.25")
    first, second = ([stretch] for stretch in staged.stretches)
    assert (first[0].steps, second[0].steps) == (5, 15)
    both = staged.flops(1)
    staged.stretches = first
    one = staged.flops(1)
    staged.stretches = second
    two = staged.flops(1)
    assert both == pytest.approx(0.25 * one + 0.75 * two, rel=1e-9)
    # Frozen encoders get no gradient, and terms that do not count are not computed.
    assert two < alone.flops(1) < whole.flops(1)
    assert one < whole.flops(1)
    assert whole.flops(1) == whole.flops(1)


def test_calibration_of_a_balancing_is_charged_and_may_be_rehearsed_longer_than_it_lasts(
    meter: Callable[..., StepMeter],
) -> None:
    plain = meter()
    calibrated = meter("balancing.start=2", "balancing.steps=2", "objective.recon.share=0.1")
    assert calibrated.milliseconds(5) > 0
    assert plain.flops(1) < calibrated.flops(1) < 1.3 * plain.flops(1)
    assert plain.parameters == calibrated.parameters > 0
    assert (plain.samples, calibrated.samples) == (4, 4)


def test_costs_are_measured_once_and_a_further_arm_does_not_change_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {"base": config_of(data), "alone": config_of(data, "strategy.kind=action_only")}
    budget = BudgetConfig(kind="time")
    measured: list[list[str]] = []

    def fake(configs: dict[str, RunConfig], *_: Any) -> dict[str, StepCost]:
        measured.append(list(configs))
        return {arm: cost(1.0, 4, 1.0 + len(measured)) for arm in configs}

    monkeypatch.setattr(costs_module, "_measure", fake)
    first = measure_costs(configs, "base", budget, fingerprint="d", folder=tmp_path)
    assert measure_costs(configs, "base", budget, fingerprint="d", folder=tmp_path) == first
    more = configs | {"staged": config_of(data, "strategy.kind=two_stage")}
    later = measure_costs(more, "base", budget, fingerprint="d", folder=tmp_path)
    assert measured == [["base", "alone"], ["base", "staged"]]
    assert {arm: later[arm] for arm in first} == first
    measure_costs(configs, "base", budget, fingerprint="other data", folder=tmp_path)
    assert measured[-1] == ["base", "alone"]


def test_real_costs_are_kept_with_a_ratio_to_the_baseline(data: Path, tmp_path: Path) -> None:
    configs = {"base": config_of(data), "alone": config_of(data, "strategy.kind=action_only")}
    budget = BudgetConfig(kind="time")
    found = measure_costs(configs, "base", budget, fingerprint="d", folder=tmp_path, rounds=1)
    assert found["base"].time_ratio == 1.0
    assert found["alone"].time_ratio is not None and found["alone"].time_ratio > 0
    assert found["alone"].flops < found["base"].flops
    assert set(json.loads((tmp_path / "costs.json").read_text())) == {"base", "alone"}


# --- cells


def folders(study: StudyConfig, fingerprint: str = "d", place: str = "/data/set") -> list[str]:
    steps = dict.fromkeys(study.arms, 20)
    sources = (SourceConfig(path=Path(place)),)
    return [cell.folder.name for cell in plan_cells(study, steps, sources, fingerprint, Path("s"))]


def test_cells_come_by_seed_first_and_cross_arms_and_levels() -> None:
    study = make_study(seeds=2, episodes_per_task=[2, "all"])
    cells = list(plan_cells(study, dict.fromkeys(study.arms, 20), SOURCES, "d", Path("s")))
    assert [(cell.seed, cell.level, cell.arm) for cell in cells[:5]] == [
        (0, 2, "end_to_end"),
        (0, 2, "action_only"),
        (0, "all", "end_to_end"),
        (0, "all", "action_only"),
        (1, 2, "end_to_end"),
    ]
    assert len({cell.folder for cell in cells}) == 8
    assert cells[1].name == "action_only, 2 demonstrations, seed 0"
    assert cells[1].folder.name.startswith("action_only-2demos-seed0-")


def test_folder_depends_on_data_and_training_but_not_on_the_place_of_either() -> None:
    study = make_study()
    assert folders(study) == folders(study, place="/elsewhere/set")
    assert folders(study) != folders(study, fingerprint="e")
    assert folders(study) != folders(make_study(overrides=["training.gradients.clip_norm=3"]))
    assert folders(study) == folders(make_study(overrides=["training.checkpoints.keep=4"], name="other"))


def test_an_arm_may_use_parts_of_the_shared_data_and_its_folder_depends_on_which() -> None:
    parts = [f"data.sources=[{{path: data_from, episodes: ['{span}']}}]" for span in ("0-3", "0-5")]
    study = make_study(arms={"all": [], "few": parts[:1], "more": parts[1:]}, baseline="all")
    steps = dict.fromkeys(study.arms, 20)
    planned = plan_cells(study, steps, SOURCES, "d", Path("s"))
    assert [config.data.sources[0].path for config in planned.values()] == [SOURCES[0].path] * 3
    assert [config.data.sources[0].episodes for config in planned.values()] == ["all", ("0-3",), ("0-5",)]
    hashes = {cell.arm: cell.folder.name.rsplit("-", 1)[1] for cell in planned}
    assert len({*hashes.values()}) == 3
    elsewhere = plan_cells(study, steps, (SourceConfig(path=Path("/else")),), "d", Path("s"))
    assert [cell.folder for cell in elsewhere] == [cell.folder for cell in planned]
    both = make_study(overrides=parts[:1])  # for every arm alike
    found = plan_cells(both, steps | dict.fromkeys(both.arms, 20), SOURCES, "d", Path("s"))
    assert {config.data.sources[0].episodes for config in found.values()} == {("0-3",)}
    wrong = make_study(arms={"all": [], "other": ["data.sources=[{path: /other/set}]"]}, baseline="all")
    with pytest.raises(UserError, match=r"arm 'other': data\.sources: an arm uses parts.*path: data_from"):
        plan_cells(wrong, steps | {"other": 20}, SOURCES, "d", Path("s"))


def test_parts_are_of_the_data_that_the_base_names_and_of_one_data_set(data: Path, tmp_path: Path) -> None:
    few = "data.sources=[{path: data_from, episodes: ['0-3']}]"
    study = make_study(data, arms={"few": [few], "all": []}, baseline="few")
    shared = share_data(study, arm_config(study, "few"), tmp_path)
    assert [source.path for source in shared.sources] == [data.resolve()]
    two = (*SOURCES, SourceConfig(path=Path("/else")))
    with pytest.raises(UserError, match=r"arm 'few': data\.sources: .* one data set.*has 2"):
        plan_cells(study, dict.fromkeys(study.arms, 20), two, "d", tmp_path)
    mixed = make_study(overrides=["data.sources=[{path: data_from}, {path: /other}]"])
    with pytest.raises(UserError, match="each path is 'data_from'"):
        arm_config(mixed, "end_to_end")


def test_other_evaluation_keeps_the_training_and_asks_for_another_result(tmp_path: Path) -> None:
    steps = dict.fromkeys(make_study().arms, 20)
    few, more = (
        next(iter(plan_cells(make_study(evaluation={"episodes": n}), steps, SOURCES, "d", tmp_path)))
        for n in (1, 2)
    )
    assert few.folder == more.folder and few.identity != more.identity
    few.folder.mkdir(parents=True)
    kept = trained(few.arm, few.seed, [1], [0], identity=few.identity)
    (few.folder / "result.json").write_text(json.dumps(asdict(kept)))
    assert few.result() == kept and more.result() is None
    (few.folder / "result.json").write_text(json.dumps({"identity": few.identity}))
    with pytest.raises(UserError, match="arm: Field required"):
        few.result()
    (few.folder / "result.json").write_text('{"identity": "')
    assert few.result() is None, "a torn result counts as none"


def test_hash_is_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from fixtures.studies import make_study\n"
        "from tutti.studies.cells import plan_cells\n"
        "study = make_study()\n"
        "cells = plan_cells(study, dict.fromkeys(study.arms, 20), (), 'd', Path('s'))\n"
        "print(*(cell.folder.name for cell in cells))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == folders(make_study())


def test_hash_covers_every_section_that_training_reads(data: Path) -> None:
    changes = ("data.horizon=4", "model.fusion.depth=2", "objective.recon=null", "balancing.kind=rlw")
    changes += ("strategy.kind=two_stage", "training.ema=0.9", "record.image_size=32")
    hashes = {training_hash(config_of(data, change), "d") for change in changes}
    assert len(hashes | {training_hash(config_of(data), "d")}) == len(changes) + 1


@pytest.mark.parametrize("study", ["e1", "e2", "towers-language"])
def test_trainings_that_were_kept_are_found_by_this_version(study: str) -> None:
    """If this fails, a new key is missing in key_effects.ADDED_LATER: its users' studies would begin anew."""
    root = Path(__file__).resolve().parents[2]
    config = load_study(root / "configs" / "studies" / f"{study}.yaml")
    planned = plan_cells(config, dict.fromkeys(config.arms, 1300), SOURCES, "dd5e91cb618c7ec7", Path("s"))
    kept = json.loads((root / "benchmarks" / "results" / f"{study}_cells.json").read_text())
    found = {cell.folder.name for cell in planned if cell.arm != "action-flops"}  # whose steps are measured
    assert len(kept) > 10 and {name for name in kept if "action-flops" not in name} <= found


# --- data


def test_data_of_another_run_are_only_read(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "dataset").symlink_to(data, target_is_directory=True)
    (run / "stages.json").write_text(json.dumps({"record": {"finished": True, "seconds": 1.0, "inputs": {}}}))
    (run / "recording.json").write_text(json.dumps({"seeds": [10000, 10007]}))
    before = sorted(str(path) for path in run.rglob("*"))
    study = make_study(data_from=run)
    shared = share_data(study, config_of(data), tmp_path / "study")
    assert shared.starts == TrainingStarts(seeds=(range(10000, 10008),))
    assert shared.sources[0].path == run.resolve() / "dataset"
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_data_that_the_base_names_are_taken_as_they_are_and_a_run_must_have_recorded_some(
    data: Path, tmp_path: Path
) -> None:
    shared = share_data(make_study(data), config_of(data), tmp_path)
    assert shared.sources[0].path == data.resolve()
    assert shared.starts == TrainingStarts(unknown=(str(data.resolve()),))
    assert shared.fingerprint == share_data(make_study(data), config_of(data), tmp_path).fingerprint
    RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"'record' has not run\. Make it first"):
        share_data(make_study(data_from=tmp_path / "run"), config_of(data), tmp_path / "study")


def test_a_plan_or_result_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"study": {"name": 3}, "data": "d", "costs": {}, "cells": []}')
    with pytest.raises(UserError, match=r"plan\.json: study\.name: "):
        read_plan(tmp_path)
    for content in ('{"study": {}, "data": 7}', "[1]", "", '{"a": ' * 10_000):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(UserError, match=r"plan\.json: .*Run the study again"):
            read_plan(tmp_path)
    (tmp_path / "plan.json").unlink()
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(UserError, match="found a FIFO"):
        read_plan(tmp_path)
    one = cell("end_to_end", folder=tmp_path)
    one.folder.mkdir()
    for bits in ([2, 0], [], [1]):
        kept = asdict(trained("end_to_end", 0, [1, 0]))
        (one.folder / "result.json").write_text(json.dumps(kept | {"successes": {"reach": bits}}))
        with pytest.raises(UserError, match="expected a success of 0 or 1 for each start"):
            one.result()

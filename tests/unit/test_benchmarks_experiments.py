"""The experiments' commands, their toy studies, and how the demo's trainings are summed up."""

from __future__ import annotations

import json
from pathlib import Path

import experiments
import pytest
from demo_seeds import note_look, summary, task_table
from joint_scores import Trained

from tutti.config.run_config import load_config
from tutti.data.sources import SourceConfig
from tutti.studies.cells import cell_config, plan_cells
from tutti.studies.config import StudyConfig, load_study

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (SourceConfig(path=Path("/data/set")),)


def study(name: str) -> StudyConfig:
    return load_study(ROOT / "configs" / "studies" / f"{name}.yaml")


def training(seed: int, push: int, pick: int, reach: int = 20) -> Trained:
    bits = {
        name: [1] * k + [0] * (20 - k) for name, k in (("push", push), ("pick-place", pick), ("reach", reach))
    }
    return Trained(
        arm="all", seed=seed, steps=1, seconds=1.0, valid_action=0.5, successes=bits, commit=None
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "trainings"),
    [
        *(("e1", 40), ("e2", 45), ("e3", 20), ("blind", 3), ("e5", 45)),
        *(("towers-vision", 15), ("towers-language", 25), ("towers-e2", 9)),
        *(("towers-full", 6), ("towers-full-words", 6), ("towers-time", 15)),
    ],
)
def test_every_cell_of_the_experiments_has_a_config_and_as_many_as_the_plan_says(
    name: str, trainings: int
) -> None:
    own = study(name)
    cells = plan_cells(own, dict.fromkeys(own.arms, 1300), SOURCES, "d", Path("s"))
    assert len(cells) == trainings
    assert f"| {trainings} |" in next(
        line
        for line in (ROOT / "docs" / "background" / "experiments.md").read_text().splitlines()
        if line.startswith(f"| {name} |")
    )


def test_starts_and_seeds_of_the_experiments_do_not_meet_each_other_or_the_demonstrations() -> None:
    blocks, seeds = list[range](), list[int](experiments.DEMO_SEEDS)
    for name in experiments.STUDIES:
        own = study(name)
        cells = plan_cells(own, dict.fromkeys(own.arms, 1300), SOURCES, "d", Path("s"))
        blocks.append(next(iter(cells.values())).evaluation.seeds)
        seeds += own.seed_list
    blocks.append(range(5000, 5020))
    everything = [start for block in blocks for start in block]
    assert len({*everything}) == len(everything) and not {*everything} & {*range(10_000, 12_000)}
    assert len({*seeds}) == len(seeds)


@pytest.mark.parametrize("name", ["e2", "towers-e2"])
def test_arms_of_unequal_labels_share_labelled_windows_and_statistics(name: str) -> None:
    own = study(name)
    cells = plan_cells(own, dict.fromkeys(own.arms, 1300), SOURCES, "d", Path("s"))
    data = {cell.arm: config.data for cell, config in cells.items() if cell.seed == own.seed_list[0]}
    shared = {arm: one.sources for arm, one in data.items() if arm != "upper"}
    assert len({*shared.values()}) == 1
    with_actions, without = shared["joint"]
    assert (with_actions.per_task, without.per_task) == ("0-9", "10-99")
    assert (without.labels.actions, without.labels.text, without.labels.state) == (False, True, False)
    labelled = {
        arm: one.batch_size * float(one.mixture.labelled) for arm, one in data.items() if arm in shared
    }
    assert labelled.pop("action-2b") == 64 and {*labelled.values()} == {32}
    assert own.budget.arms == ({"action-flops": "flops"} if name == "e2" else {})
    towers = {config.model.vision for config in cells.values()}
    assert len(towers) == 1 and {one.kind for one in towers} == {"vit" if name == "e2" else "pretrained"}


@pytest.mark.parametrize("name", experiments.SCREENINGS)
def test_rates_are_screened_on_the_data_and_terms_of_the_arms(name: str) -> None:
    config, *changes = experiments.SCREENINGS[name]
    screened = load_config(ROOT / "configs" / f"{config}.yaml", changes)
    assert screened.strategy.kind == ("action_only" if name.endswith("action") else "end_to_end")
    own = study(max((one for one in experiments.STUDIES if name.startswith(one)), key=len))
    arms = {"e1": "align-recon-state", "e2": "joint", "towers-e2": "joint", "e3": "align", "e5": "shares"}
    arms |= {f"e5-{arm}": arm for arm in ("raw", "uncertainty", "famo", "cosine-gate")}
    like = cell_config(
        own,
        arms.get(name) or {"towers-vision": "sight", "towers-language": "words"}.get(name, "action"),
        level="base",
        seed=0,
        steps=1300,
        sources=SOURCES,
    )
    assert screened.data.batch_size == like.data.batch_size and screened.data.mixture == like.data.mixture
    if "e2" in name:
        parts = [[(one.per_task, one.labels) for one in c.data.sources] for c in (screened, like)]
        assert parts[0] == parts[1]
    assert screened.model == like.model
    assert (screened.backward, screened.balancing.kind) == (like.backward, like.balancing.kind)
    if name != "e1-action":  # there the terms are off, here the strategy leaves them out
        assert screened.objective == like.objective


def test_parts_run_in_order_and_a_failure_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def fake(command: list[str]) -> int:
        ran.append(command)
        return 3 if "configs/studies/e3.yaml" in command else 0

    monkeypatch.setattr(experiments, "run", fake)
    monkeypatch.setattr(experiments, "kept", lambda study, folder: None)
    assert experiments.main(["e1", "e3", "e4"]) == 3
    assert [command[-1] for command in ran] == ["configs/studies/e1.yaml", "configs/studies/e3.yaml"]
    assert experiments.main(["e4"]) == 0 and ran[-1][0] == "demo_seeds" and "109" in ran[-1]


def test_finished_trainings_are_kept_and_taken_where_the_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, results = tmp_path / "here", tmp_path / "there", tmp_path / "results"
    results.mkdir()
    for name in ("action-seed10-ab", "align-seed10-cd"):
        cell = here / "runs" / "studies" / "e1" / "cells" / name
        cell.mkdir(parents=True)
        if name.startswith("action"):
            (cell / "result.json").write_text('{"arm": "action"}')
    monkeypatch.setattr(experiments, "ROOT", here)
    path = experiments.kept("e1", results)
    assert json.loads(path.read_text()) == {"action-seed10-ab": {"arm": "action"}}
    monkeypatch.setattr(experiments, "ROOT", there)
    own = there / "runs" / "studies" / "e1" / "cells" / "state-seed10-ef" / "result.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"arm": "state"}')
    assert sorted(json.loads(experiments.kept("e1", results).read_text())) == [
        "action-seed10-ab",
        "state-seed10-ef",
    ]
    taken = there / "runs" / "studies" / "e1" / "cells" / "action-seed10-ab" / "result.json"
    assert json.loads(taken.read_text()) == {"arm": "action"}


def test_toy_studies_take_data_of_noise_that_are_made_once(tmp_path: Path) -> None:
    command = experiments.toy_commands("e1", tmp_path)
    (path,) = (one.removeprefix("data_from=") for one in command if one.startswith("data_from="))
    own = load_study(ROOT / command[2], [one for one in command[3:-2]])
    assert own.seed_list == (0, 1) and own.levels == (5,) and str(own.data_from) == path
    stages = json.loads((Path(path) / "stages.json").read_text())
    experiments.toy_commands("e2", tmp_path)
    assert json.loads((Path(path) / "stages.json").read_text()) == stages


def test_the_summary_names_the_worst_training_and_those_that_lost_the_puck() -> None:
    trained = [training(100, 20, 20), training(101, 8, 20), training(102, 20, 19)]
    text = summary(trained)
    assert "median 98.3 %, lowest 80.0 %, highest 100.0 %" in text
    assert "The worst of 3, seed 101: push 8/20, pick-place 20/20, reach 20/20." in text
    assert "1 lost the puck (push or pick-place below half of the starts): seeds 101." in text
    assert task_table(trained).rows[0] == ("push", "100 %", "40 %", "100 %", "1")


def test_a_look_at_starts_is_noted_once_and_told_to_the_next_recipe(tmp_path: Path) -> None:
    path = tmp_path / "looks.json"
    look = {"recipe": "a", "seeds": [0], "mean": 0.5}
    assert note_look(path, range(5000, 5020), look) == note_look(path, range(5000, 5020), look) == ""
    assert note_look(path, range(6000, 6020), look | {"recipe": "b"}) == ""
    told = note_look(path, range(5010, 5030), look | {"recipe": "c"})
    assert "another recipe (a): take others (--first-seed)" in told
    assert [one["first"] for one in json.loads(path.read_text())] == [5000, 6000, 5010]

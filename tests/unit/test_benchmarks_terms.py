"""The cost benchmark of the terms has every kind, each beside the action alone, and compares in rounds."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from tutti.config.run_config import RunConfig, load_config
from tutti.objectives.terms.union import TermConfig
from tutti.plugin import CUSTOM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

recorded: Any = importlib.import_module("recorded")
terms_cost: Any = importlib.import_module("terms_cost")
timing: Any = importlib.import_module("timing")


@pytest.fixture(scope="module")
def arms() -> dict[str, RunConfig]:
    overrides = ["data.batch_size=4", "data.prefetch=0", "training.threads=1", "training.device=cpu"]
    return terms_cost.arms(load_config(ROOT / "configs" / "demo.yaml", overrides))


def test_every_kind_has_an_arm_beside_the_action_alone(arms: dict[str, RunConfig]) -> None:
    tags = {get_args(member)[1].tag for member in get_args(get_args(TermConfig)[0])}
    found = {name: config.objective.terms() for name, config in arms.items()}
    assert list(found[terms_cost.ALONE]) == ["action"]
    others = [terms for name, terms in found.items() if name != terms_cost.ALONE]
    assert all(set(terms) == {"action", "term"} for terms in others)
    assert {terms["term"].kind for terms in others} == tags - {CUSTOM, "chunk"}


def test_the_gradient_is_that_of_the_weighted_term(arms: dict[str, RunConfig], tmp_path: Path) -> None:
    config = arms["progress"]
    data = recorded.synthetic_run(tmp_path / "data", config, per_task=2, length=24)
    found: list[Any] = []
    for weight in (0.1, 0.4):
        section = config.objective.model_dump(mode="json")
        section["term"] |= {"weight": weight}
        objective = type(config.objective).model_validate(section)
        heavier = config.model_copy(update={"objective": objective})
        timer = timing.StepTimer(heavier, data, tmp_path / str(weight))
        found.append(terms_cost.loudness(timer, 2))
        timer.close()
    light, heavy = found
    assert heavy.gradient == pytest.approx(4 * light.gradient, rel=1e-4) and light.gradient > 0
    assert light.parameters == heavy.parameters > 0


def test_the_table_compares_in_rounds() -> None:
    times = {terms_cost.ALONE: [10.0, 20.0, 30.0], "progress": [11.0, 22.0, 33.0]}
    table = terms_cost.cost_table(times, {"progress": terms_cost.Loudness(gradient=0.25, parameters=1200)})
    assert table.rows[1] == ("progress", "22.0", "1.10", "1.10 - 1.10", "1,200", "0.25")
    assert all(len(row) == len(table.heads) for row in table.rows)

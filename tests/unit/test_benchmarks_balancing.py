"""The cost benchmark knows every method, hands each to its process unchanged, and compares in rounds."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from tutti.config.run_config import RunConfig, load_config, to_yaml
from tutti.plugin import CUSTOM
from tutti.training.backward.aggregators import AggregatorConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

balancing_cost: Any = importlib.import_module("balancing_cost")


@pytest.fixture(scope="module")
def arms() -> dict[str, RunConfig]:
    return balancing_cost.arms(load_config(ROOT / "configs" / "demo.yaml", ["data.batch_size=4"]))


def kinds(union: Any) -> set[str]:
    return {
        kind
        for member in get_args(get_args(union)[0])
        for kind in get_args(member.model_fields["kind"].annotation)
    }


def tags(field: str) -> set[str]:
    members = get_args(RunConfig.model_fields[field].annotation)
    return {get_args(member)[1].tag for member in members} - {CUSTOM}


def test_every_balancing_backward_and_aggregator_has_an_arm(arms: dict[str, RunConfig]) -> None:
    assert {config.balancing.kind for config in arms.values()} == tags("balancing")
    # `masked` costs what its mask makes it cost; knowledge_insulation is one.
    assert {config.backward.kind for config in arms.values()} == tags("backward") - {"masked"}
    found = {
        config.backward.aggregator.kind for config in arms.values() if config.backward.kind == "k_gradients"
    }  # pyright: ignore
    assert found == kinds(AggregatorConfig)


def test_an_arms_config_reaches_its_process_unchanged(arms: dict[str, RunConfig], tmp_path: Path) -> None:
    for name, config in arms.items():
        (tmp_path / "arm.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert load_config(tmp_path / "arm.yaml") == config, name


def test_arms_differ_in_one_section_alone(arms: dict[str, RunConfig]) -> None:
    plain = arms[balancing_cost.PLAIN].model_dump()
    for name, config in arms.items():
        differing = {key for key, value in config.model_dump().items() if value != plain[key]}
        assert differing <= {"balancing"} or differing <= {"backward"}, name
    assert plain["training"]["diagnostics"]["every"] == 0


def test_the_table_compares_times_by_round_and_memory_by_its_least() -> None:
    times = {"plain sum": [10.0, 20.0, 30.0], "other": [20.0, 40.0, 60.0]}
    table = balancing_cost.cost_table(times, {"plain sum": [500.0, 510.0], "other": [560.0, 540.0]})
    assert table.rows[1] == ("other", "40.0", "2.000", "2.000 - 2.000", "540", "+40")
    assert all(len(row) == len(table.heads) for row in table.rows)
    assert len(balancing_cost.cost_table(times, {}).heads) == 4

"""The benchmarks of costs: every kind has an arm, a term has its weighted gradient, rounds are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import balancing_cost
import decoders
import pytest
import recorded
import terms_cost
import timing

from tutti.config.run_config import RunConfig, load_config
from tutti.objectives.config import TermConfig
from tutti.plugin import CUSTOM
from tutti.training.backward.aggregators import AggregatorConfig

ROOT = Path(__file__).resolve().parents[2]


def test_every_decoder_is_timed_and_published(tmp_path: Path) -> None:
    assert decoders.main(["--calls", "2", "--output", str(tmp_path / "decoders")]) == 0
    result = json.loads((tmp_path / "decoders.json").read_text())
    costs = result["costs"]
    assert [name for name in costs if "," not in name] == list(decoders.KINDS)
    # 128 -> 256 -> 8 * 4, by hand: two FLOPs for each multiply-add.
    assert costs["regression"]["parameters"] == 128 * 256 + 256 + 256 * 32 + 32
    assert costs["regression"]["flops"] == 2 * (128 * 256 + 256 * 32)
    assert costs["flow"]["flops"] == costs["diffusion"]["flops"] > costs["bins"]["flops"]
    assert all(cost["milliseconds"]["median"] > 0 for cost in costs.values())
    assert "| regression | 41,248 |" in (tmp_path / "decoders.md").read_text()


@pytest.fixture(scope="module")
def term_arms() -> dict[str, RunConfig]:
    overrides = ["data.batch_size=4", "data.prefetch=0", "training.threads=1", "training.device=cpu"]
    return terms_cost.arms(load_config(ROOT / "configs" / "demo.yaml", overrides))


def test_every_kind_has_an_arm_beside_the_action_alone(term_arms: dict[str, RunConfig]) -> None:
    tags = {get_args(member)[1].tag for member in get_args(get_args(TermConfig)[0])}
    found = {name: config.objective.terms() for name, config in term_arms.items()}
    assert list(found[terms_cost.ALONE]) == ["action"]
    others = [terms for name, terms in found.items() if name != terms_cost.ALONE]
    assert all(set(terms) == {"action", "term"} for terms in others)
    assert {terms["term"].kind for terms in others} == tags - {CUSTOM, "chunk", "next_token"}


def test_the_gradient_is_that_of_the_raw_term_whatever_its_weight(
    term_arms: dict[str, RunConfig], tmp_path: Path
) -> None:
    config = term_arms["progress"]
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
    assert heavy.gradient == pytest.approx(light.gradient, rel=1e-4) and light.gradient > 0
    assert light.parameters == heavy.parameters > 0


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


def test_arms_differ_in_one_section_alone(arms: dict[str, RunConfig]) -> None:
    plain = arms[balancing_cost.PLAIN].model_dump()
    for name, config in arms.items():
        differing = {key for key, value in config.model_dump().items() if value != plain[key]}
        shares = {"balancing", "objective"} if "shares" in name else set()
        assert differing <= {"balancing"} or differing <= {"backward"} or differing == shares, name
    assert plain["training"]["diagnostics"]["every"] == 0


def test_the_table_compares_times_by_round_and_memory_by_its_least() -> None:
    times = {"plain sum": [10.0, 20.0, 30.0], "other": [20.0, 40.0, 60.0]}
    table = balancing_cost.cost_table(times, {"plain sum": [500.0, 510.0], "other": [560.0, 540.0]})
    assert table.rows[1] == ("other", "40.0", "2.000", "2.000 - 2.000", "540", "+40")
    assert all(len(row) == len(table.heads) for row in table.rows)
    assert len(balancing_cost.cost_table(times, {}).heads) == 4

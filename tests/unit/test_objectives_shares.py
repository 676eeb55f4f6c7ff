"""A term has a weight or a share: which of them counts, what is refused, and what stays as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixtures.term_batches import make_model
from tutti.config.run_config import load_config, to_yaml, with_overrides
from tutti.objectives.balancing.learned import UncertaintyBalancingConfig
from tutti.objectives.config import ObjectiveConfig
from tutti.objectives.weight_schedule import WeightSchedule
from tutti.types import UserError

UNITS = "backward.kind=k_gradients", "backward.aggregator={kind: pcd}"


def amounts(*overrides: str, path: Path | None = None) -> dict[str, object]:
    terms = load_config(path, list(overrides)).objective.terms()
    return {n: ("share", t.share) if t.weight is None else ("weight", t.weight) for n, t in terms.items()}


def test_the_default_objective_has_shares_and_action_a_weight() -> None:
    assert amounts("objective.progress={kind: progress}") == {
        "align": ("share", 0.1),
        "action": ("weight", 1.0),
        "recon": ("share", WeightSchedule(start=0.2, end=0.0)),
        "state": ("share", WeightSchedule(start=0.3, end=0.1)),
        "progress": ("share", 0.1),
    }
    assert ObjectiveConfig().shares() == ("align", "recon", "state")


def test_an_override_replaces_the_other_one_of_the_file_and_both_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(
        "objective: {align: {weight: 0.5}, recon: {share: 0.4}, mine: {kind: progress, share: 1}}"
    )
    assert amounts(path=path)["align"] == ("weight", 0.5)
    assert amounts("objective.align.share=null", path=path)["align"] == ("weight", 0.5)
    found = amounts("objective.align.share=0.3", "objective.mine.weight=2", path=path)
    assert (found["align"], found["recon"], found["mine"]) == (
        ("share", 0.3),
        ("share", 0.4),
        ("weight", 2.0),
    )
    with pytest.raises(UserError, match=r"objective\.align: it has a weight and a share: .* Give one"):
        load_config(path, ["objective.align.share=0.3", "objective.align.weight=0.5"])
    path.write_text("objective: {align: {weight: {start: 1}, share: 0.4}}")
    with pytest.raises(UserError, match=r"objective\.align: it has a weight and a share"):
        load_config(path)


def test_action_is_the_reference() -> None:
    with pytest.raises(UserError, match=r"shares are relative to 'action': give that a weight"):
        load_config(None, ["objective.action.share=0.5"])
    assert amounts("objective.action.weight=2")["action"] == ("weight", 2.0)
    assert amounts("objective.action={kind: 'my.file:Class'}")["action"] == ("weight", 1.0)
    assert amounts("objective.mine={kind: 'my.file:Class', share: 0.4}")["mine"] == ("share", 0.4)


@pytest.mark.parametrize("kind", ["uncertainty", "dwa", "rlw", "famo", "my.file:Class"])
def test_a_learned_balancing_takes_weights_which_are_1_unless_given(kind: str) -> None:
    assert set(amounts(f"balancing.kind={kind}").values()) == {("weight", 1.0)}
    with pytest.raises(UserError, match=rf"{kind} with a share for recon: .*objective\.recon\.weight=1"):
        load_config(None, [f"balancing.kind={kind}", "objective.recon.share=0.1"])


def test_an_aggregator_that_undoes_lambdas_takes_weights_too() -> None:
    assert set(amounts(*UNITS).values()) == {("weight", 1.0)}
    with pytest.raises(UserError, match=r"aggregator\.kind pcd with a share for align"):
        load_config(None, [*UNITS, "objective.align.share=0.1"])
    assert amounts("backward.kind=k_gradients")["align"] == ("share", 0.1)


def test_the_objective_by_itself_refuses_them_too() -> None:
    objective = ObjectiveConfig.model_validate({"recon": None, "state": {"weight": 1.0}})
    with pytest.raises(UserError, match=r"uncertainty with a share for align"):
        objective.build(make_model(), UncertaintyBalancingConfig())


def test_fsdp_is_refused_with_the_way_to_weights_unless_no_share_counts() -> None:
    with pytest.raises(UserError, match=r"fsdp with a share for align, recon, state: .*the log prints"):
        load_config(None, ["training.parallel.kind=fsdp"])
    assert load_config(None, ["training.parallel.kind=fsdp", "strategy.kind=action_only"])
    weights = [f"objective.{name}.weight=0.1" for name in ("align", "recon", "state")]
    assert load_config(None, ["training.parallel.kind=fsdp", *weights])


@pytest.mark.parametrize(
    "overrides", [[], ["balancing.kind=rlw"], ["objective.align.weight={start: 1, end: 0.5}"]]
)
def test_the_resolved_config_names_the_one_that_counts_and_reads_back(
    overrides: list[str], tmp_path: Path
) -> None:
    config = load_config(None, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    for name, term in config.model_dump(mode="json")["objective"].items():
        assert len({"weight", "share"} & term.keys()) == 1, name
    changed = with_overrides(config, ["objective.align.share=0.7", "balancing.kind=shares"], "here")
    assert changed.objective.shares()[0] == "align"

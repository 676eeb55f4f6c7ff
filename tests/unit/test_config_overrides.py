"""Overrides: one set whatever their order, nothing asked is dropped, a mistake names who made it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures.studies import make_study
from tutti.config.files import read_yaml
from tutti.config.messages import forms_of
from tutti.config.overrides import apply_overrides, parse_overrides
from tutti.config.run_config import RunConfig, build_config, load_config
from tutti.studies.cells import arm_config
from tutti.studies.config import load_study
from tutti.types import UserError

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
SCHEMA = RunConfig.model_json_schema()
DEFAULTS = RunConfig()
ALIKE = ("objective.action", "objective.recon", "objective.state")
"""The same union as objective.align."""
LONG = "training.steps=100000"
"""So long that no warm-up and no calibration is too long for it."""


def choices(node: Any) -> list[Any]:
    """What a node of the schema may be."""
    return list(forms_of(node, SCHEMA))


def kinds_of(node: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for choice in choices(node):
        kind, *others = choices(choice.get("properties", {}).get("kind", {}))
        if others:  # a key that is called kind, as that of data.cache: it chooses between no other keys
            continue
        found |= dict.fromkeys(kind.get("enum", [kind["const"]] if "const" in kind else []), choice)
    return found


def unions(
    node: Any, path: str = "", above: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Every place of the config that has kinds: its path, the kinds above that lead there, its kinds."""
    kinds = kinds_of(node)
    if len(kinds) > 1:
        yield path, above, kinds
    for choice in choices(node):
        kind = next((name for name, one in kinds.items() if one is choice), None)
        lead = (*above, f"{path}.kind={kind}") if kind and len(kinds) > 1 else above
        for key, inner in choice.get("properties", {}).items():
            yield from unions(inner, f"{path}.{key}".lstrip("."), lead)
        if "properties" in choice and isinstance(extra := choice.get("additionalProperties"), dict) and path:
            yield from unions(extra, f"{path}.extra", lead)


def other_values(node: Any) -> Iterator[Any]:
    """Plain values that differ from the default."""
    default = node.get("default")
    for choice in choices(node):
        match choice.get("type"):
            case "boolean":
                yield default is not True
            case "integer":
                yield 8 if default != 8 else 4
            case "number":
                yield 0.25 if default != 0.25 else 0.5
            case _:
                yield from (word for word in choice.get("enum", ()) if word != default)


def pairs() -> list[tuple[str, str, tuple[str, ...], str, Any]]:
    """(path, kind, kinds above, key, value): each key of each kind of each union, with one value."""
    return [
        (path, kind, above, key, value)
        for path, above, kinds in unions(SCHEMA)
        if path not in ALIKE
        for kind, choice in kinds.items()
        for key, inner in choice["properties"].items()
        if key != "kind"
        for value in list(other_values(inner))[:1]
    ]


def outcome(path: Path | None, texts: Sequence[str]) -> Any:
    try:
        return load_config(path, texts)
    except UserError as error:
        return str(error)


def laid(values: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    apply_overrides(values, parse_overrides(texts), DEFAULTS)
    return values


def at(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values[part]
    return values


def test_the_unions_of_the_schema_are_found() -> None:
    found = {path for path, *_ in unions(SCHEMA)}
    assert found >= {"training.optimizer", "training.schedule", "model.action", "objective.align", "strategy"}
    assert found >= {"objective.extra", "balancing", "backward", "backward.aggregator", "data.augmentation"}


def test_a_kind_and_its_key_mean_the_same_in_both_orders() -> None:
    held, file = 0, read_yaml(DEMO)
    for path, kind, above, key, value in pairs():
        texts = [*above, f"{path}.kind={kind}", f"{path}.{key}={yaml.safe_dump(value).split()[0]}", LONG]
        values, again = (laid(copy.deepcopy(file), order) for order in (texts, texts[::-1]))
        assert values == again, texts
        try:
            config = build_config(values, "demo")
        except UserError:
            continue  # some values do not suit the rest of the config
        section = at(config.model_dump(mode="json"), path)
        assert section["kind"] == kind and section[key] == value, texts
        held += 1
    assert held > 150


def test_any_set_of_overrides_means_the_same_in_every_order_and_keeps_all_of_them() -> None:
    draw = random.Random(0)
    pool = [f"{path}.kind={kind}" for path, kind, *_ in pairs()]
    pool += [f"{path}.{key}={draw.choice([1, 2])}" for path, _, _, key, _ in pairs()]
    pool += [f"{path}={{kind: {kind}, {key}: 1}}" for path, kind, _, key, _ in pairs()]
    pool += [f"{path}=null" for path, *_ in pairs()]
    sections = sorted({text.split("=")[0].rpartition(".")[0] for text in pool})
    kept = refused = 0
    for _ in range(400):
        section = draw.choice(sections)
        near = sorted({text for text in pool if text.startswith(section)})
        texts = draw.sample(near, min(3, len(near)))
        results: list[Any] = []
        for order in permutations(texts):
            values: dict[str, Any] = {section.split(".")[0]: {"kind": "old", "lr": 7, "weight": 3}}
            try:
                results.append(laid(values, order))
            except UserError:
                results.append(None)
                continue
            for one in parse_overrides(order):
                expected, found = one.value, at(values, one.key)
                assert expected == found or expected.items() <= found.items(), order
        assert all(result == results[0] for result in results), texts
        kept, refused = kept + (results[0] is not None), refused + (results[0] is None)
    assert kept > 100 and refused > 30


def test_a_kind_drops_the_files_keys_of_another_kind_only() -> None:
    values = {"training": {"optimizer": {"kind": "muon", "lr": 0.5, "momentum": 0.9}}}
    assert laid(values, ["training.optimizer.lr=0.1", "training.optimizer.kind=adamw"]) == {
        "training": {"optimizer": {"kind": "adamw", "lr": 0.1}}
    }


def test_a_kind_that_is_the_default_drops_nothing(tmp_path: Path) -> None:
    default = RunConfig().training.optimizer
    (tmp_path / "run.yaml").write_text("training: {optimizer: {lr: 0.5}}\nobjective: {align: {weight: 0.3}}")
    texts = [f"training.optimizer.kind={default.kind}", "objective.align.kind=contrastive"]
    config = load_config(tmp_path / "run.yaml", texts)
    assert config.training.optimizer.lr == 0.5
    assert config.objective.align == load_config(None, ["objective.align.weight=0.3"]).objective.align


@pytest.mark.parametrize(
    "texts",
    [
        ("training.steps=5", "training.steps=7"),
        ("strategy.kind=two_stage", "strategy.kind=progressive"),
        ("training.optimizer={kind: adamw, lr: 0.1}", "training.optimizer.lr=0.2"),
        ("training.optimizer={kind: adamw}", "training.optimizer.kind=muon"),
        ("objective.recon=null", "objective.recon.weight=0.2"),
        ("training={optimizer: {lr: 0.1}}", "training.optimizer={kind: muon}"),
        ("training.ema=off", "training.ema.decay=0.9"),
    ],
)
def test_overrides_that_contradict_each_other_are_refused_by_name(texts: tuple[str, str]) -> None:
    for order in (texts, texts[::-1]):
        with pytest.raises(UserError, match="contradict") as caught:
            load_config(None, order)
        assert all(text in str(caught.value) for text in texts)


def test_the_same_override_twice_is_no_contradiction() -> None:
    assert load_config(None, ["training.steps=500", "training.steps=500"]).training.steps == 500


def test_a_key_that_the_chosen_kind_does_not_have_is_refused_in_both_orders() -> None:
    texts = ["model.action.bins=12", "model.action.kind=flow"]
    said = {outcome(DEMO, order) for order in (texts, texts[::-1])}
    assert said == {
        "override 'model.action.bins=12': 1 mistake\n"
        "  model.action.bins is not a key where model.action.kind is 'flow'."
    }


@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        ("training.stepz=5", "override 'training.stepz=5': 1 mistake"),
        ("training.optimizer.kind=adamv", "override 'training.optimizer.kind=adamv': 1 mistake"),
        ("training.schedule={wrmup: 3}", "override 'training.schedule={wrmup: 3}': 1 mistake"),
        ("training.steps=10", f"{DEMO} with override 'training.steps=10': 1 mistake"),
    ],
)
def test_a_mistake_is_blamed_on_the_override_that_made_it(text: str, blamed: str) -> None:
    said = outcome(DEMO, ["name=other", text])
    assert said.splitlines()[0] == blamed


def test_a_mistake_of_the_file_is_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("training: {stepz: 5}")
    said = outcome(tmp_path / "run.yaml", ["name=other"])
    assert said.startswith(f"{tmp_path / 'run.yaml'}: 1 mistake")


# --- studies


def test_an_arms_kind_keeps_what_the_study_says_of_its_keys() -> None:
    study = make_study(
        overrides=["training.optimizer.lr=0.02", "training.schedule.warmup=3"],
        arms={"end_to_end": [], "other": ["training.optimizer.kind=adamw", "training.schedule.warmup=2"]},
    )
    training = arm_config(study, "other").training
    assert (training.optimizer.kind, training.optimizer.lr, training.schedule.warmup) == ("adamw", 0.02, 2)


def test_what_is_no_arms_to_set_is_refused() -> None:
    """A key that its kind does not have, and what the study decides, in a mapping too."""
    arms = {
        "end_to_end": [],
        "a": ["strategy.kind=action_only"],
        "sly": ["training={steps: 9, log_every: 1}"],
    }
    study = make_study(overrides=["strategy.first_share=0.3"], arms=arms)
    with pytest.raises(UserError, match=r"arm 'a': override 'strategy\.first_share=0\.3': 1 mistake"):
        arm_config(study, "a")
    with pytest.raises(UserError, match=r"arm 'sly': training\.steps is not an arm's to change"):
        arm_config(study, "sly")


def written(folder: Path, **changes: Any) -> Path:
    values = make_study().model_dump(mode="json") | changes
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_arms_that_differ_in_order_alone_are_one_arm(tmp_path: Path) -> None:
    arms = {
        "end_to_end": ["training.gradients.clip_norm=1", "seed=1"],
        "b": ["seed=1", "training.gradients.clip_norm=1"],
    }
    with pytest.raises(UserError, match="have the same overrides"):
        load_study(written(tmp_path, arms=arms))


def test_a_budgets_kind_keeps_its_steps_in_both_orders(tmp_path: Path) -> None:
    path = written(tmp_path, budget={"kind": "steps", "steps": 9})
    assert load_study(path, ["budget.kind=flops"]).budget.steps == 9
    for texts in permutations(["budget.kind=flops", "budget.steps=7"]):
        assert load_study(path, texts).budget.model_dump() == {"kind": "flops", "steps": 7, "arms": {}}


def test_an_override_of_the_base_that_the_studys_own_would_undo_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, overrides=["training.gradients.clip_norm=2"])
    with pytest.raises(UserError, match=r"'base\.training\.gradients\.clip_norm=3' changes nothing"):
        load_study(path, ["base.training.gradients.clip_norm=3"])

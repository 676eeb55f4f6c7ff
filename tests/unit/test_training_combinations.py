"""Sections that make no sense together are refused with the reason; those that do are let through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tutti.config.run_config import load_config
from tutti.types import UserError

DOCS = Path(__file__).parents[2] / "docs" / "background" / "balancing.md"

SHARE = "balancing.start=150"
K = "backward.kind=k_gradients"
KEPT = "{kind: pretrained, path: t, learn: none, cache: 9}"
WHOLE = "objective={align: null, recon: null, state: null}"
WORDS = "{kind: fast, writer: vlm}"


def aggregator(kind: str) -> list[str]:
    return [K, f"backward.aggregator={{kind: {kind}}}"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["balancing.kind=famo", *aggregator("upgrad")], r"famo with .* upgrad: FAMO learns from"),
        (["balancing.kind=dwa", *aggregator("imtl_g")], r"dwa with .* imtl_g: the aggregator normalises"),
        (["balancing.kind=rlw", *aggregator("random")], r"rlw with .* random: the weights would be drawn"),
        ([SHARE, "training.steps=150"], r"start is 150, but training\.steps is 150"),
        (["balancing.start=99"], r"start is 99, but the learning rate warms up for 100"),
        (
            ["balancing.kind=uncertainty", "objective.words={kind: recoverable_language}"],
            r"objective\.words\.kind recoverable_language: that term may be negative",
        ),
        (
            ["balancing.kind=famo", "objective.words={kind: recoverable_language}"],
            r"Set balancing\.bounds\.words well below",
        ),
        (
            ["backward={kind: masked, may_train: {recno: [fusion]}}"],
            r"names the term recno; the objective has",
        ),
        (
            [
                "backward.kind=knowledge_insulation",
                "objective={align: null, recon: null, state: {weight: 0}}",
            ],
            r"knowledge_insulation, but there is no term besides action",
        ),
        (
            [f"model.vision={KEPT}", WHOLE, "training.parallel.kind=fsdp"],
            r"model\.vision\.cache with training\.parallel\.kind fsdp: .* Set model\.vision\.cache=0, or",
        ),
        (
            [
                "model.language={kind: pretrained, path: t, learn: none, remember: 9}",
                "training.compile=model",
            ],
            r"model\.language\.remember with training\.compile model: .* Set model\.language\.remember=0, or",
        ),
        (
            ["model.vlm={path: v}", f"model.action={WORDS}", "objective.action.stop_gradient=[fused]"],
            r"action\.stop_gradient \[fused\] with model\.action\.writer vlm: .* Take fused out",
        ),
    ],
)
def test_refused_with_the_reason(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [SHARE, "training.steps=151"],
        [SHARE, *aggregator("cosine_gate")],
        ["strategy.kind=two_stage", "training.steps=300"],
        [SHARE, "backward.kind=knowledge_insulation"],
        ["balancing.kind=famo", *aggregator("sum")],
        ["balancing={kind: famo, bounds: {words: -10}}", "objective.words={kind: recoverable_language}"],
        ["balancing.kind=uncertainty", "objective.words={kind: recoverable_language, weight: 0}"],
        ["balancing.kind=uncertainty", *aggregator("pcgrad")],
        ["balancing.kind=rlw", "backward.kind=knowledge_insulation"],
        ["backward={kind: masked, may_train: {recon: [fusion]}}"],
        [f"model.vision={KEPT}", "training.compile=blocks"],
        [f"model.vision={KEPT}", "training.parallel.kind=ddp"],
        ["model.vlm={path: v}", f"model.action={WORDS}", "objective.action.stop_gradient=[vision]"],
    ],
)
def test_let_through(overrides: list[str]) -> None:
    assert load_config(None, overrides)


@pytest.mark.parametrize(
    "text", re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
)
def test_what_the_page_shows_is_a_config(text: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path)

"""4 micro-batches of 8 = 1 batch of 32 = 4 ranks of 8, in float64, where the masks of each are unlike.

Every kind of term is in EXACT, which is the large batch, or in PER_MICRO_BATCH, which compares rows.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fixtures.ranks import on_ranks
from fixtures.ranks_training import trainer_of
from fixtures.term_batches import as_double
from fixtures.vla_training import MODEL, SPEC, make_batch
from tutti.distributed.ranks import MicroBatches, current_ranks
from tutti.models.config import ModelConfig
from tutti.models.vla import VLA
from tutti.nested_dicts import merge
from tutti.objectives.config import ObjectiveConfig, TermConfig
from tutti.objectives.objective import Objective
from tutti.objectives.term import Term, TermValue
from tutti.objectives.unified import UnifiedLoss
from tutti.plugin import CUSTOM
from tutti.training.device import resolve_machine
from tutti.training.diagnostics import first_batch
from tutti.training.rng import rng_state
from tutti.training.strategy import EndToEndConfig, Strategy
from tutti.training.update import Reevaluation, Update
from tutti.types import Batch, Features, LossTerms, masked_mean

EXAMPLES = Path(__file__).parents[2] / "examples"
PARTS, ROWS, UPDATES = 4, 8, 3
EXACT: dict[str, dict[str, Any]] = {
    "chunk": {},
    "future_states": {"offsets": (1, 3), "hidden": 16, "gripper": {"dimension": -1}},
    "future_patches": {"width": 16, "heads": 2},
    "changed_patches": {"width": 16, "heads": 2},
    "masked_patches": {"width": 16, "heads": 2},
    "inverse_dynamics": {"hidden": 16, "channels": 4, "offset": 4},
    "future_latent": {"hidden": 32},
    "progress": {"hidden": 16},
    "next_token": {},
    CUSTOM: {"kind": "own_term:StateChange", "options": {"offset": 4}},
}
PER_MICRO_BATCH: dict[str, dict[str, Any]] = {
    "contrastive": {"width": 16},
    "sigmoid": {"width": 16, "bias": -2.0},
    "state_contrastive": {"width": 16, "read": "vision", "drop_one_view": False},
    "recoverable_language": {"width": 16},
}
COMPARED = PER_MICRO_BATCH | {
    "change": {"kind": "contrastive", "width": 16, "pictures": "change", "positives": "soft"}
}
EQUAL_ROWS = {"progress"}
"""A plain mean over rows, of which every micro-batch has as many."""
OF_BATCH = {"extra/target_std", "extra/mean_baseline"}
"""Metrics that are no means: a root, and an entropy of a mean, of each micro-batch."""


@pytest.fixture(autouse=True)
def _own_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_term", raising=False)


def uneven(number: int, size: int = PARTS * ROWS) -> Batch:
    """Windows of which the first quarter has neither action nor text, the second a lone action, no state and
    no future, the third views that are absent, instructions without text and still pictures, and the last
    nearly everything."""
    batch = as_double(make_batch(number, size))
    first, second, third, last = (slice(i * size // 4, (i + 1) * size // 4) for i in range(4))
    actions = torch.arange(5)[None, :, None] < (1 + torch.arange(size) % 5)[:, None, None]
    actions = actions.repeat(1, 1, 3)
    actions[first], actions[second] = False, False
    actions[second.start + 1, 0] = True
    seen, told = batch.observation.image_mask.clone(), batch.observation.text_mask.clone()
    known = batch.observation.state_mask.clone()
    seen[third, 0] = False
    seen[third.start] = False
    told[third.start + 2] = False
    told[first], known[second] = False, False
    ahead = torch.ones(size, dtype=torch.bool)
    ahead[second] = False
    ahead[last.start] = False
    (future,) = batch.futures.values()
    assert batch.later_states is not None
    later = batch.later_states.mask.clone()
    later[first, 3] = False  # at t + 3
    later[second], later[first, 0] = False, False  # no state; no actions, so no next key frame
    later[third.start + 1 : third.stop, 0] = False  # the next key frame
    pictures = future.observation.images.clone()
    still = slice(third.start, third.start + 6)
    pictures[still, 1] = batch.observation.images[still, 1]
    return replace(
        batch,
        observation=replace(batch.observation, image_mask=seen, text_mask=told, state_mask=known),
        action_mask=actions,
        futures={4: replace(future, observation=replace(future.observation, images=pictures), mask=ahead)},
        later_states=replace(batch.later_states, mask=later),
        answer=torch.arange(5 * size).view(size, 5) * 7 % SPEC.vocab_size,
        answer_mask=torch.arange(5)
        < torch.where(torch.arange(size) < size // 2, 1, torch.arange(size) % 6)[:, None],
        progress=torch.rand(size, generator=torch.Generator().manual_seed(number)).double(),
    )


def cut(whole: Batch, parts: int) -> list[Batch]:
    """Its rows as so many batches, of which this rank has its share."""
    size = len(whole.window) // parts
    ranks = current_ranks()
    found: list[Batch] = []
    for part in range(parts):
        rows = ranks.rows(size)
        own = slice(part * size + rows.start, part * size + rows.stop)
        found.append(whole.apply(lambda value, own=own: value[own]))
    return found


def built(kind: str, given: dict[str, Any]) -> tuple[VLA, UnifiedLoss]:
    torch.manual_seed(0)
    finer = {"width": 16, "stem": {"channels": (8, 16), "strides": (1, 2)}}  # 4 tokens, so some can be hidden
    model = ModelConfig.model_validate(MODEL | {"vision": finer}).build(SPEC).double()
    terms = {"align": None, "recon": None, "state": None, "extra": {"kind": kind, "weight": 0.7, **given}}
    return model, ObjectiveConfig.model_validate(terms).build(model).double()


def evaluated(
    model: VLA, loss: Objective, batches: list[Batch], *, known: bool = True
) -> tuple[dict[str, float], list[Tensor]]:
    """The mean over the batches, as micro-batches of one update, of values and metrics; the gradient of the
    term `extra`. With `known` False the batches know nothing of one another."""
    torch.manual_seed(1)  # of hidden patches
    update = MicroBatches(batches)
    means: dict[str, float] = {}
    parameters = [p for p in (*model.parameters(), *loss.parameters()) if p.requires_grad]
    gradient = [torch.zeros_like(p) for p in parameters]
    for number, batch in enumerate(batches):
        with (update if known else MicroBatches([batch])).use(number):
            terms = loss(model(batch.observation), batch, model)
        for name, value in {**terms.values, **terms.metrics}.items():
            means[name] = means.get(name, 0.0) + value.item() / len(batches)
        found = torch.autograd.grad(
            terms.values["extra"] / len(batches), parameters, allow_unused=True, materialize_grads=True
        )
        gradient = [a + b for a, b in zip(gradient, found, strict=True)]
    assert not update.unknown
    return means, gradient


def furthest(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, relative to the largest number."""
    largest = max(float(value.abs().max()) for value in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


def test_every_kind_is_in_one_of_the_two_lists() -> None:
    union = get_args(TermConfig)[0]
    kinds = {get_args(member)[1].tag for member in get_args(union)}
    assert kinds == EXACT.keys() | PER_MICRO_BATCH.keys() and not EXACT.keys() & PER_MICRO_BATCH.keys()


@pytest.mark.parametrize("kind", EXACT)
def test_a_mean_over_micro_batches_is_that_of_the_large_batch(kind: str) -> None:
    model, loss = built(kind, EXACT[kind])
    whole, parts = uneven(1), cut(uneven(1), PARTS)
    expected, gradient = evaluated(model, loss, [whole])
    found, summed = evaluated(model, loss, parts)
    assert found.keys() == expected.keys() and any(float(g.abs().max()) > 1e-3 for g in gradient)
    for name in expected.keys() - OF_BATCH:
        assert found[name] == pytest.approx(expected[name], rel=1e-12), name
    assert furthest(gradient, summed) < 1e-12
    unknown, apart = evaluated(model, loss, parts, known=False)
    if kind not in EQUAL_ROWS:  # the masks are such that the mean of means is another number
        assert abs(unknown["extra"] / expected["extra"] - 1) > 5e-4 and furthest(gradient, apart) > 1e-3


@pytest.mark.parametrize("kind", COMPARED)
def test_what_compares_rows_counts_by_the_rows_that_take_part(kind: str) -> None:
    model, loss = built(kind, COMPARED[kind])
    parts = cut(uneven(1), PARTS)
    pictured = [batch.observation.image_mask.any(dim=1) for batch in parts]
    seen, both = (
        [int((batch.labelled(labels) & here).sum()) for batch, here in zip(parts, pictured, strict=True)]
        for labels in (("state",), ("text",))
    )
    assert seen == [8, 0, 7, 8] and both == [0, 8, 6, 8]
    others = {"state_contrastive": seen, "change": [0, 0, 6, 7], "recoverable_language": [0, 1, 6, 8]}
    counts = others.get(kind, both)
    apart = [evaluated(model, loss, [batch])[0] for batch in parts]
    found, _ = evaluated(model, loss, parts)
    for name in apart[0].keys() - {"action"}:
        plain = name.split("/")[-1] in ("temperature", "bias", "skipped")
        weights = [1] * PARTS if plain else counts
        mean = sum(w * one[name] for w, one in zip(weights, apart, strict=True)) / sum(weights)
        assert found[name] == pytest.approx(mean, rel=1e-12), name
    equal = cut(as_double(make_batch(1, 2 * ROWS)), 2)
    means = [evaluated(model, loss, [batch])[0]["extra"] for batch in equal]
    assert evaluated(model, loss, equal)[0]["extra"] == (means[0] + means[1]) / 2  # to the last bit


def test_a_second_look_at_the_micro_batches_is_that_of_the_large_batch() -> None:
    model, loss = built("future_states", EXACT["future_states"])
    machine = resolve_machine("cpu", 1, "fp32")

    def means(batches: list[Batch]) -> dict[str, float]:
        def evaluate(batch: Batch, progress: float, only: Collection[str]) -> tuple[Features, LossTerms]:
            features = model(batch.observation)
            return features, loss(features, batch, model, progress, only)

        point = Strategy(EndToEndConfig().phases(), steps=1).at(0)
        update = Update(step=0, point=point, active_terms=loss.names, batches=batches)
        return Reevaluation(loss, evaluate, machine).means(update, rng_state())

    assert means(cut(uneven(1), PARTS)) == pytest.approx(means([uneven(1)]), rel=1e-12)


SHARES: dict[str, Any] = {"balancing": {"kind": "shares", "start": 1, "steps": 1}}
MASKED = {"backward": {"kind": "masked", "may_train": {"recon": ["vision"], "action": ["fusion", "action"]}}}
SECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "k_gradients": {"backward": {"kind": "k_gradients"}},
    "masked": MASKED,
    "shares": SHARES,
    "shares_of_k": SHARES | {"backward": {"kind": "k_gradients", "scope": "part"}},
}
ON_RANKS = ("plain", "shares_of_k")
OBJECTIVE = {
    "align": None,
    "recon": {"width": 16, "heads": 2, "downsample": 2, "weight": 0.1},
    "state": {"hidden": 16, "offsets": [1, 3], "gripper": {"dimension": -1}, "weight": 1.0},
}

WITH_SHARES = merge(
    OBJECTIVE, {"recon": {"weight": None, "share": 0.2}, "state": {"weight": None, "share": 0.3}}
)


def trained(folder: str, accumulation: int, name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """Records, gradients, weights of some updates of the default objective without its comparison of rows."""
    changes = {
        "accumulation": accumulation,
        "gradients": {"clip_norm": 0.5},
        "schedule": {"kind": "constant", "warmup": 1},
        **parallel,
    }
    objective = WITH_SHARES if "balancing" in SECTIONS[name] else OBJECTIVE
    trainer = trainer_of(
        Path(folder) / f"{name}-{accumulation}", changes, objective=objective, **SECTIONS[name]
    )
    gradients: list[list[Tensor]] = []
    (adam,) = trainer.optimizer.optimizers.values()
    for group in adam.param_groups:
        group["eps"] = 1.0  # with 1e-8 Adam makes a whole step of what is 0 up to rounding
    adam.register_step_pre_hook(
        lambda *_: gradients.append(
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.parameters.values()]
        )
    )
    records: list[dict[str, float]] = []
    stream: Iterator[Batch] = (batch for n in range(UPDATES) for batch in cut(uneven(n), accumulation))
    for _ in range(UPDATES):
        trainer.update(stream)
        records.append(trainer.meter.take())
    weights = [p.detach().clone() for p in trainer.parameters.values()]
    return {"records": records, "gradients": gradients, "weights": weights}


def on_each_rank(folder: str, accumulations: tuple[int, ...]) -> dict[tuple[str, int], dict[str, Any]]:
    parallel = {"parallel": {"kind": "ddp"}}
    return {(name, a): trained(folder, a, name, parallel) for name in ON_RANKS for a in accumulations}


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for expected, found in zip(one["records"], other["records"], strict=True):
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)
    for expected, found in zip(one["gradients"], other["gradients"], strict=True):
        assert furthest(expected, found) < 1e-12
    assert furthest(one["weights"], other["weights"]) < 1e-12


@pytest.mark.parametrize("name", SECTIONS)
def test_updates_of_micro_batches_are_those_of_the_large_batch(name: str, tmp_path: Path) -> None:
    whole = trained(str(tmp_path), 1, name, {})
    assert len(whole["gradients"]) == UPDATES and {
        "metric/state/key_l1",
        "metric/recon/copy_baseline",
    } <= set(whole["records"][0])
    require_same(whole, trained(str(tmp_path), PARTS, name, {}))


def test_updates_of_four_ranks_are_those_of_the_large_batch_too(tmp_path: Path) -> None:
    """Four ranks of 8 rows; and of 4 rows in each of two micro-batches."""
    expected = {name: trained(str(tmp_path), 1, name, {}) for name in ON_RANKS}
    for found in on_ranks(4, on_each_rank, str(tmp_path / "ranks"), (1, 2)):
        for (name, _), training in found.items():
            require_same(expected[name], training)


class Unknown(Term):
    """A mean that does not say what it counts."""

    def __init__(self, model: Any, **term: Any) -> None:
        super().__init__(**term)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def compute(self, features: Features, batch: Batch, model: Any) -> TermValue:
        error = (self.scale * features.readout.mean(dim=1)).square()
        return TermValue(value=masked_mean(error, batch.action_mask[:, 0, 0]), metrics={})


def test_a_mean_that_does_not_say_what_it_counts_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(accumulation: int, objective: dict[str, Any]) -> list[str]:
        caplog.clear()
        first_batch._warn_of_lone_mean.cache_clear()
        trainer = trainer_of(tmp_path / "run", {"accumulation": accumulation}, objective=objective)
        with caplog.at_level(logging.WARNING, logger="tutti.training"):
            stream = iter([batch for n in range(2) for batch in cut(uneven(n), accumulation)])
            for _ in range(2):
                trainer.update(stream)
        return [one.message for one in caplog.records if "masked_mean" in one.message]

    own = OBJECTIVE | {"extra": {"kind": f"{__name__}:Unknown"}}
    assert warned(2, OBJECTIVE) == [] and warned(1, own) == []
    assert len(warned(2, own)) == 1


def test_terms_are_those_of_one_batch_outside_of_an_update() -> None:
    model, loss = built("chunk", {})
    batch = cut(uneven(1), PARTS)[3]
    update = MicroBatches(cut(uneven(1), PARTS))

    def action() -> LossTerms:
        return loss(model(batch.observation), batch, model)

    with update.use(3):
        within = float(action().values["action"].detach())
    alone = action().values["action"].item()
    assert alone == masked_mean((model.predict(batch.observation) - batch.actions).abs(), batch.action_mask)
    counts = [float(one.action_mask.sum()) for one in update.batches]
    assert within == pytest.approx(alone * PARTS * counts[3] / sum(counts), rel=1e-12)

"""Rows that lack actions, text or state, in float64: every term and decoder takes those that have its labels.

The loss and gradient of an update are those of its labelled rows alone, however they lie in micro-batches and
ranks, and the plain sum over a split of the rows by what they have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fixtures.ranks import on_ranks
from fixtures.term_batches import as_double
from fixtures.vla_training import MODEL, SPEC, make_batch
from numerics.test_accumulation import EXACT, EXAMPLES, PER_MICRO_BATCH, cut
from tutti.distributed.ranks import MicroBatches, mean_over_ranks
from tutti.models.config import ModelConfig
from tutti.models.decoders import denoising
from tutti.models.vla import VLA
from tutti.objectives.config import ObjectiveConfig
from tutti.objectives.terms import masked_patches
from tutti.objectives.unified import UnifiedLoss
from tutti.plugin import CUSTOM
from tutti.types import LABELS, Batch, Label, LaterStates, Observation

B = 8
NARROW = {"width": 16, "depth": 1, "heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "gripper": {"kind": "regression", "hidden": 16, "gripper": {"dimension": -1}},
    "flow": {**NARROW, "draws": 2},
    "diffusion": {**NARROW, "draws": 2},
    "bins": {**NARROW, "bins": 8},
    "fast": NARROW,
    "own": {"kind": "own_decoder:Laplace", "options": {"hidden": 16}},
}
MEANS: dict[str, dict[str, Any]] = {  # next_token counts words of a label that a recording never has
    kind: {"kind": kind, **given} for kind, given in EXACT.items() if kind not in ("chunk", "next_token")
} | {"without_key": {"kind": "future_states", "offsets": (1, 3), "last": False, "hidden": 16}}
COMPARISONS: dict[str, dict[str, Any]] = {
    kind: {"kind": kind, **given} for kind, given in PER_MICRO_BATCH.items()
} | {
    "near": {"kind": "state_contrastive", "width": 16, "read": "readout"},
    "told": {"kind": "recoverable_language", "width": 16, "action": "readout"},
}
NAMES = {CUSTOM: "own"}
GROUPS = ("means", "comparisons", *DECODERS)
NEEDED: dict[str, tuple[Label, ...]] = {
    "action": ("actions",),
    "contrastive": ("text",),
    "sigmoid": ("text",),
    "state_contrastive": ("state",),
    "near": ("state",),
    "recoverable_language": ("actions", "text"),
    "told": ("text",),
    "inverse_dynamics": ("actions",),
    "future_states": ("state",),
    "without_key": ("state",),
    "own": ("state",),
}
"""Which labels a row needs, by hand; none: every row counts."""
ELEMENTS: dict[str, Callable[[Batch], float]] = {
    "action": lambda batch: float(batch.action_mask.sum()),
    "inverse_dynamics": lambda batch: float(batch.action_mask[:, :4].sum()),
    "without_key": lambda batch: 2.0 * float(batch.observation.state_mask.sum()),
    "own": lambda batch: float(batch.observation.state_mask.sum()),
    **dict.fromkeys(("masked_patches", "future_latent", "progress"), lambda batch: float(len(batch.window))),
}
"""Of how many equal elements a term is the mean, by hand, where it is one mean."""


@pytest.fixture(autouse=True)
def _own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


Rows = tuple[tuple[bool, ...], ...]
"""For actions, text and state in turn, which rows have it."""


@cache
def everything(number: int = 0) -> Batch:
    """A batch of which every row has every label, its chunks of unlike lengths."""
    batch = as_double(make_batch(number, B))
    steps = torch.arange(5)[:, None] < (1 + torch.arange(B) % 5)[:, None, None]
    progress = torch.rand(B, generator=torch.Generator().manual_seed(number)).double()
    actions = batch.actions.clone()
    actions[..., -1] = torch.where(actions[..., -1] > 0, 1.0, -1.0)  # a gripper
    ids = torch.tensor([0, 1, 0, 1, 1, 2, 2, 0])
    return replace(
        batch,
        actions=actions,
        action_mask=steps.repeat(1, 1, 3),
        progress=progress,
        instruction_id=ids,
    )


def with_labels(have: Rows, number: int = 0, junk: float = 7.0) -> Batch:
    """The batch in which only these rows have actions, text and state; elsewhere stands something else."""
    actions, text, state = (torch.tensor(rows) for rows in have)
    whole = everything(number)

    def seen(observation: Observation) -> Observation:
        return replace(
            observation,
            text=torch.where(text[:, None], observation.text, 1),
            text_mask=observation.text_mask & text[:, None],
            state=torch.where(state[:, None], observation.state, junk),
            state_mask=state,
        )

    later = whole.later_states
    assert later is not None
    mask = later.mask & state[:, None]
    mask[:, 0] &= actions  # no actions, no next key frame
    return replace(
        whole,
        observation=seen(whole.observation),
        actions=torch.where(actions[:, None, None], whole.actions, junk),
        action_mask=whole.action_mask & actions[:, None, None],
        instruction_id=torch.where(text, whole.instruction_id, 99),
        futures={k: replace(v, observation=seen(v.observation)) for k, v in whole.futures.items()},
        later_states=LaterStates(
            labels=later.labels, values=torch.where(mask[..., None], later.values, junk), mask=mask
        ),
    )


@cache
def built(group: str) -> tuple[VLA, UnifiedLoss]:
    """A model and its loss: of the action by this decoder, or of these terms."""
    torch.manual_seed(0)
    finer = {"width": 16, "stem": {"channels": (8, 16), "strides": (1, 2)}}
    decoder = {"kind": group, **DECODERS[group]} if group in DECODERS else {"hidden": 16}
    model = ModelConfig.model_validate(MODEL | {"vision": finer, "action": decoder}).build(SPEC).double()
    if model.action.needs_fit:
        model.action.fit(everything().actions, everything().action_mask)
    terms = {"means": MEANS, "comparisons": COMPARISONS}.get(group, {})
    weights = {
        NAMES.get(kind, kind): {"weight": 0.3 + 0.1 * number, **one}
        for number, (kind, one) in enumerate(terms.items())
    }
    given = {"align": None, "recon": None, "state": None, **weights}
    return model, ObjectiveConfig.model_validate(given).build(model).double()


def same_for_all(sample: Callable[[int], Tensor], size: int, dim: int = 0) -> Tensor:
    """A draw that every row gets alike, so that it does not matter which rows are drawn for together."""
    torch.manual_seed(5)
    one = sample(1)
    return one.repeat(*(size if place == dim else 1 for place in range(one.ndim)))


def learning(group: str) -> list[Tensor]:
    return [p for module in built(group) for p in module.parameters() if p.requires_grad]


Found = tuple[dict[str, float], list[Tensor]]
"""The terms of an update, and the gradient of its total."""


def evaluated(group: str, batches: list[Batch], only: Collection[str] | None = None) -> Found:
    """The update of these micro-batches, over all ranks."""
    model, loss = built(group)
    update, values = MicroBatches(batches), dict[str, float]()
    parameters = learning(group)
    gradient = [torch.zeros_like(p) for p in parameters]
    names = set(loss.names) - ({"action"} if group == "comparisons" else set()) if only is None else only
    with ExitStack() as stack:
        for module in (denoising, masked_patches):
            stack.enter_context(mock.patch.object(module, "sample_whole_batch", same_for_all))
        for number, batch in enumerate(batches):
            with update.use(number):
                terms = loss(model(batch.observation), batch, model, only=names)
            for key, value in terms.values.items():
                values[key] = values.get(key, 0.0) + float(mean_over_ranks(value.detach())) / len(batches)
            # As in DDP: every rank must have a gradient of the same parameters, or one would wait for ever.
            found = torch.autograd.grad(terms.total / len(batches), parameters, allow_unused=True)
            parts = (None if one is None else mean_over_ranks(one) for one in found)
            gradient = [a if b is None else a + b for a, b in zip(gradient, parts, strict=True)]
    assert not update.unknown
    return values, gradient


def having(labels: tuple[Label, ...], have: Rows) -> Tensor:
    """The rows that have all of these labels, by hand."""
    rows = [torch.ones(B, dtype=torch.bool), *(torch.tensor(have[LABELS.index(one)]) for one in labels)]
    return torch.stack(rows).all(dim=0)


def by_hand(group: str, have: Rows, parts: int) -> Found:
    """The same from batches that hold nothing but labelled rows: what compares rows does so in a micro-batch,
    and each counts by how many it has."""
    _, loss = built(group)
    batch, values = with_labels(have), dict[str, float]()
    gradient = [torch.zeros_like(p) for p in learning(group)]
    size = B // parts if group == "comparisons" else B
    terms = [name for name in loss.names if (name, group) != ("action", "comparisons")]
    for labels in {NEEDED.get(name, ()) for name in terms}:
        names = [name for name in terms if NEEDED.get(name, ()) == labels]
        rows = having(labels, have)
        values |= dict.fromkeys(names, 0.0)
        for start in range(0, B, size):
            own = rows & (torch.arange(B) // size == start // size)
            if own.any():
                share = int(own.sum()) / int(rows.sum())
                found, slopes = evaluated(group, [of_rows(batch, own)], names)
                values |= {name: values[name] + share * value for name, value in found.items()}
                gradient = [a + share * b for a, b in zip(gradient, slopes, strict=True)]
    return values, gradient


def of_rows(batch: Batch, rows: Tensor) -> Batch:
    """These rows alone."""
    return batch.apply(lambda value: value[rows])


def require_same(one: Found, other: Found) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-11, abs=1e-13)
    allowed = 1e-11 * max(float(g.abs().max()) for g in one[1]) + 1e-14
    assert all(float((a - b).abs().max()) <= allowed for a, b in zip(one[1], other[1], strict=True))


def micro_batches(group: str) -> tuple[int, ...]:
    """In how many an update is cut. All decoders have their mean from one term, so 2 are enough for them."""
    return (2,) if group in DECODERS else (1, 2, 4)


def masks(rows: int = B) -> st.SearchStrategy[Rows]:
    own = st.lists(st.booleans(), min_size=rows, max_size=rows).map(tuple)
    return st.tuples(own, own, own)


NONE = (False,) * B
SECOND_ONLY: Rows = ((*NONE[:4], *(True,) * 4), (*NONE[:4], *(True,) * 4), (*NONE[:7], True))
MIXED: Rows = (
    (True, False, False) * 2 + (True, False),
    (True, False, True, True) * 2,
    (False,) * 3 + (True,) * 5,
)


@pytest.mark.parametrize("group", GROUPS)
@settings(max_examples=2)
@given(have=masks())
@example(have=MIXED)
def test_an_update_is_that_of_its_labelled_rows_alone(group: str, have: Rows) -> None:
    for parts in micro_batches(group):
        require_same(evaluated(group, cut(with_labels(have), parts)), by_hand(group, have, parts))


@pytest.mark.parametrize("group", ["means", *DECODERS])
@settings(max_examples=2)
@given(have=masks())
@example(have=MIXED)
def test_a_mean_is_the_plain_sum_over_a_split_of_the_rows(group: str, have: Rows) -> None:
    """Rows that have the same labels as batches of their own, weighted by how many elements each has."""
    batch, (_, loss) = with_labels(have), built(group)
    signatures = torch.tensor(have).T
    for name in ELEMENTS.keys() & set(loss.names):
        value, gradient, number = 0.0, [torch.zeros_like(p) for p in learning(group)], ELEMENTS[name](batch)
        for kind in signatures.unique(dim=0):
            own = of_rows(batch, (signatures == kind).all(dim=1))
            found, slopes = evaluated(group, [own], [name])
            share = ELEMENTS[name](own) / max(1.0, number)
            value += share * found[name]
            gradient = [a + share * b for a, b in zip(gradient, slopes, strict=True)]
        require_same(evaluated(group, [batch], [name]), ({name: value}, gradient))


def test_no_label_at_all_gives_zero_and_no_gradient() -> None:
    for group in GROUPS:
        _, loss = built(group)
        needy = [name for name in loss.names if name in NEEDED]
        values, gradient = evaluated(group, cut(with_labels((NONE,) * 3), 2), needy)
        assert set(values.values()) == {0.0} and not any(bool(one.any()) for one in gradient)


def of_this_rank() -> list[Found]:
    """Every group in 1, 2 and 4 micro-batches: of 4, each of two ranks has a row."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return [
            evaluated(group, cut(with_labels(have), parts))
            for group in GROUPS
            for have in ((SECOND_ONLY,) if group in DECODERS else (SECOND_ONLY, MIXED))
            for parts in micro_batches(group)
        ]
    finally:
        sys.path.remove(str(EXAMPLES))


def test_two_ranks_are_one_process_whatever_is_missing() -> None:
    """The first of two ranks has no label at all in the batch of SECOND_ONLY."""
    alone = of_this_rank()
    for found in on_ranks(2, of_this_rank):
        for one, other in zip(alone, found, strict=True):
            require_same(one, other)

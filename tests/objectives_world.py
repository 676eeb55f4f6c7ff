"""A small real model and a batch that holds whatever any term may ask for, for the tests of the terms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import small_world
from small_world import MODEL
from tutti.models.config import ModelConfig
from tutti.models.vla import VLA
from tutti.objectives.term import Term
from tutti.objectives.unified import ObjectiveConfig, UnifiedLoss
from tutti.types import Batch, Features, Future, LaterStates, Observation, StateLabel, Tokens

SPEC = replace(small_world.SPEC, embodiments=("sawyer", "panda"))
OFFSETS = tuple(range(1, SPEC.horizon + 1))
STATES: tuple[StateLabel, ...] = ("next_key", "last", 1, 2, 3, 4, 5)


def make_model(seed: int = 0) -> VLA:
    torch.manual_seed(seed)
    return ModelConfig.model_validate(MODEL).build(SPEC)


def make_loss(model: VLA, **terms: Any) -> UnifiedLoss:
    """The action and, unless they are given, none of the other default terms."""
    given = {"align": None, "recon": None, "state": None, **terms}
    return ObjectiveConfig.model_validate(given).build(model)


def make_batch(seed: int = 1, b: int = 6) -> Batch:
    """Float32 windows of three instructions, with a view absent, a chunk that ends, futures past the end."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])[:b]
    texts = torch.randint(0, SPEC.vocab_size, (3, SPEC.text_length), generator=random)
    lengths = torch.tensor([6, 4, 2])

    def look() -> Observation:
        return Observation(
            images=torch.randint(0, 256, (b, 2, 3, 32, 32), dtype=torch.uint8, generator=random),
            image_mask=torch.tensor([[True, True]] * (b - 1) + [[True, False]]),
            text=texts[ids],
            text_mask=torch.arange(SPEC.text_length)[None] < lengths[ids][:, None],
            state=torch.randn(b, SPEC.state_dim, generator=random),
        )

    mask = torch.ones(b, SPEC.horizon, SPEC.action_dim, dtype=torch.bool)
    mask[0, 3:] = False
    past_end = torch.ones(b, dtype=torch.bool)
    past_end[b - 2] = False
    later = torch.ones(b, len(STATES), dtype=torch.bool)
    later[0, 3:] = False
    actions = torch.randn(b, SPEC.horizon, SPEC.action_dim, generator=random)
    return Batch(
        observation=look(),
        actions=torch.where(mask, actions, 0.0),
        action_mask=mask,
        instruction_id=ids,
        embodiment=torch.zeros(b, dtype=torch.int64),
        window=torch.arange(b) + 100 * seed,
        futures={offset: Future(observation=look(), mask=past_end) for offset in OFFSETS},
        later_states=LaterStates(
            labels=STATES,
            values=torch.randn(b, len(STATES), SPEC.state_dim, generator=random),
            mask=later,
        ),
        progress=torch.rand(b, generator=random),
    )


def as_double(batch: Batch) -> Batch:
    """The same batch in float64; pictures stay bytes."""

    def seen(observation: Observation) -> Observation:
        return replace(observation, state=observation.state.double())

    def wide(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.double()

    later = batch.later_states
    return replace(
        batch,
        observation=seen(batch.observation),
        actions=batch.actions.double(),
        futures={
            offset: replace(future, observation=seen(future.observation))
            for offset, future in batch.futures.items()
        },
        later_states=None if later is None else replace(later, values=later.values.double()),
        progress=wide(batch.progress),
    )


def reached(model: VLA, term: Term, batch: Batch) -> set[str]:
    """The parts of the model, and `head` for the term's own, whose gradient by the term is not all zero."""
    value = term(model(batch.observation), batch).value
    parts = {**dict(model.named_children()), "head": term}
    found: set[str] = set()
    for part, module in parts.items():
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            continue
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        if any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            found.add(part)
    return found


def plain_features(
    vision: Tensor, language: Tensor, readout: Tensor | None = None, mask: Tensor | None = None
) -> Features:
    """Features of given vision tokens (b, n, d) and language tokens (b, l, d), all present unless masked."""
    all_vision = torch.ones(vision.shape[:2], dtype=torch.bool)
    tokens = Tokens(values=vision, mask=all_vision if mask is None else mask)
    words = Tokens(values=language, mask=torch.ones(language.shape[:2], dtype=torch.bool))
    return Features(
        vision=tokens,
        language=words,
        readout=vision[:, 0] if readout is None else readout,
        fused_vision=tokens,
    )


def plain_batch(
    ids: Tensor,
    *,
    state: Tensor | None = None,
    actions: Tensor | None = None,
    embodiment: Tensor | None = None,
    views: int = 1,
    progress: Tensor | None = None,
) -> Batch:
    """Windows of these instructions, in float64, for a term that is given its features by hand."""
    b = len(ids)
    chunk = torch.zeros(b, 1, 1, dtype=torch.float64) if actions is None else actions
    return Batch(
        observation=Observation(
            images=torch.zeros(b, views, 3, 2, 2, dtype=torch.uint8),
            image_mask=torch.ones(b, views, dtype=torch.bool),
            text=torch.zeros(b, 1, dtype=torch.int64),
            text_mask=torch.ones(b, 1, dtype=torch.bool),
            state=torch.zeros(b, 1, dtype=torch.float64) if state is None else state,
        ),
        actions=chunk,
        action_mask=torch.ones_like(chunk, dtype=torch.bool),
        instruction_id=ids,
        embodiment=torch.zeros_like(ids) if embodiment is None else embodiment,
        window=torch.arange(b),
        progress=progress,
    )

"""Batches of the shapes that a data set would give, without one."""

from __future__ import annotations

import torch
from torch import Tensor

from tutti.types import Batch, DataNeeds, DataSpec, Future, LaterStates, Observation


def blank_batch(spec: DataSpec, size: int, needs: DataNeeds = DataNeeds()) -> Batch:
    """`size` windows with every view, a text of its own each, noise for the rest, and what terms ask for.

    No two texts are the same, so that a language encoder that encodes each text once has them all to do.
    """
    random = torch.Generator().manual_seed(0)
    numbers = torch.arange(size)
    places = spec.vocab_size ** torch.arange(spec.text_length).clamp(max=3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=random)

    def look() -> Observation:
        edge, views = spec.image_size, len(spec.views)
        return Observation(
            images=torch.randint(0, 256, (size, views, 3, edge, edge), dtype=torch.uint8, generator=random),
            image_mask=torch.ones(size, views, dtype=torch.bool),
            text=numbers[:, None] // places % spec.vocab_size,
            text_mask=torch.ones(size, spec.text_length, dtype=torch.bool),
            state=noise(spec.state_dim),
        )

    later = LaterStates(
        labels=needs.states,
        values=noise(len(needs.states), spec.state_dim),
        mask=torch.ones(size, len(needs.states), dtype=torch.bool),
    )
    return Batch(
        observation=look(),
        actions=noise(spec.horizon, spec.action_dim),
        action_mask=torch.ones(size, spec.horizon, spec.action_dim, dtype=torch.bool),
        instruction_id=numbers,
        embodiment=torch.zeros(size, dtype=torch.int64),
        window=numbers,
        futures={
            k: Future(observation=look(), mask=torch.ones(size, dtype=torch.bool)) for k in needs.futures
        },
        later_states=later if needs.states else None,
        progress=torch.linspace(0, 1, size),
    )

"""The smallest real VLA with its real unified loss, and endless batches of noise for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import small_world
from small_world import MODEL, NumberedLoader
from tutti.config.run_config import RunConfig
from tutti.models.config import ModelConfig
from tutti.models.vla import VLA
from tutti.objectives.unified import ObjectiveConfig, UnifiedLoss
from tutti.training.trainer import Trainer
from tutti.types import Batch, Future, LaterStates, Observation

SIZE = 16
SPEC = replace(small_world.SPEC, image_size=SIZE)
TERMS = ("align", "action", "recon", "state")
BATCH = 4


def make_batch(number: int, size: int = BATCH) -> Batch:
    """A batch that depends on nothing but its number."""
    random = torch.Generator().manual_seed(number)
    ids = torch.arange(size) % 3
    texts = torch.randint(0, SPEC.vocab_size, (3, SPEC.text_length), generator=random)

    def noise(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=random)

    def look() -> Observation:
        return Observation(
            images=torch.randint(0, 256, (size, 2, 3, SIZE, SIZE), dtype=torch.uint8, generator=random),
            image_mask=torch.ones(size, 2, dtype=torch.bool),
            text=texts[ids],
            text_mask=torch.ones(size, SPEC.text_length, dtype=torch.bool),
            state=noise(4),
        )

    return Batch(
        observation=look(),
        actions=noise(5, 3),
        action_mask=torch.ones(size, 5, 3, dtype=torch.bool),
        instruction_id=ids,
        embodiment=torch.zeros(size, dtype=torch.int64),
        window=torch.arange(size) + 100 * number,
        futures={4: Future(observation=look(), mask=torch.ones(size, dtype=torch.bool))},
        later_states=LaterStates(
            labels=("next_key", "last", 1, 3),
            values=noise(4, 4),
            mask=torch.ones(size, 4, dtype=torch.bool),
        ),
    )


class Data:
    def __init__(self) -> None:
        self.train = NumberedLoader(make_batch)
        self.validation = [make_batch(10_001)]


def modules(**objective: Any) -> tuple[VLA, UnifiedLoss]:
    """A fresh model and its loss, the same at each call."""
    torch.manual_seed(0)
    model = ModelConfig.model_validate(MODEL).build(SPEC)
    given: dict[str, Any] = {
        "align": {"weight": 0.3},
        "action": {"weight": 1.0},
        "recon": {"weight": 0.2},
        "state": {"weight": 1.0, "offsets": (1, 3), "gripper": {"dimension": -1}},
        **objective,
    }
    return model, ObjectiveConfig.model_validate(given).build(model)


def make_trainer(
    run: Path,
    strategy: dict[str, Any],
    progress: Any = None,
    objective: dict[str, Any] | None = None,
    **training: Any,
) -> Trainer:
    """A trainer of twelve steps without diagnostics; `training`, `objective` change those sections."""
    settings: dict[str, Any] = {
        "steps": 12,
        "threads": 1,
        "device": "cpu",
        "schedule": {"kind": "wsd", "warmup": 2},
        "log_every": 2,
        "validate_every": 0,
        "checkpoint_every": 0,
        "diagnostics": {"every": 0},
    }
    config = RunConfig.model_validate({"training": settings | training, "strategy": strategy})
    model, loss = modules(**(objective or {}))
    return Trainer(config.training, model, loss, run, strategy=config.strategy, progress=progress)

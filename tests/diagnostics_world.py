"""A small real VLA on a small world that can be learned: where a bright square lies decides what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from small_world import MODEL, SPEC, NumberedLoader
from tutti.models.config import ModelConfig
from tutti.models.vla import VLA
from tutti.objectives.unified import ObjectiveConfig
from tutti.report.findings.all import find
from tutti.report.findings.finding import Finding
from tutti.report.inputs import read_inputs
from tutti.training.config import TrainingConfig
from tutti.training.trainer import Trainer
from tutti.types import Batch, Future, LaterStates, Observation, StateLabel

WEIGHTS = {"align": 0.1, "action": 1.0, "recon": 0.3, "state": 0.3}
OFFSET, SIZE = 4, 16
STATES: tuple[StateLabel, ...] = ("next_key", "last", 1, 3)


def make_batch(seed: int, size: int = SIZE) -> Batch:
    """A square at a random place, in the colour of one of three instructions; actions point to the place."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.arange(size) % 3
    place = torch.rand(size, 2, generator=random)
    texts = torch.randint(
        0, SPEC.vocab_size, (3, SPEC.text_length), generator=torch.Generator().manual_seed(7)
    )
    state = torch.randn(size, 4, generator=random)
    target = torch.cat([place, place], dim=1) * 2 - 1

    def look(shift: int) -> Observation:
        images = torch.randint(0, 60, (size, 2, 3, 32, 32), dtype=torch.uint8, generator=random)
        for row in range(size):
            x, y = ((place[row] * 23).long() + shift).tolist()
            images[row, :, int(ids[row]), y : y + 8, x : x + 8] = 255
        return Observation(
            images=images,
            image_mask=torch.ones(size, 2, dtype=torch.bool),
            text=texts[ids],
            text_mask=torch.ones(size, SPEC.text_length, dtype=torch.bool),
            state=state,
        )

    actions = torch.cat([place * 2 - 1, ids[:, None] - 1.0], dim=1)[:, None].expand(size, 5, 3).contiguous()
    return Batch(
        observation=look(0),
        actions=actions,
        action_mask=torch.ones(size, 5, 3, dtype=torch.bool),
        instruction_id=ids,
        embodiment=torch.zeros(size, dtype=torch.int64),
        window=torch.arange(size) + 1000 * seed,
        futures={OFFSET: Future(observation=look(1), mask=torch.ones(size, dtype=torch.bool))},
        later_states=LaterStates(
            labels=STATES,
            values=target[:, None].expand(size, len(STATES), 4).contiguous(),
            mask=torch.ones(size, len(STATES), dtype=torch.bool),
        ),
    )


class Data:
    def __init__(self) -> None:
        self.train = NumberedLoader(make_batch)
        self.validation: list[Batch] = []


def make_trainer(
    run: Path,
    *,
    spoil: Callable[[VLA], None] | None = None,
    terms: dict[str, Any] | None = None,
    strategy: Any = None,
    backward: Any = None,
    **training: Any,
) -> Trainer:
    """A trainer of the small VLA with a look at every third update. `spoil` plants a fault in the model,
    `terms` are weights that differ from WEIGHTS (None removes a term)."""
    torch.manual_seed(0)
    model = ModelConfig.model_validate(MODEL).build(SPEC)
    if spoil is not None:
        spoil(model)
    weights = WEIGHTS | (terms or {})
    objective = {name: None if weight is None else {"weight": weight} for name, weight in weights.items()}
    if isinstance(objective["state"], dict):
        objective["state"]["offsets"] = (1, 3)
    settings: dict[str, Any] = {
        "steps": 36,
        "threads": 1,
        "device": "cpu",
        "optimizer": {"kind": "muon"},
        "schedule": {"kind": "wsd", "warmup": 3},
        "log_every": 3,
        "validate_every": 0,
        "checkpoint_every": 0,
        "ema": "off",
        "diagnostics": {"every": 3},
    }
    config = TrainingConfig.model_validate(settings | training)
    loss = ObjectiveConfig.model_validate(objective).build(model)
    return Trainer(config, model, loss, run, strategy=strategy, backward=backward)


def findings_of(run: Path, weights: dict[str, Any] | None = None) -> list[Finding]:
    """What is said of a run with these weights."""
    config = {"objective": {name: {"weight": w} for name, w in (WEIGHTS | (weights or {})).items() if w}}
    return find(read_inputs(run).records, config)


def detached_vision(model: VLA) -> None:
    """No gradient passes the vision encoder's output."""

    def cut(module: Any, given: Any, tokens: Any) -> Any:
        return type(tokens)(values=tokens.values.detach(), mask=tokens.mask)

    model.vision.register_forward_hook(cut)


def dead_vision(model: VLA) -> None:
    """The last convolution's ReLUs never open: every picture looks the same."""
    last = model.vision.get_submodule("stem.2.norm")
    with torch.no_grad():
        for name, value in (("weight", 0.0), ("bias", -1.0)):
            parameter = last.get_parameter(name)
            assert isinstance(parameter, Tensor)
            parameter.fill_(value)

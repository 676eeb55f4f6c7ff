"""A tiny robot world for the training tests: data, model and objective that take milliseconds.

Run as a program it trains: python training_world.py RUN STEPS [KILL_AFTER], which lets a test kill it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutti.models.sockets import ActionDecoder
from tutti.objectives.objective import Objective
from tutti.storage.checkpoint import folder_of
from tutti.training.config import TrainingConfig
from tutti.training.trainer import Trainer
from tutti.types import Batch, Features, LossTerms, Observation, Tokens, masked_mean

BATCH, VIEWS, SIZE, TEXT, STATE, HORIZON, ACTION, WIDTH = 4, 2, 8, 3, 4, 5, 2, 16


def make_batch(seed: int, size: int = BATCH) -> Batch:
    """A batch that depends on nothing but its seed; the actions can be read off the state."""
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(size, STATE, generator=g)
    observation = Observation(
        images=torch.randint(0, 256, (size, VIEWS, 3, SIZE, SIZE), generator=g, dtype=torch.uint8),
        image_mask=torch.ones(size, VIEWS, dtype=torch.bool),
        text=torch.randint(0, 9, (size, TEXT), generator=g),
        text_mask=torch.ones(size, TEXT, dtype=torch.bool),
        state=state,
    )
    return Batch(
        observation=observation,
        actions=state[:, None, :ACTION].expand(-1, HORIZON, -1).contiguous(),
        action_mask=torch.ones(size, HORIZON, ACTION, dtype=torch.bool),
        instruction_id=torch.arange(size) % 3,
        embodiment=torch.zeros(size, dtype=torch.int64),
        window=torch.arange(size) + 1000 * seed,
    )


class Loader:
    """Endless batches; batch number i is `change(i, make_batch(i))`."""

    def __init__(self, change: Callable[[int, Batch], Batch] | None = None) -> None:
        self.position = 0
        self.change = change

    def __iter__(self) -> Iterator[Batch]:
        while True:
            number = self.position
            self.position += 1
            batch = make_batch(number)
            yield batch if self.change is None else self.change(number, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Data:
    def __init__(self, change: Callable[[int, Batch], Batch] | None = None) -> None:
        self.train = Loader(change)
        self.validation = [make_batch(10_001), make_batch(10_002, size=2)]


class Decoder(ActionDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, HORIZON * ACTION)

    def forward(self, features: Features, batch: Batch) -> Tensor:
        return (self.predict(features) - batch.actions).abs()

    def predict(self, features: Features) -> Tensor:
        return self.out(self.hidden(features.readout).relu()).view(-1, HORIZON, ACTION)


class Model(nn.Module):
    """A convolution, an embedding, a norm, a position table, dropout, an action decoder."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.position = nn.Parameter(torch.randn(VIEWS * 4, WIDTH) * 0.02)
        self.token = nn.Embedding(9, WIDTH)
        self.state = nn.Linear(STATE, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.action = Decoder()

    def forward(self, observation: Observation) -> Features:
        images = observation.images.to(self.position.dtype) / 127.5 - 1.0
        b = len(images)
        patches = self.stem(images.flatten(0, 1)).flatten(2).mT.reshape(b, -1, WIDTH) + self.position
        vision = Tokens(values=patches, mask=torch.ones(b, patches.shape[1], dtype=torch.bool))
        language = Tokens(values=self.token(observation.text), mask=observation.text_mask)
        fused = patches.mean(1) + language.mean() + self.state(observation.state)
        readout = self.dropout(self.norm(fused))
        return Features(vision=vision, language=language, readout=readout, fused_vision=vision)


class TwoTerms(Objective):
    """action: the decoder's loss. recon: a linear head that reads the state off the vision tokens."""

    def __init__(self, model: Model, recon_weight: float = 0.1) -> None:
        super().__init__()
        self.decoder = (model.action,)
        self.recon_weight = recon_weight
        self.head = nn.Linear(WIDTH, STATE)
        self.scale = nn.Parameter(torch.zeros(()))

    @property
    def names(self) -> tuple[str, ...]:
        return ("action", "recon")

    def forward(
        self, features: Features, batch: Batch, progress: float = 0.0, only: Collection[str] | None = None
    ) -> LossTerms:
        action = masked_mean(self.decoder[0](features, batch), batch.action_mask)
        guess = self.head(features.vision.mean()) * self.scale.exp()
        recon = (guess - batch.observation.state).square().mean()
        lambdas = {"action": torch.ones(()), "recon": torch.tensor(self.recon_weight * (1 - progress))}
        values = {
            name: value
            for name, value in (("action", action), ("recon", recon))
            if only is None or name in only
        }
        total = sum((lambdas[name] * value for name, value in values.items()), torch.zeros(()))
        lambdas = {name: lambdas[name] for name in values}
        return LossTerms(
            values=values, lambdas=lambdas, total=total, metrics={"recon/scale": self.scale.detach()}
        )


def config(**changes: Any) -> TrainingConfig:
    """Twenty small steps on one thread."""
    settings: dict[str, Any] = {
        "steps": 20,
        "threads": 1,
        "device": "cpu",
        "schedule": {"kind": "wsd", "warmup": 3},
        "log_every": 3,
        "validate_every": 5,
        "checkpoint_every": 10,
    }
    return TrainingConfig.model_validate(settings | changes)


def make_trainer(run: Path, **keywords: Any) -> Trainer:
    """A trainer with fresh, seeded modules. `Trainer`'s keywords pass through; the rest is configuration."""
    passed = {
        name: keywords.pop(name)
        for name in ("extra", "texts", "progress", "strategy", "backward")
        if name in keywords
    }
    torch.manual_seed(0)
    model = Model()
    return Trainer(config(**keywords), model, TwoTerms(model), run, **passed)


def until_written(run: Path, step: int, patience: float = 120.0) -> None:
    """Checkpoints are written while the training goes on: what reads one must wait for its name."""
    folder, deadline = folder_of(run, step), time.monotonic() + patience
    while not folder.exists():
        assert time.monotonic() < deadline, f"{folder} was not written within {patience:.0f} s"
        time.sleep(0.01)


def main(run: Path, steps: int, kill_after: int | None) -> None:
    def die(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == kill_after:
            until_written(run, step // 10 * 10)
            os.kill(os.getpid(), signal.SIGKILL)

    optimizer = {"kind": "muon"}
    make_trainer(run, steps=steps, optimizer=optimizer, accumulation=2, progress=die).fit(Data())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)

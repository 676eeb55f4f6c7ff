"""Learning rates by part and by layer: the factor of each parameter on the optimiser's base rate."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

from pydantic import Field
from torch import nn

from tutti.errors import near_miss
from tutti.frozen_config import FrozenConfig
from tutti.types import UserError

DECODER = "action"
"""The part that a plain number of `layer_decay` leaves alone: it is the head of the whole model."""
BLOCK = re.compile(r"^(.*?\b(?:blocks?|layers?|stages)\.\d+)\.")
"""An entry of a list of blocks, by the names of our own parts and of pre-trained towers."""
TOWER = ".tower."
"""What the names of pre-trained parameters hold."""

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(gt=0, le=1)]


def part_of(name: str) -> str:
    """The part that a parameter belongs to: a child of the model such as "vision", else "model" or
    "objective". `name` starts with model. or objective."""
    root, *path = name.split(".")
    return path[0] if root == "model" and len(path) > 1 else root


def joint(model: nn.Module, objective: nn.Module) -> nn.ModuleDict:
    """Both as one module, whose names start with model. or objective. and which has each parameter once."""
    return nn.ModuleDict({"model": model, "objective": objective})


class RatesConfig(FrozenConfig):
    """Factors on the base learning rate: factor(parameter) = rate of its part * decay of its layer.

    A part of L blocks with layer decay d (BEiT, 2106.08254):

        block i of 0 .. L - 1          d^(L - 1 - i)
        what comes before the blocks   d^L             stem, embeddings, positions, adapters
        what comes behind them         1               norms, pooling, heads
        what is new beside a tower     1               readout, state, queries, vectors of views

    A plain number holds for every part that has blocks, each by its own depth, except the action decoder; a
    mapping holds for the parts that it names. A strategy's factors multiply on top.
    """

    learning_rates: dict[str, Rate] = Field(
        default={}, description="Factor on the learning rate of a part; a part not named learns at 1."
    )
    layer_decay: Decay | dict[str, Decay] = Field(
        default=1.0, description="Factor from a block to the one before it; a number, or one by part."
    )

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The parts that are named, by the key that names them."""
        decays = self.layer_decay if isinstance(self.layer_decay, dict) else {}
        return {"learning_rates": tuple(self.learning_rates), "layer_decay": tuple(decays)}

    def factors(self, model: nn.Module, objective: nn.Module) -> dict[str, float]:
        """The factor of every parameter, by its name that starts with model. or objective.

        Raises: UserError if a part is not there, or has no blocks and is to decay by layer.
        """
        factors: dict[str, float] = {}
        by_part: dict[str, list[str]] = {}
        for name, _ in joint(model, objective).named_parameters():
            factors[name] = self.learning_rates.get(part_of(name), 1.0)
            by_part.setdefault(part_of(name), []).append(name)
        for key, parts in self.parts.items():
            if message := unknown_parts(f"training.optimizer.{key}", parts, by_part):
                raise UserError(message)
        for part, own in by_part.items():
            if isinstance(self.layer_decay, dict):
                decay = self.layer_decay.get(part, 1.0)
            else:
                decay = 1.0 if part == DECODER else self.layer_decay
            depth, layers = layers_of(own)
            if not depth and isinstance(self.layer_decay, dict) and part in self.layer_decay:
                raise UserError(
                    f"training.optimizer.layer_decay names '{part}', which has no stack of blocks (a module "
                    "list named `blocks` or `layers`) whose learning rates could decay. Leave it out; "
                    f"training.optimizer.learning_rates.{part} scales all of it."
                )
            if decay != 1.0:
                beside = any(TOWER in name for name in own)
                for name, layer in zip(own, layers, strict=True):
                    factors[name] *= 1.0 if beside and TOWER not in name else decay ** (depth - layer)
        return factors


def layers_of(names: Sequence[str]) -> tuple[int, list[int]]:
    """The depth L of a part, and for each parameter, in order of registration, the number of blocks begun.

    So 0 is before the blocks, i + 1 in block i, L behind them. A block is an entry of a module list such as
    `blocks` (`BLOCK`); several lists in one part count on.
    """
    numbers: dict[str, int] = {}
    found: list[int] = []
    for name in names:
        block = BLOCK.match(name)
        found.append(numbers.setdefault(block[1], len(numbers) + 1) if block else len(numbers))
    return len(numbers), found


def unknown_parts(key: str, named: Collection[str], known: Collection[str] | Mapping[str, object]) -> str:
    """The message about parts that `key` names and the model has not; empty if there are none."""
    unknown = [part for part in named if part not in known]
    if not unknown:
        return ""
    near = near_miss(unknown[0], known)
    return f"{key} names '{unknown[0]}', which is no part; there are {', '.join(known)}.{near}"

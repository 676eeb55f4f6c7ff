"""Which parameter is moved by which optimiser, and the optimisers behind one `step` and one state.

Every trainable parameter falls in exactly one of three groups, by the type of the module that owns it:

    matrix   weights of linear and convolution layers           weight decay; Muon if it is chosen
    head     such weights in an output head or a loss term      weight decay; always AdamW
    plain    all else: biases, norms, embeddings, position tables, queries, temperatures    no decay; AdamW

An output head is the last linear layer of an `ActionDecoder`; the whole objective counts as head, and so
do the modules that `adamw_modules` names. Inside a group each part of the model (vision, language, fusion,
action) has its own learning rate, which a strategy may scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.parameter import Parameter

from tutti.models.parts import ActionDecoder
from tutti.training.muon import Muon
from tutti.types import UserError

MATRIX_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The module types whose `weight` is a matrix of the trunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroups:
    """The trainable parameters by name, each in exactly one group; names start with model. or objective."""

    matrix: dict[str, Parameter]
    head: dict[str, Parameter]
    plain: dict[str, Parameter]


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The last linear layer, in order of registration, of each action decoder in the model."""
    decoders = [module for module in model.modules() if isinstance(module, ActionDecoder)]
    linears = [[m for m in decoder.modules() if isinstance(m, nn.Linear)] for decoder in decoders]
    return {layers[-1] for layers in linears if layers}


def group_parameters(
    model: nn.Module, objective: nn.Module, adamw_modules: Sequence[str] = ()
) -> ParameterGroups:
    """Sort the trainable parameters of model and objective into matrix, head and plain.

    A parameter that both own (or two modules share) counts once, where the model first holds it.
    `adamw_modules` names further submodules of the model whose weights count as head.

    Raises: UserError if a name in `adamw_modules` is no submodule of the model.
    """
    modules = dict(model.named_modules())
    heads = output_heads(model)
    for name in adamw_modules:
        if name not in modules:
            raise UserError(
                f"training.optimizer.adamw_modules names '{name}', which is no submodule of the model. "
                f"It has, for example: {', '.join([n for n in modules if n][:12])}."
            )
        heads.update(modules[name].modules())

    groups = ParameterGroups(matrix={}, head={}, plain={})
    seen: set[Parameter] = set()
    for root_name, root in (("model", model), ("objective", objective)):
        for module_name, module in root.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad or parameter in seen:
                    continue
                seen.add(parameter)
                full_name = ".".join(part for part in (root_name, module_name, name) if part)
                is_weight = isinstance(module, MATRIX_MODULES) and name == "weight"
                if not is_weight:
                    groups.plain[full_name] = parameter
                elif root is objective or module in heads:
                    groups.head[full_name] = parameter
                else:
                    groups.matrix[full_name] = parameter
    return groups


def part_of(name: str) -> str:
    """The part that a parameter belongs to: a child of the model such as "vision", else "model" or
    "objective". `name` starts with model. or objective."""
    root, *path = name.split(".")
    return path[0] if root == "model" and len(path) > 1 else root


def by_part(members: dict[str, Parameter], name: str, **settings: Any) -> list[dict[str, Any]]:
    """One parameter group for each part of the model, in the order of the parameters."""
    groups: dict[str, list[Parameter]] = {}
    for full_name, parameter in members.items():
        groups.setdefault(part_of(full_name), []).append(parameter)
    return [{"params": group, "name": name, "part": part, **settings} for part, group in groups.items()]


class OptimizerSet:
    """Several optimisers that step together, with one state.

    `set_factor` multiplies each group's base learning rate, which is what a schedule does.
    """

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self._factor = 1.0
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in a fixed order."""
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"]]

    @property
    def learning_rates(self) -> dict[str, float]:
        """The present learning rate of each optimiser, before a strategy's factor for a part of the model."""
        return {
            name: self._factor * optimizer.param_groups[0]["base_lr"]
            for name, optimizer in self.optimizers.items()
        }

    def set_factor(self, factor: float, parts: Mapping[str, float] | None = None) -> None:
        """lr <- factor * parts[part of the model] * base_lr, for every group; a part not named counts 1."""
        self._factor = factor
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = factor * (parts or {}).get(group.get("part", ""), 1.0) * group["base_lr"]

    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of every optimiser, by its name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises: UserError if it comes from other optimisers or other parameters.
        """
        if set(state) != set(self.optimizers):
            raise UserError(
                f"The checkpoint's optimiser state is for {sorted(state)}, this run uses "
                f"{sorted(self.optimizers)}. Resume with the same training.optimizer.kind."
            )
        for name, optimizer in self.optimizers.items():
            try:
                optimizer.load_state_dict(state[name])
            except ValueError as error:
                raise UserError(
                    f"The checkpoint's {name} state does not fit this model or objective ({error}). "
                    "Resume with the same model and objective, or start a new run."
                ) from error


def _adamw(
    groups: Sequence[tuple[str, dict[str, Parameter], float]], lr: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    described = [
        group for name, members, decay in groups for group in by_part(members, name, weight_decay=decay)
    ]
    return torch.optim.AdamW(described, lr=lr, betas=betas, fused=True)


class AdamWConfig(BaseModel):
    """AdamW (1711.05101), fused, decay on matrices only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Decay of the two moments.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled decay, on matrices only.")

    def build(self, model: nn.Module, objective: nn.Module) -> OptimizerSet:
        """One AdamW over all trainable parameters of model and objective."""
        groups = group_parameters(model, objective)
        matrices = groups.matrix | groups.head
        layout = [("matrix", matrices, self.weight_decay), ("plain", groups.plain, 0.0)]
        return OptimizerSet({"adamw": _adamw(layout, self.lr, self.betas)})


class MuonConfig(BaseModel):
    """Muon on the trunk's matrices (see `muon.py`), AdamW on everything else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["muon"] = "muon"
    lr: float = Field(default=1e-2, gt=0, description="Peak learning rate of Muon.")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Nesterov momentum of Muon.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled decay of Muon's matrices.")
    rounds: int = Field(default=5, ge=1, description="Newton-Schulz rounds.")
    adamw_lr: float = Field(default=1e-3, gt=0, description="Peak learning rate of AdamW.")
    adamw_betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Moments of AdamW.")
    adamw_weight_decay: float = Field(default=0.0, ge=0, description="Decay of AdamW's matrices.")
    adamw_modules: tuple[str, ...] = Field(
        default=(), description="Submodules of the model whose weights AdamW moves, besides the output head."
    )

    def build(self, model: nn.Module, objective: nn.Module) -> OptimizerSet:
        """Muon and AdamW over all trainable parameters of model and objective."""
        groups = group_parameters(model, objective, self.adamw_modules)
        optimizers: dict[str, torch.optim.Optimizer] = {}
        if groups.matrix:
            members = by_part(groups.matrix, "matrix")
            optimizers["muon"] = Muon(members, self.lr, self.momentum, self.weight_decay, self.rounds)
        layout = [("head", groups.head, self.adamw_weight_decay), ("plain", groups.plain, 0.0)]
        if groups.head or groups.plain:
            optimizers["adamw"] = _adamw(layout, self.adamw_lr, self.adamw_betas)
        return OptimizerSet(optimizers)


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]

"""Which parameter is moved by which optimiser, and the optimisers behind one `step` and one state.

Every trainable parameter falls in exactly one of three groups, by the type of the module that owns it:

    matrix   weights of linear and convolution layers           weight decay; Muon if it is chosen
    head     such weights in an output head or a loss term      weight decay; always AdamW
    plain    all else: biases, norms, embeddings, position tables, queries, temperatures    no decay; AdamW

An output head is the last linear layer of an `ActionDecoder`; the whole objective counts as head, and so
do the modules that `adamw_modules` names. Inside a group each part of the model (vision, language, fusion,
action) has its own learning rate, which a strategy may scale, and so has each layer (learning_rates.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from tutti.distributed.sharded_tensors import shard_like_parameters
from tutti.models.interfaces import ActionDecoder
from tutti.objectives.objective import check_ownership
from tutti.training.optim.averages import ScheduleFreeAdamW
from tutti.training.optim.learning_rates import RatesConfig, joint, part_of
from tutti.training.optim.muon import Made, Muon
from tutti.types import UserError

MATRIX_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The module types whose `weight` is a matrix of the trunk."""


Group = Literal["matrix", "head", "plain"]


def trainable(model: nn.Module, objective: nn.Module) -> dict[str, Parameter]:
    """Every parameter that learns, by its name from model. or objective. on, each once.

    Raises: UserError if the objective has registered a part of the model.
    """
    check_ownership(model, objective)
    return {name: p for name, p in joint(model, objective).named_parameters() if p.requires_grad}


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The last linear layer, in order of registration, of each action decoder in the model."""
    decoders = [module for module in model.modules() if isinstance(module, ActionDecoder)]
    linears = [[m for m in decoder.modules() if isinstance(m, nn.Linear)] for decoder in decoders]
    return {layers[-1] for layers in linears if layers}


def group_parameters(
    model: nn.Module, objective: nn.Module, adamw_modules: Sequence[str] = ()
) -> dict[Group, dict[str, Parameter]]:
    """The trainable parameters of model and objective by name, each in exactly one group.

    A parameter that two modules share counts once, where it is first held.
    `adamw_modules` names further submodules of the model whose weights count as head.

    Raises: UserError if a name in `adamw_modules` is no submodule of the model.
    """
    modules = dict(model.named_modules())
    heads = {*output_heads(model), *objective.modules()}
    for name in adamw_modules:
        if name not in modules:
            raise UserError(
                f"training.optimizer.adamw_modules names '{name}', which is no submodule of the model. "
                f"It has, for example: {', '.join([n for n in modules if n][:12])}."
            )
        heads.update(modules[name].modules())

    both = joint(model, objective)
    groups: dict[Group, dict[str, Parameter]] = {"matrix": {}, "head": {}, "plain": {}}
    for full_name, parameter in both.named_parameters():
        if parameter.requires_grad:
            owner, _, name = full_name.rpartition(".")
            module = both.get_submodule(owner)
            is_weight = isinstance(module, MATRIX_MODULES) and name == "weight"
            group: Group = "plain" if not is_weight else "head" if module in heads else "matrix"
            groups[group][full_name] = parameter
    return groups


def by_rate(
    layout: Iterable[tuple[str, Mapping[str, Parameter], float]], lr: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """An optimiser's groups, from `layout`: name, parameters and weight decay of each of ours.

    One for each part of the model and factor on `lr`, in the order of the parameters. Single numbers
    (temperatures) have groups of their own: FSDP does not shard them, and torch's optimisers move sharded and
    whole tensors only apart.
    """
    found: list[dict[str, Any]] = []
    for name, members, decay in layout:
        alike: dict[tuple[str, float, bool], list[Parameter]] = {}
        for full_name, parameter in members.items():
            key = (part_of(full_name), factors[full_name], parameter.ndim == 0)
            alike.setdefault(key, []).append(parameter)
        for (part, factor, _), own in alike.items():
            settings = {"name": name, "part": part, "lr": lr * factor, "weight_decay": decay}
            found.append({"params": own, **settings})
    return found


class OptimizerSet:
    """Several optimisers that step together, with one state.

    `set_factor` multiplies each group's base learning rate, which is what a schedule does. Settings (rates,
    decays, betas) are those that it was built with, also where a loaded state comes from other ones.

    Raises: UserError if a parameter would be moved twice in a step.
    """

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self._factor = 1.0
        self.ahead = False
        """Whether `prepare` does anything: of use where a device computes while the host waits."""
        self._prepared: dict[str, list[Made]] = {}
        self._in_vain = False
        times = Counter(id(parameter) for parameter in self.parameters)
        if twice := [tuple(p.shape) for p in self.parameters if times[id(p)] > 1]:
            raise UserError(
                f"The optimisers {', '.join(optimizers)} would move a parameter of shape {twice[0]} twice in "
                "each step. Put each parameter into one group of one of them."
            )
        for group in self.groups:
            group["base_lr"] = group["lr"]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of all optimisers."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters, in a fixed order."""
        return [parameter for group in self.groups for parameter in group["params"]]

    @property
    def learning_rates(self) -> dict[str, float]:
        """The present learning rate of each optimiser, before the factors of parts and layers."""
        return {name: self._factor * optimizer.defaults["lr"] for name, optimizer in self.optimizers.items()}

    def metrics(self) -> dict[str, float]:
        """What a record says of the learning rates."""
        rates = self.learning_rates
        values = {"optim/lr": next(iter(rates.values()), 0.0), "optim/lr_factor": self._factor}
        if "muon" in rates and "adamw" in rates:
            values["optim/lr_adamw"] = rates["adamw"]
        return values

    def set_factor(self, factor: float, parts: Mapping[str, float] | None = None) -> None:
        """lr <- factor * parts[part of the model] * base_lr, for every group; a part not named counts 1."""
        self._factor = factor
        for group in self.groups:
            group["lr"] = factor * (parts or {}).get(group.get("part", ""), 1.0) * group["base_lr"]

    def prepare(self) -> None:
        """Computes what a step on the gradients as they are takes longest to (Muon's directions), and moves
        nothing: a GPU has this to do while the host waits for the numbers by which it decides on the step.
        Nothing is begun where the last ones were discarded: a norm that was clipped is likely to be again."""
        begins, self._in_vain = self.ahead and not self._in_vain, False
        muons = {name: one for name, one in self.optimizers.items() if begins and isinstance(one, Muon)}
        self._prepared = {name: one.prepare() for name, one in muons.items()}

    def discard(self) -> None:
        """The gradients have changed: what is prepared is not of theirs."""
        self._prepared, self._in_vain = {}, True

    def step(self) -> None:
        """One update of every parameter that has a gradient; of what is prepared the same bits, sooner."""
        for name, optimizer in self.optimizers.items():
            if name in self._prepared and isinstance(optimizer, Muon):
                optimizer.step_prepared(self._prepared.pop(name))
            else:
                optimizer.step()

    @property
    def averages(self) -> bool:
        """True if what is evaluated and saved is not what is trained (see `averaged`)."""
        return any(isinstance(optimizer, ScheduleFreeAdamW) for optimizer in self.optimizers.values())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the parameters are those to evaluate and to save: x of a schedule-free optimiser.
        Afterwards they are those in training again, to the last bit. Without such an optimiser: nothing."""
        with ExitStack() as stack:
            for optimizer in self.optimizers.values():
                if isinstance(optimizer, ScheduleFreeAdamW):
                    stack.enter_context(optimizer.averaged())
            yield

    def zero_grad(self) -> None:
        """Forget the gradients, and what was prepared of them."""
        self._prepared = {}
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
            own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            try:
                optimizer.load_state_dict(state[name])
                shard_like_parameters(optimizer)
                _check_state(optimizer)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(
                    f"The checkpoint's {name} state does not fit this model or objective ({error}). "
                    "Resume with the same model, objective and kinds of learning rates, or start a new run."
                ) from error
            for group, settings in zip(optimizer.param_groups, own, strict=True):
                group.update(settings)


def _check_state(optimizer: torch.optim.Optimizer) -> None:
    """Raises: ValueError if a parameter's state has other keys than that of the others, other values than
    finite numbers, or another shape than the parameter."""
    states = [(one, state) for one, state in optimizer.state.items() if isinstance(one, Tensor) and state]
    for parameter, state in states:
        if state.keys() != states[0][1].keys():
            raise ValueError(f"expected {', '.join(states[0][1])}, found {', '.join(map(str, state))}")
        for key, value in state.items():
            tensor = isinstance(value, Tensor) and (value.numel() == 1 or value.shape == parameter.shape)
            if not tensor and type(value) not in (int, float):
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{key}: expected the shape {tuple(parameter.shape)}, found {found}")
            if not bool(torch.as_tensor(value).isfinite().all()):
                raise ValueError(f"{key}: expected finite numbers")


class AdamWConfig(RatesConfig):
    """AdamW (1711.05101), fused, decay on matrices only."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Decay of the two moments.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled decay, on matrices only.")

    def build(self, model: nn.Module, objective: nn.Module) -> OptimizerSet:
        """One AdamW over all trainable parameters of model and objective.

        Raises: UserError if a learning rate is for a part that is not there.
        """
        members = _two_groups(self, model, objective)
        return OptimizerSet({"adamw": torch.optim.AdamW(members, lr=self.lr, betas=self.betas, fused=True)})


class MuonConfig(RatesConfig):
    """Muon on the trunk's matrices, AdamW on everything else."""

    kind: Literal["muon"] = "muon"
    lr: float = Field(default=1e-2, gt=0, description="Peak learning rate of Muon.")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Nesterov momentum of Muon.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled decay of Muon's matrices.")
    rounds: int = Field(default=5, ge=1, description="Newton-Schulz rounds that orthogonalise an update.")
    adamw_lr: float = Field(
        default=1e-3,
        gt=0,
        description="Peak learning rate of AdamW, for the weights that Muon does not move.",
    )
    adamw_betas: tuple[float, float] = Field(
        default=(0.9, 0.95),
        description="Decay of AdamW's two moments, for the weights that Muon does not move.",
    )
    adamw_weight_decay: float = Field(
        default=0.0, ge=0, description="Decoupled weight decay of AdamW, on matrices only."
    )
    adamw_modules: tuple[str, ...] = Field(
        default=(), description="Submodules of the model whose weights AdamW moves, besides the output head."
    )

    def build(self, model: nn.Module, objective: nn.Module) -> OptimizerSet:
        """Muon and AdamW over all trainable parameters of model and objective.

        Raises: UserError if a name in `adamw_modules` or a part is not there.
        """
        groups = group_parameters(model, objective, self.adamw_modules)
        factors = self.factors(model, objective)
        optimizers: dict[str, torch.optim.Optimizer] = {}
        matrices = by_rate([("matrix", groups["matrix"], self.weight_decay)], self.lr, factors)
        if matrices:
            optimizers["muon"] = Muon(matrices, self.lr, self.momentum, self.weight_decay, self.rounds)
        layout = [("head", groups["head"], self.adamw_weight_decay), ("plain", groups["plain"], 0.0)]
        if others := by_rate(layout, self.adamw_lr, factors):
            optimizers["adamw"] = torch.optim.AdamW(
                others, lr=self.adamw_lr, betas=self.adamw_betas, fused=True
            )
        return OptimizerSet(optimizers)


class ScheduleFreeConfig(RatesConfig):
    """Schedule-free AdamW (2405.15682): evaluated and saved is the average x.

    It averages by itself and needs no decay, so `training.ema` must be off and the schedule constant.
    """

    kind: Literal["schedule_free"] = "schedule_free"
    lr: float = Field(default=2.5e-3, gt=0, description="Learning rate after the warm-up.")
    betas: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Share of x in y, where gradients are taken; decay of the squares."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled decay at y, on matrices only.")

    def build(self, model: nn.Module, objective: nn.Module) -> OptimizerSet:
        """One optimiser over all trainable parameters of model and objective.

        Raises: UserError if a learning rate is for a part that is not there.
        """
        members = _two_groups(self, model, objective)
        return OptimizerSet({"schedule_free": ScheduleFreeAdamW(members, self.lr, self.betas)})


def _two_groups(
    config: AdamWConfig | ScheduleFreeConfig, model: nn.Module, objective: nn.Module
) -> list[dict[str, Any]]:
    """All matrices, with decay, and all else, without."""
    groups = group_parameters(model, objective)
    matrices = groups["matrix"] | groups["head"]
    layout = [("matrix", matrices, config.weight_decay), ("plain", groups["plain"], 0.0)]
    return by_rate(layout, config.lr, config.factors(model, objective))


OptimizerConfig = Annotated[AdamWConfig | MuonConfig | ScheduleFreeConfig, Field(discriminator="kind")]

"""TrainState: everything that the rest of a run depends on, part by part; a checkpoint is its state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from tutti.distributed.sharded_tensors import shard_like_all
from tutti.objectives.objective import Objective
from tutti.storage.checkpoint import OPTIMIZER, Checkpoint
from tutti.training.backward.config import BackwardConfig
from tutti.training.backward.interface import Backward
from tutti.training.optim.averages import Ema
from tutti.training.optim.optimizers import OptimizerConfig, OptimizerSet, trainable
from tutti.training.rng import load_rng_state, rng_state
from tutti.types import UserError

log = logging.getLogger("tutti.training")

BACKWARD = "backward"
"""Where the backward's state lies in a checkpoint's optimizer.pt."""


@runtime_checkable
class Stateful(Protocol):
    """A part whose state a checkpoint keeps; torch's protocol for modules and optimisers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(slots=True)
class Counters:
    """How far a run is: updates, training windows and seconds since its start; newest metrics."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    latest: dict[str, float] = field(default_factory=dict)
    samples_recorded: int = 0  # of `samples`, those before the last record

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside its step, plain values."""
        return {"samples": self.samples, "seconds": self.seconds, "metrics": self.latest}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Continues from `state`; the rate of samples is measured anew from here."""
        self.samples = self.samples_recorded = int(state["samples"])
        self.seconds, self.latest = float(state["seconds"]), dict(state["metrics"])


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Everything that the rest of a run depends on, to the last bit.

    `parameters` are those that learn, by name. `averages` are the moving averages by the name of their file
    (ema, objective_ema). `parts` are further parts with a plain state, by the name that they have in
    state.json: the loader, the meter, and so on; `tensor_parts` those whose state has tensors, which lies
    beside the optimiser's.
    """

    model: nn.Module
    objective: Objective
    parameters: dict[str, Parameter]
    optimizer: OptimizerSet
    backward: Backward
    averages: dict[str, Ema]
    parts: dict[str, Stateful] = field(default_factory=dict)
    tensor_parts: dict[str, Stateful] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        objective: Objective,
        *,
        optimizer: OptimizerConfig,
        backward: BackwardConfig,
        ema: float | Literal["off"],
    ) -> Self:
        """The state of a new training of these modules, at step 0.

        Raises: UserError if the configuration names parts or terms that are not there.
        """
        optimizers = optimizer.build(model, objective)
        parameters = trainable(model, objective)
        moved = {id(parameter) for parameter in optimizers.parameters}
        for name, parameter in parameters.items():
            if id(parameter) not in moved:
                log.warning("parameter %s is moved by no optimiser", name)
        averaged = {"ema": model, "objective_ema": objective} if ema != "off" else {}
        return cls(
            model=model,
            objective=objective,
            parameters=parameters,
            optimizer=optimizers,
            backward=backward.build(parameters, objective.names),
            averages={name: Ema(module, float(ema)) for name, module in averaged.items()},
        )

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Model and objective by the name of their file."""
        return {"model": self.model, "objective": self.objective}

    @property
    def _beside_optimizer(self) -> dict[str, Stateful]:
        return {BACKWARD: self.backward, **self.tensor_parts}

    @contextmanager
    def serving(self) -> Iterator[bool]:
        """Inside the block the modules have the weights that are served: the moving average, or that of a
        schedule-free optimiser. False if these are the ones in training."""
        with ExitStack() as stack:
            stack.enter_context(self.optimizer.averaged())
            for average in self.averages.values():
                stack.enter_context(average.applied())
            yield bool(self.averages) or self.optimizer.averages

    def checkpoint(
        self, collect: Callable[..., Any], settings: Mapping[str, Any], texts: Mapping[str, str]
    ) -> Checkpoint:
        """The state as a checkpoint, however many ranks hold it. `settings` and `texts` are kept beside it.

        All ranks must call it. Tensors are as `collect` (of a `Saver`) gives them: of a whole checkpoint rank
        0 gets all and the others none, of a sharded one each gets its share.
        """
        # A schedule-free optimiser saves the weights that are served, which lie in the model only inside the
        # block: these must be copied even where everything else is written straight from the live tensors.
        with self.optimizer.averaged():
            states = {name: module.state_dict() for name, module in self.modules.items()}
            tensors = collect(states, copy=self.optimizer.averages)
        tensors |= collect({name: average.shadow for name, average in self.averages.items()})
        beside = {name: part.state_dict() for name, part in self._beside_optimizer.items()}
        optimizer = collect({**self.optimizer.state_dict(), **beside})
        plain = {
            **self.counters.state_dict(),
            "ema_updates": {name: average.updates for name, average in self.averages.items()},
            **{name: part.state_dict() for name, part in self.parts.items()},
            **settings,
        }
        return Checkpoint(
            step=self.counters.step,
            tensors=tensors,
            optimizer=optimizer,
            rng=rng_state(),
            state=deepcopy(plain),  # a thread writes it while the parts go on
            extra=dict(texts),
        )

    def load(self, saved: Checkpoint) -> None:
        """Continues from `saved`, to the same bits.

        Raises: UserError if it is of another model or another objective.
        """
        # In place: optimisers and averages hold these very tensors, sharded or not.
        try:
            for name, module in self.modules.items():
                module.load_state_dict(shard_like_all(saved.tensors.get(name, {}), module.state_dict()))
            for name, average in self.averages.items():
                average.load(saved.tensors.get(name, {}), saved.state["ema_updates"][name])
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"The checkpoint of step {saved.step} does not fit this model or objective: "
                f"{str(error)[:600]}\n"
                "Resume with the same model and objective, or give the new run another name."
            ) from error
        # These states share a file with the optimiser's: all hold tensors that may be sharded.
        optimizers = dict(saved.optimizer)
        for name, part in self._beside_optimizer.items():
            part.load_state_dict(optimizers.pop(name, {}))
        self.optimizer.load_state_dict(optimizers)
        load_rng_state(saved.rng)  # after the modules, of which a custom one may draw while it loads
        self.counters.load_state_dict(saved.state)
        self.counters.step = saved.step
        for name, part in self.parts.items():
            part.load_state_dict(saved.state.get(name, {}))

    def layouts(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint's are loaded into, by their names among its shards.

        Where one is a DTensor, this rank reads its own share of the saved tensor and nothing more.
        """
        states = {name: module.state_dict() for name, module in self.modules.items()}
        states |= {name: average.shadow for name, average in self.averages.items()}
        layouts = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
        for name, optimizer in self.optimizer.optimizers.items():
            members = (parameter for group in optimizer.param_groups for parameter in group["params"])
            layouts |= {f"{OPTIMIZER}/{name}/state/{place}": one for place, one in enumerate(members)}
        return layouts

"""Memory and FLOPs of one update, from a model of fake tensors: nothing is allocated or computed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tutti.config.run_config import RunConfig
from tutti.models.describe import flop_counter
from tutti.models.layers import blocks_of
from tutti.objectives.unified import UnifiedLoss
from tutti.planning.memory import LiveMemory, dummy_batch, own_bytes, state_tensors
from tutti.training.backward.term_gradients import term_gradients
from tutti.training.optim.ema import Ema
from tutti.training.optim.muon import Muon
from tutti.training.optim.optimizers import OptimizerSet
from tutti.types import Batch, DataSpec, LossTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What lives through a whole training, in parameters and bytes.

    `parameters` are by part of the model, the heads of the terms under "objective". `block` is the largest
    transformer block's, `outside` what belongs to no block.
    """

    parameters: dict[str, int]
    trainable: int
    block: int
    outside: int
    weights: int
    gradients: int
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        """All parameters, heads included."""
        return sum(self.parameters.values())

    @property
    def fixed(self) -> int:
        """Bytes of weights, gradients, optimiser state and averaged weights."""
        return self.weights + self.gradients + self.optimizer + self.ema


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """Peak bytes of an update with a micro-batch of `size`: in its forward and backward pass, and in the
    optimiser's step. Both hold weights, optimiser state and averages; gradients grow in the first."""

    size: int
    passes: int
    step: int

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.passes, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs, two for each multiply-add of a matrix product or convolution: `forward` and `backward` for one
    sample, `optimizer` for one update. `recomputed` is what activation checkpointing adds to a sample."""

    forward: float
    backward: float
    recomputed: float
    optimizer: float

    @property
    def model(self) -> float:
        """Forward and backward of one sample, nothing computed twice: the FLOPs of the MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What is really computed for one sample."""
        return self.model + self.recomputed


class TrialUpdate:
    """A model, its loss and its optimiser without data; its updates are measured on real or fake tensors."""

    def __init__(self, config: RunConfig, spec: DataSpec) -> None:
        self.config, self.spec = config, spec
        self.model = config.model.build(spec)
        self.objective: UnifiedLoss = config.objective.build(self.model, config.balancing)
        for module in self.model.modules():
            if "fitted" in module._buffers:  # a decoder that learns from data before it trains: as if it had
                module._buffers["fitted"] = torch.tensor(True)
        self.optimizer: OptimizerSet = config.training.optimizer.build(self.model, self.objective)
        averaged = (self.model, self.objective) if config.training.ema != "off" else ()
        self.averages = [Ema(module, float(config.training.ema)) for module in averaged]
        self.model.train()
        self.objective.train()
        recompute(self, config.training.activation_checkpointing == "block")

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that learns."""
        return [p for root in (self.model, self.objective) for p in root.parameters() if p.requires_grad]

    def batch(self, size: int) -> Batch:
        """A dummy batch of `size` with what the terms ask for."""
        return dummy_batch(self.spec, size, self.config.objective.needs())

    def autocast(self) -> AbstractContextManager[object]:
        """That of training. A CPU stands for any device: it casts the same products."""
        low = self.config.training.precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16) if low else nullcontext()

    def forward(self, batch: Batch) -> LossTerms:
        """Model and loss at the start of a run."""
        with self.autocast():
            return self.objective(self.model(batch.observation), batch, self.model)

    def backward(self, terms: LossTerms) -> None:
        """The backward pass. Terms whose gradients are taken one by one hold all K."""
        if self.config.backward.kind in ("one", "masked", "knowledge_insulation"):
            terms.total.backward()
            return
        found = term_gradients(terms.values, self.parameters)
        for number, parameter in enumerate(self.parameters):
            own = [gradients[number] for gradients in found.values()]
            present = [gradient for gradient in own if gradient is not None]
            if present:
                parameter.grad = torch.stack(present).sum(0)

    def step(self) -> None:
        """The optimiser's step and the moving average."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.averages:
            average.update()

    def peaks(self, memory: LiveMemory, size: int, accumulation: int = 1) -> Peaks:
        """Peak bytes of a second update, when the optimiser has its state. Call it inside `memory`."""
        if not state_tensors(self.optimizer.optimizers.values()):
            self.backward(self.forward(self.batch(size)))
            self.step()
        gc.collect()
        batch = self.batch(size)
        memory.restart()
        for _ in range(min(accumulation, 2)):
            self.backward(self.forward(batch))
        passes = memory.peak
        memory.restart()
        self.step()
        return Peaks(size=size, passes=passes, step=memory.peak)

    def parts(self) -> Parts:
        """What lives through a training; the optimiser's state must be there (`peaks` makes it)."""
        counts = {name: _count(part) for name, part in self.model.named_children()}
        alone = _count(self.model) - sum(counts.values())
        counts |= {"objective": _count(self.objective)} | ({"model": alone} if alone else {})
        blocks = [_count(block) for block in blocks_of(self.model, self.objective)]
        shadows = [value for average in self.averages for value in average.shadow.values()]
        everything = [
            value for root in (self.model, self.objective) for value in (*root.parameters(), *root.buffers())
        ]
        return Parts(
            parameters=counts,
            trainable=sum(parameter.numel() for parameter in self.parameters),
            block=max(blocks, default=0),
            outside=sum(counts.values()) - sum(blocks),
            weights=own_bytes(everything),
            gradients=own_bytes(self.parameters),
            optimizer=own_bytes(state_tensors(self.optimizer.optimizers.values())),
            ema=own_bytes(shadows),
        )


def recompute(trial: TrialUpdate, on: bool) -> None:
    """Switch activation checkpointing on or off."""
    for block in blocks_of(trial.model, trial.objective):
        block.recompute = on


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def fake_update(config: RunConfig, spec: DataSpec) -> Iterator[tuple[TrialUpdate, LiveMemory]]:
    """A model of fake tensors and the counter of the bytes that it would take; inside, nothing is allocated.

    The device is a CPU's stand-in for any: its fused attention keeps what the fused ones of GPUs keep.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        memory = stack.enter_context(LiveMemory())
        yield TrialUpdate(config, spec), memory


def count_flops(config: RunConfig, spec: DataSpec, size: int = 8, *, gpu: bool = False) -> dict[bool, Flops]:
    """The FLOPs of an update over a dummy batch, without and with recomputed blocks, from fake tensors.

    On a `gpu` Muon iterates in bfloat16, which takes more of them.
    """
    with FakeTensorMode():
        trial = TrialUpdate(config, spec)
        for optimizer in trial.optimizer.optimizers.values():
            if isinstance(optimizer, Muon) and gpu:
                optimizer.iterates = torch.bfloat16
        batch = trial.batch(size)
        recompute(trial, False)
        with flop_counter() as in_forward:
            losses = trial.forward(batch)
        with flop_counter() as in_backward:
            trial.backward(losses)
        recompute(trial, True)
        with flop_counter():
            losses = trial.forward(batch)
        with flop_counter() as in_both:
            trial.backward(losses)
        with flop_counter() as in_step:
            trial.optimizer.step()
    counters = (in_forward, in_backward, in_both, in_step)
    forward, backward, again, optimizer = (float(counter.get_total_flops()) for counter in counters)
    return {
        recomputed: Flops(
            forward=forward / size,
            backward=backward / size,
            recomputed=(again - backward) / size if recomputed else 0.0,
            optimizer=optimizer,
        )
        for recomputed in (False, True)
    }

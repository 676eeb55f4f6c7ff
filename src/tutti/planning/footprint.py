"""Memory and FLOPs of one update, from a model of fake tensors: nothing is allocated or computed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tutti.config.run_config import RunConfig
from tutti.models.describe import blank_history, flop_counter
from tutti.models.layers import blocks_of
from tutti.training.backward.term_gradients import term_gradients
from tutti.training.optim.muon import Muon
from tutti.training.state import TrainState
from tutti.types import Batch, DataNeeds, DataSpec, Future, LaterStates, LossTerms, Observation, robots_of


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

    def hardware(self, recompute: bool) -> float:
        """What is really computed for one sample, with or without activation checkpointing."""
        return self.model + (self.recomputed if recompute else 0.0)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage that an operation gives inside the block, until it is freed.

    A view shares its storage, so it counts once. What an operation uses inside and frees before it returns (a
    convolution's workspace) is not seen. Works on real tensors and, without any memory, on fake ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in self._known:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)
        return found

    def restart(self) -> None:
        """Forget the peak: it is now what lives."""
        self.peak = self.live

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Layer norms cast as CUDA's autocast does: what comes in and goes out is float32. A CPU's keeps bf16."""
    # No TorchFunctionMode: torch leaves it while it handles a backward pass, where blocks are computed again.
    plain = F.layer_norm

    def cast(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return plain(x.float() if torch.is_autocast_enabled("cpu") else x, *rest, **named)

    with patch.object(F, "layer_norm", cast):
        yield


class TrialUpdate:
    """A model, its loss and its optimiser without data; its updates are measured on real or fake tensors.
    With `gpu` a CPU's tensors stand for those of a GPU: what is cast or kept there is so here."""

    def __init__(self, config: RunConfig, spec: DataSpec, *, gpu: bool = False) -> None:
        self.config, self.spec = config, spec
        self.casts = norms_in_float32 if gpu else nullcontext
        self.model = config.model.build(spec)
        self.objective = config.objective.build(self.model, config.balancing)
        for module in self.model.modules():
            if "fitted" in module._buffers:  # a decoder that learns from data before it trains: as if it had
                module._buffers["fitted"] = torch.tensor(True)
        how = config.training
        self.state = TrainState.build(
            self.model, self.objective, optimizer=how.optimizer, backward=config.backward, ema=how.ema
        )
        self.state.optimizer.ahead = gpu
        self.model.train()
        self.objective.train()
        for block in blocks_of(self.model, self.objective):
            block.recompute = how.activation_checkpointing == "block"
            block.residual = how.residual_dtype

    def batch(self, size: int) -> Batch:
        """A dummy batch of `size` with what the terms ask for."""
        return dummy_batch(self.spec, size, self.config.objective.needs())

    def autocast(self) -> AbstractContextManager[object]:
        """That of training. A CPU stands for any device: it casts the same products and convolutions."""
        low = self.config.training.precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16) if low else nullcontext()

    def forward(self, batch: Batch) -> LossTerms:
        """Model and loss at the start of a run."""
        with self.autocast(), self.casts():
            return self.objective(self.model(batch.observation), batch, self.model)

    def backward(self, terms: LossTerms) -> None:
        """The backward pass. Terms whose gradients are taken one by one hold all K."""
        parameters = list(self.state.parameters.values())
        with self.casts():  # for what is computed again
            if self.config.backward.kind in ("one", "masked", "knowledge_insulation"):
                terms.total.backward()
                return
            found = term_gradients(terms.values, parameters)
        for number, parameter in enumerate(parameters):
            own = [gradients[number] for gradients in found.values()]
            present = [gradient for gradient in own if gradient is not None]
            if present:
                parameter.grad = torch.stack(present).sum(0)

    def step(self) -> None:
        """The optimiser's step and the moving average."""
        self.state.optimizer.prepare()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        for average in self.state.averages.values():
            average.update()

    def optimizer_tensors(self) -> list[Tensor]:
        """Every tensor in the state of the optimisers; none before the first step."""
        kept = [state for one in self.state.optimizer.optimizers.values() for state in one.state.values()]
        return [value for state in kept for value in state.values() if isinstance(value, Tensor)]

    def peaks(self, memory: LiveMemory, size: int, accumulation: int = 1) -> Peaks:
        """Peak bytes of a second update, when the optimiser has its state. Call it inside `memory`."""
        if not self.optimizer_tensors():
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
        learning = self.state.parameters.values()
        roots = (self.model, self.objective)
        return Parts(
            parameters=counts,
            trainable=sum(parameter.numel() for parameter in learning),
            block=max(blocks, default=0),
            outside=sum(counts.values()) - sum(blocks),
            weights=own_bytes(value for root in roots for value in (*root.parameters(), *root.buffers())),
            gradients=own_bytes(learning),
            optimizer=own_bytes(self.optimizer_tensors()),
            ema=own_bytes(v for average in self.state.averages.values() for v in average.shadow.values()),
        )


def recompute(trial: TrialUpdate, on: bool) -> None:
    """Switch activation checkpointing on or off."""
    for block in blocks_of(trial.model, trial.objective):
        block.recompute = on


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def fake_update(
    config: RunConfig, spec: DataSpec, *, gpu: bool = False
) -> Iterator[tuple[TrialUpdate, LiveMemory]]:
    """A model of fake tensors and the counter of the bytes that it would take; inside, nothing is allocated.
    A CPU stands for any device: its fused attention keeps what the fused ones of GPUs keep."""
    with FakeTensorMode(), LiveMemory() as memory:
        yield TrialUpdate(config, spec, gpu=gpu), memory


def count_flops(config: RunConfig, spec: DataSpec, size: int = 8, *, gpu: bool = False) -> Flops:
    """The FLOPs of an update over a dummy batch, from fake tensors.

    On a `gpu` Muon iterates in bfloat16, which takes more of them.
    """
    with FakeTensorMode():
        trial = TrialUpdate(config, spec)
        for optimizer in trial.state.optimizer.optimizers.values():
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
            trial.state.optimizer.step()
    counters = (in_forward, in_backward, in_both, in_step)
    forward, backward, again, optimizer = (float(counter.get_total_flops()) for counter in counters)
    return Flops(
        forward=forward / size,
        backward=backward / size,
        recomputed=(again - backward) / size,
        optimizer=optimizer,
    )


def own_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, shared ones once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def dummy_batch(spec: DataSpec, size: int, needs: DataNeeds = DataNeeds()) -> Batch:
    """`size` windows with every view, a text of its own each, noise for the rest, and what terms ask for.

    No two texts are the same, so that a language encoder that encodes each text once has them all to do.
    """
    random = torch.Generator().manual_seed(0)
    numbers = torch.arange(size)
    number = numbers % len(spec.embodiments)
    places = spec.vocab_size ** torch.arange(spec.text_length).clamp(max=3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=random)

    def observation() -> Observation:
        edge, views = spec.image_size, len(spec.views)
        return Observation(
            images=torch.randint(0, 256, (size, views, 3, edge, edge), dtype=torch.uint8, generator=random),
            image_mask=torch.ones(size, views, dtype=torch.bool),
            text=numbers[:, None] // places % spec.vocab_size,
            text_mask=torch.ones(size, spec.text_length, dtype=torch.bool),
            state=noise(spec.state_dim),
            state_mask=torch.ones(size, dtype=torch.bool),
            robots=robots_of(spec, number),
        )

    now = observation()
    if len(spec.history) > 1:
        now = replace(now, history=blank_history(spec, size, now.state.device))
    later = LaterStates(
        labels=needs.states,
        values=noise(len(needs.states), spec.state_dim),
        mask=torch.ones(size, len(needs.states), dtype=torch.bool),
    )
    return Batch(
        observation=now,
        actions=noise(spec.horizon, spec.action_dim),
        action_mask=torch.ones(size, spec.horizon, spec.action_dim, dtype=torch.bool),
        instruction_id=numbers,
        embodiment=number,
        window=numbers,
        futures={
            k: Future(observation=observation(), mask=torch.ones(size, dtype=torch.bool))
            for k in needs.futures
        },
        later_states=later if needs.states else None,
        progress=torch.linspace(0, 1, size),
        **({"answer": now.text, "answer_mask": now.text_mask} if "answer" in needs.labels else {}),
    )

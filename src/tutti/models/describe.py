"""What a model is made of: parameters and FLOPs of each module, and the sequence of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tutti.models.pretrained.remembered import ANEW
from tutti.models.vla import VLA
from tutti.types import DataSpec, History, Observation, robots_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """One module: its parameters, forward FLOPs for one sample, and its share of the model's FLOPs.

    `depth` is 0 for the whole model, 1 for a part of it, 2 for a module inside a part; a row contains
    those below it.
    A part's own parameters that sit in none of its modules (positions, say) are in its row only.
    """

    name: str
    depth: int
    parameters: int
    flops: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """A run of tokens in the fusion's sequence."""

    name: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The model's rows, outermost first, and the fusion's sequence in order.

    A training step costs about three times the forward FLOPs: once forward, twice backward. The action
    decoder's are those of a prediction: one that generates in steps counts them all, though it trains on few.
    """

    modules: tuple[ModuleRow, ...]
    tokens: tuple[TokenRow, ...]

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.modules[0].parameters

    @property
    def flops(self) -> int:
        """Forward FLOPs for one sample, two for each multiply-add."""
        return self.modules[0].flops


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Counts the FLOPs of matrix products and convolutions in the block, two for each multiply-add.

    Elementwise work is not in it. A frozen tower computes all: no token is taken from what it remembers or
    keeps on disk, so that the count is the same on every machine.
    """
    # The fused attention of CPUs has no entry in the counter; the plain form is matrix products, and has.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, ExitStack() as after:
        after.callback(ANEW.reset, ANEW.set(True))
        yield counter


def describe(model: VLA) -> Description:
    """Runs one blank sample through `model`, on its device, and counts its FLOPs.

    The text counts as one distinct
    instruction; in training the windows of a batch share theirs, so it costs less there.
    """
    device = next(model.parameters()).device
    with flop_counter() as counter:
        model.predict(blank_observation(model.spec, device))
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    total = flops["Global"]
    root = type(model).__name__
    parts = {name: _flops_below(flops, f"{root}.{name}", part) for name, part in model.named_children()}
    # The action decoder is not called but predicts: what it computes outside its parts is what is left.
    parts["action"] += total - sum(parts.values())
    rows = [_row("model", model, 0, total, total)]
    for name, part in model.named_children():
        rows.append(_row(name, part, 1, parts[name], total))
        for child_name, child in part.named_children():
            path = f"{name}.{child_name}"
            rows.append(_row(path, child, 2, _flops_below(flops, f"{root}.{path}", child), total))
    state = int(model.spec.state_dim > 0 and model.fusion.reads_state)
    sequence = {"readout": 1, "state": state, "language": model.language.num_tokens}
    if moments := len(model.spec.history) - 1:
        sequence["earlier states"] = moments * sequence["state"]
        sequence["earlier vision"] = moments * len(model.spec.views) * model.vision.tokens_per_view
    sequence |= {f"vision: {view}": model.vision.tokens_per_view for view in model.spec.views}
    tokens = tuple(TokenRow(name=name, tokens=count) for name, count in sequence.items() if count)
    return Description(modules=tuple(rows), tokens=tokens)


def blank_observation(spec: DataSpec, device: torch.device) -> Observation:
    """One sample of the shapes that `spec` promises, with every view and every text token present."""
    size, views = spec.image_size, len(spec.views)
    return Observation(
        images=torch.zeros(1, views, 3, size, size, dtype=torch.uint8, device=device),
        image_mask=torch.ones(1, views, dtype=torch.bool, device=device),
        text=torch.zeros(1, spec.text_length, dtype=torch.int64, device=device),
        text_mask=torch.ones(1, spec.text_length, dtype=torch.bool, device=device),
        state=torch.zeros(1, spec.state_dim, device=device),
        state_mask=torch.ones(1, dtype=torch.bool, device=device),
        history=blank_history(spec, 1, device) if len(spec.history) > 1 else None,
        robots=robots_of(spec, torch.zeros(1, dtype=torch.int64, device=device)),
    )


def blank_history(spec: DataSpec, size: int, device: torch.device) -> History:
    """The earlier moments of `size` samples, all of them there."""
    moments, edge, views = len(spec.history) - 1, spec.image_size, len(spec.views)
    shape = (size, moments, views, 3, edge, edge)
    return History(
        images=torch.zeros(shape, dtype=torch.uint8, device=device),
        image_mask=torch.ones(shape[:3], dtype=torch.bool, device=device),
        state=torch.zeros(size, moments, spec.state_dim, device=device),
        state_mask=torch.ones(size, moments, dtype=torch.bool, device=device),
    )


def _row(name: str, module: nn.Module, depth: int, flops: int, total: int) -> ModuleRow:
    parameters = sum(p.numel() for p in module.parameters())
    return ModuleRow(name=name, depth=depth, parameters=parameters, flops=flops, share=flops / total)


def _flops_below(flops: dict[str, int], path: str, module: nn.Module) -> int:
    """Those of a module that was called; one that never is itself (a list, a decoder that only predicts)
    has those of what it holds."""
    if path in flops:
        return flops[path]
    return sum(_flops_below(flops, f"{path}.{name}", child) for name, child in module.named_children())

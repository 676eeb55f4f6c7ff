"""What the decoders' tests share: small sizes, features, batches, smooth chunks, a narrow real model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from test_models_parts import SPEC, batch_of
from torch import Tensor

from tutti.models.config import ModelConfig
from tutti.models.sockets import ActionDecoder
from tutti.models.vla import VLA
from tutti.types import Batch, DataSpec, Features, Tokens, masked_mean

WIDTH, HORIZON, ACTION = 16, 5, 3
NARROW = {"width": 16, "depth": 1, "heads": 2}
"""Keys of the decoders with a transformer that make it small."""
SMALL: DataSpec = replace(SPEC, image_size=16)
FIT_CHUNKS = 64


def build(kind: str, **options: Any) -> ActionDecoder:
    """A small decoder from seed 0, not fitted."""
    torch.manual_seed(0)
    narrow = {} if kind == "regression" else NARROW
    return config(kind, **{**narrow, **options}).action.build(SMALL, WIDTH)


def fitted(kind: str, **options: Any) -> ActionDecoder:
    """The same, having seen the smooth chunks of seed 7."""
    decoder = build(kind, **options)
    if decoder.needs_fit:
        decoder.fit(*chunks(FIT_CHUNKS, seed=7))
    return decoder


def config(kind: str, **options: Any) -> ModelConfig:
    return ModelConfig.model_validate({"action": {"kind": kind, **options}})


def chunks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth chunks whose last dimension is -1 or 1, all of them present."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(count, 1, ACTION, generator=random)
    slope = 0.2 * torch.randn(count, 1, ACTION, generator=random)
    actions = start + slope * torch.arange(HORIZON)[None, :, None]
    actions[..., -1] = torch.where(start[..., -1] > 0, 1.0, -1.0)
    return actions, torch.ones_like(actions, dtype=torch.bool)


def batch(count: int = 4, seed: int = 1, mask: Tensor | None = None) -> Batch:
    return batch_of(chunks(count, seed)[0], mask, SMALL)


def holes(count: int = 4) -> Tensor:
    """A mask: sample i lacks its last i steps, at most all but one."""
    present = torch.arange(HORIZON)[None] < HORIZON - torch.arange(count)[:, None].clamp(max=HORIZON - 1)
    return present[..., None].expand(-1, -1, ACTION).contiguous()


def features(count: int = 4, seed: int = 2, dtype: torch.dtype = torch.float32) -> Features:
    """Random ones, with 6 vision tokens of which the last two are absent."""
    random = torch.Generator().manual_seed(seed)
    readout = torch.randn(count, WIDTH, generator=random, dtype=dtype)
    values = torch.randn(count, 6, WIDTH, generator=random, dtype=dtype)
    tokens = Tokens(values=values, mask=(torch.arange(6) < 4).expand(count, 6))
    return Features(vision=tokens, language=tokens, readout=readout, fused_vision=tokens)


def doubled(given: Batch) -> Batch:
    return replace(given, actions=given.actions.double())


def gradients(decoder: ActionDecoder, value: Tensor) -> list[Tensor]:
    """Those of every parameter that `value` depends on."""
    found = torch.autograd.grad(value, list(decoder.parameters()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def loss(decoder: ActionDecoder, given: Features, of: Batch, seed: int = 3) -> Tensor:
    """The masked mean of the decoder's error with the draws of one seed."""
    torch.manual_seed(seed)
    return masked_mean(decoder(given, of), of.action_mask)


def narrow_model(kind: str, **options: Any) -> VLA:
    """All of a vision-language-action model, narrow, with its decoder fitted if it needs it."""
    torch.manual_seed(0)
    small = {"width": 32, "depth": 1, "heads": 2}
    sizes = {
        "vision": {**small, "stem": {"channels": (16, 32, 32)}},
        "language": {**small, "width": 16},
        "fusion": small,
        "action": {"kind": kind, **options},
    }
    model = ModelConfig.model_validate(sizes).build(SMALL)
    if model.action.needs_fit:
        model.action.fit(*chunks(FIT_CHUNKS, seed=7))
    return model

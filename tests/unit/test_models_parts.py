"""What each part of a model promises: shapes, masks that remove, texts encoded once, kernels that agree."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixtures.small_model import SPEC, observation
from tutti.models.config import ModelConfig
from tutti.models.describe import describe
from tutti.models.fusion.joint_attention import JointAttentionConfig
from tutti.models.language.transformer import TextTransformer, TextTransformerConfig
from tutti.models.layers import Block, activate, attention_mask, blocks_of, space_to_depth
from tutti.models.vision.vit import StemConfig, VisionTransformerConfig
from tutti.models.vla import VLA
from tutti.types import Tokens, UserError


@pytest.fixture
def model() -> VLA:
    torch.manual_seed(0)
    return ModelConfig().build(SPEC)


def test_space_to_depth_is_pixel_unshuffle_in_channels_last() -> None:
    x = torch.randn(2, 3, 16, 16)
    result = space_to_depth(x, 4)
    assert torch.equal(result, F.pixel_unshuffle(x, 4))
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_shapes_and_order_of_features(model: VLA) -> None:
    features = model(observation())
    n = model.vision.tokens_per_view
    assert n == 4
    assert features.vision.values.shape == (4, 2 * n, 128)
    assert features.fused_vision.values.shape == (4, 2 * n, 128)
    assert features.language.values.shape == (4, model.language.num_tokens, model.language.width)
    assert features.readout.shape == (4, 128)
    assert model.predict(observation()).shape == (4, SPEC.horizon, SPEC.action_dim)


def test_bytes_become_x_over_127_5_minus_1(model: VLA) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 2, 3, 16, 16)
    assert torch.equal(model.prepare(images), images.float() / 127.5 - 1.0)
    prepared = torch.randn(1, 2, 3, 16, 16)
    assert model.prepare(prepared) is prepared


def test_a_masked_views_pixels_change_nothing(model: VLA) -> None:
    seen = observation()
    mask = seen.image_mask.clone()
    mask[:, 1] = False
    images = seen.images.clone()
    images[:, 1] = 255 - images[:, 1]
    first = model(replace(seen, image_mask=mask))
    second = model(replace(seen, image_mask=mask, images=images))
    assert torch.equal(first.readout, second.readout)
    assert not first.vision.mask[:, 4:].any() and first.vision.mask[:, :4].all()
    assert not torch.allclose(first.readout, model(seen).readout)


def test_masking_vision_tokens_in_the_fusion_is_removing_them() -> None:
    torch.manual_seed(0)
    fusion = JointAttentionConfig(width=16, heads=2).build(SPEC, 16, 16).double()
    values, state = torch.randn(3, 6, 16, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    language = Tokens(values=values[:, :1], mask=torch.ones(3, 1, dtype=torch.bool))
    mask, known = (torch.arange(6) < 4).expand(3, 6), torch.tensor([True, False, True])
    masked = fusion(Tokens(values=values, mask=mask), language, state, known)
    cut = fusion(Tokens(values=values[:, :4], mask=mask[:, :4]), language, state, known)
    torch.testing.assert_close(masked.readout, cut.readout, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masked.vision.values[:, :4], cut.vision.values, rtol=1e-12, atol=1e-12)


def test_an_unknown_state_is_a_removed_token_whatever_it_holds() -> None:
    """As the fusion of a robot without a state, in the rows where the state is not known; no NaN, forward or
    backward."""
    torch.manual_seed(0)
    fusion = JointAttentionConfig(width=16, heads=2).build(SPEC, 16, 16).double()
    stateless = JointAttentionConfig(width=16, heads=2).build(replace(SPEC, state_dim=0), 16, 16).double()
    stateless.load_state_dict({k: v for k, v in fusion.state_dict().items() if not k.startswith("state.")})
    seen, state = torch.randn(3, 6, 16, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    tokens = [
        Tokens(values=seen[:, a:b], mask=torch.ones(3, b - a, dtype=torch.bool)) for a, b in ((0, 4), (4, 6))
    ]
    known, none = torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)
    whole = fusion(*tokens, state, ~none).readout
    without = stateless(*tokens, state[:, :0], ~none).readout
    state[1] = math.nan
    readout = fusion(*tokens, state, known).readout
    torch.testing.assert_close(readout[1], without[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(readout[::2], whole[::2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole[1], without[1])
    readout.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in fusion.parameters() if p.grad is not None)


def test_a_row_without_text_and_state_and_with_one_view_trains(model: VLA) -> None:
    """As a batch of its own, where nothing but the readout and one view is left, it is that row of the
    larger one."""
    whole = observation()
    lone = torch.tensor([True] + [False] * (len(whole.state) - 1))
    seen = replace(
        whole,
        text_mask=whole.text_mask & ~lone[:, None],
        image_mask=whole.image_mask & (~lone[:, None] | (torch.arange(whole.image_mask.shape[1]) == 0)),
        state=whole.state.masked_fill(lone[:, None], math.nan),
        state_mask=~lone,
    )
    alone = model(seen.first(1))
    torch.testing.assert_close(alone.readout, model(seen).readout[:1])
    alone.readout.square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert {"fusion.readout", "vision.embed.weight"} <= moved
    assert not any(name.startswith(("language", "fusion.state")) for name in moved)


def test_a_masked_views_nan_does_not_spread(model: VLA) -> None:
    seen = observation()
    images = model.prepare(seen.images)
    images[:, 1] = float("nan")
    mask = seen.image_mask.clone()
    mask[:, 1] = False
    model(replace(seen, images=images, image_mask=mask)).readout.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_each_view_and_the_text_and_the_state_reach_the_readout(model: VLA) -> None:
    seen = observation()
    base = model(seen).readout
    for view in range(2):
        images = seen.images.clone()
        images[:, view] = 255 - images[:, view]
        assert not torch.allclose(base, model(replace(seen, images=images)).readout)
    assert not torch.allclose(base, model(replace(seen, text=(seen.text + 1) % SPEC.vocab_size)).readout)
    assert not torch.allclose(base, model(replace(seen, state=seen.state + 1)).readout)


def test_padding_and_absent_text_change_nothing(model: VLA) -> None:
    seen = observation()
    padded = torch.where(seen.text_mask, seen.text, (seen.text + 3) % SPEC.vocab_size)
    torch.testing.assert_close(model(seen).readout, model(replace(seen, text=padded)).readout)
    silent = replace(seen, text_mask=torch.zeros_like(seen.text_mask))
    other = replace(silent, text=(seen.text + 1) % SPEC.vocab_size)
    assert torch.equal(model(silent).readout, model(other).readout)
    assert model(silent).readout.isfinite().all()
    assert not model(silent).language.mask.any()


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_encoding_distinct_texts_equals_encoding_all(num_tokens: int) -> None:
    torch.manual_seed(0)
    encoder = TextTransformerConfig(num_tokens=num_tokens, width=16).build(SPEC).double()
    assert isinstance(encoder, TextTransformer)
    seen = observation(b=3)
    rows = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    text, mask = seen.text[rows], seen.text_mask[rows]
    upstream = torch.randn(len(rows), encoder.num_tokens, 16, dtype=torch.float64)
    gradients: list[list[Tensor]] = []
    for values in (encoder(text, mask).values, encoder.encode(text, mask)):
        encoder.zero_grad()
        (values * upstream).sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(encoder(text, mask).values, encoder.encode(text, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
    assert encoder(text, mask).values.shape == (7, encoder.num_tokens, 16)


def test_no_mask_is_an_all_true_mask() -> None:
    torch.manual_seed(0)
    block, x = Block(16, 2).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert attention_mask(everything) is None
    torch.testing.assert_close(block(x), block(x, everything[:, None, None, :]))
    holes = everything.clone()
    holes[0, 2] = False
    assert attention_mask(holes) is not None


HOLES = {"image_mask": (0, 1), "text_mask": (2,), "state_mask": (1,)}
"""What of a mask is absent: a view, a text, a state."""


@pytest.mark.parametrize("absent", [None, "withheld", *HOLES])
def test_a_device_attends_without_a_mask_where_the_host_saw_that_nothing_is_absent(
    absent: str | None,
) -> None:
    model = ModelConfig.model_validate({"vision": {"withhold": absent == "withheld"}}).build(SPEC).to("meta")
    given: list[Tensor | None] = []
    blocks_of(model.fusion)[0].register_forward_pre_hook(lambda _, inputs: given.append(inputs[1]))
    seen = observation()
    if absent in HOLES:
        mask = getattr(seen, absent).clone()
        mask[HOLES[absent]] = False
        seen = replace(seen, **{absent: mask})
    there = seen.to("meta")
    model(there)
    model(there.first(2))  # other rows: nothing was seen of them
    assert [mask is None for mask in given] == [absent is None, False]


@pytest.mark.parametrize(("activation", "bias"), [("relu", True), ("gelu", False)])
def test_block_gradients_are_right(activation: Any, bias: bool) -> None:
    torch.manual_seed(0)
    block = Block(4, 2, activation=activation, bias=bias).double()
    assert any(name.endswith("mlp_in.bias") for name, _ in block.named_parameters()) == bias
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


def test_a_size_that_does_not_fit_the_stem_names_key_and_cure() -> None:
    with pytest.raises(UserError, match=r"data\.image_size is 84.*multiple of 16.*80 or 96"):
        ModelConfig().build(replace(SPEC, image_size=84))


def test_pictures_of_another_size_are_refused(model: VLA) -> None:
    with pytest.raises(UserError, match="built for 2 views of 32 x 32"):
        model(observation(replace(SPEC, image_size=48)))


def test_impossible_sizes_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="not divisible by heads"):
        VisionTransformerConfig(width=100, heads=8)
    with pytest.raises(ValueError, match="3 channels but 2 strides"):
        StemConfig(channels=(1, 2, 3), strides=(1, 2))


def test_state_dropout_withholds_states_in_training_only() -> None:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"fusion": {"state_dropout": 0.5}})
    model, seen = config.build(SPEC), observation(b=64)
    assert torch.equal(model.eval()(seen).readout, model(seen).readout)
    whole = model(seen).readout
    blind = model(replace(seen, state=torch.zeros_like(seen.state))).readout
    dropped = model.train()(seen).readout
    kept = torch.isclose(dropped, whole, atol=1e-5).all(dim=1)
    withheld = torch.isclose(dropped, blind, atol=1e-5).all(dim=1)
    assert (kept | withheld).all() and 16 < withheld.sum() < 48


def test_a_withheld_state_changes_nothing_and_costs_nothing() -> None:
    torch.manual_seed(0)
    model, seen = ModelConfig.model_validate({"fusion": {"withhold_state": True}}).build(SPEC), observation()
    other = replace(seen, state=torch.full_like(seen.state, torch.nan))
    for one in (model.train(), model.eval()):
        assert torch.equal(one.predict(other), one.predict(seen))
    assert not model.fusion.reads_state
    assert not [name for name, _ in model.named_parameters() if name.startswith("fusion.state")]
    assert [row.name for row in describe(model).tokens][:2] == ["readout", "language"]
    with pytest.raises(UserError, match=r"withhold_state is true\. Set model\.fusion\.state_dropout=0"):
        ModelConfig.model_validate({"fusion": {"withhold_state": True, "state_dropout": 0.5}}).build(SPEC)


def _autograd_nodes(value: Tensor) -> set[str]:
    waiting, names = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    return names


def test_the_activation_writes_into_no_view() -> None:
    linear = nn.Linear(6, 8)
    x = torch.randn(2, 3, 6)
    out = activate(linear(x), "relu")
    assert torch.equal(out, torch.relu(linear(x)))
    assert not any("CopySlices" in name for name in _autograd_nodes(out))
    owned = linear(x).clone()
    assert activate(owned, "relu").data_ptr() == owned.data_ptr()

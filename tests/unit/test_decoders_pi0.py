"""pi0's expert beside a VLM: transformers' own velocity and actions, what sees what, and what learns."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from fixtures import small_model
from fixtures.small_model import observation
from fixtures.towers import SIZE
from fixtures.vlms import PICTURE, save_pi0, save_vlm
from tutti.models.config import ModelConfig, load_towers, pretrained_parts
from tutti.models.describe import blank_observation
from tutti.models.layers import blocks_of
from tutti.models.vla import VLA
from tutti.objectives.term import stopped
from tutti.types import Batch, Observation, UserError

SPEC = replace(small_model.SPEC, image_size=SIZE)
SEEN = observation(SPEC, b=3)
SEEN = replace(SEEN, text=SEEN.text % 12)
Home = tuple[Path, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("vlms")
    save_vlm(folder / "smolvlm", "smolvlm")
    save_vlm(folder / "paligemma", "paligemma")
    return folder, save_pi0(folder / "pi0")


@pytest.fixture
def pi0(home: Home) -> Home:
    """A checkpoint in pi0's format, and the network of transformers."""
    return home[0] / "pi0", home[1]


def config_of(path: Path, action: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
    given = {"vlm": {"path": path, **keys}, "action": {"kind": "pi0", "steps": 4, **(action or {})}}
    return ModelConfig.model_validate(given)


def loaded(config: ModelConfig, given: tuple[str, ...] = ()) -> VLA:
    torch.manual_seed(3)
    model = config.build(SPEC)
    load_towers(model, given)
    return model.eval()


def own_inputs(seen: Observation, tokens: int) -> dict[str, Any]:
    """What transformers' own is given, without pictures that are not there and with the state filled up."""
    rows: list[list[int]] = []
    for row, count in enumerate(seen.image_mask.sum(1).tolist()):
        rows.append([PICTURE] * (tokens * count) + seen.text[row, seen.text_mask[row]].tolist())
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {
        "state": torch.nn.functional.pad(seen.state, (0, 6 - seen.state.shape[1])),
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": seen.images.float() / 127.5 - 1,
        "pixel_attention_mask": seen.image_mask,
    }


def test_velocity_and_actions_are_those_of_transformers(pi0: Home) -> None:
    """With the same noise and levels, with a view that is absent; and the learned error."""
    folder, network = pi0
    model = loaded(config_of(folder))
    seen = replace(SEEN, image_mask=torch.tensor([[True, True], [False, True], [True, True]]))
    given = own_inputs(seen, model.vision.tokens_per_view)
    flow: Any = model.action.flow
    features = model(seen)
    with torch.no_grad():
        expected = network.sample_actions(**given, noise=flow.noise.expand(3, -1, -1))
    torch.testing.assert_close(model.predict(seen), expected[..., :3], atol=1e-5, rtol=0)
    assert expected.std() > 0.5
    batch = replace(small_model.batch_of(torch.randn(3, 5, 3), spec=SPEC), observation=seen)
    noise, u = torch.randn(3, 5, 7), torch.tensor([0.1, 0.5, 0.93])
    actions = torch.nn.functional.pad(batch.actions, (0, 4))
    with torch.no_grad():
        given |= {"noise": noise, "timestep": 1 - u, "actions": actions}
        velocity = network(**given).logits
        chunk = (1 - u)[:, None, None] * noise + u[:, None, None] * actions
        condition = flow.conditioning(features)
        found = flow.denoiser(chunk, u, condition)
        error = flow.error_at(condition, actions, torch.ones_like(actions).bool(), u, noise)
    torch.testing.assert_close(found, -velocity, atol=1e-5, rtol=0)
    torch.testing.assert_close(error, (velocity - (noise - actions)).square(), atol=1e-5, rtol=1e-5)
    assert model.action(features, batch).shape == (3, 5, 3)


def test_a_withheld_state_reaches_neither_the_vlm_nor_the_expert(home: Home) -> None:
    fusion = {"kind": "vlm", "withhold_state": True}
    config = config_of(home[0] / "paligemma").model_dump(mode="json") | {"fusion": fusion}
    model = loaded(ModelConfig.model_validate(config))
    other = replace(SEEN, state=SEEN.state + 1)
    with torch.no_grad():
        assert torch.equal(model.predict(other), model.predict(SEEN))
        told = loaded(config_of(home[0] / "paligemma"))
        assert not torch.equal(told.predict(other), told.predict(SEEN))


def batch_of(seen: Observation = SEEN) -> Batch:
    torch.manual_seed(4)
    return replace(small_model.batch_of(torch.randn(3, 5, 3), spec=SPEC), observation=seen)


def gradients(model: VLA, stop: tuple[Any, ...] = ()) -> tuple[float, dict[str, float]]:
    """The action's loss and, by part, the length of its gradient."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model.action(stopped(model(SEEN), stop), batch_of()).mean()
    loss.backward()
    lengths = {
        name: sum(float(p.grad.square().sum()) for p in part.parameters() if p.grad is not None) ** 0.5
        for name, part in model.named_children()
    }
    return loss.item(), lengths


@pytest.mark.parametrize("kind", ["paligemma", "smolvlm"])
def test_insulation_is_exact_and_what_nothing_of_the_action_reads_is_known(home: Home, kind: str) -> None:
    """A new expert beside a VLM; blocks that are recomputed give the same bits."""
    model = loaded(config_of(home[0] / kind, {"width": 12, "hidden": 20}))
    expert: Any = model.action.tower.network.get_submodule("model.dit")  # pyright: ignore
    assert len(expert.layers) == 4 and expert.layers[0].mlp.up_proj.weight.shape == (20, 12)
    free, moved = gradients(model)
    rest = {name for name, p in model.named_parameters() if p.grad is None}
    last = {f"layers.3.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention")}
    assert rest and all(
        name.startswith("fusion.") and any(one in name for one in (*last, "norm.weight", "readout", "state"))
        for name in rest
    )
    exact = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for block in blocks_of(model):
        block.recompute = True
    assert gradients(model) == (free, moved)
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(a.equal(b) for a, b in zip(exact, again, strict=True))
    same, insulated = gradients(model, ("fused",))
    assert same == free and all(length > 1e-3 for length in moved.values())
    assert insulated == {"vision": 0.0, "language": 0.0, "fusion": 0.0, "action": moved["action"]}


def test_who_sees_whom(home: Home) -> None:
    """The VLM neither state nor actions; the actions the state, the present pictures and no padding."""
    model = loaded(config_of(home[0] / "paligemma", {"width": 12}))
    with torch.no_grad():
        for parameter in model.parameters():  # at first the expert hardly hears anything
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        first = model(SEEN)
        other = model(replace(SEEN, state=SEEN.state + 1))
    assert all(a.values.equal(b.values) for a, b in zip(first.layers, other.layers, strict=True))
    assert other.fused_vision.values.equal(first.fused_vision.values)
    chunk = model.predict(SEEN)
    assert not model.predict(replace(SEEN, state=SEEN.state + 1)).allclose(chunk, atol=1e-4)
    assert not model.predict(replace(SEEN, images=255 - SEEN.images)).allclose(chunk, atol=1e-4)
    unknown = replace(SEEN, state=torch.full_like(SEEN.state, torch.nan), state_mask=~SEEN.state_mask)
    assert model.predict(unknown).equal(model.predict(replace(SEEN, state=torch.zeros_like(SEEN.state))))
    there = SEEN.text_mask.clone()
    there[:, 2:] = False
    short = replace(SEEN, text_mask=there)
    padded = model.predict(replace(short, text=torch.where(there, SEEN.text, 7)))
    torch.testing.assert_close(padded, model.predict(short), atol=1e-6, rtol=0)
    cut = replace(short, text=SEEN.text[:, :2], text_mask=there[:, :2])
    torch.testing.assert_close(model.predict(cut), model.predict(short), atol=1e-6, rtol=0)
    nothing = replace(SEEN, image_mask=~SEEN.image_mask, text_mask=torch.zeros_like(SEEN.text_mask))
    assert bool(model.predict(nothing).isfinite().all())
    # In its first block the state token's keys and values know no action, so only the actions' own move.
    condition = model.action.flow.conditioning(first)  # pyright: ignore
    heard: list[torch.Tensor] = []
    block: Any = model.action.tower.network.get_submodule("model.dit.layers.3")  # pyright: ignore
    hook = block.register_forward_hook(lambda _, __, found: heard.append(found[:, 0]))
    for scale in (0.0, 1.0):
        model.action.flow.denoiser(scale * torch.randn(3, 5, 3), torch.full((3,), 0.5), condition)  # pyright: ignore
    hook.remove()
    assert heard[0].equal(heard[1])
    # Drawn to another chunk it follows.
    target = chunk[0] + 1
    drawn = model.action.predict_continuing(first, target, torch.tensor([1.0, 1, 0, 0, 0]), 5.0)
    assert (drawn[0] - target)[:2].abs().mean() < 0.5 * (chunk[0] - target)[:2].abs().mean()


def test_sizes_alone_are_enough_for_a_plan(home: Home) -> None:
    with FakeTensorMode():
        model = config_of(home[0] / "smolvlm").build(SPEC)
        seen = blank_observation(SPEC, torch.device("cpu"))
        batch = small_model.batch_of(torch.zeros(len(seen.state), 5, 3), spec=SPEC)
        model.action(model(seen), batch).sum().backward()
        assert model.action.tower.network.action_out_proj.weight.grad is not None  # pyright: ignore


def test_a_checkpoint_is_loaded_strictly_under_all_its_names(pi0: Home, tmp_path: Path) -> None:
    """Those of transformers, of lerobot's network and of its policy, whose config.json names its variants."""
    folder, _ = pi0
    model = loaded(config_of(folder))
    told = [part.tower.loaded for part in pretrained_parts(model).values()]
    assert [one.tensors for one in told if one] == [55, 1, 37, 47]
    unread = {name for one in told if one for name in one.unread}
    assert {name for name in unread if not name.startswith("vision_tower.head.")} == {
        "model.dit.embed_tokens.weight"
    }
    chunk = model.predict(SEEN)
    there = shutil.copytree(folder, tmp_path / "lerobot")
    tensors = load_file(folder / "model.safetensors")
    assert "state_proj.weight" in tensors  # transformers saves most of them under lerobot's names

    def lerobot(name: str) -> str:
        name = name.replace("language_model.model.", "language_model.").replace(
            "tower.", "tower.vision_model."
        )
        return name.replace("paligemma.model.language_model.embed_tokens", "paligemma.lm_head")

    for before in ("", "model."):
        named = {before + lerobot(name): tensor for name, tensor in tensors.items()}
        save_file(named, there / "model.safetensors", {"format": "pt"})
        assert loaded(config_of(there)).predict(SEEN).equal(chunk)
    lost = {name: one for name, one in named.items() if "gemma_expert.model.layers.2.mlp.up" not in name}
    save_file(lost, there / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors, such as model\.dit\.layers\.2\.mlp\.up_proj"):
        loaded(config_of(there))
    said = {"type": "pi0", "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    (there / "config.json").write_text(json.dumps({**said, "max_action_dim": 24}))
    vlm = config_of(there).vlm
    assert vlm is not None and vlm.picture_size() == 224
    expert = vlm.values()["action_expert"]
    assert expert["dit_config"]["hidden_size"] == 1024 and expert["max_action_dim"] == 24


def test_what_does_not_fit_is_refused(home: Home, pi0: Home) -> None:
    folder, _ = pi0
    for config, wrong in (
        (config_of(folder, {"width": 16}), r"model\.action\.width is 16, but the expert of .* has 12"),
        (ModelConfig.model_validate({"action": {"kind": "pi0"}}), r"there is no model\.vlm"),
    ):
        with pytest.raises(UserError, match=wrong):
            config.build(SPEC)
    with pytest.raises(ValueError, match=r"embodiment is prompt, but model\.action\.kind is pi0"):
        ModelConfig.model_validate(config_of(folder).model_dump(mode="json") | {"embodiment": "prompt"})
    said = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"data's actions have 3 dimensions, those of the expert .* 2"):
        config_of(folder, architecture={**said, "max_action_dim": 2}).build(SPEC)
    other = {**said, "dit_config": {**said["dit_config"], "head_dim": 4}}
    with pytest.raises(UserError, match=r"its expert has 4 blocks with .*'head_dim': 4"):
        config_of(folder, architecture=other).build(SPEC)
    save_vlm(home[0] / "qwen3_vl", "qwen3_vl")
    with pytest.raises(UserError, match=r"kind is pi0, but the language model of .* is a qwen3_vl_text"):
        config_of(home[0] / "qwen3_vl").build(SPEC)

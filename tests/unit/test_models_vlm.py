"""Whole vision-language models in three sockets: the numbers of transformers itself, and what learns."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from fixtures import small_model
from fixtures.small_model import observation
from fixtures.towers import SIZE, tf
from fixtures.vlms import hidden_states, save_vlm
from tutti.config.run_config import load_config
from tutti.data.tokenize import Tokenizer
from tutti.models.config import ModelConfig, exported, load_towers, pretrained_parts
from tutti.models.describe import blank_observation
from tutti.models.layers import blocks_of
from tutti.models.vla import VLA
from tutti.objectives.term import stopped
from tutti.objectives.terms.next_token import NextTokenConfig
from tutti.runs.build import describe_model
from tutti.types import Features, Observation, UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "vlm"

SPEC = replace(small_model.SPEC, image_size=SIZE)
SEEN = observation(SPEC, b=3)
SEEN = replace(SEEN, text=SEEN.text % 12)
KINDS = ("smolvlm", "idefics3", "paligemma", "qwen2_5_vl", "qwen3_vl")
Home = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A folder for each VLM, and the networks of transformers."""
    folder = tmp_path_factory.mktemp("vlms")
    return folder, {name: save_vlm(folder / name, name) for name in (*KINDS, "paligemma2")}


def config_of(path: Path, action: Any = None, **keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"vlm": {"path": path, **keys}, "action": action or {"hidden": 16}})


def loaded(config: ModelConfig, given: tuple[str, ...] = ()) -> VLA:
    torch.manual_seed(3)
    model = config.build(SPEC)
    load_towers(model, given)
    return model.eval()


def features(model: VLA, seen: Observation = SEEN) -> Features:
    with torch.no_grad():
        return model(seen)


@pytest.mark.parametrize("kind", [*KINDS, "paligemma2"])
def test_tokens_are_those_of_transformers_own(home: Home, kind: str) -> None:
    """Embeddings, each layer, the last norm, seen both ways or causally; with fewer layers, too."""
    folder, networks = home
    close = {"atol": 2e-6 if kind == "paligemma2" else 1e-6, "rtol": 0}
    for mask, count in (("prefix", 4), ("causal", 4), ("causal", 2)):
        model = loaded(config_of(folder / kind, mask=mask, layers=count))
        expected = hidden_states(networks[kind], SEEN, model.vision.tokens_per_view, causal=mask == "causal")
        found = features(model)
        width, pictures = model.fusion.width, found.vision.mask.shape[1]
        there = found.layers[0].mask
        embedded = torch.cat([found.vision.values[..., :width], found.language.values], dim=1)
        torch.testing.assert_close(embedded[there], expected[0][there], **close)
        assert len(found.layers) == count
        for number, layer in enumerate(found.layers[:3], 1):
            torch.testing.assert_close(layer.values[there], expected[number][there], **close)
        if count == 4:
            assert found.fused_language is not None
            fused = torch.cat([found.fused_vision.values, found.fused_language.values], dim=1)
            assert found.fused_vision.values.shape[1] == pictures
            torch.testing.assert_close(fused[there], expected[4][there], **close)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_absent_changes_nothing_and_leaves_no_gap(home: Home, kind: str) -> None:
    """State and readout change no token of the prefix to the bit; an absent view is as if there were none."""
    folder, networks = home
    model = loaded(config_of(folder / kind))
    first = features(model)
    other = features(model, replace(SEEN, state=SEEN.state + 1))
    assert other.fused_vision.values.equal(first.fused_vision.values)
    assert all(a.values.equal(b.values) for a, b in zip(first.layers, other.layers, strict=True))
    assert not other.readout.equal(first.readout)
    unknown = replace(SEEN, state=torch.full_like(SEEN.state, torch.nan), state_mask=~SEEN.state_mask)
    assert bool(features(model, unknown).readout.isfinite().all())
    images = SEEN.images.float() / 127.5 - 1
    images[:, 0] = torch.nan
    one = replace(SEEN, images=images, image_mask=torch.tensor([False, True]).expand(3, 2))
    found = features(model, one)
    tokens = model.vision.tokens_per_view
    assert found.fused_vision.mask.tolist() == [[False] * tokens + [True] * tokens] * 3
    alone = replace(SEEN, images=SEEN.images[:, 1:], image_mask=SEEN.image_mask[:, 1:])
    expected = hidden_states(networks[kind], alone, tokens, causal=False)[-1]
    torch.testing.assert_close(found.fused_vision.values[:, tokens:], expected[:, :tokens], atol=1e-6, rtol=0)
    nothing = replace(one, image_mask=~SEEN.image_mask, text_mask=torch.zeros_like(SEEN.text_mask))
    assert bool(features(model, nothing).readout.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_reached_and_blocks_are_recomputed_to_the_same_bits(home: Home, kind: str) -> None:
    gradients: list[list[torch.Tensor]] = []
    for again in (False, True):
        model = loaded(config_of(home[0] / kind))
        blocks = blocks_of(model.vision, model.fusion)
        assert len(blocks) == 3 + 4
        for block in blocks:
            block.recompute = again
        model(SEEN).readout.square().sum().backward()
        rest = [name for name, p in model.named_parameters() if p.grad is None]
        assert all(name.startswith("action.") for name in rest), rest
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def trained(model: VLA, steps: int) -> VLA:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        found = model(SEEN)
        (found.readout.square().sum() + found.fused_vision.values.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("kind", ["smolvlm", "qwen3_vl"])
def test_a_frozen_vlm_stays_and_lora_begins_as_it(home: Home, kind: str) -> None:
    path = home[0] / kind
    frozen, config = loaded(config_of(path, learn="none")), config_of(path, learn={"lora": 2})
    before = {name: tensor.clone() for name, tensor in frozen.named_parameters() if ".tower." in name}
    base = features(frozen)
    model = loaded(config)
    assert features(model).readout.equal(base.readout)
    learning = {name for name, p in model.named_parameters() if p.requires_grad and ".tower." in name}
    assert {name.split(".")[0] for name in learning} == {"vision", "fusion"}
    assert all(name.endswith((".down", ".up")) for name in learning)
    trained(frozen, 20)
    after = dict(frozen.named_parameters())
    assert all(value.equal(after[name]) and after[name].grad is None for name, value in before.items())
    assert not features(frozen).readout.equal(base.readout)  # through the state and the readout token
    assert not any(".tower." in name for name in frozen.state_dict())

    trained(model, 5)
    moved = features(model)
    assert not moved.fused_vision.values.equal(base.fused_vision.values)
    shared, tensors = exported(config, SPEC, model.state_dict())
    assert shared.vlm is not None and shared.vlm.learn == "none" and len(tensors) > len(before)
    served = shared.model_copy(update={"vlm": config.resolved().vlm.exported()})  # pyright: ignore
    plain = loaded(served, tuple(tensors))
    plain.load_state_dict(tensors)
    torch.testing.assert_close(features(plain).readout, moved.readout, atol=1e-6, rtol=1e-6)


def test_a_folder_that_is_not_the_vlm_is_refused(tmp_path: Path) -> None:
    save_vlm(tmp_path, "smolvlm")
    file = tmp_path / "model.safetensors"
    tensors, given = load_file(file), config_of(tmp_path).resolved()
    told = [part.tower.loaded for part in pretrained_parts(loaded(given)).values()]
    assert [one and (one.tensors, one.unread) for one in told] == [
        (count, ("lm_head.weight",)) for count in (54, 1, 37)
    ]
    lost = {name: value for name, value in tensors.items() if "layers.1.mlp.up_proj" not in name}
    save_file(lost, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors, such as text_model\.layers\.1\.mlp\.up"):
        loaded(config_of(tmp_path))
    with pytest.raises(UserError, match=r"expected: [0-9a-f]{64}, as model\.vlm\.sha256"):
        loaded(given)
    for keys, message in (
        ({"layers": 5}, r"model\.vlm\.layers is 5, but the language model of .* has 4"),
        ({"path": tmp_path / "no"}, r"model\.vlm\.path: .*config\.json is not there"),
    ):
        with pytest.raises(UserError, match=message):
            config_of(**{"path": tmp_path, **keys}).build(SPEC)
    larger = replace(SPEC, image_size=24)
    with pytest.raises(UserError, match=r"data\.image_size=16, or model\.vlm\.interpolate=true"):
        config_of(tmp_path).build(larger)
    assert config_of(tmp_path, interpolate=True).build(larger).vision.tokens_per_view == 9
    with pytest.raises(UserError, match=r"has 40 tokens, its language model embeds 32"):
        config_of(tmp_path).build(replace(SPEC, vocab_size=40))


def test_what_the_files_beside_a_vlm_say(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that ends an answer, colours as transformers 5 saves them, and Qwen's edges that are none."""
    for kind, end in (("paligemma", 1), ("smolvlm", 2), ("qwen3_vl", 3)):
        folder = shutil.copytree(home[0] / kind, tmp_path / kind)
        said = json.loads((folder / "config.json").read_text())
        if kind == "qwen3_vl":
            said["text_config"]["eos_token_id"] = [end, 9]
        (folder / "config.json").write_text(json.dumps(said))
        source = config_of(folder).text_source
        assert source is not None and source.end == end
    processor: dict[str, Any] = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "smolvlm" / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    assert config_of(tmp_path / "smolvlm").towers()["vlm"].resolved().mean == (0.1, 0.2, 0.3)  # pyright: ignore
    processor["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
    (tmp_path / "qwen3_vl" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert config_of(tmp_path / "qwen3_vl").picture_size() == 224
    monkeypatch.setitem(sys.modules, "transformers.vision_utils", None)
    with pytest.raises(UserError, match=r"model\.vlm: a qwen3_vl needs transformers 5\.15"):
        config_of(tmp_path / "qwen3_vl").build(SPEC)


@pytest.mark.parametrize("special", [True, False])
def test_a_special_token_without_a_row_is_left_out(home: Home, tmp_path: Path, special: bool) -> None:
    """<image> is behind PaliGemma's words, and in a pi0 behind its rows; no text has it."""
    folder = shutil.copytree(home[0] / "paligemma", tmp_path / "pi0")
    said = json.loads((folder / "tokenizer.json").read_text())
    said["model"]["vocab"] |= {f"w{n}": n for n in range(12, 32)}
    image = {"id": 32, "content": "<image>", "special": special, "normalized": False}
    said["added_tokens"] = [image | {"single_word": False, "lstrip": False, "rstrip": False}]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    made = Tokenizer.of(["go"], 512, "auto", config_of(folder).text_source)
    spec = replace(SPEC, vocab_size=made.vocab_size)
    if special:
        assert spec.vocab_size == 32 and int(made.encode(["go <image>"])[0].max()) < 32
        assert Tokenizer.from_json(made.to_json()).vocab_size == 32
        assert config_of(folder).build(spec).spec.vocab_size == 32
    else:
        with pytest.raises(UserError, match=r"has 33 tokens, its language model embeds 32"):
            config_of(folder).build(spec)
    rows = json.loads((folder / "config.json").read_text())
    rows["text_config"]["vocab_size"] = 40  # as ever where it has one: the words of actions stay
    source = config_of(folder, architecture=rows).text_source
    assert Tokenizer.of(["go"], 512, "auto", source).vocab_size == 33


def test_more_tokens_than_a_sliding_window_are_refused(home: Home) -> None:
    said = json.loads((home[0] / "paligemma2" / "config.json").read_text())
    for window, fits in ((100, True), (8, False)):
        said["text_config"]["sliding_window"] = window
        model = config_of(home[0] / "paligemma2", architecture=said).build(SPEC)
        if fits:
            assert features(model).readout.shape[0] == 3
            continue
        with pytest.raises(UserError, match=r"model\.vlm: a token sees 8 in blocks(.*\n)+  found: \d\d\n"):
            features(model)


def test_the_hash_is_that_of_the_file_which_is_read(home: Home, tmp_path: Path) -> None:
    """Where one file stands beside the pieces of a sharded one, transformers reads the one."""
    folder = shutil.copytree(home[0] / "smolvlm", tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(one) for name, one in tensors.items()}, folder / "model-1.safetensors")
    table = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    one = pretrained_parts(loaded(config_of(folder)))["vision"].tower.loaded
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert one is not None and one.sha256 == expected


def test_parts_beside_a_vlm_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vision\.kind is vit, but model\.vlm is given"):
        ModelConfig.model_validate({"vlm": {"path": tmp_path}, "vision": {"kind": "vit"}})
    with pytest.raises(ValueError, match=r"fusion\.kind is vlm, but there is no model\.vlm"):
        ModelConfig.model_validate({"fusion": {"kind": "vlm"}})
    with_dropout = ModelConfig.model_validate({"vlm": {"path": tmp_path}, "fusion": {"state_dropout": 0.5}})
    assert with_dropout.fusion.state_dropout == 0.5
    assert ModelConfig.model_validate(with_dropout.model_dump(mode="json")) == with_dropout


def test_sizes_alone_are_enough_for_a_plan(home: Home) -> None:
    """Nothing looks at values, in a forward or a backward pass."""
    for kind in KINDS:
        with FakeTensorMode():
            model = config_of(home[0] / kind).build(SPEC)
            model(blank_observation(SPEC, torch.device("cpu"))).readout.sum().backward()
            assert model.fusion.readout.grad is not None and model.fusion.width == 16  # pyright: ignore


# --- the decoder that reads every layer


FLOW = {"kind": "flow", "width": 12, "depth": 3, "heads": 3, "cross_attention": "layers"}


def action_gradients(home: Home, stop: tuple[Any, ...]) -> tuple[float, dict[str, float]]:
    """The flow's loss and, by part, the length of its gradient; its gates do not begin at 0 here."""
    model = loaded(config_of(home[0] / "smolvlm", FLOW))
    with torch.no_grad():
        for block in model.action.denoiser.trunk.blocks:  # pyright: ignore
            block.modulation.weight.normal_(std=0.3)
    batch = replace(small_model.batch_of(torch.randn(3, 5, 3), spec=SPEC), observation=SEEN)
    torch.manual_seed(1)
    loss = model.action(stopped(model(SEEN), stop), batch).mean()
    loss.backward()
    lengths = {
        name: sum(float(p.grad.square().sum()) for p in part.parameters() if p.grad is not None) ** 0.5
        for name, part in model.named_children()
    }
    return loss.item(), lengths


def test_knowledge_insulation_leaves_exactly_no_gradient_in_the_vlm(home: Home) -> None:
    free, moved = action_gradients(home, ())
    same, insulated = action_gradients(home, ("fused",))
    assert same == free and all(length > 1e-3 for length in moved.values())
    assert insulated == {"vision": 0.0, "language": 0.0, "fusion": 0.0, "action": moved["action"]}


def test_each_block_of_the_decoder_reads_the_layer_of_its_depth(home: Home) -> None:
    model = loaded(config_of(home[0] / "smolvlm", FLOW))
    found = features(model)
    conditioning: Any = model.action.conditioning
    before = conditioning(found)
    reads: list[list[int]] = []
    for number, layer in enumerate(found.layers):
        other = replace(layer, values=layer.values + torch.randn_like(layer.values))
        layers = (*found.layers[:number], other, *found.layers[number + 1 :])
        after = conditioning(replace(found, layers=layers))
        reads.append(
            [n for n in range(3) if not after.memories[n].keys.equal(before.memories[n].keys)]  # pyright: ignore
        )
    assert reads == [[], [0], [1], [2]]  # three blocks, four layers
    # A masked token is no part of the memory: a text's padding, a view that is absent.
    mask = before.memories[0].mask
    assert mask is not None and mask[:, 0, 0, 1:].equal(found.layers[0].mask) and bool(mask[:, 0, 0, 0].all())
    with pytest.raises(
        ValueError, match=r"cross_attention is layers, those of model\.vlm, and there is none"
    ):
        ModelConfig.model_validate({"action": FLOW})


@pytest.mark.parametrize("kind", ["paligemma", "smolvlm"])
def test_the_language_model_writes_as_transformers_own(home: Home, kind: str) -> None:
    """An answer of four tokens behind a text, the text seen both ways by PaliGemma: its own logits, to 1e-5,
    or SmolVLM's, whose output layer is a matrix of its own."""
    whole = tf.AutoModelForImageTextToText.from_pretrained(home[0] / kind).eval()
    own = {"mask": "causal", "output_layer": True} if kind == "smolvlm" else {}
    model = loaded(config_of(home[0] / kind, **own))
    model.language.require_writer("objective.answer")
    text, answer = SEEN.text[:1, :3], torch.tensor([[7, 5, 9, 3]])
    ids = torch.cat([torch.tensor([[2]]), text, answer], dim=1)
    kinds = torch.tensor([[0] * 4 + [1] * 4])
    named = {"token_type_ids": kinds} if kind == "paligemma" else {}
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=torch.ones_like(ids), **named).logits
        first = model.language(ids[:, :1], torch.ones(1, 1, dtype=torch.bool))
        there = torch.ones(1, 5, dtype=torch.bool)
        there[:, 3:] = False  # padding of the text, which leaves no gap
        padded = torch.cat([text, text[:, :2]], dim=1)
        found = model.language.write(first, padded, there, answer, torch.ones_like(answer, dtype=torch.bool))
    torch.testing.assert_close(found, expected[:, 3:7], atol=1e-5, rtol=1e-5)
    # Beside an insulated action this is what teaches the VLM.
    batch = replace(small_model.batch_of(torch.randn(3, 5, 3), spec=SPEC), observation=SEEN)
    batch = replace(batch, answer=answer.expand(3, 4), answer_mask=torch.ones(3, 4, dtype=torch.bool))
    term = NextTokenConfig().build(model, "answer")
    term(model(SEEN), batch, model).value.backward()
    for part in (model.vision, model.language, model.fusion):
        assert sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None) > 1e-3
    if own:
        head: Any = model.language.tower.network.get_submodule("lm_head")  # pyright: ignore
        assert head.weight.grad.any() and not head.weight.equal(model.language.embedding.weight)  # pyright: ignore
        told = [part.tower.loaded for part in pretrained_parts(model).values()]
        assert all(one and not one.unread for one in told)
        frozen = loaded(config_of(home[0] / kind, **own, learn="none"))
        assert not frozen.language.state_dict() and not any(
            p.requires_grad for p in frozen.language.parameters()
        )
    for other, keys, wrong in (
        ("smolvlm", {}, "has an output layer of its own"),
        ("paligemma", {"layers": 2}, "is cut behind an earlier block"),
    ):
        with pytest.raises(UserError, match=f"objective.answer lets the language model write, .* {wrong}"):
            config_of(home[0] / other, **keys).build(SPEC).language.require_writer("objective.answer")


WORDS: dict[str, Any] = {"kind": "fast", "writer": "vlm", "vocabulary_size": 14, "skip": 3, "scale": 2.0}


@pytest.mark.parametrize("kind", ["paligemma", "smolvlm"])
def test_actions_are_words_of_the_vlm_in_one_sequence_with_pictures_and_text(home: Home, kind: str) -> None:
    """pi0-FAST's layout: error and greedy chunk are those of the VLM's own logits, row by row."""
    whole = tf.AutoModelForImageTextToText.from_pretrained(home[0] / kind).eval()
    model = loaded(config_of(home[0] / kind, WORDS, output_layer=True))
    batch = small_model.batch_of(0.5 * torch.randn(3, 5, 3), spec=SPEC)
    seen = replace(SEEN, image_mask=torch.tensor([[True, True], [True, True], [False, True]]))
    batch = replace(batch, observation=seen)
    fast: Any = model.action
    fast.fit(batch.actions, batch.action_mask)
    (tokens, lengths), spelled = fast.tokens.encode(batch.actions), fast.tokens.lengths()
    found = model(seen)
    table: Any = whole.get_input_embeddings()

    def behind(row: int, known: list[int]) -> torch.Tensor:
        """PaliGemma's logits of each token behind those that are known; word k from the end stands for k."""
        pictures = found.vision.values[row, found.vision.mask[row]]
        text = table(seen.text[row, seen.text_mask[row]])
        begin = fast.begin(found.readout[row])[None]
        said = table(torch.tensor([SPEC.vocab_size - 1 - 3 - k for k in known], dtype=torch.long))
        x, given = torch.cat([pictures, text, begin, said])[None], len(pictures) + len(text)
        place = torch.arange(x.shape[1])
        sees = (place <= place[:, None]) | (place < given)
        inner = whole.model.language_model if kind == "paligemma" else whole.model.text_model
        named = {"attention_mask": sees[None, None], "position_ids": place[None] + (kind == "paligemma")}
        hidden = inner(inputs_embeds=x, **named).last_hidden_state
        logits = whole.lm_head(hidden[0, -1])
        return logits[[SPEC.vocab_size - 1 - 3 - k for k in range(14)]]

    expected: list[torch.Tensor] = []
    with torch.no_grad():
        for row, length in enumerate(lengths.tolist()):
            ids, lacking, errors = tokens[row, :length].tolist(), 15, []
            for place, token in enumerate(ids):
                logits = behind(row, ids[:place]).masked_fill(spelled > lacking, -torch.inf)
                errors.append(-logits.log_softmax(-1)[token])
                lacking -= int(spelled[token])
            expected.append(torch.stack(errors).mean())
            written, lacking = list[int](), 15
            while lacking and len(written) < int(fast.tokens.longest):
                logits = behind(row, written).masked_fill(spelled > lacking, -torch.inf)
                written.append(int(logits.argmax()))
                lacking -= int(spelled[written[-1]])
            mine = fast.written(found)[row]
            assert mine[mine >= 0].tolist() == written
    error = fast(found, batch)
    torch.testing.assert_close(error[:, 0, 0], torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert model.predict(seen).shape == (3, 5, 3)
    before = error.mean()
    before.backward()
    for part in (model.vision, model.language, model.fusion):
        assert sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None) > 1e-3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        error = fast(model(seen), batch).mean()
        error.backward()
        optimizer.step()
    assert error < 0.5 * before


def test_a_language_model_that_cannot_write_actions_is_refused(home: Home) -> None:
    for kind, action, wrong in (
        ("smolvlm", WORDS, "model.action.writer lets the language model write, .* output layer of its own"),
        (
            "paligemma",
            WORDS | {"vocabulary_size": 18},
            "vocabulary_size is 18, .* 20 tokens, of which the last 3",
        ),
    ):
        with pytest.raises(UserError, match=wrong):
            config_of(home[0] / kind, action).build(SPEC)
    tied = json.loads((home[0] / "qwen3_vl" / "config.json").read_text()) | {"tie_word_embeddings": True}
    with pytest.raises(UserError, match="a qwen3_vl write actions, whose pictures have places in a grid"):
        config_of(home[0] / "qwen3_vl", WORDS, architecture=tied).build(SPEC)
    with pytest.raises(UserError, match=r"model\.action\.writer is vlm, but there is no model\.vlm"):
        ModelConfig.model_validate({"action": WORDS}).build(SPEC)


@pytest.mark.parametrize(
    ("recipe", "kind", "tokens"),
    [
        ("smolvla", "smolvlm", 4),
        ("pi0", "paligemma", 16),
        ("pi0-fast", "paligemma", 16),
        ("openvla-oft", "paligemma", 16),
        ("flower", "smolvlm", 4),
    ],
)
def test_recipes_are_configs_that_build(home: Home, recipe: str, kind: str, tokens: int) -> None:
    """With tiny stand-ins for their backbones and experts."""
    small = {"vlm.path": home[0] / kind, "vlm.layers": 4}
    if recipe in ("smolvla", "pi0-fast", "flower"):
        small |= {"action.width": 32, "action.depth": 4, "action.heads": 4}
    if recipe == "pi0-fast":  # the stand-in has few words
        small = small | {"action.vocabulary_size": 10, "action.skip": 1}
    overrides = [f"model.{key}={value}" for key, value in small.items()]
    config = load_config(CONFIGS / f"{recipe}-like.yaml", overrides)
    described = describe_model(config)
    assert {row.tokens for row in described.tokens if row.name.startswith("vision")} == {tokens}
    assert config.data.pixels == SIZE and list(config.objective.terms()) == ["action"]

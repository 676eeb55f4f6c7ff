"""The next-token term: its value is transformers' own and that of a plain reckoning; nothing of it leaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.small_model import MODEL
from fixtures.term_batches import SPEC, make_batch, make_loss, make_model
from fixtures.towers import READ, save_tokenizer, save_tower, tf
from fixtures.vlms import save_vlm
from tutti.data.tokenize import Tokenizer
from tutti.models.config import ModelConfig, load_towers
from tutti.models.interfaces import LanguageEncoder
from tutti.models.layers import blocks_of
from tutti.models.vla import VLA
from tutti.nested_dicts import merge
from tutti.objectives.terms import NextTokenTerm
from tutti.types import Batch, Tokens, UserError

GROUPED = {**READ, "num_key_value_heads": 1, "head_dim": 8}


def decoder(folder: Path, kind: str) -> Any:
    """A tiny random decoder with tied embeddings but of Mistral, saved and as transformers loads it."""
    torch.manual_seed(5)
    config = {
        "llama": lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
        "mistral": lambda: tf.MistralConfig(**GROUPED, tie_word_embeddings=False),
        "gemma2": lambda: tf.Gemma2Config(**GROUPED, final_logit_softcapping=0.5),
        "qwen3": lambda: tf.Qwen3Config(**GROUPED, tie_word_embeddings=True),
    }[kind]()
    made = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        made.get_input_embeddings().weight.mul_(20)  # else all words are alike
    made.save_pretrained(folder)
    save_tokenizer(folder)
    return made


def with_tower(folder: Path, **keys: Any) -> VLA:
    tower = {"kind": "pretrained", "path": folder, "num_tokens": 2, "heads": 2, **keys}
    torch.manual_seed(1)
    model = ModelConfig.model_validate(merge(MODEL, {"language": tower})).build(SPEC)
    load_towers(model)
    return model.eval()


def term_of(model: VLA, **keys: Any) -> NextTokenTerm:
    term = make_loss(model, answer={"kind": "next_token", "weight": 1.0, **keys}).terms["answer"].eval()
    assert isinstance(term, NextTokenTerm)
    return term


def parts(model: VLA, term: NextTokenTerm, batch: Batch, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one row the begin with the picture's tokens, the ids of the text, those of the answer, unpadded."""
    seen, answer, mask = model(batch.observation).fused_vision, batch.answer, batch.answer_mask
    assert answer is not None and mask is not None
    picture = term.prefix(seen.values[row][seen.mask[row]])
    text = batch.observation.text[row][batch.observation.text_mask[row]]
    return torch.cat([term.begin[None], picture]), text, answer[row][mask[row]]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "mistral"])
def test_the_value_is_that_of_transformers(tmp_path: Path, kind: str) -> None:
    whole, batch = decoder(tmp_path, kind), make_batch()
    model = with_tower(tmp_path, output_layer=True)
    term = term_of(model)
    total, count, right = torch.zeros(()), 0, 0
    with torch.no_grad():
        for row in range(len(batch.window)):
            before, text, said = parts(model, term, batch, row)
            embedded = whole.get_input_embeddings()(torch.cat([text, said]))
            labels = torch.cat([torch.full((len(before) + len(text),), -100), said])
            if len(said):
                given = torch.cat([before, embedded])[None]
                found = whole(inputs_embeds=given, labels=labels[None])
                total, count = total + found.loss * len(said), count + len(said)
                right += int((found.logits[0, -len(said) - 1 : -1].argmax(-1) == said).sum())
        value = term(model(batch.observation), batch, model)
    assert count == 11
    assert value.value.item() == pytest.approx((total / count).item(), abs=1e-6)
    assert value.metrics["answer/accuracy"].item() == pytest.approx(right / count)


def test_the_value_is_that_of_a_plain_reckoning() -> None:
    """Tutti's own encoder: what is given sees all that is given, a word of the answer what stands before."""
    model, batch = make_model().double().eval(), make_batch()
    term = term_of(model).double()
    language: Any = model.language
    batch = batch.apply(lambda one: one.double() if one.is_floating_point() else one)
    errors: list[Tensor] = []
    with torch.no_grad():
        for row in range(len(batch.window)):
            before, text, said = parts(model, term, batch, row)
            ids = torch.cat([text, said])
            positions = language.position[: len(ids)]
            positions = torch.cat(
                [positions, positions.new_zeros(len(ids) - len(positions), model.language.width)]
            )
            x = torch.cat([before, language.token(ids) + positions])[None]
            given = len(before) + len(text)
            seen = torch.tensor(
                [[key < given or key <= at for key in range(x.shape[1])] for at in range(x.shape[1])]
            )
            for block in language.blocks:
                x = block(x, seen[None, None])
            logits = language.norm(x[0]) @ language.token.weight.T
            for place, word in enumerate(said.tolist()):
                errors.append(-logits[given + place - 1].log_softmax(-1)[word])
        value = term(model(batch.observation), batch, model)
    assert len(errors) == 11
    torch.testing.assert_close(value.value, torch.stack(errors).mean(), rtol=1e-10, atol=0)


def test_no_answer_leaks_into_features_or_an_earlier_word() -> None:
    model, batch = make_model().eval(), make_batch()
    term, ids = term_of(model), batch.answer
    assert ids is not None
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SPEC.vocab_size
    with torch.no_grad():
        features = model(batch.observation)
        some = (batch, replace(batch, answer=changed))
        one, two = (term._errors(features.fused_vision, each, model)[0] for each in some)
    assert one[1, :4].equal(two[1, :4]) and not one[1, 4].equal(two[1, 4])


def test_a_frozen_decoder_passes_the_gradient_on(tmp_path: Path) -> None:
    decoder(tmp_path, "llama")
    model, batch = with_tower(tmp_path, learn="none"), make_batch()
    term = term_of(model)
    term(model(batch.observation), batch, model).value.backward()
    moved = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert moved == {"vision", "fusion", "language"}  # of language the pooling, by way of the fusion
    assert not any(p.grad is not None for p in model.language.tower.parameters())  # pyright: ignore


def writers(folder: Path) -> dict[str, VLA]:
    """Tutti's own encoder, a pre-trained decoder, and a whole VLM."""
    decoder(folder / "llama", "llama")
    save_vlm(folder / "vlm", "paligemma")
    torch.manual_seed(1)
    keys = {"path": folder / "vlm", "interpolate": True}
    vlm = ModelConfig.model_validate({"vlm": keys, "action": MODEL["action"]}).build(SPEC)
    load_towers(vlm)
    return {"own": make_model(), "llama": with_tower(folder / "llama"), "vlm": vlm.eval()}


def test_a_batch_without_answers_is_worth_nothing(tmp_path: Path) -> None:
    """A micro-batch may have none; networks of others take no batch of 0 rows."""
    for model in writers(tmp_path).values():
        batch = make_batch()
        assert batch.answer_mask is not None
        batch = replace(batch, answer_mask=torch.zeros_like(batch.answer_mask))
        value = term_of(model)(model(batch.observation), batch, model).value
        value.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert value.item() == 0 and found and not any(bool(grad.any()) for grad in found)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["language"], {"vision", "language", "fusion"}),
        (["fused"], {"language"}),
        (["language", "fused"], set()),
    ],
)
def test_what_stops_holds_the_writer_also_where_blocks_are_recomputed(
    tmp_path: Path, stop: list[str], expected: set[str]
) -> None:
    for name, model in writers(tmp_path).items():
        batch, found = make_batch(), list[dict[str, Tensor]]()
        for again in (False, True):
            for block in blocks_of(model):
                block.recompute = again
            torch.manual_seed(2)
            term_of(model, stop_gradient=stop)(model(batch.observation), batch, model).value.backward()
            found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
            assert all(block.recompute is again for block in blocks_of(model))
        assert found[0].keys() == found[1].keys()
        assert all(grad.equal(found[1][key]) for key, grad in found[0].items())
        moved = {key.split(".")[0] for key, grad in found[0].items() if grad.any()}
        # What the fusion gives has read the text, too.
        moved = {key.split(".")[0] for key, grad in found[0].items() if grad.any()}
        assert moved == expected, name


def test_an_encoder_that_cannot_write_is_refused(tmp_path: Path) -> None:
    for name, keys, why in (
        ("bert", {}, "bert of .* is no decoder"),
        ("llama", {}, "llama of .* has an output layer of its own"),
        ("gemma", {"layer": -2}, "is cut behind an earlier layer"),
        ("bert", {"output_layer": True}, ""),
    ):
        save_tower(tmp_path / name, name)
        said = rf"objective\.answer lets the language encoder write.*{why}" if why else "bert writes no texts"
        with pytest.raises(UserError, match=said):
            term_of(with_tower(tmp_path / name, **keys))
    model = make_model()
    with pytest.raises(UserError, match=r"needs answers.*data\.sources\.answer"):
        batch = replace(make_batch(), answer=None)
        term_of(model)(model(batch.observation), batch, model)


def test_answers_end(tmp_path: Path) -> None:
    made = Tokenizer.fit(["what is it", "a red cup"])
    ids, mask = made.encode_answers(["a red cup", "", "A  RED"])
    assert (
        mask.sum(dim=1).tolist() == [4, 0, 3] and ids[0, 3] == ids[2, 2] == 0 and ids[0, :2].equal(ids[2, :2])
    )
    save_tokenizer(tmp_path)
    tower = Tokenizer.from_folder(tmp_path, ["go to"], around=("in: ", ""), end=3)
    assert tower.encode_answers(["go to the"])[0][0, :4].tolist() == [4, 5, 6, 3]
    assert Tokenizer.from_json(tower.to_json()).encode_answers(["go"])[0][0, :2].tolist() == [4, 3]


def test_an_encoder_that_does_not_write_says_so_when_it_is_called() -> None:
    class Deaf(LanguageEncoder):
        def forward(self, text: Tensor, text_mask: Tensor) -> Any: ...

    nothing = torch.zeros(1, 1, dtype=torch.int64)
    before = Tokens(values=torch.zeros(1, 1, 4), mask=torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(UserError, match="lets the language encoder write, which Deaf does not"):
        Deaf().write(before, nothing, nothing.bool(), nothing, nothing.bool())

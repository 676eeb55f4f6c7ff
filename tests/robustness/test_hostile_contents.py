"""What a stranger's files say is believed within bounds: no bomb fills the memory, no giant is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fixtures import hostile
from fixtures.hostile import WEIGHT_FILES, Stranger, edit_json, put


@pytest.mark.parametrize("form", list(hostile.YAML))
def test_a_bomb_in_a_config_is_refused(stranger: Stranger, form: str) -> None:
    text = hostile.YAML[form].encode()
    put(stranger.checkpoint, "config.yaml", text)
    assert "config.yaml" in stranger.load()
    if form not in ("laughs", "loop", "deep", "escapes", "controls", "list"):
        return  # the same function reads both files
    (stranger.run / "config.yaml").write_bytes(text)
    said = stranger.refused("probe", stranger.run)
    assert "config.yaml" in said and "\x1b" not in said


@pytest.mark.parametrize("name", ["spec.json", "normalizer.json", "tokenizer.json"])
@pytest.mark.parametrize("form", list(hostile.JSON))
def test_a_bomb_in_a_text_of_a_checkpoint_is_refused(stranger: Stranger, name: str, form: str) -> None:
    put(stranger.checkpoint, name, hostile.JSON[form])
    assert name in stranger.load()


@pytest.mark.parametrize("form", list(hostile.JSON))
def test_a_bomb_in_the_books_is_refused(unfinished: Stranger, form: str) -> None:
    run = unfinished.run
    (run / "checkpoints" / "best.json").write_bytes(hostile.JSON[form])
    said = unfinished.refused("export", run, "--to", unfinished.out / "x", "--checkpoint", "best")
    assert "best.json" in said
    before = (unfinished.checkpoint / "state.json").read_bytes()
    (unfinished.checkpoint / "state.json").write_bytes(hostile.JSON[form])
    assert "state.json" in unfinished.load()
    if form in ("deep", "nan"):
        assert "state.json" in unfinished.resumed()
    (unfinished.checkpoint / "state.json").write_bytes(before)
    (run / "stages.json").write_bytes(hostile.JSON[form])
    assert "stages.json" in unfinished.refused("probe", run)


@pytest.mark.parametrize("form", list(hostile.WEIGHTS))
def test_a_bomb_in_a_file_of_weights_is_refused(unfinished: Stranger, form: str) -> None:
    for name in WEIGHT_FILES:
        put(unfinished.checkpoint, name, hostile.WEIGHTS[form])
    assert "safetensors" in unfinished.load() or "weights" in unfinished.load()
    unfinished.resumed()


SPEC = [
    *((key, value) for key in ("image_size", "state_dim", "action_dim") for value in (10**6, -1, 0, "8")),
    *((key, 10**9) for key in ("horizon", "vocab_size", "text_length")),
    *(("views", ["v"] * 10**5), ("views", []), ("views", "front"), ("views", ["x" * 10**6])),
    *(("embodiments", ["e"] * 10**5), ("embodiments", [1]), ("fps", float("inf")), ("fps", "10")),
    *(("image_size", True), ("image_size", 2**63), ("another", 1)),
]


@pytest.mark.parametrize(("key", "value"), SPEC, ids=lambda one: str(one)[:12])
def test_absurd_sizes_of_the_data_are_refused(stranger: Stranger, key: str, value: Any) -> None:
    edit_json(stranger.checkpoint, "spec.json", lambda spec: spec | {key: value})
    assert "spec.json" in stranger.load()


SIZES: dict[str, Any] = {
    "model.vision.width": 2**20,
    "model.vision.depth": 10**9,
    "model.vision.mlp_ratio": 1e300,
    "model.vision.stem.channels": [2**40, 8],
    "model.language.width": 2**33,
    "model.language.num_tokens": 10**12,
    "model.fusion.depth": 10**6,
    "model.fusion.mlp_ratio": float("inf"),
    "model.action.hidden": 2**31,
    "model.action.depth": 1,
    "model.action flow": {"kind": "flow", "steps": 10**9},
    "model.action diffusion": {"kind": "diffusion", "training_steps": 10**10},
    "model.action fast": {"kind": "fast", "vocabulary_size": 10**10},
    "model.action bins": {"kind": "bins", "bins": 10**10},
}


@pytest.mark.parametrize("key", SIZES)
def test_a_model_of_absurd_size_is_not_built(stranger: Stranger, key: str) -> None:
    stranger.configure(key.split(maxsplit=1)[0], SIZES[key])
    stranger.load()


def tokenizer(change: str, values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with one change."""
    bpe = values["bpe"]
    match change:
        case "length":
            values["text_length"] = 10**12
        case "max_length":
            values["max_length"] = 10**12
        case "padding":
            bpe["padding"] = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
            bpe["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
        case "search":
            pattern = {"Regex": "(a+)+$"}
            bpe["pre_tokenizer"] = {
                "type": "Split",
                "pattern": pattern,
                "behavior": "Isolated",
                "invert": False,
            }
        case "replace":
            bpe["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "x" * 10**6}
        case "precompiled":
            parts = [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}]
            bpe["normalizer"] = {"type": "Sequence", "normalizers": parts}
        case "word_level":
            bpe["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
        case "identity":
            bpe["model"]["vocab"] = {key: 4_000_000_000 + n for n, key in enumerate(bpe["model"]["vocab"])}
        case "merges":
            bpe["model"]["merges"] = [["\u0000", "\u0000"]]
        case "dropout":
            bpe["model"]["dropout"] = 0.5
        case "vocabulary":
            bpe["model"]["vocab"] = {}
        case "bpe":
            values["bpe"] = "x"
    return values


@pytest.mark.parametrize(
    "change",
    [
        *("length", "max_length", "padding", "search", "replace", "precompiled", "word_level", "identity"),
        *("merges", "dropout", "vocabulary", "bpe"),
    ],
)
def test_another_tokenizer_is_refused(stranger: Stranger, change: str) -> None:
    edit_json(stranger.checkpoint, "tokenizer.json", lambda values: tokenizer(change, values))
    assert "tokenizer.json" in stranger.load()


MOMENTS: dict[str, Any] = {
    "list": [[]],
    "text": "x",
    "shape": torch.zeros(3),
    "not finite": torch.tensor(float("nan")),
    "missing": None,
}


@pytest.mark.parametrize("how", MOMENTS)
def test_moments_of_another_form_are_refused(unfinished: Stranger, how: str) -> None:
    """torch takes what it is given, and fails, or divides by it, in the next step."""
    path = unfinished.checkpoint / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    state = saved["adamw"]["state"][2]
    if how == "missing":
        del state["exp_avg_sq"]
    else:
        state["exp_avg_sq"] = MOMENTS[how]
    torch.save(saved, path)
    put(unfinished.checkpoint, path.name, path.read_bytes())
    assert "does not fit" in unfinished.resumed()

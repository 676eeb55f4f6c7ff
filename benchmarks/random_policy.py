"""A small policy with random weights, two views of 96 pixels, and what it may be shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.models.config import ModelConfig
from tutti.storage.manifest import CONFIG, NORMALIZER, SPEC, STATE, TOKENIZER, WEIGHTS, size_of
from tutti.types import DataSpec

TEXT = "open the tap"


def parts() -> tuple[DataSpec, Normalizer, Tokenizer]:
    """Of one robot with a state and an action of 4 numbers, which were noise in its training."""
    tokenizer = Tokenizer.fit([TEXT, "close the tap"], 300)
    spec = DataSpec(
        views=("front", "wrist"),
        image_size=96,
        state_dim=4,
        action_dim=4,
        horizon=8,
        vocab_size=tokenizer.vocab_size,
        text_length=tokenizer.text_length,
        embodiments=("arm",),
        fps=20.0,
    )
    numbers = np.random.default_rng(0).normal(size=(2, 50, 4)).astype(np.float32)
    return spec, Normalizer.fit("quantile", "arm", *numbers), tokenizer


def write_policy(folder: Path, weights: Mapping[str, torch.Tensor], files: Mapping[str, str]) -> Path:
    """A checkpoint with these weights and texts, as `Policy.load` reads it with "raw" weights."""
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS["raw"])
    for name, text in files.items():
        (folder / name).write_text(text)
    listed = {path.name: size_of(path.read_bytes(), "crc32") for path in sorted(folder.iterdir())}
    (folder / STATE).write_text(json.dumps({"step": 1, "files": listed}))
    return folder


def random_policy(folder: Path) -> Path:
    """A checkpoint of the `parts` with random weights, and the model of the configs."""
    spec, normalizer, tokenizer = parts()
    torch.manual_seed(0)
    config = ModelConfig()
    files = {
        SPEC: json.dumps(asdict(spec)),
        NORMALIZER: json.dumps(normalizer.to_dict()),
        TOKENIZER: tokenizer.to_json(),
        CONFIG: json.dumps({"model": config.model_dump(mode="json")}),
    }
    return write_policy(folder, config.build(spec).state_dict(), files)


def observations(spec: DataSpec, count: int) -> list[dict[str, Any]]:
    """Pictures of noise of two sizes, states of noise."""
    numbers, found = np.random.default_rng(1), []
    for place in range(count):
        size = (place % 2 + 1) * spec.image_size
        images = {view: numbers.integers(0, 256, (size, size, 3), dtype=np.uint8) for view in spec.views}
        state = numbers.normal(size=spec.state_dim).astype(np.float32)
        found.append({"images": images, "state": state, "prompt": TEXT})
    return found

"""Reads the files of a checkpoint within bounds, so that a damaged file cannot build an absurd model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError

from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.models.config import CustomDecoderConfig, ModelConfig
from tutti.plugin import Origin, Trust
from tutti.storage import shards
from tutti.storage.find_checkpoint import is_sharded, kept_weights
from tutti.storage.layout import CONFIG, NORMALIZER, SHARDS, SPEC, TOKENIZER, WEIGHTS, Weights
from tutti.storage.manifest import Manifest
from tutti.storage.reading import parse_json, parse_yaml, shown
from tutti.types import DataSpec, UserError

CURE = "The folder is not a whole checkpoint: name another one, or train again."
SIZES = {
    "image_size": 8192,
    "state_dim": 4096,
    "action_dim": 4096,
    "horizon": 4096,
    "vocab_size": 2**20,
    "text_length": 2**16,
}
"""The largest value of each size in spec.json."""
MAX_VIEWS, MAX_EMBODIMENTS, MAX_NAME, MAX_FPS = 64, 1024, 200, 1e6
MAX_BUFFERS = 2**25
"""Numbers in the buffers of a model that are computed and not in its checkpoint."""

MAX_HEADER = 2**24
"""Bytes of the header of a file of weights."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of a checkpoint, by name."""


def read_model(folder: Manifest, weights: Weights, trust: Trust) -> tuple[ModelConfig, DataSpec]:
    """What the model of a checkpoint or an export is made from, found to be that of its weights.

    Raises: UserError if a file is missing, damaged or absurd, or names or sizes differ.
    """
    spec, config = read_spec(folder), read_model_config(folder, trust)
    check_model(config, spec, shapes_of(folder, weights), folder.folder)
    return config, spec


def read_spec(folder: Manifest) -> DataSpec:
    """The content of spec.json. Raises: UserError, naming the key that is not what it must be."""
    path = folder.folder / SPEC
    fields = parse_json(folder.text(path.name), path, finite=True, cure=CURE)
    lists = {"views": MAX_VIEWS, "embodiments": MAX_EMBODIMENTS}
    for key, most in SIZES.items():
        value = fields.get(key)
        if type(value) is not int or not 1 <= value <= most:
            raise _no_spec(path, key, fields, f"a whole number from 1 to {most}")
    for key, most in lists.items():
        names = fields.get(key)
        names = names if isinstance(names, list) and len(names) <= most else []
        if not names or not all(isinstance(name, str) and len(name) <= MAX_NAME for name in names):
            raise _no_spec(path, key, fields, f"1 to {most} names")
    fps = fields.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= MAX_FPS:
        raise _no_spec(path, "fps", fields, "a positive number")
    known = {*SIZES, *lists, "fps"}
    if more := [key for key in fields if key not in known]:
        raise UserError(f"{path}: not the data spec of a checkpoint ({shown(more)} are no keys). {CURE}")
    values: dict[str, Any] = fields | {key: tuple(fields[key]) for key in lists}
    return DataSpec(**values)


def _no_spec(path: Path, key: str, fields: Mapping[str, Any], expected: str) -> UserError:
    found = shown(fields[key]) if key in fields else "nothing"
    return UserError(
        f"{path}: not the data spec of a checkpoint: {key}: expected {expected}, found {found}. {CURE}"
    )


def read_model_config(folder: Manifest, trust: Trust) -> ModelConfig:
    """The section `model` of config.yaml. Raises: UserError; of a class that is not trusted, when built."""
    path = folder.folder / CONFIG
    values = parse_yaml(folder.text(path.name), path)
    try:
        return ModelConfig.model_validate(values["model"], context=Origin(path, trust))
    except (ValidationError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: its section `model` cannot be read ({error}). The checkpoint is of another version of "
            "Tutti, or the file was changed."
        ) from error


def read_normalizer(folder: Manifest, spec: DataSpec) -> Normalizer:
    """The content of normalizer.json. Raises: UserError, also if it is not that of `spec`."""
    path = folder.folder / NORMALIZER
    values = parse_json(folder.text(path.name), path, cure=CURE)
    try:
        normalizer = Normalizer.from_dict(values)
        for name in spec.embodiments:
            normalizer.check(name, spec.state_dim, spec.action_dim)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        said = shown(str(error), 300, quoted=False)
        raise UserError(f"{path}: cannot be used ({said}). {CURE}") from error
    return normalizer


def read_tokenizer(folder: Manifest, spec: DataSpec) -> Tokenizer:
    """The content of tokenizer.json. Raises: UserError, also if it is not that of `spec`."""
    path = folder.folder / TOKENIZER
    text = folder.text(path.name)
    try:
        tokenizer = Tokenizer.from_json(text)
    except UserError as error:
        raise UserError(f"{path}: cannot be used ({error}) {CURE}") from error
    found = (tokenizer.vocab_size, tokenizer.text_length)
    if found != (spec.vocab_size, spec.text_length):
        raise UserError(
            f"{path}: expected {spec.vocab_size} ids and a text_length of {spec.text_length}, as spec.json "
            f"says, found {found[0]} and {found[1]}. {CURE}"
        )
    return tokenizer


def check_model(config: ModelConfig, spec: DataSpec, shapes: Shapes, folder: Path) -> None:
    """Whether these are the weights of this model, before there is room for either.

    A model with an action decoder of the user's own is not looked at: its code is trusted by then.

    Raises: UserError if names or sizes differ, or the model would be larger than its weights say.
    """
    if isinstance(config.action, CustomDecoderConfig):
        return
    blocks = _depths(config.model_dump(mode="json"))
    if blocks > len(shapes):
        raise UserError(
            f"{folder}: these weights are of another model: config.yaml asks for {blocks} blocks, and there "
            f"are {len(shapes)} tensors. {CURE}"
        )
    try:
        with torch.device("meta"):
            model = config.build(spec)
            weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        model.load_state_dict(weights, strict=True)
    except UserError:
        raise
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:  # sizes that differ, or overflow
        raise another_model(folder, error) from error
    computed = sum(one.numel() for name, one in model.named_buffers() if name not in weights)
    if computed > MAX_BUFFERS:
        raise UserError(
            f"{folder}: the model of config.yaml and spec.json computes tables of {computed:,} numbers; "
            f"expected at most {MAX_BUFFERS:,}. {CURE}"
        )


def another_model(folder: Path, error: Exception) -> UserError:
    """What torch said of weights that do not fit."""
    first = "\n".join(line[:300] for line in str(error).splitlines()[:6])
    return UserError(f"{folder}: these weights are of another model.\n{first}\n{CURE}")


def shapes_of(folder: Manifest, weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights, by the index of the shards or the header of the file; no weight is read.

    Raises: UserError if they are missing or damaged.
    """
    file = WEIGHTS[kept_weights(folder, weights)]
    if is_sharded(folder):
        start = f"{Path(file).stem}/"
        entries = shards.index_of(folder.folder / SHARDS)
        return {name.removeprefix(start): e.shape for name, e in entries.items() if name.startswith(start)}
    with folder.opened(file) as content:
        return _header_shapes(content, folder.folder / file)


def _header_shapes(file: BinaryIO, path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in the header of a file of safetensors.

    Raises: UserError if it is none, or holds more or less than its header says.
    """
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER, size):
        raise UserError(f"{path}: these weights are damaged (a header of {length:,} bytes). {CURE}")
    header = file.read(length)
    try:
        entries = parse_json(header.decode("utf-8", errors="replace"), "its header")
    except UserError as error:
        raise UserError(f"{path}: these weights are damaged ({error}). {CURE}") from error
    entries.pop("__metadata__", None)
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for name, entry in entries.items():
            shape, (start, end) = entry["shape"], entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or math.prod(shape) > end:
                raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
            shapes[name] = tuple(shape)
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        if max(ends, default=0) != size - len(header) - 8:
            raise ValueError("its length is not that of its tensors")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: these weights are damaged ({shown(str(error), 300)}). {CURE}") from error
    return shapes


def _depths(values: Any) -> int:
    """The number of blocks in a config."""
    if not isinstance(values, Mapping):
        return 0
    depth = values.get("depth", 0)
    return (depth if isinstance(depth, int) else 0) + sum(map(_depths, values.values()))

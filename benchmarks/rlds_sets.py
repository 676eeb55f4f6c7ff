"""Writes RLDS sets as TFDS lays them out, version folders of tfrecord files, for tests and benchmarks."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tutti.data.formats.rlds.example import messages
from tutti.data.formats.rlds.records import masked_crc32c

CORE = "tensorflow_datasets.core.features."
TEXT = {"pythonClassName": f"{CORE}text_feature.Text", "text": {}}
Values = np.ndarray | Sequence[bytes] | None
"""What a key of an Example holds: floats, integers, bytes; None for a feature without a value."""


def tensor(*shape: int, dtype: str = "float32", encoding: str = "none", **more: Any) -> dict[str, Any]:
    """The node of an array in features.json."""
    body = {"shape": {"dimensions": [str(one) for one in shape]}, "dtype": dtype, "encoding": encoding}
    return {"pythonClassName": f"{CORE}tensor_feature.Tensor", "tensor": {**body, **more}}


def image(*shape: int, dtype: str = "uint8") -> dict[str, Any]:
    """The node of pictures."""
    body = {"shape": {"dimensions": [str(one) for one in shape]}, "dtype": dtype}
    return {"pythonClassName": f"{CORE}image_feature.Image", "image": body}


def sequence(inner: Mapping[str, Any], class_name: str = "sequence_feature.Sequence") -> dict[str, Any]:
    """The node of a list."""
    return {"pythonClassName": CORE + class_name, "sequence": {"feature": inner, "length": "-1"}}


def dictionary(features: Mapping[str, Any]) -> dict[str, Any]:
    """The node of named features."""
    return {
        "pythonClassName": f"{CORE}features_dict.FeaturesDict",
        "featuresDict": {"features": dict(features)},
    }


def episodes_of(steps: Mapping[str, Any], **outside: Any) -> dict[str, Any]:
    """features.json of an RLDS set: the features of a step by keys with "/", and those `outside` of steps."""
    flags = {name: tensor(dtype="bool") for name in ("is_first", "is_last", "is_terminal")}
    tree: dict[str, Any] = {}
    for key, node in (flags | dict(steps)).items():
        folder, _, name = key.partition("/")
        if name:
            tree.setdefault(folder, {})[name] = node
        else:
            tree[key] = node
    nodes = {key: node if "pythonClassName" in node else dictionary(node) for key, node in tree.items()}
    return dictionary({"steps": sequence(dictionary(nodes), "dataset_feature.Dataset"), **outside})


def feature(values: Values) -> bytes:
    """A Feature's bytes."""
    made: Any = messages()[1]()
    if isinstance(values, np.ndarray):
        name = "float_list" if values.dtype.kind == "f" else "int64_list"
        getattr(made, name).value.extend(values.ravel().tolist())
        getattr(made, name).SetInParent()
    elif values is not None:
        made.bytes_list.value.extend(values)
        made.bytes_list.SetInParent()
    return made.SerializeToString()


def flags_of(count: int) -> dict[str, Values]:
    """The flags of an episode of `count` steps."""
    place = np.arange(count)
    last = (place == count - 1).astype(np.int64)
    return {
        "steps/is_first": (place == 0).astype(np.int64),
        "steps/is_last": last,
        "steps/is_terminal": last,
    }


def example(values: Mapping[str, Values]) -> bytes:
    """A record's bytes."""
    made: Any = messages()[0]()
    for key, one in values.items():
        made.features.feature.add(key=key.encode(), value=feature(one))
    return made.SerializeToString()


def framed(content: bytes) -> bytes:
    """A record as it lies in a TFRecord file."""
    length = len(content).to_bytes(8, "little")
    sums = [masked_crc32c(part).to_bytes(4, "little") for part in (length, content)]
    return length + sums[0] + content + sums[1]


def write_set(
    folder: Path,
    name: str,
    features: Mapping[str, Any],
    records: Mapping[str, Sequence[Iterable[bytes]]],
    **info: Any,
) -> Path:
    """Writes records, by split and shard, into a version folder, and gives it."""
    folder.mkdir(parents=True, exist_ok=True)
    described: list[dict[str, Any]] = []
    for split, parts in records.items():
        lengths: list[str] = []
        for number, part in enumerate(parts):
            path = folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(parts):05d}"
            with path.open("wb") as file:
                lengths.append(str(sum(file.write(framed(one)) > 0 for one in part)))
        described.append({"name": split, "shardLengths": lengths})
    values = {"name": name, "version": "1.0.0", "splits": described, **info}
    (folder / "dataset_info.json").write_text(json.dumps(values))
    (folder / "features.json").write_text(json.dumps(features))
    return folder


def encoded(picture: np.ndarray, format_: str = "PNG") -> bytes:
    """A picture as a file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=format_)
    return buffer.getvalue()

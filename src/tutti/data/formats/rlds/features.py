"""features.json of a TFDS version folder: its features as a flat table of keys and how each is stored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tutti.data.formats.errors import COPY_AGAIN, data_error
from tutti.data.formats.interface import MAX_DIM, MAX_EDGE
from tutti.errors import UserError
from tutti.storage.reading import read_json, read_text, shown

STEPS = "steps/"
CLOCKS = ("is_first", "is_last", "is_terminal")
"""Features of which each step has one value: the first that is there tells how many steps there are."""
_DEPTH = 12
_INTEGERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
_FLOATS = ("float16", "float32", "float64")
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in (*_INTEGERS, *_FLOATS)}
_KINDS = {
    **{"FeaturesDict": "featuresDict", "Sequence": "sequence", "Dataset": "sequence", "Text": "text"},
    **{"Tensor": "tensor", "Scalar": "tensor", "Image": "image", "ClassLabel": "classLabel"},
}
"""What a class is called where a node holds it, in files that name only the class."""


class _PassedOver(Exception):
    """Why a feature cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a feature is stored: `key` in the Example, in a list for all steps or, outside of them, one value.

    `storage`: numbers in the list; "bytes" or "zlib", an array each; "file", an encoded picture; "text"; the
    code points of a text; the number of a class with a name. `shape` is (h, w) of a picture, 0 where it is
    not known; else that of an array.
    """

    key: str
    kind: Literal["picture", "vector", "text"]
    storage: Literal["numbers", "bytes", "zlib", "file", "text", "code points", "class"]
    shape: tuple[int, ...] = ()
    dtype: np.dtype = _DTYPES["int64"]
    optional: bool = False
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The key that users give: that of the Example, without "steps/"."""
        return self.key.removeprefix(STEPS)

    @property
    def size(self) -> int:
        """How many numbers one value has."""
        return math.prod(self.shape) * (3 if self.kind == "picture" else 1)

    @property
    def of_steps(self) -> bool:
        """Whether each step has a value of its own."""
        return self.key.startswith(STEPS)


def read_features(folder: Path) -> tuple[dict[str, Stored], str, dict[str, str]]:
    """The features that can be used by their names, the key that counts steps, and why others cannot be used.

    Raises: UserError if features.json is damaged, or describes no episodes of steps.
    """
    path = folder / "features.json"
    root = read_json(path, links=True, cure=f"Cure: {COPY_AGAIN}")
    features: dict[str, Stored] = {}
    passed_over: dict[str, str] = {}
    keys, name = set[str](), ""
    try:
        for key, kind, content, nested in _leaves(root):
            name = key.removeprefix(STEPS)
            if name in keys:
                raise data_error(f"{path}: two features are called {shown(name)}.")
            keys.add(name)
            try:
                if nested:
                    raise _PassedOver("a sequence within a step or outside of the steps")
                features[name] = _stored(folder, key, kind, content)
            except _PassedOver as reason:
                passed_over[name] = str(reason)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as error:
        what = "misses a part" if isinstance(error, KeyError) else "is of another form"
        found = f"{shown(name)}, or the entry after it, {what}" if name else f"an entry that {what}"
        raise data_error(
            f"{path} is damaged.", expected="features as TFDS writes them", found=found
        ) from None
    for clock in CLOCKS:
        stored = features.get(clock)
        if stored is not None and stored.of_steps and stored.storage == "numbers" and stored.size == 1:
            return features, stored.key, passed_over
    found = shown(sorted(keys), 300) if keys else "no feature"
    expected = f"a feature `steps` with {CLOCKS[0]} (RLDS)"
    cure = "Tutti reads robot episodes as RLDS lays them out; other TFDS sets hold none."
    raise data_error(f"{path} describes no episodes.", expected=expected, found=found, cure=cure)


def _content(node: Any) -> tuple[str, Any]:
    """What a node is, and what it says: of today's files, of those that hold JSON as text, of old ones."""
    class_name: str = node.get("pythonClassName", node.get("type", "")).rsplit(".", 1)[-1]
    kind = _KINDS.get(class_name, class_name)
    if "pythonClassName" in node or "type" not in node:
        known = [name for name in (*_KINDS.values(), "jsonFeature", "video") if name in node]
        if known and known[0] != "jsonFeature":
            return known[0], node[known[0]]
        content = json.loads(node["jsonFeature"]["json"]) if known else {}
    else:
        content = node.get("content", {})
        content = json.loads(content) if isinstance(content, str) else content
    if kind == "featuresDict" and not node.get("proto_cls"):
        content = {"features": content}
    return kind, content


def _leaves(node: Any, path: str = "", depth: int = 0, nested: int = 0) -> Iterator[Any]:
    """(key, kind, content, whether it lies in a sequence other than the steps) of each leaf."""
    if depth > _DEPTH:
        raise ValueError(f"nested deeper than {_DEPTH} levels")
    kind, content = _content(node)
    if kind == "featuresDict":
        for name, child in content.get("features", {}).items():
            yield from _leaves(child, f"{path}/{name}" if path else name, depth + 1, nested)
    elif kind == "sequence":
        yield from _leaves(content["feature"], path, depth + 1, nested + (path != STEPS[:-1]))
    else:
        yield path, kind, content, nested


def _dimensions(content: Any) -> tuple[int, ...]:
    """A shape; 0 where a size is not known."""
    shape = content.get("shape") or ()
    many = shape.get("dimensions", ()) if isinstance(shape, dict) else shape
    return tuple(0 if one is None or int(one) < 0 else int(one) for one in many)


def _stored(folder: Path, key: str, kind: str, content: Any) -> Stored:
    shape, optional = _dimensions(content), bool(content.get("optional"))
    dtype, encoding = str(content.get("dtype") or "uint8"), str(content.get("encoding") or "none").lower()
    if kind == "text" or (kind == "tensor" and dtype in ("string", "object") and not shape):
        return Stored(key=key, kind="text", storage="text", optional=optional)
    if kind == "classLabel":
        path = folder / f"{key.replace('/', '-')}.labels.txt"
        classes = tuple(read_text(path).rstrip("\n").split("\n")) if path.is_file() else ()
        storage = "class" if classes else "numbers"
        return Stored(key=key, kind="text" if classes else "vector", storage=storage, classes=classes)
    if kind == "image":
        shape = shape or (0, 0, 3)
        if dtype != "uint8":
            raise _PassedOver(f"depth pictures ({dtype})")
        if len(shape) != 3 or shape[2] not in (0, 3):
            raise _PassedOver("pictures that are not RGB")
        if max(shape[:2]) > MAX_EDGE:
            raise _PassedOver(f"pictures of more than {MAX_EDGE:,} pixels a side")
        return Stored(key=key, kind="picture", storage="file", shape=shape[:2], optional=optional)
    if kind != "tensor" or dtype not in _DTYPES or encoding not in ("none", "bytes", "zlib"):
        raise _PassedOver(f"of a kind that is not read ({shown(f'{kind} {dtype} {encoding}', quoted=False)})")
    if 0 in shape:
        raise _PassedOver("an array of unknown size")
    storage = "numbers" if encoding == "none" else encoding
    if len(shape) == 3 and shape[2] == 3 and dtype == "uint8" and max(shape) <= MAX_EDGE:
        pixels = _DTYPES["uint8"]
        return Stored(
            key=key, kind="picture", storage=storage, shape=shape[:2], dtype=pixels, optional=optional
        )
    last, number = key.rpartition("/")[2], _DTYPES[dtype]
    if "instruction" in last and len(shape) == 1 and dtype.startswith("int") and encoding == "none":
        return Stored(key=key, kind="text", storage="code points", shape=shape, optional=optional)
    if math.prod(shape) > MAX_DIM:
        raise _PassedOver(f"a vector of more than {MAX_DIM:,} numbers")
    return Stored(key=key, kind="vector", storage=storage, shape=shape, dtype=number, optional=optional)

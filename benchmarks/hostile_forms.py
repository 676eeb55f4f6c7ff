"""What a stranger may write into files that Tutti reads: pickles, bombs, and things that are no files."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

DEEP = 100_000
SPARSE = 50 * 2**30


class Evil:
    """Unpickled, it makes a folder: the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def evil_pickle(canary: Path) -> bytes:
    """A plain pickle that makes the canary when it is loaded."""
    return pickle.dumps(Evil(canary), protocol=2)


def evil_archive(canary: Path, *, zipped: bool = True) -> bytes:
    """The same as `torch.save` writes it, today or in its older form."""
    buffer = io.BytesIO()
    torch.save({"state": Evil(canary)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def put(folder: Path, name: str, data: bytes) -> None:
    """Writes a file of a checkpoint and makes the list in state.json fit, as a stranger would."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    state = json.loads((folder / "state.json").read_text())
    state["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "state.json").write_text(json.dumps(state))


def edit_json(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Changes the values of a JSON file of a checkpoint."""
    values = json.loads((folder / name).read_text())
    put(folder, name, json.dumps(change(values) or values).encode())


def edit_yaml(path: Path, keys: str, value: Any) -> None:
    """Sets one key of a config."""
    values = yaml.safe_load(path.read_text())
    place = values
    *above, last = keys.split(".")
    for key in above:
        place = place[key] if isinstance(place.get(key), dict) else place.setdefault(key, {})
    place[last] = value
    path.write_text(yaml.safe_dump(values))


def as_sparse(path: Path) -> None:
    """50 GB that take no space on the disk."""
    with path.open("wb") as file:
        file.truncate(SPARSE)


def as_socket(path: Path) -> None:
    """A socket, bound where its path is short enough for the system, then moved."""
    with TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{folder}/s")
        shutil.move(f"{folder}/s", path)


def in_place(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """What `make` makes stands where the file was."""

    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return replace


SPECIAL: dict[str, Callable[[Path], None]] = {
    "fifo": in_place(os.mkfifo),  # nobody writes to it: whoever opens it waits
    "device": in_place(lambda path: path.symlink_to("/dev/zero")),  # it never ends
    "folder": in_place(Path.mkdir),
    "loop": in_place(lambda path: path.symlink_to(path)),
    "sparse": as_sparse,
    "socket": in_place(as_socket),
}
"""Ways in which something stands in the place of a file that is no plain one, or far too large."""


def as_link_outside(path: Path) -> None:
    """A link to the file itself, which now lies elsewhere."""
    path.symlink_to(path.rename(path.parents[2] / path.name))


YAML = {
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "\n".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "\nmodel: *i\n",
    "loop": "model: &a {x: *a}\n",
    "deep": "model: " + "[" * DEEP,
    "deep_blocks": "model:\n " + "- " * 20_000 + "x\n",
    "digits": "model: {size: " + "9" * 5000 + "}\n",
    "list_as_key": "model: {[1, 2]: 3}\n",
    "map_as_key": "model: {{a: b}: 3}\n",
    "python_tag": "model: !!python/object/apply:os.mkdir [canary]\n",
    "integer_tag": "model: {size: !!int abc}\n",
    "binary_tag": "model: {size: !!binary aGVsbG8=}\n",
    "date": "model: {size: !!timestamp 2024-99-99}\n",
    "twice": "model: {size: tiny, size: small}\n",
    "many": "model: [" + "1," * 20_001 + "]\n",
    "long": "model: " + "x" * 2**20 + "\n",
    "controls": "model: \x00\x01\n",
    "escapes": 'model: {"\\e[2J\\e]0;title\\a": 1}\n',
    "list": "- a\n- b\n",
    "number": "3\n",
    "keys": "model: {" + ", ".join(f"key{number}: 1" for number in range(4000)) + "}\n",
    "long_key": "model: {" + "k" * 100_000 + ": 1}\n",
}
"""Texts that a config.yaml may hold."""

JSON = {
    "empty": b"",
    "torn": b'{"train": {"fini',
    "deep": b"[" * DEEP,
    "deep_objects": b'{"a":' * DEEP,
    "wide": b"[" + b"[]," * 2_000_000 + b"[]]",
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "not_utf8": b'{"step": "\xff\xfe"}',
    "list": b"[1, 2]",
    "null": b"null",
    "nan": b'{"step": NaN, "seconds": Infinity, "scores": NaN}',
}
"""Bytes that a JSON file may hold."""


def header(entries: bytes, length: int | None = None) -> bytes:
    """The beginning of a file of safetensors."""
    return struct.pack("<Q", len(entries) if length is None else length) + entries


def tensor(shape: list[int], size: int) -> bytes:
    """A header with one tensor."""
    return header(
        json.dumps({"position": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    )


WEIGHTS = {
    "longer_than_the_file": header(b"{}", 2**60),
    "deep": header(b'{"a":' * DEEP),
    "empty": b"",
    "no_json": header(b"\xff" * 64),
    "huge_shape": tensor([2**31, 2**31], 16),
    "negative": tensor([-1], 4),
    "many_names": header(
        json.dumps(
            {f"x{n}": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]} for n in range(50_000)}
        ).encode()
    ),
}
"""Bytes that a file of weights may hold."""

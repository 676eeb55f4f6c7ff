"""A tiny run that was really trained, and the ways in which a stranger may have spoilt a copy of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from tutti.cli.main import app
from tutti.serving.policy import Policy
from tutti.types import UserError

SECONDS = 60
"""Far more than any of these calls takes; one that hangs fails."""
MEMORY = 700 * 2**20
"""Address space that a call may add: threads reserve some, a bomb would need more."""
LINES, CHARACTERS = 25, 2500
STEP = "step-000002"
WEIGHT_FILES = ("model.safetensors", "ema.safetensors")
TEXTS = ("spec.json", "normalizer.json", "tokenizer.json", "config.yaml")
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


def evil_archive(canary: Path) -> bytes:
    """The same as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save({"state": Evil(canary)}, buffer)
    return buffer.getvalue()


@contextmanager
def bounded() -> Iterator[None]:
    """The block ends in time and in memory, or the test fails."""

    def late(*_: Any) -> None:
        pytest.fail(f"no end after {SECONDS} s")

    with Path("/proc/self/statm").open() as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def call(*arguments: str | Path) -> Result:
    """A command of `tutti` in this process, within bounds."""
    with bounded():
        return CliRunner().invoke(app, [str(one) for one in arguments])


def one_screen(text: str) -> None:
    """A message for people: short, and no traceback."""
    assert text.strip()
    assert len(text) <= CHARACTERS, f"{len(text)} characters: {text[:400]}"
    assert len(text.splitlines()) <= LINES, text
    assert "Traceback" not in text


def put(folder: Path, name: str, data: bytes) -> None:
    """Writes a file of a checkpoint and makes the list in state.json fit, as a stranger would."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    state = json.loads((folder / "state.json").read_text())
    state["files"][name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "state.json").write_text(json.dumps(state))


def fit(folder: Path, name: str) -> None:
    """The list in state.json fits the file as it is now."""
    put(folder, name, (folder / name).read_bytes())


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


def as_fifo(path: Path) -> None:
    """A FIFO that nobody writes to: whoever opens it waits."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def as_device(path: Path) -> None:
    """A link to a device that never ends."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def as_folder(path: Path) -> None:
    """A folder."""
    path.unlink(missing_ok=True)
    path.mkdir()


def as_sparse(path: Path) -> None:
    """50 GB that take no space on the disk."""
    with path.open("wb") as file:
        file.truncate(SPARSE)


SPECIAL = {"fifo": as_fifo, "device": as_device, "folder": as_folder, "sparse": as_sparse}

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


def forget_canary_modules() -> None:
    """So that the next import runs them again."""
    for name in [name for name in sys.modules if name.split(".")[0] == "canary_module"]:
        del sys.modules[name]


@dataclass(frozen=True)
class Stranger:
    """A copy of the run that has ended after its checkpoint of step 2, of an export, and the traps."""

    run: Path
    export: Path
    canary: Path
    out: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / STEP

    @property
    def mine(self) -> Path:
        """The user's own config, with which a training goes on."""
        return self.out / "mine.yaml"

    def load(self) -> str:
        """What Policy.load says."""
        with bounded(), pytest.raises(UserError) as caught:
            Policy.load(self.run)
        one_screen(str(caught.value))
        return str(caught.value)

    def refused(self, *command: str | Path) -> str:
        """What a command says that is refused."""
        done = call(*command)
        assert done.exit_code == 2, (done.exit_code, done.output[-2000:], repr(done.exception))
        said = done.output[done.output.index("error:") :]
        one_screen(said)
        return said

    def resumed(self) -> str:
        return self.refused("train", self.mine, "--run", self.run)

    def forked(self) -> str:
        fork = f"training.fork={{run: {self.run}}}"
        return self.refused("train", self.mine, "--run", self.out / "fork", fork)

"""Checkpoints: a folder that appears whole or not at all, and a loader that believes nothing.

run/checkpoints/step-000200/
  model.safetensors  ema.safetensors        the weights and their moving average
  objective.safetensors  objective_ema.safetensors   the terms' heads, if they have any state
  optimizer.pt  rng.pt                      moments of the optimisers; random states
  ...                                       texts the pipeline passes in (spec.json, normalizer.json, ...)
  state.json                                step, loader position, metrics, versions, checksums of all files

Sharded, every process writes what it holds: a folder shards/ (see tutti.shards) stands for all .safetensors
files and for the tensors of optimizer.pt. `load` reads either.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tutti import shards
from tutti.data.storage import sync
from tutti.training.disk import TEMPORARY, disk_error, pickled, unpickled
from tutti.training.distributed import ONE, World
from tutti.training.frame import put_in, taken_out
from tutti.types import UserError

STATE = "state.json"
OPTIMIZER = "optimizer"
"""What the names of an optimiser's tensors begin with among the shards."""
NAME = re.compile(r"step-\d+")
"""Of a checkpoint's folder."""
T = TypeVar("T")
Size = dict[str, int]
"""bytes and crc32 of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds. `tensors` are named sets of weights ("model", "ema", "objective", ...)."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    state: dict[str, Any]
    extra: dict[str, str] = field(default_factory=dict)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def versions() -> dict[str, str]:
    """Versions that the bits of a run depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


def folder_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` updates."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint beside its final place, then rename it there.

    A complete folder of the same step is kept as it is, since a resumed run reaches the same bytes.

    Raises: UserError if the disk is full or not writable; then nothing half-written is left.
    """
    final = folder_of(run, checkpoint.step)
    with _whole_or_not(final) as temporary:
        if temporary is not None:
            sizes = _write_whole(temporary, checkpoint)
            _finish(temporary, final, checkpoint, sizes)
    return final


def save_sharded(run: Path, checkpoint: Checkpoint, world: World) -> Path:
    """The same by all ranks of `world` at once, each of which brings its shares and writes them.

    The folder gets its name when every rank has written and told its checksums. The others wait for the
    first rank, which makes it.

    Raises: UserError on all ranks if one cannot write; then nothing half-written is left.
    """
    final = folder_of(run, checkpoint.step)

    def apart() -> tuple[Any, dict[str, Tensor]]:
        tensors = {f"{name}/{key}": t for name, one in checkpoint.tensors.items() for key, t in one.items()}
        return taken_out(checkpoint.optimizer, OPTIMIZER, tensors), tensors

    with _whole_or_not(final, world) as temporary:
        if temporary is None:
            return final
        frame, tensors = _everywhere(apart, world)
        shards.write(temporary / shards.FOLDER, tensors, world.waiting)
        own = _everywhere(lambda: _sizes(temporary / shards.FOLDER, world.ranks.rank), world)
        sizes = {name: size for one in world.together(own) for name, size in one.items()}
        light = replace(checkpoint, tensors={}, optimizer=frame)
        world.on_first(lambda: _finish(temporary, final, light, {**_write_whole(temporary, light), **sizes}))
    return final


@contextmanager
def _whole_or_not(final: Path, world: World = ONE) -> Iterator[Path | None]:
    """A new folder to write into, or None if `final` is there already; removed if the block fails."""
    temporary = final.with_name(TEMPORARY + final.name)

    def begin() -> bool:
        if (final / STATE).exists():
            return False
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return True

    try:
        yield temporary if world.on_first(begin) else None
    except OSError as error:
        if world.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(error, final) from error


def _finish(temporary: Path, final: Path, checkpoint: Checkpoint, sizes: dict[str, Size]) -> None:
    """Writes state.json, the last file, and renames the folder, if all files are there.

    Raises: OSError if one of them is not: a rank has written it to another disk.
    """
    for name, size in sizes.items():
        if not (temporary / name).is_file() or (temporary / name).stat().st_size != size["bytes"]:
            raise OSError(
                f"{name} was written by another process but is not seen by this one: use a folder "
                "that all processes share"
            )
    if (temporary / shards.FOLDER).is_dir():
        sync(temporary / shards.FOLDER)
    state = {**checkpoint.state, "step": checkpoint.step, "versions": versions(), "files": sizes}
    _write(temporary / STATE, json.dumps(state, indent=1).encode())
    sync(temporary)
    shutil.rmtree(final, ignore_errors=True)  # a folder without state.json: never complete
    os.replace(temporary, final)
    sync(final.parent)


def _write_whole(folder: Path, checkpoint: Checkpoint) -> dict[str, Size]:
    """All files but shards and state.json. Gives their sizes."""
    sizes: dict[str, Size] = {}

    def write(name: str, data: bytes) -> None:
        _write(folder / name, data)
        sizes[name] = {"bytes": len(data), "crc32": zlib.crc32(data)}

    for name, tensors in checkpoint.tensors.items():
        if tensors:
            whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            write(f"{name}.safetensors", save_tensors(whole))
    write("optimizer.pt", pickled(checkpoint.optimizer))
    write("rng.pt", pickled(checkpoint.rng))
    for name, text in checkpoint.extra.items():
        write(name, text.encode())
    return sizes


def _everywhere(make: Callable[[], T], world: World) -> T:
    """`make()` on each rank. What goes wrong on one is raised on all, so that none waits for it."""
    made: list[T] = []
    failed: Exception | None = None
    try:
        made.append(make())
    except Exception as error:
        failed = error
    texts = world.together("" if failed is None else f"rank {world.ranks.rank}: {failed!r}")
    if failed is not None:
        raise failed
    if told := [text for text in texts if text]:
        raise OSError(told[0])
    return made[0]


def _sizes(folder: Path, rank: int) -> dict[str, Size]:
    """Of the shards of a rank."""
    return {f"{shards.FOLDER}/{path.name}": _size(path) for path in shards.files_of(folder, rank)}


def _size(path: Path) -> Size:
    """Size and checksum of a file, read in pieces."""
    number, length = 0, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            number, length = zlib.crc32(piece, number), length + len(piece)
    return {"bytes": length, "crc32": number}


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first. Folders still being written do not count, nor do copies
    that somebody has put beside them (step-000200.bak)."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((folder for folder in found if NAME.fullmatch(folder.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a folder step-N: of a checkpoint, or of a step saved for replay."""
    return int(folder.name.split("-")[1])


def remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a kill in the middle leaves no half checkpoint.

    Raises: UserError if it cannot be renamed.
    """
    doomed = folder.with_name(TEMPORARY + folder.name)
    try:
        os.replace(folder, doomed)
    except OSError as error:
        raise disk_error(error, folder) from error
    shutil.rmtree(doomed, ignore_errors=True)


def verify(folder: Path) -> Path:
    """Compares every file's size and checksum with state.json. Gives the folder.

    Raises: UserError if a file is missing, truncated or changed.
    """
    for name, expected in _state(folder)["files"].items():
        try:
            _compare(folder, name, _size(folder / name), expected)
        except FileNotFoundError as error:
            raise UserError(f"{folder / name}: the checkpoint lacks this file. {_cure(folder)}") from error
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read ({error.strerror}). {_cure(folder)}") from error
    return folder


def load(folder: Path, forms: Mapping[str, Tensor] | None = None, *, verified: bool = False) -> Checkpoint:
    """Read a checkpoint, whole or sharded, and check every file's size and checksum.

    `forms`: where it has a DTensor, only this rank's share is read of a sharded checkpoint (see
    `tutti.shards.read`). `verified`: `verify` has passed, so shards are not read once more to be checked.

    Raises: UserError if a file is missing, truncated or changed.
    """
    state = _state(folder)
    sharded = any(name.startswith(f"{shards.FOLDER}/") for name in state["files"])
    if sharded and not verified:
        verify(folder)
    own = [name for name in state["files"] if not name.startswith(f"{shards.FOLDER}/")]
    try:
        contents = {name: (folder / name).read_bytes() for name in own}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: the checkpoint lacks this file. {_cure(folder)}") from error
    for name, data in contents.items():
        found: Size = {"bytes": len(data), "crc32": zlib.crc32(data)}
        _compare(folder, name, found, state["files"][name])
    tensors = {
        name.removesuffix(".safetensors"): load_tensors(data)
        for name, data in contents.items()
        if name.endswith(".safetensors")
    }
    optimizer = unpickled(io.BytesIO(contents["optimizer.pt"]))
    if sharded:
        flat = shards.read(folder / shards.FOLDER, forms)
        optimizer = put_in(optimizer, flat)
        for name, tensor in flat.items():
            part, _, key = name.partition("/")
            if part != OPTIMIZER:
                tensors.setdefault(part, {})[key] = tensor
    return Checkpoint(
        step=state["step"],
        tensors=tensors,
        optimizer=optimizer,
        rng=unpickled(io.BytesIO(contents["rng.pt"])),
        state=state,
        extra={
            name: data.decode()
            for name, data in contents.items()
            if name not in {"optimizer.pt", "rng.pt"} and not name.endswith(".safetensors")
        },
    )


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text())
        if not isinstance(state["files"], dict):
            raise TypeError("its key 'files' is no table")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: the checkpoint lacks this file. {_cure(folder)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / STATE}: not readable as a checkpoint's state ({error}). {_cure(folder)}"
        ) from error
    return state


def _compare(folder: Path, name: str, found: Size, expected: Size) -> None:
    if found["bytes"] != expected["bytes"]:
        raise UserError(
            f"{folder / name}: truncated, {expected['bytes']} bytes expected, {found['bytes']} found. "
            f"{_cure(folder)}"
        )
    if found["crc32"] != expected["crc32"]:
        raise UserError(f"{folder / name}: damaged, its checksum differs. {_cure(folder)}")


def _cure(folder: Path) -> str:
    if not folder.exists():
        return "Its run has removed it meanwhile (training.keep_checkpoints): take a newer one."
    return f"Delete the folder {folder} to continue from the checkpoint before it."


def load_latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None if it has none.

    Raises: UserError if the newest one is damaged.
    """
    found = checkpoints(run)
    return load(found[-1]) if found else None

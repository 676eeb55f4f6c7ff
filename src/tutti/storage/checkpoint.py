"""Checkpoints: a folder that appears whole or not at all, and a loader that believes nothing.

run/checkpoints/step-000200/
  model.safetensors  ema.safetensors        the weights and their moving average
  objective.safetensors  objective_ema.safetensors   the terms' heads, if they have any state
  optimizer.pt  rng.pt                      moments of the optimisers; random states
  ...                                       texts the pipeline passes in (spec.json, normalizer.json, ...)
  state.json                                step, loader position, metrics, versions, checksums of all files

Sharded, every process writes what it holds: a folder shards/ (see tutti.storage.shards) stands for all
.safetensors files and for the tensors of optimizer.pt. `load` reads either. Where there are .safetensors
files, shards/ is not looked at.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tutti.distributed.frame import put_in, taken_out
from tutti.distributed.world import ONE, World
from tutti.storage import shards
from tutti.storage.disk import TEMPORARY, disk_error, pickled, unpickled
from tutti.storage.files import sync
from tutti.storage.manifest import STATE, Manifest, Size, crc32_of
from tutti.types import UserError

OPTIMIZER = "optimizer"
"""What the names of an optimiser's tensors begin with among the shards."""
PICKLED = ("optimizer.pt", "rng.pt")
"""Nested states, which torch.load reads with weights_only=True: tensors and plain values, no classes."""
NAME = re.compile(r"step-\d+")
"""Of a checkpoint's folder."""
T = TypeVar("T")


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

    def apart() -> tuple[Any, dict[str, Tensor], list[shards.Piece]]:
        tensors = {f"{name}/{key}": t for name, one in checkpoint.tensors.items() for key, t in one.items()}
        return taken_out(checkpoint.optimizer, OPTIMIZER, tensors), tensors, shards.held(tensors)

    with _whole_or_not(final, world) as temporary:
        if temporary is None:
            return final
        frame, tensors, held = _everywhere(apart, world)
        folder, everywhere, rank = temporary / shards.FOLDER, world.together(held), world.ranks.rank
        own = _everywhere(lambda: shards.write(folder, tensors, everywhere, rank), world)
        sizes = {f"{shards.FOLDER}/{name}": size for one in world.together(own) for name, size in one.items()}
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
        sizes[name] = crc32_of(data)

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
    told = "" if failed is None else f"rank {world.ranks.rank}: {failed!r}"
    all_told = world.together((told, failed.errno if isinstance(failed, OSError) else None))
    if failed is not None:
        raise failed
    for text, number in all_told:
        if text:
            raise OSError(text) if number is None else OSError(number, text)
    return made[0]


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
    manifest = Manifest.of(folder)
    for name in manifest.files:
        manifest.check(name)
    return folder


def load(folder: Path, forms: Mapping[str, Tensor] | None = None, *, verified: bool = False) -> Checkpoint:
    """Read a checkpoint, whole or sharded, and check every file's size and checksum.

    `forms`: where it has a DTensor, only this rank's share is read of a sharded checkpoint (see
    `tutti.storage.shards.read`). `verified`: `verify` has passed, so shards are not read once more.

    Raises: UserError if a file is missing, truncated, changed, or not what its name says.
    """
    manifest = Manifest.of(folder)
    step = manifest.table.get("step")
    if type(step) is not int or step < 0:
        raise UserError(f"{folder / STATE}: step: expected a whole number, found {step!r:.80}.")
    own = [name for name in manifest.files if not name.startswith(f"{shards.FOLDER}/")]
    sharded = len(own) < len(manifest.files) and not any(name.endswith(".safetensors") for name in own)
    if sharded and not verified:
        verify(folder)
    tensors = {
        name.removesuffix(".safetensors"): _tensors(folder / name, manifest.read(name))
        for name in own
        if name.endswith(".safetensors")
    }
    optimizer, rng = (unpickled(folder / name, manifest.read(name)) for name in PICKLED)
    if sharded:
        flat = shards.read(folder / shards.FOLDER, forms)
        try:
            optimizer = put_in(optimizer, flat)
        except KeyError as error:
            raise UserError(f"{folder}: damaged, optimizer.pt names {error}; no shard has it.") from error
        for name, tensor in flat.items():
            part, _, key = name.partition("/")
            if part != OPTIMIZER:
                tensors.setdefault(part, {})[key] = tensor
    texts = [name for name in own if name not in PICKLED and not name.endswith(".safetensors")]
    return Checkpoint(
        step=step,
        tensors=tensors,
        optimizer=optimizer,
        rng=rng,
        state=manifest.table,
        extra={name: manifest.text(name) for name in texts},
    )


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, not a file of safetensors ({error}).") from error


def load_latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None if it has none.

    Raises: UserError if the newest one is damaged.
    """
    found = checkpoints(run)
    return load(found[-1]) if found else None

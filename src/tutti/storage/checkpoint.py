"""Saves and loads checkpoints: complete folders or none; each file is verified by its size and CRC.

`tutti.storage.layout` lists what the folder run/checkpoints/step-000200 holds. Saved sharded, every process
writes the shares that it holds; `load` reads either form. Where there are .safetensors files, shards/ is not
read.
"""

from __future__ import annotations

import io
import json
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

from tutti.distributed.sharded_tensors import restore_tensors, strip_tensors
from tutti.distributed.world import ONE_PROCESS, World
from tutti.errors import UserError
from tutti.storage import layout, shards
from tutti.storage.files import begin_folder, commit_folder, disk_error, partial_path
from tutti.storage.layout import SHARDS, STATE
from tutti.storage.manifest import Manifest, Size, crc32_of, open_inside

OPTIMIZER = "optimizer"
"""What the names of an optimiser's tensors begin with among the shards."""
T = TypeVar("T")
_FOLDER = re.compile(r"step-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds. `tensors` are named sets of weights ("model", "ema", "objective", ...)."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    state: dict[str, Any]
    extra: dict[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions that the bits of a run depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


def folder_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` updates."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Writes the checkpoint beside its final place, then renames it there.

    A complete folder of the same step is kept as it is, since a resumed run reaches the same bytes.

    Raises: UserError if the disk is full or not writable; then nothing half-written is left.
    """
    final = folder_of(run, checkpoint.step)
    with _complete_or_absent(final) as temporary:
        if temporary is not None:
            _finish(temporary, final, checkpoint, _write_files(temporary, checkpoint))
    return final


def save_sharded(run: Path, checkpoint: Checkpoint, world: World) -> Path:
    """The same by all ranks of `world` at once, each of which brings its shares and writes them.

    The folder gets its name when every rank has written and told its checksums. The others wait for the
    first rank, which makes it.

    Raises: UserError on all ranks if one cannot write; then nothing half-written is left.
    """
    final = folder_of(run, checkpoint.step)

    def split() -> tuple[Any, dict[str, Tensor], list[shards.Piece]]:
        tensors = {f"{name}/{key}": t for name, one in checkpoint.tensors.items() for key, t in one.items()}
        return strip_tensors(checkpoint.optimizer, OPTIMIZER, tensors), tensors, shards.local_pieces(tensors)

    with _complete_or_absent(final, world) as temporary:
        if temporary is None:
            return final
        frame, tensors, pieces = _on_all_ranks(split, world)
        folder, all_pieces, rank = temporary / SHARDS, world.all_gather(pieces), world.ranks.rank
        written = _on_all_ranks(lambda: shards.write(folder, tensors, all_pieces, rank), world)
        sizes = {f"{SHARDS}/{name}": size for one in world.all_gather(written) for name, size in one.items()}
        rest = replace(checkpoint, tensors={}, optimizer=frame)
        world.on_rank_zero(
            lambda: _finish(temporary, final, rest, {**_write_files(temporary, rest), **sizes})
        )
    return final


@contextmanager
def _complete_or_absent(final: Path, world: World = ONE_PROCESS) -> Iterator[Path | None]:
    """A new folder to write into, or None if `final` is complete already; removed if the block fails."""

    def begin() -> bool:
        if (final / STATE).exists():
            return False
        begin_folder(final)
        return True

    try:
        yield partial_path(final) if world.on_rank_zero(begin) else None
    except OSError as error:
        if world.first:
            shutil.rmtree(partial_path(final), ignore_errors=True)
        raise disk_error(error, final) from error


def _finish(temporary: Path, final: Path, checkpoint: Checkpoint, sizes: dict[str, Size]) -> None:
    """Writes state.json, the last file, and renames the folder.

    Raises: OSError if a file is not there: a rank has written it to another disk.
    """
    for name, size in sizes.items():
        if not (temporary / name).is_file() or (temporary / name).stat().st_size != size["bytes"]:
            raise OSError(
                f"{name} was written by another process but is not seen by this one: use a folder "
                "that all processes share"
            )
    state = {**checkpoint.state, "step": checkpoint.step, "versions": versions(), "files": sizes}
    (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    commit_folder(temporary, final)  # a folder of that name has no state.json: it was never complete


def _write_files(folder: Path, checkpoint: Checkpoint) -> dict[str, Size]:
    """Writes all files but shards and state.json. Gives their sizes and checksums."""
    sizes: dict[str, Size] = {}

    def write(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        sizes[name] = crc32_of(data)

    for name, tensors in checkpoint.tensors.items():
        if tensors:
            whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            write(f"{name}.safetensors", save_tensors(whole))
    write(layout.OPTIMIZER, serialize(checkpoint.optimizer))
    write(layout.RNG, serialize(checkpoint.rng))
    for name, text in checkpoint.extra.items():
        write(name, text.encode())
    return sizes


def _on_all_ranks(make: Callable[[], T], world: World) -> T:
    """`make()` on each rank. An error of one rank is raised on all, so that none waits for it for ever."""
    made: list[T] = []
    failure: Exception | None = None
    try:
        made.append(make())
    except Exception as error:
        failure = error
    message = "" if failure is None else f"rank {world.ranks.rank}: {failure!r}"
    messages = world.all_gather((message, failure.errno if isinstance(failure, OSError) else None))
    if failure is not None:
        raise failure
    for text, number in messages:
        if text:
            raise OSError(text) if number is None else OSError(number, text)
    return made[0]


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return step_folders(run / "checkpoints")


def step_folders(folder: Path) -> list[Path]:
    """The folders step-N of `folder`, oldest first. Folders still being written do not count, nor do copies
    that somebody has put beside them (step-000200.bak)."""
    return sorted((path for path in folder.glob("step-*") if _FOLDER.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a folder step-N: of a checkpoint, or of a step saved for replay."""
    return int(folder.name.split("-")[1])


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
    files = [name for name in manifest.files if not name.startswith(f"{SHARDS}/")]
    weights = [name for name in files if name.endswith(".safetensors")]
    sharded = len(files) < len(manifest.files) and not weights
    if sharded and not verified:
        verify(folder)
    tensors = {
        name.removesuffix(".safetensors"): _tensors(folder / name, manifest.read(name)) for name in weights
    }
    nested = (layout.OPTIMIZER, layout.RNG)
    optimizer, rng = (deserialize(folder / name, manifest.read(name)) for name in nested)
    if sharded:
        flat = shards.read(folder / SHARDS, forms)
        try:
            optimizer = restore_tensors(optimizer, flat)
        except KeyError as error:
            raise UserError(f"{folder}: damaged, optimizer.pt names {error}; no shard has it.") from error
        for name, tensor in flat.items():
            part, _, key = name.partition("/")
            if part != OPTIMIZER:
                tensors.setdefault(part, {})[key] = tensor
    texts = [name for name in files if name not in (*weights, *nested)]
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


def deserialize(path: Path, data: bytes | None = None) -> Any:
    """Reads what `serialize` has made: tensors and plain values, nothing else. `data` is the content of the
    file `path`, which is read if it is not given.

    Raises: UserError if the file cannot be read, is damaged, or holds anything else.
    """
    try:
        if data is None:
            with open_inside(path.parent, path.name) as file:
                data = file.read()
        # To the CPU: there may be no device of the kind that saved it, or it may be another rank's.
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file leads to
        first = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{path}: cannot be read: missing, damaged, or more than tensors and plain values ({first})."
        ) from error


def serialize(value: Any) -> bytes:
    """What `torch.save` would write, as bytes: a full disk then fails as a plain OSError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

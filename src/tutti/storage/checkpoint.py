"""Saves, finds and loads checkpoints: complete folders or none; each file is verified by its size and CRC.

`tutti.storage.manifest` lists what the folder run/checkpoints/step-000200 holds. Saved sharded, every process
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
from safetensors.torch import save as save_tensors
from torch import Tensor

from tutti.distributed.sharded_tensors import restore_tensors, strip_tensors
from tutti.distributed.world import ONE_PROCESS, World
from tutti.errors import UserError
from tutti.storage import shards
from tutti.storage.files import begin_folder, commit_folder, disk_error, partial_path
from tutti.storage.manifest import (
    BEST_MARK,
    EXPORT,
    OPTIMIZER_FILE,
    RNG_FILE,
    SHARDS,
    STATE,
    WEIGHTS,
    Manifest,
    Size,
    size_of,
)
from tutti.storage.reading import open_plain, read_json, shown
from tutti.storage.tensors import read

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
        sizes[name] = size_of(data)

    for name, tensors in checkpoint.tensors.items():
        if tensors:
            whole = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            write(f"{name}.safetensors", save_tensors(whole))
    write(OPTIMIZER_FILE, serialize(checkpoint.optimizer))
    write(RNG_FILE, serialize(checkpoint.rng))
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


def find_checkpoint(path: Path, which: int | str = "latest") -> Path:
    """`path` itself if it is a checkpoint or an export, else `which` of `checkpoints/step-...` below it: the
    "latest", the "best", as best.json marks it (training.checkpoints.keep_best), or the one of a step.

    `.../checkpoints/last` and `.../checkpoints` also mean the newest. Whether it is whole is not looked at,
    so that an older one never stands for a damaged one. Raises UserError if there is none.
    """
    if _holds_policy(path):
        return path
    home = path / "checkpoints"
    if path.name == "checkpoints":
        home = path
    elif path.name == "last":
        home = path.parent
    steps = {step_of(folder): folder for folder in step_folders(home) if _holds_policy(folder)}
    if not steps:
        raise UserError(
            f"{path}: no checkpoint here (expected {WEIGHTS['raw']}, or "
            f"{home.name}/step-.../{WEIGHTS['raw']}). Name a run's folder, such as "
            "runs/demo, after `tutti train` has saved its first checkpoint."
        )
    if which == "latest":
        return steps[max(steps)]
    step = _best(home / BEST_MARK) if which == "best" else which
    if step not in steps:
        raise UserError(
            f"{home}: no checkpoint of step {step}; there are {', '.join(map(str, sorted(steps)))}, and "
            "the words latest and best."
        )
    return steps[step]


def _best(mark: Path) -> int:
    """The step that best.json marks."""
    cure = (
        "No checkpoint of this run is marked as the best. Train with training.checkpoints.keep_best={metric: "
        "valid/total, mode: min}, or choose latest, or a step."
    )
    step = read_json(mark, cure=cure).get("step")
    if type(step) is not int:
        raise UserError(f"{mark}: step is {shown(step)}, expected a whole number. {cure}")
    return step


def _holds_policy(folder: Path) -> bool:
    return any((folder / name).exists() for name in (STATE, EXPORT, WEIGHTS["raw"], SHARDS))


def listed(folder: Path) -> Manifest:
    """The manifest of an export, or else of a checkpoint; every file that it lists is there in its size.

    Raises: UserError if the folder has none, lacks a file, or is an export with shards in it.
    """
    name = EXPORT if (folder / EXPORT).exists() else STATE
    if not (folder / name).exists():
        raise UserError(
            f"{folder}: expected {STATE} (a checkpoint) or {EXPORT} (an export), found neither, so its files "
            "cannot be checked. Name a whole checkpoint, or export again: tutti export RUN --to FOLDER."
        )
    if name == EXPORT and (folder / SHARDS).exists():
        raise UserError(
            f"{folder}: an export holds no {SHARDS}/, so this one is not as Tutti has written it. Export "
            "again: tutti export RUN --to FOLDER."
        )
    manifest = Manifest.of(folder, name)
    manifest.check_sizes()
    return manifest


def load(folder: Path, forms: Mapping[str, Tensor] | None = None, *, verified: bool = False) -> Checkpoint:
    """Reads a checkpoint, whole or sharded, and checks size and checksum of every file that it reads.

    `forms`: where it has a DTensor, only this rank's share is read (see `tutti.storage.tensors.read`).
    `verified`: `verify` has passed, so the tensors are not read twice.

    Raises: UserError if a file is missing, truncated, changed, or not what its name says.
    """
    manifest = Manifest.of(folder)
    step = manifest.table.get("step")
    if type(step) is not int or step < 0:
        raise UserError(f"{folder / STATE}: step: expected a whole number, found {step!r:.80}.")
    optimizer, rng = (deserialize(folder / one, manifest.read(one)) for one in (OPTIMIZER_FILE, RNG_FILE))
    flat = read(manifest, forms=forms, verified=verified)
    try:
        optimizer = restore_tensors(optimizer, flat)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged, optimizer.pt names {error}; no shard has it.") from error
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        part, _, key = name.partition("/")
        if part != OPTIMIZER:
            tensors.setdefault(part, {})[key] = tensor
    others = (OPTIMIZER_FILE, RNG_FILE, *(name for name in manifest.files if name.endswith(".safetensors")))
    texts = [name for name in manifest.files if name not in others and not name.startswith(f"{SHARDS}/")]
    return Checkpoint(
        step=step,
        tensors=tensors,
        optimizer=optimizer,
        rng=rng,
        state=manifest.table,
        extra={name: manifest.text(name) for name in texts},
    )


def deserialize(path: Path, data: bytes | None = None) -> Any:
    """Reads what `serialize` has made: tensors and plain values, nothing else. `data` is the content of the
    file `path`, which is read if it is not given.

    Raises: UserError if the file cannot be read, is damaged, or holds anything else.
    """
    try:
        if data is None:
            with open_plain(path, inside=path.parent) as file:
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

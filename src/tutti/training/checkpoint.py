"""Checkpoints: a folder that appears whole or not at all, and a loader that believes nothing.

run/checkpoints/step-000200/
  model.safetensors  ema.safetensors        the weights and their moving average
  objective.safetensors  objective_ema.safetensors   the terms' heads, if they have any state
  optimizer.pt  rng.pt                      moments of the optimisers; random states
  ...                                       texts the pipeline passes in (spec.json, normalizer.json, ...)
  state.json                                step, loader position, metrics, versions, checksums of all files
"""

from __future__ import annotations

import errno
import io
import json
import os
import platform
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tutti.data.storage import sync_folder, write_atomically
from tutti.types import UserError

STATE = "state.json"
TEMPORARY = ".writing-"
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds. `tensors` are named sets of weights ("model", "ema", "objective", ...)."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    state: dict[str, Any]
    extra: dict[str, str] = field(default_factory=dict)


def disk_error(error: OSError, path: Path) -> UserError:
    """The message for a write that failed."""
    if error.errno in FULL:
        free = shutil.disk_usage(path if path.exists() else path.parent).free / 2**20
        return UserError(
            f"{path}: cannot write, the disk (or the quota or file size limit) is full; {free:.0f} MiB are "
            "free. Free space and run the same command again: it continues from the last checkpoint."
        )
    return UserError(
        f"{path}: cannot write ({error.strerror}). Check that the folder exists and is writable."
    )


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a kill leaves the old file or the new one.

    Raises: UserError if the disk is full.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise disk_error(error, path) from error


def require_writable(folder: Path) -> None:
    """Makes the folder if it is not there, and tries whether a file can be written into it.

    Raises: UserError if not.
    """
    probe = folder / f"{TEMPORARY}probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"tutti")
        probe.unlink()
    except OSError as error:
        raise disk_error(error, folder) from error


def pickled(value: Any) -> bytes:
    """What `torch.save` would write, as bytes: a full disk then fails as a plain OSError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


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
    if (final / STATE).exists():
        return final
    temporary = final.with_name(TEMPORARY + final.name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(temporary, checkpoint)
        sync_folder(temporary)
        shutil.rmtree(final, ignore_errors=True)  # a folder without state.json: never complete
        os.replace(temporary, final)
        sync_folder(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(error, final) from error
    return final


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    sizes: dict[str, dict[str, int]] = {}

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
    state = {**checkpoint.state, "step": checkpoint.step, "versions": versions(), "files": sizes}
    _write(folder / STATE, json.dumps(state, indent=1).encode())


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; folders still being written do not count."""
    return sorted((run / "checkpoints").glob("step-*"), key=step_of)


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


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint and check every file's size and checksum.

    Raises: UserError if a file is missing, truncated or changed.
    """
    cure = f"Delete the folder {folder} to continue from the checkpoint before it."
    try:
        state = json.loads((folder / STATE).read_text())
        contents = {name: (folder / name).read_bytes() for name in state["files"]}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: the checkpoint lacks this file. {cure}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / STATE}: not readable as a checkpoint's state ({error}). {cure}"
        ) from error
    for name, expected in state["files"].items():
        data = contents[name]
        if len(data) != expected["bytes"]:
            raise UserError(
                f"{folder / name}: truncated, {expected['bytes']} bytes expected, {len(data)} found. {cure}"
            )
        if zlib.crc32(data) != expected["crc32"]:
            raise UserError(f"{folder / name}: damaged, its checksum differs. {cure}")
    tensors = {
        name.removesuffix(".safetensors"): load_tensors(data)
        for name, data in contents.items()
        if name.endswith(".safetensors")
    }
    own = {"optimizer.pt", "rng.pt"}
    return Checkpoint(
        step=state["step"],
        tensors=tensors,
        optimizer=torch.load(io.BytesIO(contents["optimizer.pt"]), weights_only=True),
        rng=torch.load(io.BytesIO(contents["rng.pt"]), weights_only=True),
        state=state,
        extra={
            name: data.decode()
            for name, data in contents.items()
            if name not in own and not name.endswith(".safetensors")
        },
    )


def load_latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None if it has none.

    Raises: UserError if the newest one is damaged.
    """
    found = checkpoints(run)
    return load(found[-1]) if found else None


def differences(saved: Any, new: Any, key: str = "") -> list[str]:
    """The leaves in which two nested configs differ, as "model.vision.depth: saved 4, now 6"."""
    if isinstance(saved, Mapping) and isinstance(new, Mapping):
        names = [*saved, *(name for name in new if name not in saved)]
        lines: list[str] = []
        for name in names:
            path = f"{key}.{name}" if key else str(name)
            lines += differences(saved.get(name, "(absent)"), new.get(name, "(absent)"), path)
        return lines
    plain_saved = list(saved) if isinstance(saved, tuple) else saved
    plain_new = list(new) if isinstance(new, tuple) else new
    return [] if plain_saved == plain_new else [f"{key}: saved {plain_saved!r}, now {plain_new!r}"]


def check_resumable(
    saved_config: Mapping[str, Any],
    new_config: Mapping[str, Any],
    sections: tuple[str, ...] = ("model", "data"),
) -> None:
    """Refuse to continue a run whose model or data section has changed.

    Raises: UserError naming each key that differs, with both values.
    """
    lines: list[str] = []
    for section in sections:
        lines += differences(saved_config.get(section, {}), new_config.get(section, {}), section)
    if lines:
        listed = "\n".join(f"  {line}" for line in lines[:10])
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise UserError(
            f"This run was started with another {' or '.join(sections)} section, so it cannot be resumed:\n"
            f"{listed}{more}\nRestore these values, or give the new run another name."
        )

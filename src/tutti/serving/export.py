"""A checkpoint without what only training needs: one file of weights, and what a policy reads beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tutti import shards
from tutti.data.storage import full_disk_is_a_user_error, sync_tree
from tutti.serving.policy import (
    FILES,
    Policy,
    Weights,
    find_checkpoint,
    is_sharded,
    kept_weights,
    read_weights,
)
from tutti.types import UserError

BESIDE = ("spec.json", "normalizer.json", "tokenizer.json")
ABOUT = "export.json"


def export(
    run: Path | str,
    to: Path | str,
    weights: Weights = "ema",
    checkpoint: int | Literal["latest", "best"] = "latest",
) -> Path:
    """Writes `to`: model.safetensors (the moving average, or the raw weights; where training kept no average,
    the raw ones), config.yaml, spec.json, normalizer.json, tokenizer.json, and export.json, which says where
    they come from. `Policy.load(to)` reads it, without the run and its data.

    The folder appears whole or not at all, and only after a policy could be loaded from it. Gives the folder.

    Raises: UserError if there is no such checkpoint, it is damaged, `to` exists, or the disk is full.
    """
    source, to = find_checkpoint(Path(run), checkpoint), Path(to)
    if to.exists():
        raise UserError(f"{to} exists. Give --to a folder that does not, or delete this one.")
    weights = kept_weights(source, weights)
    config = source / "config.yaml"
    if not config.is_file():
        config = source.parent.parent / "config.yaml"
    temporary = to.with_name(f".writing-{to.name}")
    try:
        with full_disk_is_a_user_error(to.parent, "the export", lambda: _needed(source)):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if is_sharded(source):
                (temporary / FILES["raw"]).write_bytes(save(read_weights(source, weights)))
            else:
                _copy(source / FILES[weights], temporary / FILES["raw"])
            for path in (config, *(source / name for name in BESIDE)):
                _copy(path, temporary / path.name)
            about = {"checkpoint": source.name, "weights": weights, "parameters": _count(temporary)}
            (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            Policy.load(temporary)
            sync_tree(temporary)
            os.replace(temporary, to)
    except OSError as error:
        raise UserError(f"{to}: cannot be written ({error.strerror}). Choose a writable folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return to


def export_command(run: Path, to: Path, weights: str, checkpoint: str) -> Path:
    """`tutti export`: the options as text, checked.

    Raises: UserError for a value that is none of the choices, and what `export` raises.
    """
    if weights not in FILES:
        raise UserError(f"--weights: expected {' or '.join(FILES)}, found '{weights}'.")
    if checkpoint.isdecimal():
        return export(run, to, weights, int(checkpoint))
    if checkpoint not in ("latest", "best"):
        raise UserError(f"--checkpoint: expected latest, best or the number of a step, found '{checkpoint}'.")
    return export(run, to, weights, checkpoint)


def _needed(source: Path) -> str:
    """No more than the weights of the checkpoint."""
    files = [*source.glob("*.safetensors"), *(source / shards.FOLDER).glob("*")]
    return f"at most {sum(path.stat().st_size for path in files)} bytes"


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise UserError(f"{source}: missing; this is not a whole checkpoint of a training.") from error


def _count(folder: Path) -> int:
    """The numbers in the file of weights."""
    total = 0
    try:
        with safe_open(folder / FILES["raw"], framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a file, not a mapping)
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size
    except SafetensorError as error:
        raise UserError(f"The weights of the checkpoint are damaged ({error}).") from error
    return total

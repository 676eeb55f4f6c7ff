"""Finds the checkpoint or export that a path names, and reads its weights as its manifest lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tutti.errors import UserError
from tutti.storage import shards
from tutti.storage.checkpoint import step_folders, step_of
from tutti.storage.layout import BEST_MARK, EXPORT, SHARD_INDEX, SHARDS, STATE, WEIGHTS, Weights
from tutti.storage.manifest import Manifest
from tutti.storage.reading import read_json, shown


def find_checkpoint(path: Path, which: int | Literal["latest", "best"] = "latest") -> Path:
    """`path` itself if it is a checkpoint or an export, else the newest `checkpoints/step-...` below it, or
    `which` of them: the one that best.json marks as the best by a metric (training.checkpoints.keep_best),
    or the one of a step.

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
            f"{home}: no checkpoint of step {step}; there are {', '.join(map(str, sorted(steps)))}."
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
    names = (STATE, EXPORT, WEIGHTS["raw"], SHARDS)
    return any((folder / name).exists() for name in names)


def listed(folder: Path) -> Manifest:
    """The manifest of an export, or else of a checkpoint; every file that it lists is there in its size.

    Raises: UserError if the folder has none, lacks a file, or is an export with shards in it.
    """
    if not (folder / EXPORT).exists():
        if not (folder / STATE).exists():
            raise UserError(
                f"{folder}: expected {STATE} (a checkpoint) or {EXPORT} (an export), found neither, so its "
                "files cannot be checked. Name a whole checkpoint, or export again: tutti export RUN --to "
                "FOLDER."
            )
        manifest = Manifest.of(folder)
    elif (folder / SHARDS).exists():
        raise UserError(
            f"{folder}: an export holds no {SHARDS}/, so this one is not as Tutti has written it. "
            "Export again: tutti export RUN --to FOLDER."
        )
    else:
        manifest = Manifest.of(folder, EXPORT)
    manifest.check_sizes()
    return manifest


def is_sharded(manifest: Manifest) -> bool:
    """True for a checkpoint that every rank has written its shares of (`tutti.storage.shards`): it lists
    shards, and no weights in one file."""
    return WEIGHTS["raw"] not in manifest.files and f"{SHARDS}/{SHARD_INDEX}" in manifest.files


def kept_weights(manifest: Manifest, weights: Weights) -> Weights:
    """`weights`, or the raw ones where training has kept no average.

    Raises: UserError if the index of the shards is damaged.
    """
    if not is_sharded(manifest):
        return weights if WEIGHTS[weights] in manifest.files else "raw"
    manifest.check(f"{SHARDS}/{SHARD_INDEX}")
    start = f"{Path(WEIGHTS[weights]).stem}/"
    saved = any(name.startswith(start) for name in shards.index_of(manifest.folder / SHARDS))
    return weights if saved else "raw"


def read_weights(manifest: Manifest, weights: Weights) -> dict[str, Tensor]:
    """The model's weights; the raw ones where training has kept no average.

    Raises: UserError if they are missing, damaged, or not finite.
    """
    file = WEIGHTS[kept_weights(manifest, weights)]
    if not is_sharded(manifest):
        manifest.check(file)
        try:
            return check_finite(manifest.folder, load_file(manifest.folder / file))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{manifest.folder / file}: these weights are damaged ({error}).") from error
    start = f"{Path(file).stem}/"
    folder = manifest.folder / SHARDS
    named = shards.read(folder, below=start, check=lambda name: manifest.check(f"{SHARDS}/{name}"))
    return check_finite(manifest.folder, {name.removeprefix(start): value for name, value in named.items()})


def check_finite(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the tensors back.

    Raises: UserError if one of them holds NaN or infinity.
    """
    bad = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise UserError(
            f"{folder}: the weights hold NaN or infinity in {len(bad)} of {len(tensors)} tensors, such as "
            f"{bad[0]}. No robot can act by them. Take an older checkpoint, and find in the records of the "
            "training where the loss went wrong."
        )
    return tensors

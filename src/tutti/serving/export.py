"""Exports a policy: a checkpoint's weights and the files that inference needs, without the training state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from safetensors.torch import save

from tutti.plugin import Trust
from tutti.serving.contents import read_model
from tutti.serving.policy import Policy
from tutti.storage.files import explain_disk_errors, megabytes, write_folder
from tutti.storage.find_checkpoint import find_checkpoint, kept_weights, listed, read_weights
from tutti.storage.layout import EXPORT, POLICY_FILES, WEIGHTS, Weights
from tutti.storage.manifest import sha256_of
from tutti.types import UserError


def export_policy(
    run: Path | str,
    to: Path | str,
    weights: Weights = "ema",
    checkpoint: int | Literal["latest", "best"] = "latest",
    *,
    trust_code: Trust = False,
) -> Path:
    """Writes `to`: model.safetensors (the moving average, or the raw weights; where training kept no average,
    the raw ones), config.yaml, spec.json, normalizer.json, tokenizer.json, and export.json, which says where
    they come from and lists the size and SHA-256 of each. `Policy.load(to)` reads it, without the run and its
    data.

    The folder appears whole or not at all, and only after a policy could be loaded from it. Gives the folder.
    `trust_code`: an action decoder of the user's own is imported for that.

    Raises: UserError if there is no such checkpoint, it is damaged, its weights are not finite, `to` exists,
    or the disk is full.
    """
    source, to = listed(find_checkpoint(Path(run), checkpoint)), Path(to)
    if to.exists():
        raise UserError(f"{to} exists. Give --to a folder that does not, or delete this one.")
    weights = kept_weights(source, weights)
    read_model(source, weights, trust_code)
    tensors = read_weights(source, weights)
    content = {WEIGHTS["raw"]: save(tensors)} | {name: source.read(name) for name in POLICY_FILES}
    about = {
        "checkpoint": source.folder.name,
        "weights": weights,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "files": {name: sha256_of(data) for name, data in content.items()},
    }
    needed = megabytes(sum(map(len, content.values())))
    with explain_disk_errors(to, "the export", needed), write_folder(to) as folder:
        for name, data in content.items():
            (folder / name).write_bytes(data)
        (folder / EXPORT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        Policy.load(folder, trust_code=trust_code)
    return to


def export_command(run: Path, to: Path, weights: str, checkpoint: str, *, trust_code: bool = False) -> Path:
    """`tutti export`: the options as text, checked.

    Raises: UserError for a value that is none of the choices, and what `export_policy` raises.
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights: expected {' or '.join(WEIGHTS)}, found '{weights}'.")
    if checkpoint.isdecimal():
        return export_policy(run, to, weights, int(checkpoint), trust_code=trust_code)
    if checkpoint not in ("latest", "best"):
        raise UserError(f"--checkpoint: expected latest, best or the number of a step, found '{checkpoint}'.")
    return export_policy(run, to, weights, checkpoint, trust_code=trust_code)

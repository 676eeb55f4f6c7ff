"""Export: what a policy needs of a checkpoint, in a folder of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from tutti.models.config import exported
from tutti.nested_dicts import without_addresses
from tutti.plugin import Trust
from tutti.serving.contents import read_model, read_normalizer, read_served, read_tokenizer
from tutti.serving.exports.card import CARD, card
from tutti.serving.exports.graph import EXACT, INT8, GraphKind, graphs_of
from tutti.serving.exports.int8 import error_of, quantised
from tutti.serving.interface import interface
from tutti.serving.policy import Policy
from tutti.storage.checkpoint import find_checkpoint, listed
from tutti.storage.files import explain_disk_errors, megabytes, write_folder, write_json
from tutti.storage.manifest import (
    CONFIG,
    CONVENTIONS,
    EXPORT,
    POLICY_FILES,
    STARTS,
    WEIGHTS,
    Weights,
    size_of,
)
from tutti.storage.reading import parse_yaml
from tutti.storage.tensors import read_weights, weights_in
from tutti.types import UserError


def export_policy(
    run: Path | str,
    to: Path | str,
    weights: Weights = "ema",
    checkpoint: int | str = "latest",
    *,
    half: bool = False,
    robot: int = 0,
    graphs: Collection[GraphKind] = (),
    int8: bool = False,
    results: Mapping[str, Any] | None = None,
    trust_code: Trust = False,
) -> Path:
    """Writes `to`: model.safetensors (the moving average, or the raw weights; where training kept no average,
    the raw ones; with `half` rounded to float16, half the size), config.yaml, spec.json, normalizer.json,
    tokenizer.json, and export.json, which says where they come from and what goes in and comes out
    (`interface`), and lists the size and SHA-256 of each. `Policy.load(to)` reads it, without the run and its
    data, and computes in the model's own type of numbers, however they are stored.

    `graphs` adds model.pt2 or model.onnx, one graph for programs without Tutti (`exports.graph`); with `int8`
    model.int8.onnx comes beside the latter, smaller and not exact (`exports.int8`).
    README.md is a model card; `results` are those of an evaluation, as results.json has them.

    The folder appears whole or not at all, and only after a policy could be loaded from it. Gives the folder.
    `robot`: the number of the source, of those in conventions.json, whose conventions the export answers in.
    `trust_code`: an action decoder of the user's own is imported for that.

    Raises: UserError if there is no such checkpoint, it is damaged, its weights are not finite or, with
    `half`, too large for float16, `to` exists, or the disk is full.
    """
    source, to = listed(find_checkpoint(Path(run), checkpoint)), Path(to)
    if to.exists():
        raise UserError(f"{to} exists. Give --to a folder that does not, or delete this one.")
    weights, _ = weights_in(source, weights)
    config, spec = read_model(source, weights, trust_code)
    config, tensors = exported(config, spec, read_weights(source, weights))
    if half:
        rounded = {n: value.half() if value.is_floating_point() else value for n, value in tensors.items()}
        if large := [name for name, value in rounded.items() if not bool(torch.isfinite(value).all())]:
            raise UserError(
                f"{source.folder}: {large[0]} has numbers that float16 does not have. Leave out --half."
            )
        tensors = rounded
    names = (*POLICY_FILES, *(name for name in (STARTS,) if name in source.files))
    content = {WEIGHTS["raw"]: save(tensors)} | {name: source.read(name) for name in names}
    before = parse_yaml(source.text(CONFIG), source.folder / CONFIG)
    values = without_addresses(before)
    if config.towers():
        values["model"] = config.model_dump(mode="json")
    if values != before:
        content[CONFIG] = yaml.safe_dump(values, sort_keys=False, width=110).encode()
    served = read_served(source, spec)
    if served is None and robot:
        raise UserError(f"{source.folder}: all its sources have one convention; leave out --robot.")
    if served is not None:
        served = served.beginning_with(robot)
        content[CONVENTIONS] = served.model_dump_json(indent=1).encode()
    about: dict[str, Any] = {
        "checkpoint": source.folder.name,
        "weights": weights,
        **({"stored": "float16"} if half else {}),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        **interface(spec, read_normalizer(source, spec), read_tokenizer(source, spec), served),
        "files": {name: size_of(data, "sha256") for name, data in content.items()},
    }
    needed = megabytes(sum(map(len, content.values())))
    with explain_disk_errors(to, "the export", needed), write_folder(to) as folder:
        for name, data in content.items():
            (folder / name).write_bytes(data)
        write_json(folder / EXPORT, about)
        policy = Policy.load(folder, trust_code=trust_code)
        for one in (about, *about.get("robots", {}).values()):
            one["inputs"]["reads_state"] = policy.model.fusion.reads_state
        more = graphs_of(policy, {*graphs, "onnx"} if int8 else graphs)
        if int8:
            more[INT8] = quantised(more[EXACT])
            about["int8"] = error_of(policy, more[EXACT], more[INT8])
        more[CARD] = card(to.name, about, values, results).encode()
        for name, data in more.items():
            (folder / name).write_bytes(data)
            if name != CARD:  # people edit it, and no policy reads it
                about["files"][name] = size_of(data, "sha256")
        write_json(folder / EXPORT, about)
    return to

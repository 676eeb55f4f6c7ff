"""A policy as a folder that LeRobot loads, with the plugin `lerobot_policy_tutti` (plugins/lerobot)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from tutti.models.config import CustomDecoderConfig
from tutti.plugin import Trust
from tutti.serving.contents import read_model_config, read_served, read_spec
from tutti.serving.export import export_policy
from tutti.storage.checkpoint import listed
from tutti.storage.files import explain_disk_errors, write_folder, write_json
from tutti.storage.manifest import CONVENTIONS, NORMALIZER, SPEC, TOKENIZER, WEIGHTS, Weights
from tutti.types import DataSpec, UserError

IMAGES = "observation.images."
SAME = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY")
"""The policy normalises by itself."""


def export_to_lerobot(
    run: Path | str,
    to: Path | str,
    weights: Weights = "ema",
    checkpoint: int | str = "latest",
    *,
    robot: int = 0,
    trust_code: Trust = False,
) -> Path:
    """Writes config.json, model.safetensors, policy_preprocessor.json and policy_postprocessor.json.

    Raises: UserError as `export_policy`, for a policy of several robots or a decoder of the user's own.
    """
    to = Path(to)
    if to.exists():
        raise UserError(f"{to} exists. Give --to a folder that does not, or delete this one.")
    with tempfile.TemporaryDirectory() as place:
        source = listed(
            export_policy(
                run, Path(place) / "export", weights, checkpoint, robot=robot, trust_code=trust_code
            )
        )
        spec, model = read_spec(source), read_model_config(source, trust_code)
        if len(spec.embodiments) > 1 or isinstance(model.action, CustomDecoderConfig):
            raise UserError("--for lerobot: expected a policy of one robot with a decoder of Tutti.")
        if len(spec.history) > 1:
            raise UserError("--for lerobot: this policy looks at earlier observations, LeRobot gives it one.")
        files = {name: source.text(name) for name in (SPEC, NORMALIZER, TOKENIZER)}
        conventions = source.text(CONVENTIONS) if CONVENTIONS in source.files else ""
        served = read_served(source, spec)
        own = spec if served is None else served.spec(spec, 0)
        tensors = load_file(source.folder / WEIGHTS["raw"])
    features = _features(own)
    config = {
        "type": "tutti",
        "input_features": features,
        "output_features": {"action": _vector("ACTION", own.action_dim)},
        "device": "cpu",
        "normalization_mapping": SAME,
        "chunk_size": own.horizon,
        "n_action_steps": max(1, own.horizon // 2),
        "image_size": spec.image_size,
        "model": model.model_dump_json(),
        "spec": files[SPEC],
        "normalizer": files[NORMALIZER],
        "tokenizer": files[TOKENIZER],
        "conventions": conventions,
    }
    before = [
        _step("rename_observations_processor", rename_map={}),
        _step("to_batch_processor"),
        _step("device_processor", device="cpu", float_dtype=None),
        _step("normalizer_processor", eps=1e-8, features=features | config["output_features"], norm_map=SAME),
    ]
    after = [
        _step("unnormalizer_processor", eps=1e-8, features=config["output_features"], norm_map=SAME),
        _step("device_processor", device="cpu", float_dtype=None),
    ]
    with explain_disk_errors(to, "the export"), write_folder(to) as folder:
        data = save({f"model.{name}": value for name, value in tensors.items()})
        (folder / "model.safetensors").write_bytes(data)
        write_json(folder / "config.json", config)
        for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
            write_json(folder / f"{name}.json", {"name": name, "steps": steps})
    return to


def _features(spec: DataSpec) -> dict[str, Any]:
    size = [3, spec.image_size, spec.image_size]
    names = (view if view.startswith("observation.") else IMAGES + view for view in spec.views)
    state = {"observation.state": _vector("STATE", spec.state_dim)} if spec.state_dim else {}
    return {name: {"type": "VISUAL", "shape": size} for name in names} | state


def _vector(kind: str, size: int) -> dict[str, Any]:
    return {"type": kind, "shape": [size]}


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}

"""`tutti plan`: from a config and a few numbers to the plan."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from tutti.config.run_config import RunConfig
from tutti.planning.devices import Device, Precision, find_device
from tutti.planning.plan import GPUS_PER_MACHINE, Plan, Request, make_plan
from tutti.runs.build import expected_spec
from tutti.types import UserError

ASSUMED_MFU = {"gpu": 0.40, "measured": 0.45}
"""Where --mfu is not given: of a GPU's peak, a middling figure of large transformer trainings; of this
machine's own matrix product, about what the demo's step reaches on a CPU (benchmarks/README.md)."""


def plan_run(
    config: RunConfig,
    *,
    gpus: int,
    device: str = "h100",
    memory: float | Literal["device"] = "device",
    tflops: float | Literal["device"] = "device",
    bandwidth: float | Literal["device"] = "device",
    mfu: float | Literal["assumed"] = "assumed",
    samples: float | Literal["config"] = "config",
    episodes: float | Literal["config"] = "config",
    frames: float = 150.0,
    epochs: float = 1.0,
    overhead: float = 0.0,
    process: float | Literal["device"] = "device",
) -> tuple[Plan, Request]:
    """The plan and what it was made for. `memory` in GB, `tflops` in TFLOP/s, `bandwidth` in GB/s,
    `overhead` in ms, `process` in MB.

    The samples are `samples`; else `episodes` * `frames` * `epochs`, each frame being a window; else
    `training.steps` updates of the config's batch.

    Raises: UserError for an unknown device, both samples and episodes, or numbers out of range.
    """
    precision = precision_on(config, device)
    found: Device = find_device(device, precision)
    global_batch = config.data.batch_size * config.training.accumulation
    if samples != "config" and episodes != "config":
        raise UserError("--samples and --episodes both say how long the training is; give one of them.")
    if samples == "config":
        frames_in_all = config.training.steps * global_batch if episodes == "config" else episodes * frames
        samples = float(frames_in_all) * (1.0 if episodes == "config" else epochs)
    if tflops != "device":
        if not 0 < tflops < math.inf:
            raise UserError(f"--tflops is {tflops:g}; give a number above 0.")
        own = {"bf16": tflops * 1e12, "fp32": tflops * 1e12, "name": f"{found.name} at {tflops:g} TFLOP/s"}
        found = replace(found, **own)
    between = found.link if gpus <= GPUS_PER_MACHINE else found.network
    kind = "measured" if device == "measured" else "gpu"
    request = Request(
        gpus=gpus,
        memory=found.memory if memory == "device" else memory * 1e9,
        device=found,
        mfu=ASSUMED_MFU[kind] if mfu == "assumed" else mfu,
        bandwidth=between if bandwidth == "device" else bandwidth * 1e9,
        samples=samples,
        overhead=overhead / 1000,
        process=found.process if process == "device" else process * 1e6,
    )
    return make_plan(config, expected_spec(config), request, precision), request


def precision_on(config: RunConfig, device: str) -> Precision:
    """What `training.precision: auto` means there: bf16 on GPUs, fp32 on this machine's CPU."""
    given = config.training.precision
    if given != "auto":
        return given
    return "fp32" if device == "measured" else "bf16"

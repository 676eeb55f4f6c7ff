"""`tutti plan`: the plan of a training from its config, a device and the number of GPUs."""

from __future__ import annotations

from typing import Literal

from tutti.config.run_config import RunConfig
from tutti.planning.devices import Device, Precision, find_device
from tutti.planning.plan import GPUS_PER_MACHINE, Plan, Request, make_plan
from tutti.runs.build import expected_spec

ASSUMED_MFU = {"gpu": 0.40, "measured": 0.45}
"""Where --mfu is not given: of a GPU's peak, a middling figure of large transformer trainings; of this
machine's own matrix product, about what the demo's step reaches on a CPU (benchmarks/README.md)."""


def plan_run(
    config: RunConfig,
    *,
    gpus: int,
    device: str = "h100",
    memory: float | Literal["device"] = "device",
    mfu: float | Literal["assumed"] = "assumed",
    episodes: float | Literal["config"] = "config",
    frames: float = 150.0,
    process: float | Literal["device"] = "device",
) -> tuple[Plan, Request]:
    """The plan and what it was made for. `memory` in GB, `process` in MB.

    The samples are `episodes` * `frames`, each frame being a window; else `training.steps` updates of the
    config's batch.

    Raises: UserError for an unknown device, or numbers out of range.
    """
    precision = precision_on(config, device)
    target: Device = find_device(device, precision)
    global_batch = config.data.batch_size * config.training.accumulation
    is_measured = device == "measured"
    request = Request(
        gpus=gpus,
        memory=target.memory if memory == "device" else memory * 1e9,
        device=target,
        mfu=ASSUMED_MFU["measured" if is_measured else "gpu"] if mfu == "assumed" else mfu,
        bandwidth=target.link if gpus <= GPUS_PER_MACHINE else target.network,
        samples=float(config.training.steps * global_batch) if episodes == "config" else episodes * frames,
        process=target.process if process == "device" else process * 1e6,
    )
    return make_plan(config, expected_spec(config), request, precision), request


def precision_on(config: RunConfig, device: str) -> Precision:
    """What `training.precision: auto` means there: bf16 on GPUs, fp32 on this machine's CPU."""
    given = config.training.precision
    if given != "auto":
        return given
    return "fp32" if device == "measured" else "bf16"

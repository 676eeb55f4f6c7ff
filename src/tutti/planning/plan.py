"""The plan of a training: what it holds, computes and sends, how long it takes, and what fits on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tutti.config.run_config import RunConfig
from tutti.models.pretrained.vision import PretrainedVision
from tutti.planning.devices import Device, Precision, find_device
from tutti.planning.footprint import Flops, Parts, Peaks, count_flops, fake_update, recompute
from tutti.runs.build import expected_spec, with_steps
from tutti.types import DataSpec, UserError

RESERVE = 0.92
"""Share of a GPU's memory that tensors may fill: the rest is CUDA's own, libraries' workspaces, fragments."""

ASSUMED_MFU = {"gpu": 0.40, "measured": 0.45}
"""Where --mfu is not given: of a GPU's peak, a middling figure of large transformer trainings; of this
machine's own matrix product, about what the demo's step reaches on a CPU (benchmarks/README.md)."""

GPUS_PER_MACHINE = 8
DAY = 86400.0
Kind = Literal["single", "ddp", "fsdp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to plan for: GPUs, the device, the share of its peak that the products of a training reach (MFU),
    and the samples that the training is to see."""

    gpus: int
    device: Device
    mfu: float
    samples: float

    def __post_init__(self) -> None:
        limits = {
            "--gpus": (self.gpus, 1, math.inf),
            "--memory": (self.device.memory / 1e9, 1e-6, math.inf),
            "--mfu": (self.mfu, 1e-6, 1),
            "the number of samples": (self.samples, 1, math.inf),
        }
        for name, (value, least, most) in limits.items():
            if not (least <= value <= most and math.isfinite(value)):
                upwards = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of at least {least:g}"
                raise UserError(f"{name} is {value:g}; give a number {upwards}.")

    @property
    def bandwidth(self) -> float:
        """Bytes per second between the GPUs: inside a machine, or from one to another."""
        return self.device.link if self.gpus <= GPUS_PER_MACHINE else self.device.network


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one GPU: of tensors, max(`constant` + `sample` * rows, `step`), the second in the optimiser's
    step; and `process`, what the process holds beside them."""

    constant: float
    sample: float
    step: float
    process: float = 0.0

    def at(self, rows: int) -> float:
        """The peak of all with micro-batches of `rows`."""
        return max(self.constant + self.sample * rows, self.step) + self.process

    def largest(self, room: float) -> int:
        """The most rows that fit in `room` bytes; 0 if none do."""
        if self.step + self.process > room:
            return 0
        return max(0, math.floor((room - self.process - self.constant) / self.sample))


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run the training, on one GPU or all of them.

    `largest` is the largest micro-batch of a GPU that fits, `rows` the one that is used, `micro_batches` how
    many of them make the config's global batch; `sent` the bytes that each GPU sends in an update. Where
    nothing fits, or the GPUs do not divide the batch, `why_not` says so and times are infinite.
    """

    kind: Kind
    recompute: bool
    gpus: int
    memory: Memory
    largest: int
    rows: int
    micro_batches: int
    peak: float
    sent: float
    compute_seconds: float
    step_seconds: float
    days: float
    why_not: str

    @property
    def name(self) -> str:
        """As in the table."""
        return self.kind + (" + recompute" if self.recompute else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that was predicted, and what for."""

    request: Request
    spec: DataSpec
    precision: Precision
    global_batch: int
    steps: int
    tokens: int
    parts: Parts
    flops: Flops
    ways: tuple[Way, ...]
    features: int = 0
    """Bytes of a picture in the feature cache; 0: there is none."""


def plan_run(
    config: RunConfig,
    *,
    gpus: int,
    device: str = "h100",
    memory: float | None = None,
    mfu: float | None = None,
    episodes: float | None = None,
    frames: float = 150.0,
) -> Plan:
    """`tutti plan`; `memory` in GB, the device's where it is not given.

    The samples are `episodes` * `frames`, each frame being a window; else `training.steps` updates of the
    config's batch.

    Raises: UserError for an unknown device, or numbers out of range.
    """
    config = with_steps(config, say=False)
    measured = device == "measured"
    precision = config.training.precision
    if precision == "auto":  # what it means there: bf16 on GPUs, fp32 on this machine's CPU
        precision = "fp32" if measured else "bf16"
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"precision": precision})}
    )
    target = find_device(device, precision)
    of_config = float(config.training.steps * config.data.batch_size * config.training.accumulation)
    request = Request(
        gpus=gpus,
        device=target if memory is None else replace(target, memory=memory * 1e9),
        mfu=ASSUMED_MFU["measured" if measured else "gpu"] if mfu is None else mfu,
        samples=of_config if episodes is None else episodes * frames,
    )
    return make_plan(config, expected_spec(config), request)


def make_plan(config: RunConfig, spec: DataSpec, request: Request) -> Plan:
    """Predicts a training of `config`, whose precision is decided on, from fake tensors of `spec`'s sizes."""
    gpu, global_batch = not request.device.process, config.data.batch_size * config.training.accumulation
    flops, sizes = count_flops(config, spec, gpu=gpu), sizes_near(global_batch, request.gpus)
    parts, peaks, tokens, features = _measured(config, spec, sizes=sizes, gpu=gpu)
    kinds: tuple[Kind, ...] = ("single", "ddp", "fsdp") if request.gpus > 1 else ("single",)
    return Plan(
        request=request,
        spec=spec,
        precision=precision_of(config),
        global_batch=global_batch,
        steps=math.ceil(request.samples / global_batch),
        tokens=tokens,
        parts=parts,
        flops=flops,
        features=features,
        ways=tuple(
            _way(
                kind,
                peaks[again],
                again=again,
                parts=parts,
                flops=flops,
                request=request,
                config=config,
            )
            for kind in kinds
            for again in (False, True)
        ),
    )


def precision_of(config: RunConfig) -> Precision:
    """That of a config that has been decided on."""
    return "bf16" if config.training.precision == "bf16" else "fp32"


def sizes_near(global_batch: int, gpus: int) -> tuple[int, int]:
    """Two micro-batches near the one that will be used: the line through both is the prediction."""
    rows = min(max(4, global_batch // gpus), 64)
    return rows, 2 * rows


def _measured(
    config: RunConfig, spec: DataSpec, sizes: tuple[int, int], *, gpu: bool
) -> tuple[Parts, dict[bool, tuple[Peaks, Peaks]], int, int]:
    """What lives through the training; the peaks at both sizes without and with recomputation; the tokens;
    the bytes of a picture in the feature cache."""
    peaks: dict[bool, tuple[Peaks, Peaks]] = {}
    accumulation = config.training.accumulation
    with fake_update(config, spec, gpu=gpu) as (trial, memory):
        for again in (False, True):
            recompute(trial, again)
            first, second = (trial.peaks(memory, size, accumulation) for size in sizes)
            peaks[again] = (first, second)
        model = trial.model
        moments = len(spec.history)
        seen = len(spec.views) * model.vision.tokens_per_view
        tokens = 1 + model.language.num_tokens + moments * (1 + seen)
        features = model.vision.record_bytes if isinstance(model.vision, PretrainedVision) else 0
        return trial.parts(), peaks, tokens, features


def memory_on(kind: Kind, gpus: int, parts: Parts, peaks: tuple[Peaks, Peaks], config: RunConfig) -> Memory:
    """Bytes of the tensors on one GPU.

    single  the measured line: weights, optimiser, averages, gradients as they grow, activations
    ddp     the same and DDP's buckets, a second copy of the gradients
    fsdp    a share 1/n of what lives, and gathered: what belongs to no block, two blocks (one is fetched
            while another computes) and one block's gradient; activations as before. Weights that are gathered
            in float32 are cast as on one GPU, those gathered in bf16 need no cast. With several micro-batches
            the gradients live whole until the last.
    """
    first, second = peaks
    sample = (second.passes - first.passes) / (second.size - first.size)
    constant = first.passes - sample * first.size
    step = float(max(first.step, second.step))
    if kind == "single":
        return Memory(constant=constant, sample=sample, step=step)
    if kind == "ddp":
        return Memory(constant=constant + parts.gradients, sample=sample, step=step + parts.gradients)
    width = gathered_width(config)
    gathered = width * (parts.outside + 2 * parts.block) + 4 * parts.block
    casts = 2 * parts.trainable if config.training.precision == "bf16" else 0
    temporary = step - parts.fixed
    alone = temporary if config.training.optimizer.kind == "muon" else temporary / gpus
    return Memory(
        constant=max(constant - casts, parts.fixed - parts.gradients) / gpus
        + gathered
        + (casts if width == 4 else 0),
        sample=sample,
        step=parts.fixed / gpus + max(0.0, alone),
    )


def gathered_width(config: RunConfig) -> int:
    """Bytes of a weight that FSDP gathers (`training.parallel.communication`, where that is chosen)."""
    parallel = config.training.parallel
    return 2 if parallel.kind == "fsdp" and parallel.communication == "bf16" else 4


def sent_bytes(kind: Kind, gpus: int, parts: Parts, *, width: int, micro_batches: int) -> float:
    """Bytes that a GPU sends in an update, by ring algorithms; `width` is that of a weight on its way.

    ddp   2 (n - 1) / n * gradients, at the last micro-batch
    fsdp  (n - 1) / n * weights gathered, forward and backward, in every micro-batch, and (n - 1) / n *
          gradients reduced and scattered at the last
    """
    share = (gpus - 1) / gpus
    if kind == "single":
        return 0.0
    if kind == "ddp":
        return 2 * share * parts.gradients
    gathered = width * parts.total
    return share * (2 * micro_batches * gathered + parts.gradients)


def _way(
    kind: Kind,
    peaks: tuple[Peaks, Peaks],
    *,
    again: bool,
    parts: Parts,
    flops: Flops,
    request: Request,
    config: RunConfig,
) -> Way:
    device = request.device
    gpus = 1 if kind == "single" else request.gpus
    memory = replace(memory_on(kind, gpus, parts, peaks, config), process=device.process)
    global_batch = config.data.batch_size * config.training.accumulation
    wanted = global_batch // gpus
    largest = memory.largest(device.memory * RESERVE)
    if kind == "fsdp" and largest < wanted:  # gradients are shared out after the last micro-batch only
        memory = replace(memory, constant=memory.constant + (1 - 1 / gpus) * parts.gradients)
        largest = memory.largest(device.memory * RESERVE)
    why_not = ""
    if wanted == 0:
        why_not = f"the global batch of {global_batch} is smaller than the number of GPUs"
    elif global_batch % gpus:
        why_not = f"the global batch of {global_batch} cannot be shared out evenly"
    elif largest == 0:
        why_not = f"needs {memory.at(1) / 1e9:.1f} GB for one sample"
    rows = max(1, min(largest, wanted))
    micro_batches = max(1, math.ceil(wanted / rows))
    rows = max(1, math.ceil(wanted / micro_batches))
    sent = sent_bytes(kind, gpus, parts, width=gathered_width(config), micro_batches=micro_batches)
    share = gpus if kind == "fsdp" else 1  # of the optimizer's work; Muon's matrices are divided, too
    work = flops.hardware(again) * rows * micro_batches + flops.optimizer / share
    computing = work / (device.peak(precision_of(config)) * request.mfu)
    # Beside the products the step reads gradients, and reads and writes weights, state and averages.
    moved = float(parts.gradients) + 2 * (parts.weights + parts.optimizer + parts.ema)
    computing += moved / share / device.memory_bandwidth
    seconds = computing + exposed_seconds(kind, sent / request.bandwidth, computing)
    if why_not:
        seconds = math.inf
    return Way(
        kind=kind,
        recompute=again,
        gpus=gpus,
        memory=memory,
        largest=largest,
        rows=rows,
        micro_batches=micro_batches,
        peak=memory.at(rows),
        sent=sent,
        compute_seconds=computing,
        step_seconds=seconds,
        days=seconds * math.ceil(request.samples / global_batch) / DAY,
        why_not=why_not,
    )


def exposed_seconds(kind: Kind, sending: float, computing: float) -> float:
    """What of the sending is not hidden: DDP sends beside the backward pass (two thirds of the work), FSDP
    beside all of it."""
    hidden = {"single": 0.0, "ddp": 2 / 3 * computing, "fsdp": computing}[kind]
    return max(0.0, sending - hidden)

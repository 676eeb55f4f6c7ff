"""Prints a plan as tables, or gives it as plain values for JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from pydantic_core import to_json

from tutti.planning.plan import DAY, GPUS_PER_MACHINE, RESERVE, Plan, Way
from tutti.runs.data_inspect import print_robots
from tutti.runs.terminal import print_line, print_table

SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
LARGE_SHARE = 0.05
"""Share of an update's FLOPs above which the optimizer's are spoken of."""
TIMES = ((DAY, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON takes it; an infinite time is null."""
    found = asdict(plan)
    for way, own in zip(plan.ways, found["ways"], strict=True):
        own["name"] = way.name
    found["parts"] |= {"total": plan.parts.total, "fixed": plan.parts.fixed}
    found["flops"] |= {"model": plan.flops.model, "hardware": plan.flops.hardware(recompute=True)}
    found["request"]["bandwidth"] = plan.request.bandwidth
    found["assumptions"] = assumptions(plan)
    return json.loads(to_json(found, inf_nan_mode="null"))


def assumptions(plan: Plan) -> list[str]:
    """What the prediction rests on, in sentences."""
    request, device = plan.request, plan.request.device
    where = "between machines" if request.gpus > GPUS_PER_MACHINE else "inside the machine"
    kept = [
        "On a CPU malloc may keep freed tensors, up to a third of the rest again, unless "
        "MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ are set, which costs time (docs/how-to/plan.md)."
    ]
    views, frame = len(plan.spec.views), len(plan.spec.views) * plan.features
    cached = [
        f"The feature cache takes {in_bytes(1e3 * frame)} of disk for 1,000 frames of {views} views, up to "
        "model.vision.cache MiB; the vision tower's forward pass, counted here, is of the first epoch alone."
    ]
    return [
        f"{device.name}: {device.peak(plan.precision) / 1e12:.3g} TFLOP/s peak in {plan.precision}, of which "
        f"a training reaches {100 * request.mfu:.0f} % (--mfu); recomputation counts as work.",
        f"Tensors and {in_bytes(device.process)} of the process fill {100 * RESERVE:.0f} % "
        f"of {device.memory / 1e9:.4g} GB (--memory); no two texts are the same.",
        f"{request.bandwidth / 1e9:g} GB/s {where}; DDP hides it behind the backward pass, FSDP behind all.",
        *(kept if device.process else ()),
        *(cached if plan.features else ()),
        *optimizer_products(plan),
        f"{request.samples:,.0f} samples in updates of {plan.global_batch:,}; data come as fast as wanted.",
    ]


def optimizer_share(plan: Plan) -> float:
    """The optimizer's share of the FLOPs of an update on one GPU; Muon's do not grow with the batch."""
    return plan.flops.optimizer / (plan.flops.optimizer + plan.flops.model * plan.global_batch)


def optimizer_products(plan: Plan) -> list[str]:
    """What to do where the optimizer's products are more than `LARGE_SHARE` of an update."""
    if (share := optimizer_share(plan)) <= LARGE_SHARE:
        return []
    batch = math.ceil(plan.flops.optimizer * (1 / LARGE_SHARE - 1) / plan.flops.model)
    return [
        f"Muon's products are {100 * share:.0f} % of an update's on one GPU, since they do not shrink with "
        f"the batch: {100 * LARGE_SHARE:.0f} % at {batch:,} samples an update (data.batch_size x "
        "training.accumulation); training.optimizer.kind=adamw has none."
    ]


def print_plan(plan: Plan, *, as_json: bool = False) -> None:
    """Parameters, bytes and FLOPs, then one line for each way to run it. Or all of it as JSON."""
    if as_json:
        print(json.dumps(plain(plan), indent=1))
        return
    parts, flops = plan.parts, plan.flops
    print_robots(plan.spec.embodiments, plan.spec.robots)
    rows = [(f"parameters: {name}", f"{count:,}") for name, count in parts.parameters.items()]
    rows.append(("parameters", f"{parts.total:,}"))
    if parts.trainable < parts.total:
        rows.append(("parameters that learn", f"{parts.trainable:,}"))
    for name in ("weights", "gradients", "optimizer", "ema"):
        rows.append((f"bytes: {name}", in_bytes(float(getattr(parts, name)))))
    for way in plan.ways:
        if way.kind == "single":
            again = ", recomputed" if way.recompute else ""
            rows.append((f"bytes: a sample's activations{again}", in_bytes(way.memory.sample)))
    rows += [
        ("bytes: the process beside its tensors", in_bytes(plan.request.device.process)),
        ("tokens in the fusion", f"{plan.tokens:,}"),
        ("FLOPs of a sample, forward", scaled(flops.forward).strip()),
        ("FLOPs of a sample, backward", scaled(flops.backward).strip()),
        ("FLOPs that checkpointing adds", scaled(flops.recomputed).strip()),
        ("FLOPs of the optimizer, per update", scaled(flops.optimizer).strip()),
        ("its share of an update's, one GPU", f"{100 * optimizer_share(plan):.1f} %"),
    ]
    print_table("Model, memory and FLOPs", ("what", "value"), rows, narrow=True)
    heads = ("way", "GPUs", "largest", "batch", "memory", "sent", "update", "in all")
    title = f"{plan.steps:,} updates of {plan.global_batch:,} samples"
    print_table(title, heads, [_row(way) for way in plan.ways], narrow=True)
    for way in plan.ways:
        if way.why_not:
            print_line(f"{way.name} on {way.gpus}: {way.why_not}.")
    for sentence in assumptions(plan):
        print_line(sentence)


def _row(way: Way) -> tuple[str, ...]:
    start = ("  recomputed" if way.recompute else way.kind, f"{way.gpus:,}", f"{way.largest:,}")
    if way.why_not:
        return (*start, "-", in_bytes(way.peak), "-", "-", "-")
    batch = f"{way.micro_batches} x {way.rows}"
    times = (scaled(seconds, TIMES) for seconds in (way.step_seconds, way.days * DAY))
    return (*start, batch, in_bytes(way.peak), in_bytes(way.sent), *times)


def in_bytes(value: float) -> str:
    """73.1 GB."""
    return f"{scaled(value)}B"


def scaled(value: float, units: tuple[tuple[float, str], ...] = SIZES) -> str:
    """Three significant digits and the largest unit that leaves at least 1, so that no size shows as 0."""
    size, unit = next(((size, unit) for size, unit in units if abs(value) >= size), units[-1])
    number = f"{value / size:.3g}"
    return f"{float(number):,.0f} {unit}" if "e" in number else f"{number} {unit}"

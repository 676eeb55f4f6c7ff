"""What a GPU does with Tutti: ceilings, throughput, attention and block micro-benchmarks, a kernel profile.

Run by benchmarks/gpu_check.sh. Each section has a deadline and a guard: a section that fails is reported with
its traceback, the others run, and the exit code is 1. What is known so far is on disk ($OUT/gpu_check.md and
.json): a killed run loses nothing.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from frame import DEMO
from recorded import synthetic_run
from throughput import found_of, measure, peak_of, release
from timing import shortened, with_training
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tutti.config.run_config import RunConfig, load_config
from tutti.distributed.ranks import ONE_RANK
from tutti.models.layers import Block
from tutti.runs.build import build_training
from tutti.runs.provenance import circumstances
from tutti.training.data_feed import feed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OUT = Path(os.environ.get("OUT", "gpu_out"))
BEGAN = float(os.environ.get("BEGAN", time.time()))
LIMIT = float(os.environ.get("LIMIT", "465"))

OPTIONS = {
    "fp32": "training.precision=fp32",
    "bf16": "training.precision=bf16",
    "compile": "training.compile=blocks",
    "whole": "training.compile=model",
    "adamw": "training.optimizer={kind: adamw, lr: 1.0e-3}",
    "any": "training.deterministic=false",
    "recompute": "training.activation_checkpointing=block",
    "residual": "training.residual=bf16",
    "nobias": "model={vision: {bias: false}, language: {bias: false}, fusion: {bias: false}}",
}
"""Parts of a cell's option, joined by "+"."""
SECTIONS = os.environ.get("SECTIONS", "attention blocks").split()
"""The micro-benchmarks behind the cells."""
CELLS = (
    "base,224,256,bf16+compile* large,224,128,bf16+compile+adamw+residual+nobias "
    "base,224,256,bf16+compile+adamw* small,224,512,bf16+compile+adamw* "
    "base,224,256,bf16+compile+adamw+residual+nobias+any base,224,256,bf16+compile+residual "
    "large,224,128,bf16+compile+adamw base,224,64,bf16+compile+adamw"
    if CUDA
    else "tiny,64,4,fp32+adamw tiny,64,4,bf16+residual+nobias"
)
"""What `Cell.parse` reads: preset, image size, batch size, option; those with a * are profiled too. First
what has not been measured: Muon's directions before the wait (without "adamw" it is the demo's Muon), base
with sizes as numbers behind large in one process, small with its stem compiled."""

KERNELS = {
    "optimizer": r"multi_tensor|adam|lerp|foreach",
    "attention": r"flash|fmha|attention|sdpa",
    "convolution": r"conv|implicit|cudnn",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|splitK",
    "triton": r"^triton",
    "copies": r"memcpy|memset|copy|cat",
    "elementwise and reductions": r".",
}
"""Kinds of kernels by their names; the first that matches counts."""

lines: list[str] = []
result: dict[str, Any] = {"device": torch.cuda.get_device_name() if CUDA else "cpu", **circumstances()}


def report(text: str) -> None:
    """Prints a line and writes all that is known so far to disk."""
    print(text, flush=True)
    lines.append(text)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "gpu_check.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (OUT / "gpu_check.json").write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")


def section(name: str, work: Callable[[], None], *, need: float) -> bool:
    """Runs a section if `need` seconds are left. True if it ran without an error or was left out."""
    left = LIMIT - (time.time() - BEGAN)
    if left < need:
        report(f"-- {name}: left out, {left:.0f} s remain")
        return True
    started, failed = time.time(), False
    try:
        work()
    except Exception:
        failed = True
        report(f"-- {name}: FAILED\n" + "".join(traceback.format_exc().splitlines(keepends=True)[-14:]))
    report(f"-- {name}: {time.time() - started:.0f} s, at {time.time() - BEGAN:.0f} s")
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return not failed


def median_ms(work: Callable[[], object], repeats: int = 12, warmup: int = 4) -> float:
    """Median milliseconds of `work` on the GPU, by events; on a CPU one run by the wall clock."""
    if not CUDA:
        work()
        started = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - started)
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        work()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def ceilings() -> None:
    """A large bf16 product, a copy, and the products of a transformer block in their three directions."""
    n = 8192 if CUDA else 64
    # Random numbers: a product of constants was seen to run 13 % faster.
    left, right = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    rate = 2 * n**3 / median_ms(lambda: left @ right) * 1e3
    source = torch.randn(2**28 if CUDA else 2**16, device=DEVICE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median_ms(lambda: target.copy_(source)) * 1e3
    result["matmul"], result["copy"] = rate, bandwidth
    report(f"bf16 {n}^3: {rate / 1e12:.3g} TFLOP/s; copy {bandwidth / 1e12:.2g} TB/s")
    tokens = 101_888 if CUDA else 32
    rows = [
        (width, name, *product_rates(tokens, *sizes))
        for width in ((768, 1280) if CUDA else (32,))
        for name, sizes in {
            "qkv": (width, 3 * width),
            "out": (width, width),
            "mlp in": (width, 4 * width),
            "mlp out": (4 * width, width),
        }.items()
    ]
    result["products"] = rows
    report("products, TFLOP/s (width, name, forward, d input, d weight): " + "; ".join(map(str, rows)))


def product_rates(tokens: int, inputs: int, outputs: int) -> tuple[float, ...]:
    """TFLOP/s of a linear layer in bf16: forward, gradient of the input, gradient of the weight."""
    x = torch.randn(tokens, inputs, device=DEVICE).bfloat16()
    weight = torch.randn(outputs, inputs, device=DEVICE).bfloat16()
    gradient = torch.randn(tokens, outputs, device=DEVICE).bfloat16()
    times = (
        median_ms(lambda: functional.linear(x, weight)),
        median_ms(lambda: gradient @ weight),
        median_ms(lambda: gradient.T @ x),
    )
    return tuple(round(2 * tokens * inputs * outputs / ms / 1e9, 1) for ms in times)


def attention() -> None:
    """Forward and backward of each attention kernel, with and without a mask, deterministic and not."""
    dtype = torch.bfloat16 if CUDA else torch.float32
    report("attention, forward + backward (tokens, kernel, order, ms, TFLOP/s):")
    for b, h, n, e in ((256, 12, 398, 64), (512, 12, 196, 64)) if CUDA else ((2, 2, 16, 8),):
        # As a block hands them over: side by side in what one linear layer gave.
        joined = torch.randn(b, n, 3, h, e, device=DEVICE, dtype=dtype).permute(2, 0, 3, 1, 4)
        q, k, v = (one.requires_grad_() for one in joined.unbind(0))
        everywhere = torch.ones(b, 1, 1, n, dtype=torch.bool, device=DEVICE)
        kernels = {
            "flash": (SDPBackend.FLASH_ATTENTION, None),
            "efficient, mask": (SDPBackend.EFFICIENT_ATTENTION, everywhere),
            "efficient": (SDPBackend.EFFICIENT_ATTENTION, None),
            "cudnn": (SDPBackend.CUDNN_ATTENTION, None),
            "cudnn, mask": (SDPBackend.CUDNN_ATTENTION, everywhere),
            "math": (SDPBackend.MATH, None),
        }
        for deterministic in (True, False):
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = False  # filling is not part of the kernel
            for name, (backend, mask) in kernels.items():
                row = (n, name, "deterministic" if deterministic else "any order")
                try:
                    with sdpa_kernel(backend):
                        ms = attention_ms(q, k, v, mask)
                    row = (
                        *row,
                        round(ms, 3),
                        round(14 * b * h * n * n * e / ms / 1e9, 1),
                    )  # 4 forward, 10 backward
                except RuntimeError as error:  # this kernel is not there for such inputs: that is the finding
                    row = (*row, "-", str(error).splitlines()[0][:60])
                result.setdefault("attention", []).append(row)
                report(f"   {row}")
    torch.use_deterministic_algorithms(False)


def attention_ms(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> float:
    gradient = torch.randn_like(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    def step() -> None:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.autograd.grad(out, (q, k, v), gradient)

    return median_ms(step)


def blocks() -> None:
    """One transformer block: what a mask, the float32 stream and the compiler cost."""
    b, n, width, heads = (256, 398, 768, 12) if CUDA else (2, 16, 32, 2)
    flops = 3 * (24 * b * n * width**2 + 4 * b * n**2 * width)
    report(
        f"one block of width {width}, {b} x {n} tokens, forward + backward (stream, mask, mode, ms, TFLOP/s):"
    )
    for stream in (torch.float32, torch.bfloat16) if CUDA else (torch.float32,):
        for masked in (True, False):
            for compiled in (False, True) if CUDA else (False,):
                ms = block_ms(b, n, width, heads, stream=stream, masked=masked, compiled=compiled)
                mode = ("mask" if masked else "no mask", "compiled" if compiled else "eager")
                row = (str(stream)[6:], *mode, round(ms, 2), round(flops / ms / 1e9, 1))
                result.setdefault("blocks", []).append(row)
                report(f"   {row}")
                release()


def block_ms(
    b: int, n: int, width: int, heads: int, *, stream: torch.dtype, masked: bool, compiled: bool
) -> float:
    block = Block(width, heads).to(DEVICE, stream)
    run = torch.compile(block, fullgraph=True) if compiled else block
    x = torch.randn(b, n, width, device=DEVICE, dtype=stream, requires_grad=True)
    mask = torch.ones(b, 1, 1, n, dtype=torch.bool, device=DEVICE) if masked else None
    gradient = torch.randn_like(x)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA and stream == torch.float32):
            out = run(x, mask)
        out.backward(gradient)

    return median_ms(step, repeats=8, warmup=3)


class Cell(NamedTuple):
    """One setting whose throughput is measured."""

    preset: str
    size: int
    rows: int
    option: str

    @classmethod
    def parse(cls, text: str) -> Cell:
        preset, size, rows, option = text.split(",")
        return cls(preset, int(size), int(rows), option)

    def config(self) -> RunConfig:
        """The demo's config with this preset, picture size, batch and option."""
        keys = [OPTIONS[part] for part in self.option.split("+")]
        sizes = (f"model.size={self.preset}", f"data.image_size={self.size}", f"data.batch_size={self.rows}")
        config = load_config(DEMO, [*sizes, *keys, "training.diagnostics.every=0"])
        return with_training(config, device=DEVICE, threads=torch.get_num_threads())

    def __str__(self) -> str:
        return f"{self.preset:6s} {self.size} px batch {self.rows:4d} {self.option:20s}"


def throughput(cell: Cell, data_from: Path, scratch: Path) -> None:
    """Samples per second, MFU against the data sheet and against the measured product, memory, data wait."""
    config = cell.config()
    steps = 20 if CUDA else 1
    got = measure(config, data_from, scratch, steps=steps, warmup=4 if CUDA else 1)
    peak = peak_of(config.training.precision)[1]
    one = found_of(config, data_from, preset=cell.preset, option=cell.option, peak=peak, got=got)
    of_product = one.flops_per_sample * one.samples_per_second / result["matmul"]
    result.setdefault("cells", []).append({**asdict(one), "image": cell.size, "of_product": of_product})
    report(
        f"   {cell} {one.samples_per_second:8.1f} samples/s "
        f"{1000 * cell.rows / one.samples_per_second:7.1f} ms "
        f"{one.flops_per_sample / 1e9:7.1f} GFLOP/sample, MFU {100 * one.mfu:4.1f} % of the data sheet, "
        f"{100 * of_product:4.1f} % of the measured product; "
        f"peak {one.peak_memory / 1e9:5.1f} GB; data wait {100 * one.data_share:.1f} %"
    )


def gaps(spans: Iterable[tuple[float, float]]) -> list[float]:
    """The times between spans (start, end) in which none goes on, longest first."""
    found, until = list[float](), -math.inf
    for start, end in sorted(spans):
        if start > until > -math.inf:
            found.append(start - until)
        until = max(until, end)
    return sorted(found, reverse=True)


def profile(cell: Cell, number: int, data_from: Path, scratch: Path) -> None:
    """Three updates under torch's profiler: how busy the GPU is, and with which kinds of kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    training = build_training(shortened(cell.config(), 1_000_000), data_from, output=scratch)
    try:
        with feed(training.data, ONE_RANK, training.trainer.machine.device) as moved:
            stream = iter(moved.train)
            training.run_updates(range(4), stream)
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=activities) as seen:
                started = time.perf_counter()
                training.run_updates(range(4, 7), stream)
                torch.cuda.synchronize()
                wall = 1000 * (time.perf_counter() - started) / 3
    finally:
        training.data.train.close()
    # An annotation ("Optimizer.step#...") spans kernels and gaps between them: it is none itself.
    kernels = [
        event
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    by_kind = dict.fromkeys(KERNELS, 0.0)
    for event in kernels:
        kind = next(
            kind for kind, pattern in KERNELS.items() if re.search(pattern, event.name, re.IGNORECASE)
        )
        by_kind[kind] += event.device_time / 3000
    busy = sum(by_kind.values())
    # In us; one an update is the one wait, if the host has queued nothing that goes on meanwhile.
    holes = [gap / 1000 for gap in gaps((one.time_range.start, one.time_range.end) for one in kernels)][:9]
    result.setdefault("profiles", {})[str(cell)] = {
        "wall_ms": wall,
        "busy_ms": busy,
        "kernels": len(kernels) / 3,
        "longest_gaps_ms": holes,
        **by_kind,
    }
    report(
        f"profile of {cell}: {wall:.1f} ms an update with the profiler, "
        f"GPU busy {busy:.1f} ms, {len(kernels) / 3:.0f} kernels and copies; "
        f"longest times without any, in three updates: {', '.join(f'{ms:.2f}' for ms in holes)} ms"
    )
    for kind, ms in sorted(by_kind.items(), key=lambda one: -one[1]):
        report(f"   {kind:28s} {ms:7.2f} ms  {100 * ms / busy:4.1f} %")
    table = seen.key_averages().table(
        sort_by="self_device_time_total", row_limit=60, max_name_column_width=90
    )
    (OUT / f"profile-{number}.txt").write_text(table, encoding="utf-8")


def main() -> int:
    """0 if no section failed."""
    torch.set_num_threads(4 if CUDA else 1)
    passed = [section("ceilings", ceilings, need=20 if CUDA else 0)]
    with tempfile.TemporaryDirectory(prefix="tutti-gpu-") as name:
        scratch = Path(name)
        sizes = (4, 40) if CUDA else (1, 16)
        data_from = synthetic_run(scratch / "data", load_config(DEMO), *sizes)
        for number, text in enumerate(os.environ.get("CELLS", CELLS).split()):
            cell = Cell.parse(text.rstrip("*"))
            measured = partial(throughput, cell, data_from, scratch / f"run-{number}")
            passed.append(section(text, measured, need=45 if CUDA else 0))
            release()
            if text.endswith("*") and CUDA:
                profiled = partial(profile, cell, number, data_from, scratch / f"profile-{number}")
                passed.append(section("profile", profiled, need=40))
                release()
    for work, need in ((attention, 25), (blocks, 30)):
        if work.__name__ in SECTIONS:
            passed.append(section(work.__name__, work, need=need if CUDA else 0))
    report(f"end at {time.time() - BEGAN:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())

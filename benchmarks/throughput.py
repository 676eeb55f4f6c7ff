"""Samples per second, MFU and memory of presets with options, by the Trainer's own step.

python benchmarks/throughput.py [--presets small base] runs on CUDA where torch sees a card, else on the CPU
and says so. benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from frame import DEMO
from memory_cell import forget_peak, resident_peak
from recorded import synthetic_run
from tables import RESULTS, Table, prints_user_errors, publish
from timing import matmul_rates, shortened, with_training, work_clock

from tutti.config.run_config import RunConfig, load_config
from tutti.distributed.ranks import ONE_RANK
from tutti.planning.devices import device_of_card, measured_device
from tutti.planning.footprint import count_flops
from tutti.runs.build import build_data, build_training
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.training.data_feed import feed
from tutti.training.device import resolve_machine

OPTIONS: dict[str, tuple[str, ...]] = {
    "fp32": ("training.precision=fp32",),
    "bf16": ("training.precision=bf16",),
    "bf16, compile": ("training.precision=bf16", "training.compile=blocks"),
    "bf16, compile, adamw": (
        *("training.precision=bf16", "training.compile=blocks"),
        "training.optimizer={kind: adamw, lr: 1.0e-3}",
    ),
    "bf16, compile, any order": (
        *("training.precision=bf16", "training.compile=blocks"),
        "training.deterministic=false",
    ),
    "bf16, recompute": ("training.precision=bf16", "training.activation_checkpointing=block"),
}
BY_NAME = {"bf16, compile model": ("training.precision=bf16", "training.compile=model")}
"""Options that are measured where they are asked for: a deep model takes minutes to compile."""
OPTIONS |= BY_NAME
GPU_ROWS = {"tiny": 1024, "small": 1024, "base": 1024, "large": 512}
CPU_ROWS = {"tiny": 64, "small": 32, "base": 16, "large": 1}
GPU_STEPS = {"tiny": 50, "small": 20, "base": 20, "large": 20}
CPU_STEPS = {"tiny": 10, "small": 3, "base": 1, "large": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One preset with one option. MFU = FLOPs of model and terms, forward and backward, per sample, times
    samples per second, over the peak; recomputation and the optimizer's products do not count as useful.
    `hardware_share` counts both. `peak_memory` is that of CUDA's tensors, on a CPU of the whole process."""

    preset: str
    option: str
    rows: int
    samples_per_second: float
    flops_per_sample: float
    mfu: float
    hardware_share: float
    peak_memory: float
    data_share: float


def measure(
    config: RunConfig, data_from: Path, scratch: Path, *, steps: int, warmup: int
) -> dict[str, float]:
    """`steps` of the Trainer's own updates behind `warmup` that do not count, batches moved ahead on CUDA."""
    training = build_training(shortened(config, 1_000_000), data_from, output=scratch)
    trainer, data = training.trainer, training.data
    device = trainer.machine.device
    _, now = work_clock(device.type, torch.get_num_threads())
    try:
        with feed(data, ONE_RANK, device, config.training.accumulation) as moved:
            stream = iter(moved.train)
            training.run_updates(range(warmup), stream)
            trainer.timer.take(0)
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            else:
                forget_peak()
            started = now()
            for step in range(warmup, warmup + steps):
                training.run_updates((step,), stream)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = now() - started
        samples = steps * config.data.batch_size * config.training.accumulation
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()
        return {
            "samples_per_second": samples / seconds,
            "peak_memory": float(peak),
            "data_share": trainer.timer.take(samples)["time/data_share"],
        }
    finally:
        data.train.close()


def peak_of(precision: str) -> tuple[str, float]:
    """The device's name and its FLOP/s at this precision: by its data sheet, or by this machine's matmul."""
    low = precision == "bf16"
    if torch.cuda.is_available() and (known := device_of_card(torch.cuda.get_device_name())):
        return torch.cuda.get_device_name(), known.peak("bf16" if low else "fp32")
    if torch.cuda.is_available():
        device = measured_device("bf16" if low else "fp32")
        return device.name, device.peak("bf16" if low else "fp32")
    _, now = work_clock("cpu", torch.get_num_threads())
    return "this CPU", max(matmul_rates(dtype=torch.bfloat16 if low else torch.float32, clock=now))


def table_of(rows: Sequence[Found]) -> Table:
    """One line for each preset and option."""
    lines = [
        (
            *(one.preset, one.option, str(one.rows), f"{one.samples_per_second:.1f}"),
            *(f"{one.flops_per_sample / 1e9:.2f}", f"{100 * one.mfu:.1f} %"),
            *(f"{100 * one.hardware_share:.1f} %", f"{one.peak_memory / 1e9:.2f}"),
            f"{100 * one.data_share:.2f} %",
        )
        for one in rows
    ]
    heads = ("preset", "option", "batch", "samples/s", "GFLOP/sample", "MFU", "with optimizer", "peak GB")
    return Table(title="Throughput", heads=(*heads, "data wait"), rows=tuple(lines))


def benchmark(arguments: argparse.Namespace, scratch: Path) -> None:
    """Measures and publishes."""
    found_in = circumstances()
    cuda = torch.cuda.is_available()
    rows = GPU_ROWS if cuda else CPU_ROWS
    print_line(f"on {torch.cuda.get_device_name() if cuda else 'the CPU: torch sees no CUDA device'}")
    data_from = synthetic_run(scratch / "data", load_config(DEMO))
    found: list[Found] = []
    left_out: list[str] = []
    peaks: dict[str, tuple[str, float]] = {}
    for preset in arguments.presets:
        for option in arguments.options:
            size = arguments.batch or rows[preset]
            sizes = (f"model.size={preset}", f"data.batch_size={size}")
            config = load_config(DEMO, [*sizes, *OPTIONS[option], "training.diagnostics.every=0"])
            config = with_training(config, device="cuda" if cuda else "cpu", threads=arguments.threads)
            precision = config.training.precision
            peaks[precision] = peaks.get(precision) or peak_of(precision)
            folder = scratch / f"{preset}-{len(found)}"
            steps = arguments.steps or (GPU_STEPS if cuda else CPU_STEPS)[preset]
            print_line(f"{preset}, {option}, batch {size}: {steps} updates behind {arguments.warmup} ...")
            try:
                got = measure(config, data_from, folder, steps=steps, warmup=arguments.warmup)
            except torch.cuda.OutOfMemoryError:
                left_out.append(f"{preset}, {option}: a batch of {size} is too large for this card (--batch)")
                print_line(left_out[-1])
                continue
            finally:
                release()
            labels = {"preset": preset, "option": option}
            one = found_of(config, data_from, **labels, peak=peaks[precision][1], got=got)
            found.append(one)
            print_line(
                f"{preset}, {option}: {one.samples_per_second:.1f} samples/s, MFU {100 * one.mfu:.1f} %"
            )
    clock, _ = work_clock("cuda" if cuda else "cpu", torch.get_num_threads())
    notes = [
        "; ".join(
            f"Peak in {name}: {rate / 1e12:.3g} TFLOP/s ({card})" for name, (card, rate) in peaks.items()
        )
        + ("" if cuda else f". No CUDA device: the peak is a product of 2048^2 by the {clock}."),
        f"{arguments.steps or 'Updates by preset, all'} behind {arguments.warmup} that do not count. "
        f"Seconds are {clock}. Memory: the peak of "
        f"{'tensors on the card' if cuda else 'the whole process, data included'}. "
        f"{made_with(found_in)}",
        *left_out,
    ]
    result = {**found_in, "rows": [asdict(one) for one in found], "peaks": peaks}
    publish(arguments.output, "benchmarks/throughput", [table_of(found)], notes, result)


def found_of(
    config: RunConfig, data_from: Path, *, preset: str, option: str, peak: float, got: dict[str, float]
) -> Found:
    """What was measured, with the FLOPs for the sizes of the data that is trained on."""
    data = build_data(config, data_from)
    data.train.close()
    again = config.training.activation_checkpointing == "block"
    flops = count_flops(config, data.spec, gpu=torch.cuda.is_available())
    rate, rows = got["samples_per_second"], config.data.batch_size
    whole = flops.hardware(again) + flops.optimizer / (rows * config.training.accumulation)
    return Found(
        preset=preset,
        option=option,
        rows=rows,
        flops_per_sample=flops.model,
        mfu=flops.model * rate / peak,
        hardware_share=whole * rate / peak,
        **got,
    )


def release() -> None:
    """What the last preset held is given back before the next is built."""
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()  # what was compiled holds on to the blocks that it was compiled for
        torch.cuda.empty_cache()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    presets = ["small", "base", "large"] if cuda else ["tiny", "small", "base"]
    options = [name for name in OPTIONS if name not in BY_NAME] if cuda else ["fp32", "bf16"]
    parser.add_argument("--presets", nargs="+", choices=GPU_ROWS, default=presets)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=options)
    parser.add_argument("--batch", type=int, default=0, help="samples of an update; default: by preset")
    parser.add_argument("--steps", type=int, default=0, help="counted updates; default: by preset")
    parser.add_argument("--warmup", type=int, default=5 if cuda else 1, help="updates before, not counted")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0, or 2 for a mistake of the user."""
    arguments = parse(given)
    torch.set_num_threads(resolve_machine("auto", arguments.threads, "fp32").threads)
    with tempfile.TemporaryDirectory(prefix="tutti-benchmark-") as name:
        benchmark(arguments, Path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())

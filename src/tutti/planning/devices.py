"""Devices by name: their dense peak, memory and bandwidths, as their makers state them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from tutti.types import UserError

T, G = 1e12, 1e9
REPEATS = 5
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """`bf16` and `fp32` in dense FLOP/s, `memory` in bytes; `memory_bandwidth`, `link` (to the others of its
    machine, one way) and `network` (to other machines) in bytes per second. `process` are the bytes that a
    process holds there beside its tensors."""

    name: str
    bf16: float
    fp32: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    process: float = 0.0

    def peak(self, precision: Precision) -> float:
        """FLOP/s at this precision."""
        return self.bf16 if precision == "bf16" else self.fp32


_DATA_SHEETS = {  # TFLOP/s in bf16 and fp32, GB, GB/s of the memory and of the link
    "a100": (312.0, 19.5, 80.0, 2039.0, 300.0),
    "h100": (989.0, 67.0, 80.0, 3350.0, 450.0),
    "h100pcie": (756.0, 51.0, 80.0, 2000.0, 64.0),
    "h200": (989.0, 67.0, 141.0, 4800.0, 450.0),
    "b200": (2250.0, 75.0, 180.0, 8000.0, 900.0),
    "l40s": (362.0, 91.6, 48.0, 864.0, 32.0),
    "rtx4090": (165.0, 82.6, 24.0, 1008.0, 32.0),
}
DEVICES: dict[str, Device] = {
    name: Device(
        name=name,
        bf16=bf16 * T,
        fp32=fp32 * T,
        memory=memory * G,
        memory_bandwidth=bandwidth * G,
        link=link * G,
        network=50 * G,
    )
    for name, (bf16, fp32, memory, bandwidth, link) in _DATA_SHEETS.items()
}
"""Data sheets of the SXM cards (PCIe for h100pcie, l40s and rtx4090), without sparsity: bf16 on tensor cores,
fp32 outside of them, as torch computes unless TF32 is allowed. The network is taken as 400 Gbit/s a card."""

CPU_PROCESS: dict[Precision, float] = {"fp32": 490e6, "bf16": 545e6}
"""What a process on a CPU holds beside its tensors, measured on the tiny preset by benchmarks/memory.py:
Python and its modules, torch's code as far as it was used; in bf16 also oneDNN's programs, one for each shape
of a product. On a GPU the share that is left free stands for CUDA's context and the libraries."""


def find_device(name: str, precision: Precision) -> Device:
    """The device of this name; `measured`: this machine, by its matrix product at `precision`.

    Raises: UserError for an unknown name.
    """
    if name == "measured":
        return measured_device(precision)
    if name not in DEVICES:
        raise UserError(
            f"--device {name}: unknown. Known are {', '.join(DEVICES)} and measured (this machine); for "
            "another give the nearest, its --memory, and as --mfu the share of that one's peak."
        )
    return DEVICES[name]


def device_of_card(card: str) -> Device | None:
    """The device whose name is in what CUDA calls a card ("NVIDIA H100 80GB HBM3"); None if there is none."""
    plain = card.lower().replace(" ", "")
    named = [name for name in DEVICES if name in plain]
    return DEVICES[max(named, key=len)] if named else None


def measured_device(precision: Precision) -> Device:
    """This machine: the rates of a square matrix product and of a copy, the best of some.

    Only the rate at `precision` is measured; the other is NaN. The product is large on CUDA, where a small
    one takes less time than its launch. No cache holds what is copied.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    size, copied = (8192, 1024 * 2**20) if kind == "cuda" else (1024, 32 * 2**20)
    rate = product_rate(kind, torch.bfloat16 if precision == "bf16" else torch.float32, size)
    source = torch.zeros(copied // 4, device=kind)
    copy = torch.empty_like(source)
    seconds = min(timed(kind, lambda: copy.copy_(source)) for _ in range(REPEATS))
    main_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = torch.cuda.mem_get_info()[1] if kind == "cuda" else main_memory
    return Device(
        name=f"measured ({torch.cuda.get_device_name() if kind == 'cuda' else 'CPU'})",
        bf16=rate if precision == "bf16" else math.nan,
        fp32=rate if precision == "fp32" else math.nan,
        memory=float(memory),
        memory_bandwidth=2 * source.nbytes / seconds,
        link=1 * G,
        network=1 * G,
        process=CPU_PROCESS[precision] if kind == "cpu" else 0.0,
    )


def product_rate(kind: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two square matrices, the best of `REPEATS` after one that does not count."""
    left, right = (torch.ones(size, size, dtype=dtype, device=kind) for _ in range(2))
    seconds = [timed(kind, lambda: torch.mm(left, right)) for _ in range(REPEATS + 1)]
    return 2 * size**3 / min(seconds[1:])


def timed(kind: str, work: Callable[[], object]) -> float:
    """Seconds until the work is done on the device, too."""
    started = time.perf_counter()
    work()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started

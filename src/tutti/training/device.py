"""Resolves `auto` for device, threads and precision on this machine, each with its reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tutti.distributed.cores import processor_name, usable_cores
from tutti.training.rng import seed_everything
from tutti.types import UserError

FASTEST_FIRST = [
    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
]
_attention = ExitStack()
"""Holds the choice of attention's kernels open for the rest of the process: torch has no setter for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The resolved settings; `reasons` has one sentence for each. `processor` names what computes."""

    device: torch.device
    threads: int
    precision: Literal["fp32", "bf16"]
    reasons: tuple[str, ...]
    processor: str = ""

    @property
    def kind(self) -> str:
        """What it computes on, and in which precision."""
        return f"{self.device.type} in {self.precision}"

    def autocast(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextmanager
    def computing(self, seed: int) -> Iterator[None]:
        """Inside the block torch has these threads, and all random numbers come from `seed` on."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            seed_everything(seed)
            yield
        finally:
            torch.set_num_threads(threads)

    def set_determinism(self, *, deterministic: bool) -> None:
        """How CUDA computes, in this process from now on; on a CPU nothing changes.

        `deterministic`: the same sums in the same order each time, also where atomic additions would be
        faster (attention's and convolutions' backward passes); an operation that has no such form is an
        error. Else cuDNN's attention comes first, the fastest on an H200 (benchmarks/gpu_check.py).
        Convolutions in float32 are in float32: torch would round their inputs to TF32.
        """
        if self.device.type != "cuda":
            return
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.cudnn.benchmark = False
        # The older of two ways to say it: after the newer one, whoever asks in the older gets an error.
        torch.backends.cudnn.allow_tf32 = False
        _attention.close()
        if not deterministic:
            _attention.enter_context(sdpa_kernel(FASTEST_FIRST, set_priority=True))


def resolve_machine(
    device: Literal["auto", "cpu", "cuda"],
    threads: int | Literal["auto"],
    precision: Literal["auto", "fp32", "bf16"],
) -> Machine:
    """Resolve the three settings; never by the machine's present load, so a rerun decides the same.

    Raises: UserError if CUDA is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is 'cuda', but torch sees no CUDA device. Use training.device=auto.")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    cuda = kind == "cuda"

    count, why_threads = threads, "as configured"
    if count == "auto":
        # A launcher may have started several processes on this machine, which share its cores.
        cores, beside = usable_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        count, why_threads = max(1, cores // beside), "all cores this process may use"
        if beside > 1:
            why_threads = f"a share of {cores} cores for each of {beside} processes"

    why_precision = "as configured"
    if precision == "auto" and cuda:
        precision, why_precision = "bf16", "autocast; weights and optimiser stay float32"
    elif precision == "auto":
        precision = "fp32"
        why_precision = "bfloat16 is hundreds of times slower on CPUs without bfloat16 units"
        units = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
        if any(there for unit, there in units.items() if unit.endswith("bf16")):
            # benchmarks/results/throughput_amx.md: a product is 6 times as fast, an update 0.99 (tiny), 1.2.
            why_precision = "exact; this CPU has bfloat16 units, by which updates gain little"
    reasons = (
        f"device {kind} ({'a CUDA device is present' if cuda else 'no CUDA device used'})",
        f"threads {count} ({why_threads})",
        f"precision {precision} ({why_precision})",
    )
    on_cpu = f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"
    return Machine(
        device=torch.device(kind),
        threads=count,
        precision=precision,
        reasons=reasons,
        processor=torch.cuda.get_device_name() if cuda else on_cpu,
    )

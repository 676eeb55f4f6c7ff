"""Compares two runs bit by bit: every tensor, number and record, and the first value that differs."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutti.nested_dicts import ABSENT, leaves
from tutti.storage.checkpoint import Checkpoint
from tutti.training.records import read_records

TIMES = "time/"
"""Metrics that begin so say how long something took: no two runs agree on them, and nothing hangs on them."""

STATE = ("loader", "step", "samples", "ema_updates", "meter", "diagnostics", "fault_policy", "metrics")
"""What is compared of a checkpoint's state.json; the rest is the config, versions, seconds and checksums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """`count` of the `size` numbers of `name` differ; the first at `index` (empty for a single number)."""

    name: str
    index: tuple[int, ...]
    one: str
    other: str
    count: int
    size: int

    def __str__(self) -> str:
        where = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        among = f"; {self.count} of its {self.size} values differ" if self.size > 1 else ""
        return f"{self.name}{where}: {self.one} and {self.other}{among}"


@dataclass(slots=True)
class Comparison:
    """How many values were compared and how many differ, by section, in the order of comparison."""

    values: dict[str, int] = field(default_factory=dict)
    differing: dict[str, int] = field(default_factory=dict)
    first: Difference | None = None

    @property
    def num_values(self) -> int:
        """All values that were compared."""
        return sum(self.values.values())

    @property
    def num_differing(self) -> int:
        """Those of them that differ."""
        return sum(self.differing.values())

    def add(self, section: str, one: Any, other: Any) -> None:
        """Compares two nested structures of tensors and plain values.

        Numbers are equal if all their bits are: 0.0 and -0.0 differ, and NaN equals the same NaN.
        """
        left, right = dict(leaves(one)), dict(leaves(other))
        self.values.setdefault(section, 0)
        self.differing.setdefault(section, 0)
        for name in [*left, *(name for name in right if name not in left)]:
            full = f"{section}/{name}" if name else section
            size, found = _compare(full, left.get(name, ABSENT), right.get(name, ABSENT))
            self.values[section] += size
            if found is not None:
                self.differing[section] += found.count
                self.first = self.first or found


def _compare(name: str, one: Any, other: Any) -> tuple[int, Difference | None]:
    """How many values there are, and what differs."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.shape, one.dtype) == (other.shape, other.dtype):
            return one.numel(), _tensors(name, one, other)
        one, other = (f"{value.dtype!s} {tuple(value.shape)}" for value in (one, other))
    elif isinstance(one, Tensor) or isinstance(other, Tensor):
        one, other = (f"tensor {tuple(v.shape)}" if isinstance(v, Tensor) else v for v in (one, other))
    if _bits(one) == _bits(other):
        return 1, None
    return 1, Difference(name=name, index=(), one=repr(one), other=repr(other), count=1, size=1)


def _tensors(name: str, one: Tensor, other: Tensor) -> Difference | None:
    a, b = (value.detach().cpu().contiguous().reshape(-1) for value in (one, other))
    if not a.numel():
        return None
    unequal = (a.view(torch.uint8) != b.view(torch.uint8)).reshape(a.numel(), -1).any(1)
    count = int(unequal.sum())
    if not count:
        return None
    place = int(unequal.nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), one.shape)) if one.ndim else ()
    values = (repr(value[place].item()) for value in (a, b))
    return Difference(
        name=name, index=index, one=next(values), other=next(values), count=count, size=a.numel()
    )


def _bits(value: Any) -> Any:
    """A float as its bytes: 0.0 and -0.0 differ, a NaN equals itself. With the type, since 1 == True."""
    return (type(value), struct.pack("d", value) if isinstance(value, float) else value)


def untimed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, or the latest metrics, without what depends on the time."""
    return {name: value for name, value in record.items() if not name.startswith(TIMES)}


def compare_checkpoints(found: Comparison, one: Checkpoint, other: Checkpoint) -> None:
    """Weights, averages, heads and balancing, optimisers, the backward, random states, loader, counters."""
    for name in dict.fromkeys((*one.tensors, *other.tensors)):
        found.add(name, one.tensors.get(name, {}), other.tensors.get(name, {}))
    backward = "backward"  # it lies beside the optimisers
    both = (one.optimizer, other.optimizer)
    found.add("optimizer", *({k: v for k, v in saved.items() if k != backward} for saved in both))
    found.add(backward, *(saved.get(backward, {}) for saved in both))
    found.add("random states", one.rng, other.rng)
    for name in STATE:
        values = [saved.state.get(name, ABSENT) for saved in (one, other)]
        found.add(name, *(untimed(value) if isinstance(value, dict) else value for value in values))


def compare_records(found: Comparison, one: Path, other: Path) -> None:
    """The lines of two runs' records.jsonl, in order, without times and without events, which are faults."""
    both = [[untimed(r) for r in read_records(run) if r["kind"] != "event"] for run in (one, other)]
    named = [{f"step {r['step']} {r['kind']}": r for r in records} for records in both]
    found.add("records.jsonl", *named)
    found.add("records.jsonl, order", *([list(names) for names in named]))


def windows_of(path: Path, batches: int) -> tuple[dict[str, list[int]], Sequence[str]]:
    """The windows of each batch as noted in `path`, and the numbers of those that were made twice and differ.

    A killed run makes batches after its checkpoint twice; more than `batches` may have been made ahead.
    """
    order: dict[str, list[int]] = {}
    changed: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            number, windows = json.loads(line)
        except ValueError:
            continue  # cut short by the kill; the batch is made again
        if number >= batches:
            continue
        if order.get(str(number), windows) != windows:
            changed.append(str(number))
        order[str(number)] = windows
    return order, changed

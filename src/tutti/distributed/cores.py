"""How many processor cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may use: its affinity, or a container's smaller CPU quota (rounded up)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
        return affinity if quota == "max" else max(1, min(affinity, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return affinity

"""Every backward trains through the real Trainer, and a resumed run ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fixtures.balanced_training import resumes

AGGREGATORS: list[dict[str, Any]] = [
    {"kind": kind}
    for kind in (
        *("sum", "mean", "random", "pcgrad", "imtl_g", "upgrad", "dualproj", "cagrad", "mgda"),
        *("aligned_mtl", "fairgrad", "gradvac", "pcd", "cosine_gate"),
    )
]
BACKWARDS: dict[str, dict[str, Any]] = {
    "one": {"kind": "one"},
    "masked": {"kind": "masked", "may_train": {"action": ["action", "norm"], "recon": ["stem"]}},
    "masked k": {"kind": "k_gradients", "may_train": {"action": ["action", "norm", "stem"]}},
    **{f"k {found['kind']}": {"kind": "k_gradients", "aggregator": found} for found in AGGREGATORS},
    **{
        f"k by part {found['kind']}": {"kind": "k_gradients", "aggregator": found, "scope": "part"}
        for found in AGGREGATORS
        if found["kind"] in ("pcgrad", "gradvac", "pcd", "cosine_gate")
    },
}


@pytest.mark.parametrize("kind", BACKWARDS)
def test_every_backward_trains_and_resumes(kind: str, tmp_path: Path) -> None:
    found = resumes(tmp_path, {"kind": "fixed"}, BACKWARDS[kind])
    weights = {name for name in found.counters.latest if name.startswith("backward/weight/")}
    part = "stem/" if "part" in kind else ""
    assert weights == set() or f"backward/weight/{part}align" in weights
    assert bool(weights) == kind.startswith(("k ", "masked k"))

"""Backwards train through the real Trainer, and a resumed run ends with the same bits.

That the state of every aggregator is whole is shown in test_backward_k_gradients.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fixtures.balanced_training import resumes

BACKWARDS: dict[str, dict[str, Any]] = {
    "one": {"kind": "one"},
    "masked": {"kind": "masked", "may_train": {"action": ["action", "norm"], "recon": ["stem"]}},
    "masked k": {"kind": "k_gradients", "may_train": {"action": ["action", "norm", "stem"]}},
    **{
        f"k {kind}": {"kind": "k_gradients", "aggregator": {"kind": kind}}
        for kind in ("random", "upgrad", "cagrad", "fairgrad", "gradvac")
    },
    "k by part": {"kind": "k_gradients", "aggregator": {"kind": "pcd"}, "scope": "part"},
}


@pytest.mark.parametrize("kind", BACKWARDS)
def test_every_backward_trains_and_resumes(kind: str, tmp_path: Path) -> None:
    found = resumes(tmp_path, {"kind": "shares"}, BACKWARDS[kind])
    weights = {name for name in found.counters.latest if name.startswith("backward/weight/")}
    part = "stem/" if "part" in kind else ""
    assert weights == set() or f"backward/weight/{part}align" in weights
    assert bool(weights) == kind.startswith(("k ", "masked k"))

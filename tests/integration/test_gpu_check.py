"""The check that a GPU machine runs, at toy sizes on the CPU: later renames must not break it unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_check import gaps

ROOT = Path(__file__).resolve().parents[2]


def test_gaps_lie_between_spans_that_may_overlap() -> None:
    spans = [(10.0, 12.0), (0.0, 4.0), (1.0, 2.0), (3.0, 9.0), (15.5, 16.0)]
    assert gaps(spans) == [3.5, 1.0] and gaps([]) == []


def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh"],
        cwd=ROOT,
        env=os.environ | {"SKIP_TESTS": "1", "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert result["matmul"] > 0 and result["copy"] > 0
    assert [cell["option"] for cell in result["cells"]] == ["fp32+adamw", "bf16+residual+nobias"]
    assert all(cell["samples_per_second"] > 0 for cell in result["cells"])
    assert len(result["attention"]) == 12 and len(result["blocks"]) == 2

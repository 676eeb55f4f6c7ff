"""The check that a GPU machine runs, at toy sizes on the CPU: later renames must not break it unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
    assert [cell["preset"] for cell in result["cells"]] == ["tiny"]
    assert result["cells"][0]["samples_per_second"] > 0
    assert len(result["attention"]) == 12 and len(result["blocks"]) == 2

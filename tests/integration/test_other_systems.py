"""A training from start to end where nothing of what only Linux has is there, as on macOS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_train_resume_evaluate_and_report(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env["TUTTI_CACHE"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "fixtures.other_system", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    said, run = done.stdout, tmp_path / "run"
    assert done.returncode == 0, said + done.stderr
    assert said.count("frame cache: ") == 1 and said.count("training: 4/4") == 2
    assert "going on from step-000002 instead" in said
    assert json.loads((run / "evaluation" / "open_loop.json").read_text())["overall"]["windows"] > 0
    assert (run / "report.html").is_file()


def test_mujoco_itself_chooses_how_to_render_where_there_is_no_egl() -> None:
    script = "import os, sys; sys.platform = {!r}; import tutti.suites.metaworld.rendering as _; print({})"
    env = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    for system, chosen in (("darwin", "None"), ("linux", "egl")):
        command = [sys.executable, "-c", script.format(system, "os.environ.get('MUJOCO_GL')")]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        assert done.stdout.strip() == chosen

"""The Makefile: who may install the rendering packages does, and says so; others are told what to ask for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = "libegl1 libgl1-mesa-dri"
# `make test` runs this file too: what it hands down (flags, level) would change what these calls print.
OUTSIDE = {
    name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
}


def rendering(
    folder: Path, *, user: int, sudo: bool = False, installed: bool = False, works: bool = True
) -> str:
    """What `make rendering` says and runs on a machine that these stand-ins pretend."""
    log = folder / "ran"
    tools = {
        "dpkg-query": "echo install ok installed" if installed else "exit 1",
        "id": f"echo {user}",
        "sudo": '[ "$1" = -n ] && shift; exec "$@"' if sudo else "exit 1",
        "apt-get": f'echo "apt-get $*" >> {log}; exit {int(not works)}',
    }
    for name, body in tools.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "rendering"],
        cwd=ROOT,
        env=OUTSIDE | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + (log.read_text() if log.exists() else "")


pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.mark.parametrize(("user", "sudo"), [(0, False), (1000, True)])
def test_root_and_sudo_without_a_password_install_and_say_so(tmp_path: Path, user: int, sudo: bool) -> None:
    said = rendering(tmp_path, user=user, sudo=sudo)
    assert f"Installing the Debian packages {NEEDED}" in said
    assert f"apt-get install -y -qq --no-install-recommends {NEEDED}" in said


def test_others_are_told_what_to_ask_for(tmp_path: Path) -> None:
    said = rendering(tmp_path, user=1000)
    assert f"apt-get install --no-install-recommends {NEEDED}" in said and "needs root" in said
    assert not (tmp_path / "ran").exists()


def test_what_is_there_is_not_installed_again(tmp_path: Path) -> None:
    assert rendering(tmp_path, user=0, installed=True) == ""


def test_an_installation_that_fails_is_said_and_does_not_stop(tmp_path: Path) -> None:
    assert "apt-get failed" in rendering(tmp_path, user=0, works=False)


def test_smoke_and_demo_end_with_how_to_activate() -> None:
    for target in ("smoke", "demo"):
        planned = subprocess.run(
            ["make", "-n", target], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, check=True
        ).stdout
        assert planned.rstrip().endswith(". .venv/bin/activate\\n'")

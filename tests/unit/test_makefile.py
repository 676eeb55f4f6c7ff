"""The Makefile: who may install the rendering packages does, and says so; others are told what to ask for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

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


INSTALL = f"apt-get install -y -qq --no-install-recommends {NEEDED}"


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        ({"user": 0}, (f"Installing the Debian packages {NEEDED}", INSTALL)),
        ({"user": 1000, "sudo": True}, (f"Installing the Debian packages {NEEDED}", INSTALL)),
        ({"user": 1000}, (f"apt-get install --no-install-recommends {NEEDED}", "needs root")),
        ({"user": 0, "works": False}, ("apt-get failed",)),
        ({"user": 0, "installed": True}, ()),
    ],
)
def test_packages_are_installed_by_who_may_and_what_is_done_is_said(
    tmp_path: Path, machine: dict[str, Any], says: tuple[str, ...]
) -> None:
    """Root, and sudo without a password, install; others are told what to ask for; no failure stops."""
    said = rendering(tmp_path, **machine)
    assert all(text in said for text in says) and bool(said) == bool(says)
    assert (tmp_path / "ran").exists() == (len(says) > 0 and "needs root" not in says)


def test_smoke_and_demo_end_with_how_to_activate() -> None:
    for target in ("smoke", "demo"):
        planned = subprocess.run(
            ["make", "-n", target], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, check=True
        ).stdout
        assert planned.rstrip().endswith(". .venv/bin/activate\\n'")


def test_help_comes_first_and_names_every_target() -> None:
    said = [
        subprocess.run(
            ["make", "-s", *target], cwd=ROOT, env=OUTSIDE, capture_output=True, text=True, check=True
        ).stdout
        for target in ((), ("help",))
    ]
    (phony,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert said[0] == said[1]
    assert all(f"make {target} " in said[0] for target in {*phony.split()} - {"help", "rendering"})

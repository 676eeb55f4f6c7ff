"""Where and with what a result was made: command, commit, machine, and versions of packages."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tutti.distributed.cores import processor_name, usable_cores

PACKAGES = (
    *("tutti-vla", "torch", "numpy", "pyarrow", "h5py", "av", "pillow", "tokenizers"),
    *("numcodecs", "imagecodecs", "metaworld", "mujoco"),
)


def circumstances() -> dict[str, Any]:
    """Command, commit, machine, versions, and the load of the machine now."""
    tutti = Path(sys.argv[0]).name in ("tutti", "__main__.py")
    return {
        "command": shlex.join([*(["tutti"] if tutti else ["python", sys.argv[0]]), *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "load": os.getloadavg()[0],
    }


def made_with(made: dict[str, Any]) -> str:
    """The circumstances in one paragraph."""
    where, software = made["machine"], made["versions"]
    return (
        f"Command: `{made['command']}`. Commit {made['commit']}; {where['processor']}, "
        f"{where['cores']} cores, load {made['load']:.1f} before the start; "
        f"Python {software['python']}, torch {software['torch']}."
    )


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that shape a result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Where it ran: system, processor, and the cores that this process may use."""
    return {"system": platform.platform(), "processor": processor_name(), "cores": usable_cores()}


def commit() -> str | None:
    """The git commit of Tutti's own checkout, "+" added if its files were changed; None outside one."""
    package = Path(__file__).resolve().parents[1]
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    head = _git(package, "rev-parse", "HEAD") if tracked is not None else None
    return None if head is None else head + ("+" if _git(package, "status", "--porcelain", ".") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

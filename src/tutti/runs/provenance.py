"""Where and with what a result was made: command, commit, machine, and versions of packages."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tutti.distributed.cores import processor_name, usable_cores

PACKAGES = (
    *("tutti-vla", "torch", "numpy", "pyarrow", "h5py", "av", "pillow", "tokenizers"),
    *("numcodecs", "imagecodecs", "metaworld", "mujoco"),
)

EXTRAS = (
    *("pydantic", "safetensors", "tensorboard", "torchjd", "scipy", "jaxtyping", "simplejpeg", "gymnasium"),
    *("optuna", "wandb", "mlflow", "mlflow-skinny", "trackio", "fsspec", "s3fs", "quadprog", "cvxpy"),
)
SETTINGS = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("CUBLAS_WORKSPACE_CONFIG", "MUJOCO_GL", "PYOPENGL_PLATFORM", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)
"""Environment variables whose value a bug report shows."""


def circumstances() -> dict[str, Any]:
    """Command, commit, machine, versions, and the load of the machine now. Of an address in the command, such
    as a database's, user and password are left out: the reports that show it are passed on."""
    tutti = Path(sys.argv[0]).name in ("tutti", "__main__.py")
    command = shlex.join([*(["tutti"] if tutti else ["python", sys.argv[0]]), *sys.argv[1:]])
    return {
        "command": re.sub(r"://[^/@\s]+@", "://...@", command),
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


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of the packages that shape a result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """What a bug report needs: versions, extras, machine, GPUs, disk, commit, and what decides threads and
    processes. No paths, names or secrets."""
    import torch

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else []
    settings = {name: value for name, value in sorted(os.environ.items()) if name in SETTINGS}
    return {
        **versions((*PACKAGES, *EXTRAS)),
        **machine(),
        "torch built for": torch.version.cuda or "CPU",
        "GPUs": ", ".join(gpus) or "none",
        "threads of torch": torch.get_num_threads(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
        "scheduler": next(
            (one for one in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST") if one in os.environ), "none"
        ),
        "settings": " ".join(f"{name}={value}" for name, value in settings.items()) or "none",
        "commit": commit(),
    }


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

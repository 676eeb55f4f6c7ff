"""Imports MuJoCo and Meta-World: sets their environment variables first, explains what is missing.

Both are imported on first use, not when `tutti` is, so training on a machine without a simulator works.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

from tutti.errors import UserError

# Read by mujoco when it is imported, and by Mesa when it opens its first context. LP_NUM_THREADS=0 makes
# the software rasteriser work in the calling thread: several processes render, none waits for threads.
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")

INSTALL = "pip install 'tutti-vla[simulation]'"
CURE = (
    "Rendering needs EGL, in software is enough. On Debian or Ubuntu:\n"
    "    apt-get install --no-install-recommends libegl1 libgl1-mesa-dri\n"
    "and the environment variable MUJOCO_GL=egl, set before Python first imports mujoco "
    "(tutti sets it if it is unset)."
)


@functools.cache
def load_mujoco() -> ModuleType:
    """The module `mujoco`, imported with the settings above.

    Raises:
        UserError: it is not installed, or the OpenGL library that MUJOCO_GL names cannot be loaded.
    """
    try:
        return importlib.import_module("mujoco")
    except ModuleNotFoundError as error:
        raise UserError(f"The simulator is not installed ({error}). Install it with: {INSTALL}") from error
    except Exception as error:
        # PyOpenGL reports a missing libEGL as an AttributeError or an ImportError, by version.
        raise UserError(
            f"mujoco could not be imported with MUJOCO_GL={os.environ['MUJOCO_GL']!r}: "
            f"{type(error).__name__}: {error}\n{CURE}"
        ) from error


@functools.cache
def load_metaworld() -> tuple[dict[str, type], dict[str, type]]:
    """Meta-World's environment classes and its scripted experts, both by name ("reach-v3").

    Raises:
        UserError: Meta-World or the simulator under it is not installed or cannot be loaded.
    """
    load_mujoco()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            environments = importlib.import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
            experts = importlib.import_module("metaworld.policies").ENV_POLICY_MAP
    except ImportError as error:
        # Meta-World 3.1.1 imports `packaging` but does not ask pip for it.
        raise UserError(f"Meta-World could not be imported ({error}). Install it with: {INSTALL}") from error
    return dict(environments), dict(experts)

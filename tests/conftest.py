"""Every test runs on one thread, and checks the shapes that the package's annotations promise."""

from __future__ import annotations

import os
import signal

# A job in the background of a shell inherits an ignored Ctrl-C; tests of interruptions need the usual one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from jaxtyping import install_import_hook

import fixtures.shape_checker  # noqa: F401  the hook looks it up by its name

_hook = install_import_hook("tutti", "fixtures.shape_checker.check")

import torch

torch.set_num_threads(1)

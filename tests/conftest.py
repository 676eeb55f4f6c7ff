"""Every test runs on one thread, and checks the shapes that the package's annotations promise."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile

# A job in the background of a shell inherits an ignored Ctrl-C, one of nohup an ignored SIGHUP; tests of
# interruptions need the usual ones.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nothing made here is to outlive a power cut, and the disk takes milliseconds to be sure each time.
os.fsync = lambda fd: None
os.environ["TUTTI_CACHE"] = tempfile.mkdtemp(prefix="tutti-tests-cache-")

import jaxtyping
import pytest
from hypothesis import settings

from fixtures import shape_checker

# The same examples each time, on a busy machine too.
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("tests")

SLOWEST_FIRST = (
    *("test_ranks", "test_study", "test_verify_resume", "test_debug_doctor", "test_pipeline"),
    *(
        "test_ranks_torchrun",
        "test_planning",
        "test_tiny_preset",
        "test_ranks_policy",
        "test_ranks_validation",
    ),
    *("test_golden", "test_gpu_check", "test_recording", "test_suites_metaworld", "test_benchmarks_speed"),
    *("test_training_blocks", "test_decoders_all", "test_training_strategy", "test_hostile_folders"),
)
"""With the longest files first and the short ones last, no worker of xdist ends long before another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TUTTI_CACHE"], ignore_errors=True)


jaxtyping.jaxtyped = shape_checker.light
_hook = jaxtyping.install_import_hook("tutti", "fixtures.shape_checker.check")

import torch

torch.set_num_threads(1)

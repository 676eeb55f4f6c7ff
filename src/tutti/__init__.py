"""Tutti pre-trains vision-language-action robot models end to end, under one unified loss.

`import tutti` costs nothing: the names below load their module when they are first used.

    import tutti
    config = tutti.load_config("configs/demo.yaml", ["training.steps=500"])
    run = tutti.pipeline.train(config)
    policy = tutti.Policy.load(run / "checkpoints" / "last")
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutti import pipeline
    from tutti.config import RunConfig, load_config
    from tutti.errors import UserError
    from tutti.serving.policy import Policy

__version__ = "0.1.0"

# How long an idle OpenMP thread spins before it sleeps, read when torch loads. The default spins for ever and
# collapses when other work shares the cores; sleeping at once costs a small model half its speed. 20,000
# turns (some 50 microseconds) keep nine tenths of the speed of spinning; docs/log.md has the figures.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# cuBLAS gives the same bits each time only with workspaces of fixed sizes, read when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__all__ = ["Policy", "RunConfig", "UserError", "__version__", "load_config", "pipeline"]

_HOME = {
    "Policy": "tutti.serving.policy",
    "RunConfig": "tutti.config",
    "UserError": "tutti.errors",
    "load_config": "tutti.config",
    "pipeline": "tutti.pipeline",
}


def __getattr__(name: str) -> Any:
    """Finds a public name in its module at first use, so that `tutti --help` need not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'tutti' has no attribute '{name}'")
    module = import_module(_HOME[name])
    return module if name == "pipeline" else getattr(module, name)

"""Tutti pre-trains vision-language-action robot models end to end, under one unified loss.

`import tutti` costs nothing: the names below load their module when they are first used.

    import tutti
    config = tutti.load_config("configs/demo.yaml", ["training.steps=500"])
    run = tutti.train(config)
    policy = tutti.Policy.load(run / "checkpoints" / "last")
"""

import os

import lazy_loader

__version__ = "0.1.0"

# How long an idle OpenMP thread spins before it sleeps, read when torch loads. The default spins for ever and
# collapses when other work shares the cores; sleeping at once costs a small model half its speed. 20,000
# turns (some 50 microseconds) keep nine tenths of the speed of spinning; docs/log.md has the figures.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# cuBLAS gives the same bits each time only with workspaces of fixed sizes, read when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

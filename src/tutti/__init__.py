"""Tutti pre-trains vision-language-action robot models end to end, under one unified loss.

`import tutti` is fast: each name loads its module when it is first used. A run is a config, and the functions
`record`, `train`, `evaluate` and `report` (or `demo` for all four) do its stages:

    >>> import tutti
    >>> config = tutti.load_config("configs/demo.yaml", ["name=short", "training.steps=500"])
    >>> config.training.steps
    500
    >>> [row.name for row in tutti.describe_model(config).modules if row.depth == 1]
    ['vision', 'language', 'fusion', 'action']
    >>> checkpoint = tutti.train(config)  # doctest: +SKIP
    >>> policy = tutti.Policy.load(checkpoint)  # doctest: +SKIP

Subclass `Term`, `Balancing` or `ActionDecoder` to add a loss, a balancing or a decoder; a config names the
class as `kind: my_module:MyTerm`.
"""

import os

import lazy_loader

__version__ = "0.1.0"

# How long an idle OpenMP thread spins before it sleeps, read when torch loads. The default spins for ever and
# collapses when other work shares the cores; sleeping at once costs a small model half its speed. 20,000
# turns (some 50 microseconds) keep nine tenths of the speed of spinning; see docs/background/log.md.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# cuBLAS gives the same bits each time only with workspaces of fixed sizes, read when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

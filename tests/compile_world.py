"""Compiled blocks against eager ones, in a process of its own: torch.compile cannot follow shape checks.

python compile_world.py WHAT prints what one test reads, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.utils import counters

from tutti.models.config import ModelConfig
from tutti.objectives.unified import ObjectiveConfig
from tutti.training.compilation import compiled
from vla_world import MODEL, SPEC, make_batch

DECODERS: dict[str, dict[str, Any]] = {
    "regression": {"kind": "regression", "hidden": 32},
    "flow": {"kind": "flow", "width": 16, "depth": 2, "heads": 2},
}


def losses(
    mode: Any, decoder: str = "regression", steps: int = 2, device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """Totals and the norm of the gradient of a few batches, and what the compiler counted."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        MODEL | {"action": DECODERS[decoder], "fusion": {"width": 32, "depth": 3}}
    )
    model = config.build(SPEC)
    objective = ObjectiveConfig().model_copy(update={"recon": None, "state": None}).build(model)
    model, objective = model.to(device), objective.to(device)
    forward = compiled(model, mode, **options)
    totals: list[float] = []
    for number in range(steps):
        batch = make_batch(number).to(device)
        terms = objective(forward(batch.observation), batch)
        terms.total.backward()
        totals.append(terms.total.item())
    gradients = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    return {
        "totals": totals,
        "norm": torch.stack(gradients).norm().item(),
        "breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"]["unique_graphs"],
        "names": sorted(model.state_dict()) == sorted(config.build(SPEC).state_dict()),
    }


def main(what: str) -> None:
    """`eager:DECODER`, `MODE:DECODER` with a backend that needs no C++ compiler, `inductor`, or `cuda`, which
    gives the eager losses too."""
    mode, _, decoder = what.partition(":")
    if what == "cuda":
        found = {kind: losses(kind, "flow", device="cuda") for kind in ("off", "blocks", "model")}
    elif what == "inductor":
        found = losses("blocks", "regression")
    else:
        mode = "off" if mode == "eager" else mode
        found = losses(mode, decoder, **({} if mode == "off" else {"backend": "aot_eager"}))
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])

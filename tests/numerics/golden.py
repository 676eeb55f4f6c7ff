"""Golden curves: short runs whose every loss and gradient norm is kept, and compared with later ones.

    PYTHONPATH=tests .venv/bin/python tests/numerics/golden.py --write "why the numbers are to change"

writes tests/numerics/golden/NAME.json anew. On the machine type that a file was written on, a run must give
the same numbers to the last bit; elsewhere each may be off by `tolerance(step)` of the largest in its curve.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fixtures.vla_training import MODEL, SPEC, Data
from tutti.config.run_config import RunConfig
from tutti.models.config import ModelConfig
from tutti.nested_dicts import merge
from tutti.objectives.config import ObjectiveConfig
from tutti.runs.provenance import machine
from tutti.training.records import read_records
from tutti.training.trainer import Trainer

FOLDER = Path(__file__).resolve().parent / "golden"
STEPS = 10
KEPT = ("loss/", "lambda/", "optim/grad_norm", "valid/")
"""What is kept of a record: every term raw and weighted, the total, lambdas, gradient norms, and what the
averaged weights have on held-out windows."""

OBJECTIVE = {
    "align": {"weight": {"start": 0.3, "end": 0.1}},
    "action": {"weight": 1.0},
    "recon": {"weight": 0.2},
    "state": {"weight": 1.0, "offsets": (1, 3), "gripper": {"dimension": -1}},
}
MOVES = {"align": ["vision", "language"], "state": ["vision"]}
PRESETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "muon": {"training": {"optimizer": {"kind": "muon"}}},
    "two_stage": {"strategy": {"kind": "two_stage"}},
    "k_gradients": {"backward": {"kind": "k_gradients", "aggregator": {"kind": "cosine_gate"}}},
    "masked_routing": {"backward": {"kind": "masked", "may_train": MOVES}},
    "shares": {"objective": {name: {"weight": None, "share": 0.2} for name in MOVES}},
    "flow_decoder": {"model": {"action": {"kind": "flow"}}},
    "accumulation": {"training": {"accumulation": 3}},
    "ema": {"training": {"ema": 0.9, "validation": {"every": 2}}},
}
"""What each curve changes of the same small run."""


def tolerance(step: int) -> float:
    """2e-5 * 1.6^step: rounding that differs from the first step on, and grows as a training's errors do."""
    return 2e-5 * 1.6**step


def machine_type() -> dict[str, str]:
    """What decides the last bits on a CPU: instruction set, processor, torch and its libraries."""
    built = torch.__config__.show()
    libraries = [
        line.strip(" -") for line in built.splitlines() if "Math Kernel" in line or "MKL-DNN" in line
    ]
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": machine()["processor"],
        "torch": str(torch.__version__),
        "libraries": "; ".join(libraries),
        "onednn": str(torch.backends.mkldnn.is_available()),
    }


def curve(name: str) -> list[dict[str, float]]:
    """The kept values of every step of a preset's run, in float32 on one thread; the last step of a
    preset that names `ema` has the norm of every averaged tensor too."""
    changes = PRESETS[name]
    settings = {
        "steps": STEPS,
        "threads": 1,
        "device": "cpu",
        "schedule": {"kind": "wsd", "warmup": 2},
        "gradients": {"clip_norm": 1.0},
        "log_every": 1,
        "validation": {"every": 0},
        "checkpoints": {"every": 0},
        "diagnostics": {"every": 0},
    }
    training = merge(settings, changes.get("training", {}))
    sections = {key: changes[key] for key in ("strategy", "backward", "balancing") if key in changes}
    terms = merge(OBJECTIVE, changes.get("objective", {}))
    config = RunConfig.model_validate({"training": training, "objective": terms, **sections})
    torch.manual_seed(0)
    model = ModelConfig.model_validate(MODEL | changes.get("model", {})).build(SPEC)
    objective = ObjectiveConfig.model_validate(terms).build(model, config.balancing)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        trainer = Trainer(
            config.training, model, objective, run, strategy=config.strategy, backward=config.backward
        )
        trainer.fit(Data())
        steps: list[dict[str, float]] = [{} for _ in range(STEPS)]
        for record in read_records(run):
            kept = {
                key: value for key, value in record.items() if key.startswith(KEPT) and "metric" not in key
            }
            steps[record["step"] - 1] |= kept
        averages = trainer.averages if "ema" in changes.get("training", {}) else {}
        for part, average in averages.items():
            for key, value in average.shadow.items():
                steps[-1][f"average/{part}/{key}"] = float(value.double().norm())
        return steps


def stored(name: str) -> dict[str, Any]:
    """The file of a curve: reason, machine type, steps."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def deviations(kept: list[dict[str, float]], found: list[dict[str, float]], *, exact: bool) -> Iterator[str]:
    """A sentence for each value that is missing, or off by more than allowed."""
    if len(kept) != len(found):
        yield f"{len(kept)} steps are kept, {len(found)} were made"
    for step, (one, other) in enumerate(zip(kept, found, strict=False), start=1):
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other:
                yield f"step {step}: {key} is {'not kept' if key not in one else 'absent now'}"
                continue
            largest = max(abs(record.get(key, 0.0)) for record in kept)
            allowed = 0.0 if exact else tolerance(step) * largest
            if not abs(one[key] - other[key]) <= allowed:
                yield f"step {step}: {key} was {one[key]!r}, is {other[key]!r} (allowed: {allowed:.3g})"


def main() -> int:
    """Writes the files of all curves, or of those named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", metavar="REASON", required=True, help="why, in a line; it is kept")
    parser.add_argument("--only", nargs="*", choices=list(PRESETS), default=list(PRESETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in arguments.only:
        content = {"reason": arguments.write, "machine": machine_type(), "steps": curve(name)}
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written: {FOLDER / name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

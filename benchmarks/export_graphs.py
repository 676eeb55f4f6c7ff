"""The graphs of an export: how far they are from the model, and what one prediction costs on one core.

    python benchmarks/export_graphs.py [--kinds regression flow ...] [--policy runs/demo]

A policy of every decoder with random weights, two views of 96 pixels, the model of the configs; with --policy
a trained one in a first row. Process CPU time of one thread, the best of 40 predictions, in turns, of a batch
of 1, 2 and 8; differences are the largest of a batch of noise, over the largest action. `Policy.predict` has
the language tokens of an instruction after the first time, the graphs encode the text each time. The error
of int8 is the mean of `exports.int8`. A decoder without a graph has the reason for it. Writes
results/export_graphs.json and .md.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from random_policy import parts

from tutti.models.config import ModelConfig
from tutti.serving.exports.graph import INPUTS, GraphPolicy, example, graphs_of
from tutti.serving.exports.int8 import error_of, quantised
from tutti.serving.policy import Policy
from tutti.types import UserError

RESULTS = Path(__file__).parent / "results"
KINDS = ("regression", "flow", "diffusion", "bins", "fast")
BATCHES = (1, 2, 8)


def policy_of(kind: str) -> Policy:
    """A policy with random weights, fitted to noise where it must be."""
    spec, normalizer, tokenizer = parts()
    torch.manual_seed(0)
    model = ModelConfig.model_validate({"action": {"kind": kind}}).build(spec)
    if model.action.needs_fit:
        model.action.fit(torch.randn(200, 8, 4), torch.ones(200, 8, 4, dtype=torch.bool))
    for value in model.action.parameters():  # last layers start at nearly 0
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.05)
    return Policy(model, normalizer, tokenizer, warn=False)


def costs(forms: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """CPU milliseconds of a prediction of each, the best of 40, in turns."""
    spent = {name: list[float]() for name in forms}
    for _ in range(40):
        for name, predict in forms.items():
            began = time.process_time()
            predict()
            spent[name].append(1000 * (time.process_time() - began))
    return {f"{name}, CPU ms": round(min(those), 2) for name, those in spent.items()}


def predicting(policy: Policy, size: int) -> Callable[[], Any]:
    """`Policy.predict` of pictures of noise of this size, with a state near the mean."""
    random, spec = np.random.default_rng(0), policy.spec
    pictures = {view: random.integers(0, 256, (size, size, 3), np.uint8) for view in spec.views}
    state = policy.normalizer.stats[spec.embodiments[0]].state.mean.astype(np.float32)
    return lambda: policy.predict(pictures, state, "open the drawer")


def measure(kind: str, trained: Policy | None = None) -> dict[str, Any]:
    """One row."""
    policy = trained or policy_of(kind)
    sizes = {"predict": policy.spec.image_size, "predict of 480 x 480": 480}
    predicts = costs({name: predicting(policy, size) for name, size in sizes.items()})
    try:
        files = graphs_of(policy, ("pt2", "onnx"))
    except UserError as error:
        return {"policy": kind, "no graph": str(error)} | predicts
    files["model.int8.onnx"] = quantised(files["model.onnx"])
    graph = GraphPolicy(policy).eval()
    program = torch.export.load(io.BytesIO(files["model.pt2"])).module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(files[name], options, providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "model.int8.onnx")
    }

    def onnx(given: tuple[torch.Tensor, ...], name: str = "model.onnx") -> np.ndarray:
        inputs = {n: one.numpy() for n, one in zip(INPUTS, given, strict=True)}
        return np.asarray(sessions[name].run(None, inputs)[0])

    row: dict[str, Any] = {"policy": kind}
    with torch.no_grad():
        for batch in BATCHES:
            given = example(policy, batch)
            expected = graph(*given).numpy()
            for name, found in (("pt2", program(*given).numpy()), ("onnx", onnx(given))):
                apart = float(np.abs(found - expected).max() / np.abs(expected).max())
                row[f"{name}, difference, batch {batch}"] = float(f"{apart:.1e}")
        row |= predicts
        for batch in BATCHES:
            given = example(policy, batch)
            forms: dict[str, Callable[[], Any]] = {
                "eager": partial(graph, *given),
                "pt2": partial(program, *given),
                "onnxruntime": partial(onnx, given),
                "int8": partial(onnx, given, "model.int8.onnx"),
            }
            row |= costs({f"{name}, batch {batch}": form for name, form in forms.items()})
    row["int8, mean error"] = f"{error_of(policy, files['model.onnx'], files['model.int8.onnx'])['mean']:.1%}"
    return row | {f"{name}, MiB": round(len(data) / 2**20, 1) for name, data in files.items()}


def tables(found: list[dict[str, Any]]) -> str:
    """Differences, costs and the rest, with a row for each policy; then why a decoder has no graph."""
    names = [name for name in found[0] if name not in ("policy", "no graph")]
    far, cost = ([name for name in names if part in name] for part in ("difference", "CPU ms"))
    rest = [name for name in names if name not in (*far, *cost)]
    text = ""
    for columns in (far, cost, rest):
        rows = [["policy", *columns], ["---"] * (1 + len(columns))]
        rows += [[row["policy"], *(str(row.get(name, "no graph")) for name in columns)] for row in found]
        text += "".join(f"| {' | '.join(cells)} |\n" for cells in rows) + "\n"
    return text + "".join(f"{row['policy']}: {row['no graph']}\n" for row in found if "no graph" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--policy", type=Path, help="a run's folder, or an export's")
    torch.set_num_threads(1)
    arguments, found = parser.parse_args(), list[dict[str, Any]]()
    policies: list[tuple[str, str, Policy | None]] = [
        (f"{kind}, random weights", kind, None) for kind in arguments.kinds
    ]
    if arguments.policy is not None:
        trained = Policy.load(arguments.policy, warn=False)
        size = sum(one.numel() for one in trained.model.parameters())
        policies.insert(0, (f"{arguments.policy.name}, {size / 1e6:.1f} M parameters", "", trained))
    for title, kind, trained in policies:
        found.append(measure(kind, trained) | {"policy": title})
        print(json.dumps(found[-1]), flush=True)
        (RESULTS / "export_graphs.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "export_graphs.md").write_text(tables(found))


if __name__ == "__main__":
    main()

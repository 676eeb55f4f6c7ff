"""What each action decoder costs: parameters, FLOPs and milliseconds of one prediction at batch 1.

python benchmarks/decoders.py measures the decoder alone, untrained, on features that are already there, with
the sizes of configs/demo.yaml. benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tables import RESULTS, Table, prints_user_errors, publish
from timing import Spread, interleave, spread

from tutti.config.run_config import RunConfig, load_config
from tutti.models.decoders.fast import FastDecoder
from tutti.models.describe import blank_observation, describe
from tutti.models.vla import VLA
from tutti.runs.provenance import circumstances, made_with
from tutti.suites.metaworld.task import ACTION_DIM, STATE_DIM
from tutti.types import DataSpec, Features

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
KINDS = ("regression", "flow", "diffusion", "bins", "fast")
CHUNKS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A decoder's size, the FLOPs of one prediction (two for each multiply-add), and its milliseconds."""

    parameters: int
    flops: int
    milliseconds: Spread


def data_spec(config: RunConfig) -> DataSpec:
    """The sizes of the data that the config would record."""
    suite, data = config.record.spec, config.data
    return DataSpec(
        views=suite.views,
        image_size=data.image_size,
        state_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        horizon=data.horizon,
        vocab_size=data.vocab_size,
        text_length=16,
        embodiments=(suite.robot,),
        fps=suite.fps,
    )


def drifting_chunks(spec: DataSpec, count: int = CHUNKS) -> tuple[torch.Tensor, torch.Tensor]:
    """Random walks of about the size of normalised actions, and their masks, for decoders that need a fit."""
    random = torch.Generator().manual_seed(0)
    steps = torch.randn(count, spec.horizon, spec.action_dim, generator=random)
    steps[:, 1:] *= 0.2
    actions = steps.cumsum(1)
    return actions, torch.ones_like(actions, dtype=torch.bool)


def build_model(config: RunConfig, spec: DataSpec) -> VLA:
    """The config's model with fresh weights, fitted to random walks, in evaluation mode.

    FAST is made to write one number a token, up to the longest of these chunks: its slowest prediction.
    """
    torch.manual_seed(config.seed)
    model = config.model.build(spec).eval()
    if model.action.needs_fit:
        model.action.fit(*drifting_chunks(spec))
    if isinstance(model.action, FastDecoder):
        with torch.no_grad():
            model.action.out.bias[model.action.tokens.lengths() > 1] = -1e4
    return model


def timer(model: VLA, features: Features) -> Callable[[int], float]:
    """Mean milliseconds of a prediction, over the given number of calls."""

    def measure(calls: int) -> float:
        with torch.inference_mode():
            started = time.perf_counter()
            for _ in range(calls):
                model.action.predict(features)
            return 1000 * (time.perf_counter() - started) / calls

    return measure


def measure(configs: Mapping[str, RunConfig], calls: int) -> dict[str, Cost]:
    """The cost of the decoder of each config, the calls interleaved."""
    models = {name: build_model(config, data_spec(config)) for name, config in configs.items()}
    timers: dict[str, Callable[[int], float]] = {}
    for name, model in models.items():
        with torch.inference_mode():
            timers[name] = timer(model, model(blank_observation(model.spec, torch.device("cpu"))))
    times = interleave(timers, rounds=calls, steps=1)
    costs: dict[str, Cost] = {}
    for name, model in models.items():
        row = next(row for row in describe(model).modules if row.name == "action")
        costs[name] = Cost(parameters=row.parameters, flops=row.flops, milliseconds=spread(times[name]))
    return costs


def cost_table(costs: Mapping[str, Cost]) -> Table:
    """One row a decoder."""
    rows: list[tuple[str, ...]] = []
    for name, cost in costs.items():
        time_taken = cost.milliseconds
        quartiles = f"{time_taken.low:.2f} - {time_taken.high:.2f}"
        size = (f"{cost.parameters:,}", f"{cost.flops / 1e6:.2f} M")
        rows.append((name, *size, f"{time_taken.median:.2f}", quartiles))
    heads = ("decoder", "parameters", "FLOPs per predict", "ms per predict", "quartiles")
    return Table(title="Action decoders, batch 1, one thread", heads=heads, rows=tuple(rows))


def benchmark(arguments: argparse.Namespace) -> None:
    """Measures and publishes."""
    found_in = circumstances()
    torch.set_num_threads(1)
    changes = {
        **{kind: [f"model.action.kind={kind}"] for kind in KINDS},
        **{
            f"{kind}, cross-attention": [f"model.action.kind={kind}", "model.action.cross_attention=true"]
            for kind in KINDS[1:]
        },
    }
    configs = {name: load_config(arguments.config, given) for name, given in changes.items()}
    costs = measure(configs, arguments.calls)
    notes = [
        f"Median and quartiles of {arguments.calls} calls, the decoders in turns. FAST: its slowest case.",
        made_with(found_in),
    ]
    result = {**found_in, "calls": arguments.calls, "costs": {n: asdict(cost) for n, cost in costs.items()}}
    publish(arguments.output, "benchmarks/decoders", [cost_table(costs)], notes, result)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEMO, help="sizes of the data and of the model")
    parser.add_argument("--calls", type=int, default=50, help="timed predictions of each decoder")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoders", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0, or 2 for a mistake of the user."""
    benchmark(parse(given))
    return 0


if __name__ == "__main__":
    sys.exit(main())

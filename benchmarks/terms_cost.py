"""What each loss term adds to a training step beside the action's, and how loud it is at the first weights.

python benchmarks/terms_cost.py --threads 1 measures the Trainer's own step with the action term alone and
with one further term at a weight of 1; they take turns. benchmarks/README.md says what a column means.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import frame
import torch
from tables import Table, publish
from timing import StepTimer, interleave, ratios, spread, with_training

from tutti.config.run_config import RunConfig, build_config
from tutti.objectives.objective import PRIMARY
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.training.backward.term_gradients import term_gradients

ALONE = "action alone"
TERM = "term"
TERMS: dict[str, dict[str, Any]] = {
    "contrastive": {},
    "sigmoid": {},
    "state_contrastive": {},
    "state_contrastive, read: vision": {"read": "vision"},
    "recoverable_language": {},
    "future_latent": {},
    "progress": {},
    "future_patches": {},
    "changed_patches": {},
    "masked_patches": {},
    "masked_patches, stop_gradient: [vision]": {"stop_gradient": ["vision"]},
    "future_states": {},
    "inverse_dynamics": {},
    "inverse_dynamics, stop_future: true": {"stop_future": True},
}
"""Every kind but the action's own and `next_token`, of which the demo has no label, and options that change
its cost; the kind stands before the comma."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loudness:
    """Of a raw term: its gradient's norm over the action's, and the parameters of its head."""

    gradient: float
    parameters: int


def arms(config: RunConfig) -> dict[str, RunConfig]:
    """The action alone, then with each term beside it, without diagnostics."""
    diagnostics = config.training.diagnostics.model_dump() | {"every": 0}
    values = with_training(config, diagnostics=diagnostics).model_dump(mode="json")
    alone = dict.fromkeys(("align", "recon", "state")) | {PRIMARY: {}}
    found = {ALONE: build_config(values | {"objective": alone}, ALONE)}
    for name, options in TERMS.items():
        term = {"kind": name.partition(",")[0], "weight": 1.0} | options
        found[name] = build_config(values | {"objective": alone | {TERM: term}}, name)
    return found


def loudness(timer: StepTimer, batches: int) -> Loudness:
    """|dL/d model| over |dL_action/d model|, each norm a mean over batches, at the first weights."""
    trainer, loader = timer.trainer, timer.data.train
    parameters = list(trainer.model.parameters())
    norms = {TERM: 0.0, PRIMARY: 0.0}
    for number in range(batches):
        batch = loader.batch_at(number)
        terms = trainer.objective(trainer.model(batch.observation), batch, trainer.model)
        for name, found in term_gradients(terms.values, parameters).items():
            norms[name] += float(torch.nn.utils.get_total_norm([one for one in found if one is not None]))
    heads = sum(parameter.numel() for parameter in trainer.objective.parameters())
    return Loudness(gradient=norms[TERM] / norms[PRIMARY], parameters=heads)


def cost_table(times: Mapping[str, Sequence[float]], loud: Mapping[str, Loudness]) -> Table:
    """Time per step of each term, against the action alone; its head and its gradient."""
    against = ratios(times, ALONE)
    rows: list[tuple[str, ...]] = []
    for name, values in times.items():
        ratio = against[name]
        cells = (f"{spread(values).median:.1f}", f"{ratio.median:.2f}", f"{ratio.low:.2f} - {ratio.high:.2f}")
        own = loud.get(name)
        head, gradient = (f"{own.parameters:,}", f"{own.gradient:.2f}") if own else ("", "1")
        rows.append((name, *cells, head, gradient))
    heads = ("term", "ms per step", "against action alone", "quartiles", "parameters of its head", "gradient")
    return Table(title="What a term costs beside the action's", heads=heads, rows=tuple(rows))


def benchmark(arguments: argparse.Namespace, config: RunConfig, data_from: Path, scratch: Path) -> bool:
    """Measures and publishes; there is nothing to pass or fail."""
    found_in = circumstances()
    timers: dict[str, StepTimer] = {}
    loud: dict[str, Loudness] = {}
    try:
        for number, (name, one) in enumerate(arms(config).items()):
            timers[name] = StepTimer(one, data_from, scratch / f"arm{number}")
            if name != ALONE:
                loud[name] = loudness(timers[name], arguments.batches)
        print_line(f"timing {len(timers)} arms, {arguments.rounds} rounds of {arguments.turn} steps each ...")
        times = interleave(timers, arguments.rounds, arguments.turn)
    finally:
        for timer in timers.values():
            timer.close()
    notes = [
        f"Gradient: norm of the raw term's over the model, against the action's, at the first weights, "
        f"means over {arguments.batches} batches. Batch {config.data.batch_size}, "
        f"{torch.get_num_threads()} thread(s). {made_with(found_in)}",
    ]
    result = {
        **found_in,
        "data": str(arguments.run) if arguments.run else "synthetic",
        "threads": torch.get_num_threads(),
        "ms_per_step": times,
        "against": {name: asdict(ratio) for name, ratio in ratios(times, ALONE).items()},
        "loudness": {name: asdict(one) for name, one in loud.items()},
    }
    publish(arguments.output, "benchmarks/terms_cost", [cost_table(times, loud)], notes, result)
    return True


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = frame.parser(__doc__, "terms_cost", rounds=15, turn=3)
    parser.add_argument("--batches", type=int, default=4, help="for the norms of gradients")
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    """0 if it measured, 2 for a mistake of the user."""
    return frame.run(parse(given), benchmark)


if __name__ == "__main__":
    sys.exit(main())

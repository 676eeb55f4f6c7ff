"""What the diagnostics add to the time of training, at the default cadence.

python benchmarks/diagnostics_cost.py measures the Trainer's own step with a look and without one, in turns,
on the demo's model and objective. benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import frame
import torch
from tables import Table, publish
from timing import Spread, StepTimer, interleave, ratios, spread, with_training

from tutti.config.run_config import RunConfig
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.training.diagnostics.loss_spikes import SpikeDetector
from tutti.training.diagnostics.observer import DiagnosticsConfig
from tutti.training.diagnostics.update_shares import measured_fraction

PLAIN = "no look"
MOST_ADDED = 0.03


def arms(config: RunConfig, shares: Sequence[float]) -> dict[str, RunConfig]:
    """A training without a look, and, for each share of the batch, one with a look in every step."""
    own = config.training.diagnostics.model_dump()
    looks = {f"look, {share:g} of the batch": {"every": 1, "share": share} for share in shares}
    return {
        name: with_training(config, diagnostics=own | changes)
        for name, changes in {PLAIN: {"every": 0}, **looks}.items()
    }


def search_ms(config: RunConfig, steps: int = 20_000) -> float:
    """Milliseconds that the search for loss spikes takes in a step: too little to see in a step's time."""
    detector = SpikeDetector(config.training.diagnostics.spikes)
    values = dict.fromkeys(config.objective.terms(), 1.0)
    started = time.perf_counter()
    for _ in range(steps):
        detector.detect(values)
    return 1000 * (time.perf_counter() - started) / steps


def added(look: Spread, every: int, search: float) -> Spread:
    """What a look in every `every`-th step, the windows of updates before every twentieth look and the search
    for spikes add to the time of training.

    (look - 1) * fraction + search: `look` is the time of a step with a look over that of one without,
    `fraction` that of the steps that have one (`measured_fraction`), `search` the share of a step that the
    search takes.
    """
    fraction = measured_fraction(every)
    low, median, high = ((ratio - 1) * fraction + search for ratio in (look.low, look.median, look.high))
    return Spread(median=median, low=low, high=high)


def cost_table(times: Mapping[str, Sequence[float]], overheads: Mapping[str, Spread], every: int) -> Table:
    """Time per step of each arm, and what it adds to a training."""
    rows: list[tuple[str, ...]] = []
    against = ratios(times, PLAIN)
    for name, values in times.items():
        one, ratio = spread(values), against[name]
        more = overheads.get(name)
        cells = ("", "")
        if more is not None:
            cells = (f"{100 * more.median:+.2f} %", f"{100 * more.low:+.2f} - {100 * more.high:+.2f} %")
        row = (name, f"{one.median:.1f}", f"{one.low:.1f} - {one.high:.1f}", f"{ratio.median:.3f}")
        rows.append((*row, f"{ratio.low:.3f} - {ratio.high:.3f}", *cells))
    heads = (
        "in every step",
        "ms per step",
        "quartiles",
        "ratio",
        "quartiles",
        f"1 in {every} adds",
        "quartiles",
    )
    return Table(title="What a look costs", heads=heads, rows=tuple(rows))


def measure(
    config: RunConfig, data_from: Path, scratch: Path, *, shares: Sequence[float], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Milliseconds per step of every arm, interleaved. Uses torch's present threads."""
    timers = {
        name: StepTimer(own, data_from, scratch / f"arm{number}")
        for number, (name, own) in enumerate(arms(config, shares).items())
    }
    try:
        return interleave(timers, rounds, steps)
    finally:
        for timer in timers.values():
            timer.close()


def benchmark(arguments: argparse.Namespace, config: RunConfig, data_from: Path, scratch: Path) -> bool:
    """Measures, publishes, and says whether the default look stays within its budget."""
    found_in = circumstances()
    default = DiagnosticsConfig()
    shares = sorted({default.share, *arguments.shares})
    print_line(f"timing {1 + len(shares)} arms, {arguments.rounds} rounds of {arguments.turn} steps each ...")
    times = measure(config, data_from, scratch, shares=shares, rounds=arguments.rounds, steps=arguments.turn)
    search = search_ms(config) / spread(times[PLAIN]).median
    against = {name: ratio for name, ratio in ratios(times, PLAIN).items() if name != PLAIN}
    overheads = {name: added(ratio, default.every, search) for name, ratio in against.items()}
    own = overheads[f"look, {default.share:g} of the batch"]
    passed = own.median <= MOST_ADDED
    notes = [
        f"Default (a look every {default.every} steps at {default.share:g} of the batch): "
        f"{100 * own.median:+.2f} % of the training time, wanted at most {100 * MOST_ADDED:.0f} %: "
        f"{'PASS' if passed else 'FAIL'}. The search for spikes is {100 * search:.4f} % of it.",
        f"Terms: {', '.join(config.objective.terms())}. Batch {config.data.batch_size}, "
        f"{torch.get_num_threads()} thread(s). {made_with(found_in)}",
    ]
    result = {
        **found_in,
        "data": str(arguments.run) if arguments.run else "synthetic",
        "threads": torch.get_num_threads(),
        "ms_per_step": times,
        "search_share": search,
        "ratio": {name: asdict(ratio) for name, ratio in against.items()},
        "added": {name: asdict(more) for name, more in overheads.items()},
        "passed": passed,
    }
    tables = [cost_table(times, overheads, default.every)]
    publish(arguments.output, "benchmarks/diagnostics_cost", tables, notes, result)
    return passed


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = frame.parser(__doc__, "diagnostics_cost", rounds=20, turn=4)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.25, 0.5, 1.0], help="shares of a batch")
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    """0 if the default stays within its budget, 1 if not, 2 for a mistake of the user."""
    return frame.run(parse(given), benchmark)


if __name__ == "__main__":
    sys.exit(main())

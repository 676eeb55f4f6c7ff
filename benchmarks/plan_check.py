"""The time that `tutti plan` predicts against measured updates on this CPU; memory.py does so for memory.

python benchmarks/plan_check.py calibrates --mfu and what an update takes besides on two small runs,
predicts another batch and another preset from them, and measures all in turns. benchmarks/README.md says
what each column means.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from frame import DEMO
from memory import BASE
from tables import RESULTS, Table, prints_user_errors, publish
from timing import Spread, interleave, matmul_rates, spread, work_clock

from tutti.config.run_config import RunConfig, load_config
from tutti.planning.footprint import TrialUpdate, count_flops
from tutti.runs.build import expected_spec
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.training.device import resolve_machine

MOST_ERROR = 0.20
CALIBRATION = (("tiny", 16), ("tiny", 64))
RUNS = (*CALIBRATION, ("tiny", 32), ("small", 4), ("small", 8))
MATMUL = "matmul"
SIZE = 1024


class Updates:
    """Whole updates of a preset on blank batches, and the FLOPs that the plan counts for them."""

    def __init__(self, config: RunConfig, rows: int) -> None:
        spec = expected_spec(config)
        again = config.training.activation_checkpointing == "block"
        flops = count_flops(config, spec)
        self.work = flops.hardware(again) * rows + flops.optimizer
        self._one = TrialUpdate(config, spec)
        self._batch = self._one.batch(rows)

    def __call__(self, steps: int) -> float:
        """Milliseconds of an update: the mean over `steps`."""
        now = clock()
        started = now()
        for _ in range(steps):
            self._one.backward(self._one.forward(self._batch))
            self._one.step()
        return 1000 * (now() - started) / steps


def clock() -> Callable[[], float]:
    """That of all measurements here."""
    return work_clock("cpu", torch.get_num_threads())[1]


def matmul(steps: int) -> float:
    """Milliseconds of a float32 product of two square matrices, the best of three for each of the steps."""
    return 1000 * 2 * SIZE**3 / max(matmul_rates(3 * steps, SIZE, clock=clock()))


def name_of(run: tuple[str, int]) -> str:
    """As in the table."""
    return f"{run[0]}, batch {run[1]}"


def calibrated(work: tuple[float, float], ms: tuple[float, float]) -> tuple[float, float]:
    """FLOPs per ms and the overhead in ms: the line through two runs, an overhead below 0 counting as 0."""
    rate = (work[1] - work[0]) / (ms[1] - ms[0])
    overhead = ms[0] - work[0] / rate
    return (rate, overhead) if overhead >= 0 else (sum(work) / sum(ms), 0.0)


def predictions(
    work: Mapping[str, float], times: Mapping[str, Sequence[float]], base: tuple[str, str]
) -> dict[str, list[float]]:
    """Milliseconds of every run that does not calibrate, for each round from what calibrates in it."""
    found: dict[str, list[float]] = {name: [] for name in work if name not in base}
    for small, large in zip(times[base[0]], times[base[1]], strict=True):
        rate, overhead = calibrated((work[base[0]], work[base[1]]), (small, large))
        for name, values in found.items():
            values.append(overhead + work[name] / rate)
    return found


def time_tables(
    times: Mapping[str, Sequence[float]], work: Mapping[str, float], found: Mapping[str, Spread], rate: float
) -> list[Table]:
    """FLOPs and time of the runs that calibrate, and of those that are held out, with errors."""
    given: list[tuple[str, ...]] = []
    held_out: list[tuple[str, ...]] = []
    for name, amount in work.items():
        one = spread(times[name])
        share = amount / (one.median / 1000) / rate
        row = (name, f"{amount / 1e9:.2f}", f"{one.median:.0f}", f"{one.low:.0f} - {one.high:.0f}")
        row = (*row, f"{100 * share:.1f} %")
        error = found.get(name)
        if error is None:
            given.append(row)
            continue
        between = f"{100 * error.low:+.1f} - {100 * error.high:+.1f} %"
        held_out.append((*row, f"{100 * error.median:+.1f} %", between))
    heads = ("run", "GFLOP", "ms", "quartiles", "of the matmul")
    return [
        Table(title="Time of an update: calibrates", heads=heads, rows=tuple(given)),
        Table(
            title="Time of an update: held out", heads=(*heads, "error", "quartiles"), rows=tuple(held_out)
        ),
    ]


def benchmark(arguments: argparse.Namespace) -> bool:
    """Measures, publishes, and says whether every prediction is within 20 %."""
    found_in = circumstances()
    chosen = [run for run in RUNS if run[0] in arguments.presets or run in CALIBRATION]
    configs = {run: load_config(DEMO, [*BASE, f"model.size={run[0]}"]) for run in chosen}
    runs = {name_of(run): Updates(config, run[1]) for run, config in configs.items()}
    print_line(f"timing {len(runs)} runs, {arguments.rounds} rounds ...")
    times = interleave({MATMUL: matmul, **runs}, arguments.rounds, arguments.turn)
    base = (name_of(CALIBRATION[0]), name_of(CALIBRATION[1]))
    work = {name: run.work for name, run in runs.items()}
    predicted = predictions(work, times, base)
    found = {
        name: spread([one / real - 1 for one, real in zip(values, times[name], strict=True)])
        for name, values in predicted.items()
    }
    passed = all(abs(error.median) <= MOST_ERROR for error in found.values())
    rate = 2 * SIZE**3 / (spread(times[MATMUL]).median / 1000)
    typical = (spread(times[base[0]]).median, spread(times[base[1]]).median)
    per_ms, overhead = calibrated((work[base[0]], work[base[1]]), typical)
    notes = [
        f"Calibrated on {base[0]} and {base[1]}: --mfu {1000 * per_ms / rate:.2f} of the matmul, overhead "
        f"{overhead:.0f} ms. Predicted / measured - 1 in the same round; wanted within "
        f"{100 * MOST_ERROR:.0f} %: {'PASS' if passed else 'FAIL'}.",
        f"Matmul float32 {SIZE}^3: {rate / 1e9:.1f} GFLOP/s; {torch.get_num_threads()} thread(s); ms are "
        f"{work_clock('cpu', torch.get_num_threads())[0]}. "
        f"{made_with(found_in)}",
    ]
    result = {
        **found_in,
        "work": work,
        "ms": times,
        "errors": {name: asdict(one) for name, one in found.items()},
        "passed": passed,
    }
    publish(
        arguments.output,
        "benchmarks/plan_check",
        time_tables(times, work, found, rate),
        notes,
        result,
    )
    return passed


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=("tiny", "small"), default=["tiny", "small"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=10, help="rounds over the runs")
    parser.add_argument("--turn", type=int, default=2, help="updates of each in a round")
    parser.add_argument("--output", type=Path, default=RESULTS / "plan_check", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0 if every prediction is within 20 %, 1 if not, 2 for a mistake of the user."""
    arguments = parse(given)
    torch.set_num_threads(resolve_machine("cpu", arguments.threads, "fp32").threads)
    return 0 if benchmark(arguments) else 1


if __name__ == "__main__":
    sys.exit(main())

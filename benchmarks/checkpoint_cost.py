"""How long a checkpoint holds up the training: written at once, in the background, whole or in shards.

python benchmarks/checkpoint_cost.py trains a preset for some steps in each mode, in turns, and saves after
each turn. benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from frame import DEMO
from recorded import synthetic_run
from tables import RESULTS, Table, prints_user_errors, publish
from timing import Spread, StepTimer, spread, with_training

from tutti.config.run_config import RunConfig, load_config
from tutti.runs.provenance import circumstances, made_with

MODES: dict[str, dict[str, object]] = {
    "whole, at once": {"format": "whole", "background": False},
    "whole, in the background": {"format": "whole", "background": True},
    "sharded, at once": {"format": "sharded", "background": False},
    "sharded, in the background": {"format": "sharded", "background": True},
}


class SavingTimer:
    """A training that saves: how long the loop is held, and how long until the checkpoint is on the disk."""

    def __init__(self, config: RunConfig, data_from: Path, run: Path) -> None:
        self._timer = StepTimer(config, data_from, run)
        self._timer.trainer.state.parts["loader"] = self._timer.data.train
        self._run = run

    def __call__(self, steps: int) -> tuple[float, float]:
        """Milliseconds, after `steps` updates; updates go on while it is written, as in a training."""
        trainer = self._timer.trainer
        self._timer(steps)
        started = time.perf_counter()
        trainer.save()
        held = time.perf_counter()
        thread = trainer.saver._thread
        while thread is not None and thread.is_alive():
            self._timer(1)
        trainer.saver.wait()
        return 1000 * (held - started), 1000 * (time.perf_counter() - started)

    def size(self) -> int:
        """Bytes of the newest checkpoint."""
        newest = sorted((self._run / "checkpoints").glob("step-*"))[-1]
        return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())

    def close(self) -> None:
        """Stop the loader's thread."""
        self._timer.close()


def measure(
    config: RunConfig, data_from: Path, scratch: Path, rounds: int, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Each mode's times, the modes in turns; one uncounted turn of each comes first."""
    timers = {
        mode: SavingTimer(
            with_training(config, checkpoints={**changes, "keep": 1}),
            data_from,
            scratch / mode.replace(" ", "-"),
        )
        for mode, changes in MODES.items()
    }
    found: dict[str, dict[str, list[float]]] = {
        mode: {"held": [], "written": [], "bytes": []} for mode in MODES
    }
    for number in range(rounds + 1):
        for mode, timer in timers.items():
            held, written = timer(steps)
            if number:
                found[mode]["held"].append(held)
                found[mode]["written"].append(written)
    for mode, timer in timers.items():
        found[mode]["bytes"].append(float(timer.size()))
        timer.close()
    return found


def table(preset: str, found: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """A line for each mode."""

    def line(mode: str) -> tuple[str, ...]:
        held, written = spread(found[mode]["held"]), spread(found[mode]["written"])
        size = f"{found[mode]['bytes'][0] / 1e6:,.1f}"
        return (mode, size, *_texts(held), *_texts(written))

    heads = ("mode", "MB", "ms held", "quartiles", "ms until written", "quartiles")
    return Table(title=f"A checkpoint of {preset}", heads=heads, rows=tuple(line(mode) for mode in found))


def _texts(one: Spread) -> tuple[str, str]:
    return f"{one.median:,.0f}", f"{one.low:,.0f} - {one.high:,.0f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], help="tiny, small, base, large")
    parser.add_argument("--rounds", type=int, default=9, help="rounds over the modes")
    parser.add_argument("--turn", type=int, default=2, help="updates between two checkpoints")
    parser.add_argument("--batch", type=int, default=4, help="windows of an update")
    parser.add_argument("--output", type=Path, default=RESULTS / "checkpoint_cost", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0, or 2 for a mistake of the user."""
    arguments = parse(given)
    found_in = circumstances()
    common = ("training.device=cpu", "training.threads=1", f"data.batch_size={arguments.batch}")
    tables: list[Table] = []
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="tutti-benchmark-") as name:
        for preset in arguments.presets:
            config = load_config(DEMO, (*common, f"model.size={preset}"))
            scratch = Path(name) / preset
            data = synthetic_run(scratch / "data", config)
            found = measure(config, data, scratch, arguments.rounds, arguments.turn)
            tables.append(table(preset, found))
            results[preset] = {
                mode: {key: asdict(spread(values)) for key, values in one.items()}
                for mode, one in found.items()
            }
    notes = [
        "Held: the training waits. Written: the folder has its name and everything is on the disk; meanwhile "
        f"the training goes on with the same core. {made_with(found_in)}"
    ]
    publish(arguments.output, "benchmarks/checkpoint_cost", tables, notes, {**found_in, "presets": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())

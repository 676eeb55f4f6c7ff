"""Augmentation: samples per CPU second, against colour jitter written as plain numpy.

python benchmarks/augmentation.py    # a minute of one core

A sample is the present and one later picture of two views. The plain numpy of the first column is what the
loader did before: the same factors, picture by picture of arithmetic over the whole batch. All take turns in
one process on one thread, and CPU time is counted, draws included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tables import RESULTS, Table, prints_user_errors, publish
from timing import spread

from tutti.data.augmentation import ColourJitter, PictureJitter
from tutti.data.augmentation.draws import Draws, changes_of
from tutti.data.mixture import Stream
from tutti.runs.provenance import circumstances, made_with

VIEWS = 2
WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32).reshape(3, 1, 1)
COLOUR = "colour"
EVERY = {name: {"probability": 0.5} for name in ("blur", "crop", "rotation", "shift")}
KINDS = {
    COLOUR: ColourJitter().full(),
    "pictures": PictureJitter(),
    "pictures, half of them moved": PictureJitter.model_validate(EVERY),
}


def plain(moments: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Brightness, contrast and saturation of 0.2 by the factors that `colour` draws."""
    lead = (len(moments[0]), VIEWS, 1, 1, 1)
    random = np.random.default_rng([seed, 3, 0])
    brightness, contrast, saturation = (random.uniform(0.8, 1.2, lead).astype(np.float32) for _ in range(3))
    mean = grey(moments[0] * brightness).mean((3, 4), keepdims=True)

    def changed(images: np.ndarray) -> np.ndarray:
        x = (images * brightness - mean) * contrast + mean
        level = grey(x)
        return np.clip(np.rint((x - level) * saturation + level), 0, 255).astype(np.uint8)

    return [changed(images) for images in moments]


def grey(x: np.ndarray) -> np.ndarray:
    """The luminance of each pixel."""
    return (x * WEIGHTS).sum(2, keepdims=True)


def augmented(moments: list[np.ndarray], seed: int, config: PictureJitter) -> list[np.ndarray]:
    """By Tutti, draws included."""
    rows = len(moments[0])
    draws = Draws.of(seed, 0, [Stream((), slice(None), 0, rows)], rows, VIEWS)
    change = changes_of(config, draws, np.ones((rows, VIEWS), bool))
    return [images.numpy() for images in change([torch.from_numpy(images) for images in moments])]


def measured(size: int, rows: int, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Samples per CPU second of each way, in turns; the largest difference of a number of a picture between
    the plain way and `colour`."""
    random = np.random.default_rng(size)
    moments = [random.integers(0, 256, (rows, VIEWS, 3, size, size), dtype=np.uint8) for _ in range(2)]
    ways: dict[str, Callable[[int], list[np.ndarray]]] = {"plain": lambda seed: plain(moments, seed)}
    for name, config in KINDS.items():
        ways[name] = lambda seed, config=config: augmented(moments, seed, config)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    largest = 0
    for turn in range(rounds + 1):
        found: dict[str, list[np.ndarray]] = {}
        for name, way in ways.items():
            began = time.process_time()
            found[name] = way(turn)
            seconds = time.process_time() - began
            if turn:  # the first one is for the caches
                rates[name].append(rows / seconds)
        for one, other in zip(found["plain"], found[COLOUR], strict=True):
            largest = max(largest, int(np.abs(one.astype(np.int16) - other).max()))
    return rates, largest


@prints_user_errors
def main() -> int:
    """0 if plain numpy and `colour` give the same pictures, but for the rounding of what lies in between."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 224], help="data.image_size")
    parser.add_argument("--rows", type=int, default=64, help="samples in a batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "augmentation", help="without suffix")
    given = parser.parse_args()
    torch.set_num_threads(1)
    made, lines, result, largest = circumstances(), [], {}, 0
    for size in given.sizes:
        rates, difference = measured(size, given.rows, given.rounds)
        largest, result[f"{size} px"] = max(largest, difference), rates
        ratio = spread([a / b for a, b in zip(rates[COLOUR], rates["plain"], strict=True)])
        medians = [f"{spread(rates[name]).median:,.0f}" for name in rates]
        lines.append((f"{size} px", *medians, f"{ratio.median:.1f}", f"{ratio.low:.1f} - {ratio.high:.1f}"))
    heads = ("pictures", "plain numpy, colour", *KINDS, "colour / plain", "quartiles")
    table = Table(title="Samples augmented per CPU second", heads=heads, rows=tuple(lines))
    note = (
        f"Batches of {given.rows}, {VIEWS} views now and once later, {given.rounds} rounds in turns; no "
        f"number of a picture differs by more than {largest} of 255 between plain numpy and colour. "
        f"{made_with(made)}"
    )
    result = {"made": made, "rates": result, "largest_difference": largest}
    publish(given.output, "benchmarks/augmentation", [table], [note], result)
    return 0 if largest <= 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Damaged data sets, odd configs, odd command lines and hostile folders: all of it by one command.

    python benchmarks/hostile_input.py                             # as published, hours on two cores
    python benchmarks/hostile_input.py --sets 60 --configs 90 --commands 150 --folders 36 --output /tmp/robust

Each part has its own table, in benchmarks/results or in `--output`. Exit code 1 if any input ended badly: a
traceback, no end, more than 2 GB, a stranger's code run, a file outside read, another result without a word.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import damaged_data
import damaged_sets
import hostile_folders
import hostile_rules
import odd_commands
import odd_configs
from bounded_process import Outcome, publish_outcomes
from tables import RESULTS

from tutti.runs.terminal import print_line

PARTS: dict[str, tuple[str, int, Callable[[int], list[Outcome]]]] = {
    "sets": ("damaged_data", 2000, lambda count: damaged_data.outcomes_of(list(damaged_sets.LINES), count)),
    "configs": ("odd_configs", 600, odd_configs.outcomes_of),
    "commands": ("odd_commands", 200 * len(odd_commands.NAMES), odd_commands.outcomes_of),
    "folders": ("hostile_folders", 20 * len(hostile_rules.RULES), hostile_folders.outcomes_of),
}
"""The name of each part's result, its number of inputs, and what judges so many."""


def main(given: Sequence[str] | None = None) -> int:
    """0 if no input ended badly, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for part, (_, count, _) in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=count, help=f"how many; {count} unless given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(given)
    bad: dict[str, int] = {}
    for part, (name, _, judge) in PARTS.items():
        if count := getattr(options, part):
            title = name.replace("_", " ").capitalize()
            bad[part] = publish_outcomes(options.output / name, title, judge(count))
    ended = ", ".join(f"{part} {number}" for part, number in bad.items())
    print_line(f"ended badly: {ended or 'nothing was asked for'}")
    return int(any(bad.values()))


if __name__ == "__main__":
    sys.exit(main())

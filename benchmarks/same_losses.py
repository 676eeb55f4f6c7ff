"""Same computation, same losses? Trains a config at two commits on the same data and compares every number.

python benchmarks/same_losses.py main HEAD            configs/smoke.yaml, 20 steps, a synthetic data set
python benchmarks/same_losses.py HEAD . CONFIG        a dot is the working tree as it is
A config inside the repository is read as it is at each commit, so keys may be renamed between them;
--renamed OLD=NEW says what metrics and parameters of the first commit are called at the second.
The commits are unpacked by `git archive` into a temporary folder: checkout and index are not touched.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recorded import synthetic_run
from safetensors.torch import load_file
from tables import prints_user_errors

from tutti.config.run_config import load_config
from tutti.debug.compare_runs import Comparison, untimed
from tutti.evaluation.closed_loop.starts import DATASET
from tutti.runs.terminal import print_line
from tutti.training.records import read_records
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[1]
HERE = "."
LEAST_KEYS = ("training.threads=1", "training.device=cpu", "training.log_every=1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sameness:
    """`found` compares what both commits record and the weights at the end; `only` are the metrics that one
    of them does not record. `sizes` are the largest relative deviations of each metric that differs."""

    steps: int
    found: Comparison
    first_step: str
    only: tuple[str, ...]
    sizes: dict[str, float]


def git(*arguments: str) -> bytes:
    """What a reading git command prints. Raises: UserError with what it said."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def unpack(commit: str, folder: Path) -> Path:
    """A commit's `src` and `configs`, unpacked into a folder; the repository itself for a dot."""
    if commit == HERE:
        return ROOT
    name = git("rev-parse", "--verify", f"{commit}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", name, "src", "configs"))) as archive:
        archive.extractall(folder, filter="data")
    return folder


def config_at(tree: Path, config: Path) -> Path:
    """The config of that path as it is in `tree`, if it is one of the repository's; else the file itself."""
    whole = config.resolve()
    inside = tree / whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole
    return inside if inside.is_file() else whole


def renamed(name: str, renames: Mapping[str, str]) -> str:
    """The name with each old word, or words joined by dots or slashes, replaced by the new one."""
    for old, new in renames.items():
        name = re.sub(rf"(?<![\w]){re.escape(old)}(?![\w])", new, name)
    return name


def train(source: Path, config: Path, overrides: Sequence[str], run: Path) -> None:
    """`tutti train` of the package in `source`. Raises: UserError with the end of its output."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    asked = [sys.executable, "-c", "import tutti; print(tutti.__file__)"]
    found = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_relative_to(source):
        raise UserError(f"Python imports tutti from {found}, not from {source}: is it installed otherwise?")
    command = [sys.executable, "-m", "tutti", "train", str(config), *overrides, "--run", str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise UserError(f"{source}: the training failed:\n{(done.stdout + done.stderr)[-2000:]}")


def compare(one: Path, other: Path, steps: int, renames: Mapping[str, str] | None = None) -> Sameness:
    """The records of two runs step by step, and all weights of their last checkpoints."""
    both = [{(r["step"], r["kind"]): untimed(r) for r in read_records(run)} for run in (one, other)]
    both[0] = {key: _with_names(values, renames or {}) for key, values in both[0].items()}
    found, only, sizes, first_step = Comparison(), set(), {}, ""
    for key in sorted(both[0].keys() | both[1].keys()):
        left, right = (records.get(key, {}) for records in both)
        only |= set(left) ^ set(right)
        shared = [name for name in left if name in right]
        before = found.num_differing
        found.add(f"step {key[0]} {key[1]}", *({n: values[n] for n in shared} for values in (left, right)))
        if found.num_differing > before:
            first_step = first_step or f"step {key[0]} ({key[1]})"
            for name in shared:
                sizes[name] = max(sizes.get(name, 0.0), _deviation(left[name], right[name]))
    last = [sorted((run / "checkpoints").glob("step-*"))[-1] for run in (one, other)]
    for name in sorted({path.name for folder in last for path in folder.glob("*.safetensors")}):
        weights = [load_file(folder / name) if (folder / name).exists() else {} for folder in last]
        weights[0] = _with_names(weights[0], renames or {})
        found.add(name, *weights)
    return Sameness(
        steps=steps,
        found=found,
        first_step=first_step,
        only=tuple(sorted(only)),
        sizes={name: size for name, size in sizes.items() if size > 0},
    )


def _with_names(values: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    return {renamed(name, renames): value for name, value in values.items()}


def _deviation(one: Any, other: Any) -> float:
    """|a - b| / max(|a|, |b|); 0 for equal values and for what is no number."""
    if one == other or not isinstance(one, float) or not isinstance(other, float):
        return 0.0
    return abs(one - other) / max(abs(one), abs(other))


def describe(names: Sequence[str], result: Sameness) -> None:
    """The verdict in one line; where something differs, what, when and by how much."""
    found = result.found
    if result.only:
        print_line(f"recorded at one of them only: {', '.join(result.only)}")
    verdict = f"{result.steps} steps, {found.num_differing:,} of {found.num_values:,} values differ"
    if found.first is None:
        print_line(f"same computation: {verdict} ({' and '.join(names)})")
        return
    print_line(f"NOT the same computation: {verdict} ({' and '.join(names)})")
    print_line(f"first: {found.first}")
    for name, size in sorted(result.sizes.items(), key=lambda item: -item[1])[:12]:
        print_line(f"  {name}: off by up to {size:.2g} of its value, from {result.first_step} on")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs=2, metavar="COMMIT", help="commits, branches, tags, or a dot")
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs" / "smoke.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="key.sub=value, for both")
    parser.add_argument("--renamed", nargs="*", default=[], metavar="OLD=NEW", help="names, first to second")
    return parser.parse_args(arguments)


def same_losses(
    commits: Sequence[str],
    config: Path,
    steps: int,
    overrides: Sequence[str],
    renames: Mapping[str, str] | None = None,
) -> Sameness:
    """Both trainings in a temporary folder, on the config's own data sets or else on a synthetic one."""
    given = [f"training.steps={steps}", *LEAST_KEYS, *overrides]
    loaded = load_config(config, given)
    with tempfile.TemporaryDirectory(prefix="tutti-same-") as name:
        scratch = Path(name)
        if not loaded.data.sources:
            synthetic_run(scratch, loaded, per_task=4, length=24)
            given.append(f"data.sources=[{{path: {scratch / DATASET}}}]")
        runs = []
        for number, commit in enumerate(commits):
            tree = unpack(commit, scratch / f"commit{number}")
            runs.append(scratch / f"run{number}")
            train(tree / "src", config_at(tree, config), given, runs[-1])
        return compare(*runs, steps, renames)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0 if it is the same computation, 1 if not, 2 for a mistake of the user."""
    arguments = parse(given)
    renames = dict(one.split("=", 1) for one in arguments.renamed)
    result = same_losses(arguments.commits, arguments.config, arguments.steps, arguments.overrides, renames)
    describe(arguments.commits, result)
    return 0 if result.found.first is None else 1


if __name__ == "__main__":
    sys.exit(main())

"""Does joint training help? All four terms against fewer, at equal steps and at equal time.

python benchmarks/joint_training.py --run runs/demo trains every arm from several seeds on the data that the
run has recorded, which is only read, and plays each in the simulator. Interrupted, it goes on where it was.
benchmarks/README.md says what each column means.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from joint_cell import Cell, identity, load, make_cell
from joint_scores import (
    BASE,
    ArmScore,
    Budget,
    Trained,
    difference_table,
    mean_table,
    plain,
    score,
    task_table,
)
from recorded import check_recorded, require_unchanged, snapshot
from tables import RESULTS, prints_user_errors, publish
from timing import ratios, spread, step_times

from tutti.config.run_config import RunConfig, load_config, to_yaml
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.storage.files import write_atomically
from tutti.types import UserError

LABELS = {
    "all": "all four terms",
    "no_align_recon": "without align, recon",
    "no_state": "without state",
    "action_only": "action only",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
ROUNDS, TURN = 20, 3


def equal_time_steps(steps: int, ratio: float) -> int:
    """Steps that take as long as `steps` of all terms, for an arm whose step takes `ratio` of that one's."""
    return max(steps, round(steps / ratio))


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """Each folder once, in the first order."""
    return list({cell.folder: cell for cell in cells}.values())


def measured_costs(config: RunConfig, run: Path, work: Path, fingerprint: str) -> dict[str, Any]:
    """Each arm's time per step over that of `all`, on one thread; measured once, then kept in cost.json."""
    path, key = work / "cost.json", identity(config, fingerprint)
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["identity"] == key:
            return found
    print_line(f"timing a step of each arm, {ROUNDS} rounds of {TURN} steps ...")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times, _ = step_times(config, run, work / "timing", ROUNDS, TURN)
    finally:
        torch.set_num_threads(before)
    found = {
        "identity": key,
        "ms_per_step": {arm: asdict(spread(values)) for arm, values in times.items()},
        "ratio": {arm: ratio.median for arm, ratio in ratios(times, BASE).items()},
        "load": os.getloadavg()[0],
    }
    write_atomically(path, json.dumps(found, indent=1))
    return found


def start_cell(cell: Cell, run: Path) -> Cell:
    """Runs a cell in a process of its own, its output in the cell's folder.

    Raises: UserError with the end of that output if it failed.
    """
    write_atomically(cell.folder / "cell.yaml", to_yaml(cell.config))
    worker = Path(__file__).with_name("joint_cell.py").resolve()
    command = [sys.executable, str(worker), str(cell.folder), str(run)]
    log = cell.folder / "output.log"
    with log.open("a", encoding="utf-8") as output:
        done = subprocess.run(
            command, env=os.environ | ONE_THREAD, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode != 0 or not cell.result.is_file():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise UserError(f"{cell.folder.name} failed (exit {done.returncode}); the end of {log}:\n{tail}")
    return cell


def finish(cells: Sequence[Cell], run: Path, jobs: int) -> None:
    """Runs the cells that have no result yet, `jobs` at a time.

    Raises: UserError, after all others were tried, if some failed.
    """
    missing = [cell for cell in cells if not cell.result.is_file()]
    print_line(
        f"{len(cells)} trainings, {len(cells) - len(missing)} found, {len(missing)} to do, {jobs} at a time"
    )
    failures: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(start_cell, cell, run) for cell in missing]
        try:
            for number, future in enumerate(as_completed(waiting), start=1):
                try:
                    one = load(future.result())
                    what = f"{one.arm}, seed {one.seed}, {one.steps} steps ({one.seconds:.0f} s)"
                    print_line(f"{number}/{len(missing)} {what}: {100 * one.mean:.1f} %")
                except UserError as error:
                    failures.append(str(error))
                    print_line(f"{number}/{len(missing)} {error}")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failures:
        raise UserError(
            f"{len(failures)} trainings failed, see above. Run again: the finished ones are kept."
        )


def plan(
    arguments: argparse.Namespace, config: RunConfig, fingerprint: str, cost: dict[str, Any]
) -> dict[tuple[str, Budget], list[Cell]]:
    """The cells of each arm at each budget, one a seed; `all` has one budget, which is the measure."""
    planned: dict[tuple[str, Budget], list[Cell]] = {}
    for arm in (BASE, *(arm for arm in LABELS if arm in arguments.arms)):
        budgets: dict[Budget, int] = {"steps": arguments.steps}
        if arm != BASE:
            budgets["time"] = equal_time_steps(arguments.steps, cost["ratio"][arm])
        for budget, steps in budgets.items():
            planned[arm, budget] = [
                make_cell(
                    config,
                    arguments.run,
                    arguments.work,
                    fingerprint,
                    arm=arm,
                    seed=seed,
                    steps=steps,
                    starts=arguments.starts,
                )
                for seed in range(arguments.seeds)
            ]
    return planned


def notes(scores: Sequence[ArmScore], trained: Sequence[Trained], arguments: argparse.Namespace) -> list[str]:
    """What the tables rest on, in sentences."""
    commits = sorted({str(one.commit) for one in trained})
    compared = sum(one.against is not None for one in scores)
    return [
        f"{arguments.seeds} training seeds, {arguments.starts} held-out starts a task with held-out "
        f"instructions, the same for every arm and seed; one thread a training, {arguments.jobs} at a time. "
        f"All intervals 95 %, not corrected for the {compared} comparisons.",
        "Verdict: better or worse only where both the paired bootstrap and the t-interval of the seeds' "
        "differences exclude 0.",
        f"Trained at commit {', '.join(commits)}.",
    ]


def benchmark(arguments: argparse.Namespace) -> None:
    """Plans, trains what is missing, publishes."""
    arguments.run, arguments.work = arguments.run.resolve(), arguments.work.resolve()
    found_in = circumstances()
    config = load_config(arguments.run / "config.yaml")
    fingerprint = check_recorded(arguments.run, config)
    before = snapshot(arguments.run)
    config.record.spec.check_rendering()  # before anything long begins
    arguments.work.mkdir(parents=True, exist_ok=True)
    cost = measured_costs(config, arguments.run, arguments.work, fingerprint)
    planned = plan(arguments, config, fingerprint, cost)
    by_seed = sorted((cell for cells in planned.values() for cell in cells), key=lambda cell: cell.seed)
    finish(unique(by_seed), arguments.run, arguments.jobs)
    require_unchanged(before, snapshot(arguments.run))
    trained = {key: [load(cell) for cell in cells] for key, cells in planned.items()}
    scores = [score(budget, found, trained[BASE, "steps"]) for (_, budget), found in trained.items()]
    everything = [one for found in trained.values() for one in found]
    publish(
        arguments.output,
        "benchmarks/joint_training",
        [table(scores, LABELS) for table in (mean_table, difference_table, task_table)],
        [*notes(scores, everything, arguments), made_with(found_in)],
        {
            **found_in,
            "cost": cost,
            "data": fingerprint,
            "scores": plain(scores),
            "trained": [asdict(load(cell)) for cell in unique(by_seed)],
        },
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a finished run of the demo")
    parser.add_argument(
        "--steps", type=int, default=1000, help="steps of every arm; the measure of equal time"
    )
    others = [arm for arm in LABELS if arm != BASE]
    parser.add_argument("--arms", nargs="+", choices=others, default=others, help=f"beside {BASE}")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds, from 0")
    parser.add_argument("--starts", type=int, default=20, help="rollouts per task")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/joint_training"), help="folder of the trainings"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "joint_training", help="without suffix")
    return parser.parse_args(arguments)


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0 if the study is complete, 2 for a mistake of the user."""
    arguments = parse(given)
    benchmark(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

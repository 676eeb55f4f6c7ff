"""Random kill -9 points in recording, cache building, evaluation and report: is the end the same?

    python benchmarks/kill_stages.py              # 40 kills, benchmarks/results/kill_stages.{md,json}
    python benchmarks/kill_stages.py --kills 3 --only cache report --output /tmp/kills

Each stage of a tiny run (configs/smoke.yaml) is run once undisturbed. Then it is run in a copy of the folder,
killed with SIGKILL at a random moment, twice, and run again to its end. Every file that the stage makes is
compared, byte by byte but for times: data set, cache, rollouts, results.json, table of stages, page. Training
has kills of its own (benchmarks/kill_resume.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import RESULTS, Table, prints_user_errors, publish

from tutti import pipeline
from tutti.config.run_config import RunConfig, load_config
from tutti.runs.build import build_data
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"
KILLS, AT_ONCE = 10, 2
"""Kills of each stage, and those that one run goes through."""
TIMES = ("seconds", "resumed", "stage_seconds", "time", "started", "load")
"""Keys whose values a clock decides."""
STAGES: dict[str, tuple[Callable[[RunConfig, Path], object], tuple[str, ...]]] = {
    "record": (pipeline.record, ("dataset", "recording.json", "stages.json")),
    "cache": (build_data, ("../cache",)),
    "evaluate": (lambda _, run: pipeline.evaluate(run), ("evaluation", "stages.json")),
    "report": (lambda _, run: pipeline.report(run), ("report.html", "summary.json", "stages.json")),
}
"""What each stage is, and what it makes, seen from the run's folder."""


def child(stage: str, home: Path) -> None:
    """The stage in the run home/run, as a process of its own, which says nothing."""
    os.environ["TUTTI_CACHE"] = str(home / "cache")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    STAGES[stage][0](config_of(), home / "run")


def config_of() -> RunConfig:
    """The config of every run."""
    return load_config(SMOKE, ["name=kills", "training.steps=4", "training.checkpoints.every=4"])


def run(stage: str, home: Path, seconds: float | None = None) -> float | None:
    """Runs a stage; killed after `seconds` it gives None, else the seconds that it took."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", __name__])
    process = context.Process(target=child, args=(stage, home))
    started = time.monotonic()
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    if process.exitcode:
        raise RuntimeError(f"{stage} ended with code {process.exitcode}")
    return time.monotonic() - started


def without_times(value: Any) -> Any:
    """A JSON value without what a clock decides."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def state(stage: str, home: Path) -> dict[str, str]:
    """A digest of each file that a stage has made; no file that a kill has left half-written may be there."""
    found: dict[str, str] = {}
    for name in STAGES[stage][1]:
        path = (home / "run" / name).resolve()
        files = [one for one in sorted(path.rglob("*")) if one.is_file()] if path.is_dir() else [path]
        for file in files:
            # The frame cache says which data set it was made from: here that lies below `home`.
            content = file.read_bytes().replace(str(home).encode(), b"")
            if file.suffix == ".json":
                content = json.dumps(without_times(json.loads(content)), sort_keys=True).encode()
            elif file.suffix == ".html":
                content = re.sub(rb"[\d.,]+", b"", content)
            if file.name != ".lock":
                found[str(file.relative_to(home))] = hashlib.sha256(content).hexdigest()
    return found


def measure(stage: str, before: Path, scratch: Path, kills: int, dice: random.Random) -> dict[str, Any]:
    """One undisturbed run of a stage from the folder `before` on, and killed ones; as plain values."""
    sound, killed = scratch / f"{stage}-sound", scratch / f"{stage}-killed"
    shutil.copytree(before, sound)
    duration = run(stage, sound)
    assert duration is not None
    expected, done, differ = state(stage, sound), 0, list[str]()
    runs = values = 0
    while done < kills:
        shutil.copytree(before, killed)
        for _ in range(min(AT_ONCE, kills - done)):
            done += run(stage, killed, dice.uniform(0.02, 1) * duration) is None
        run(stage, killed)
        found = state(stage, killed)
        runs, values = runs + 1, values + len(expected)
        differ += [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        shutil.rmtree(killed)
    return {"kills": done, "runs": runs, "files": values, "differ": sorted(differ), "seconds": duration}


@prints_user_errors
def main(given: Sequence[str] | None = None) -> int:
    """0 if no file differs, 1 if one does, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=KILLS, help="of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--only", nargs="*", default=list(STAGES), choices=list(STAGES), help="stages")
    parser.add_argument("--output", type=Path, default=RESULTS / "kill_stages", help="without suffix")
    options = parser.parse_args(given)
    made, results = circumstances(), dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="tutti-kills-") as name:
        scratch, home = Path(name), Path(name) / "before"
        (home / "run").mkdir(parents=True)
        for stage in STAGES:
            if stage == "evaluate":
                pipeline_train(home)
            if stage in options.only:
                dice = random.Random(f"{stage} {options.seed}")
                results[stage] = measure(stage, home, scratch, options.kills, dice)
                one = results[stage]
                print_line(
                    f"{stage}: {one['kills']} kills, {len(one['differ'])} of {one['files']} files differ"
                )
            run(stage, home)
    rows = [
        (stage, str(one["kills"]), str(one["runs"]), str(one["files"]), str(len(one["differ"])))
        for stage, one in results.items()
    ]
    heads = ("stage", "kills", "runs", "files compared", "files that differ")
    table = Table(
        title="Killed with SIGKILL and run again, against undisturbed", heads=heads, rows=tuple(rows)
    )
    publish(options.output, "Kill stages", [table], [made_with(made)], {"stages": results, **made})
    return int(any(one["differ"] for one in results.values()))


def pipeline_train(home: Path) -> None:
    """What evaluation and report need; its own kills are not of this benchmark."""
    os.environ["TUTTI_CACHE"] = str(home / "cache")
    pipeline.train(config_of(), home / "run")


if __name__ == "__main__":
    sys.exit(main())

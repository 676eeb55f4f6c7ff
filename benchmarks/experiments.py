"""All experiments of docs/background/experiments.md in order, each by its own command; a killed one goes on.

python benchmarks/experiments.py [PART ...] runs all parts, or those named: weights, data, rates, tower-rates,
e1, e2, e3, blind, e5, towers-vision, towers-language, towers-e2, towers-full, towers-full-words,
towers-time, e4, e4-stateless. What is finished is found again. After `rates`, write the chosen ones into the
configs: the page says how.

Finished trainings of a study are kept in benchmarks/results/STUDY_cells.json and taken from there: a study
may go on another day, or on another machine where the recorded data are the same to the byte.

--toy runs all studies within minutes on data of noise, with 2 seeds, a few steps and one short rollout: it
finds mistakes of the configs, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from recorded import synthetic_run
from tables import prints_user_errors

from tutti.config.run_config import load_config
from tutti.evaluation.closed_loop.starts import RECORDING
from tutti.runs.folder import RunFolder
from tutti.runs.terminal import print_line
from tutti.storage.files import write_atomically, write_json
from tutti.storage.reading import read_json
from tutti.studies.cells import CELLS, RESULT

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO_SEEDS, STATELESS_SEEDS = range(100, 110), range(110, 120)
RECORDINGS = ("demo", "experiments", "three-goals")
TOWERS = (
    *("towers-vision", "towers-language", "towers-e2"),
    *("towers-full", "towers-full-words", "towers-time"),
)
STUDIES = ("e1", "e2", "e3", "blind", "e5", *TOWERS)
FIFTY = ("data.sources=[{path: runs/experiments/dataset, per_task: 0-49}]",)
UNEQUAL = (
    "data.sources=[{path: runs/experiments/dataset, per_task: 0-9}, {path: runs/experiments/dataset, "
    "per_task: 10-99, labels: {actions: false, state: false}}]",
)
UNSHARED = tuple(f"objective.{term}.share=null" for term in ("align", "recon", "state"))
DEMO_SHARES = (
    *("objective.align.share=0.25", "objective.recon.share=0.3"),
    "objective.state.share={start: 2.0, end: 0.4, schedule: cosine}",
    "balancing={kind: shares, steps: 20, again: 125}",
)
RAW = (
    "objective.align.weight={start: 0.1, end: 0.0, schedule: cosine, end_at: 0.5}",
    "objective.recon.weight={start: 0.1, end: 0.0, schedule: cosine}",
    "objective.state.weight={start: 5.0, end: 0.3, schedule: cosine}",
)
GATE = "backward={kind: k_gradients, aggregator: {kind: cosine_gate}}"
SIGHT = "{kind: pretrained, path: weights/efficientnet-lite0, layer: 3, shuffle: 2, learn: none, cache: 4096}"
WORDS = "{kind: pretrained, path: weights/minilm, learn: none, num_tokens: 4}"
SCREENINGS: dict[str, tuple[str, ...]] = {
    "e1": ("experiments", *FIFTY),
    "e1-action": ("experiments", *FIFTY, "strategy.kind=action_only"),
    "e2": ("experiments", *UNEQUAL, "data.batch_size=64", "data.mixture.labelled=0.5"),
    "e2-action": ("experiments", *UNEQUAL, "data.mixture.labelled=1", "strategy.kind=action_only"),
    "e3": ("three-goals", "data.sources=[{path: runs/three-goals/dataset}]"),
    "e5": ("experiments", *FIFTY, *DEMO_SHARES),
    "e5-raw": ("experiments", *FIFTY, *UNSHARED, *RAW),
    "e5-uncertainty": ("experiments", *FIFTY, *UNSHARED, "balancing={kind: uncertainty}"),
    "e5-famo": ("experiments", *FIFTY, *UNSHARED, "balancing={kind: famo}"),
    "e5-cosine-gate": ("experiments", *FIFTY, *DEMO_SHARES, GATE),
    "towers-vision": ("experiments", *FIFTY, f"model.vision={SIGHT}"),
    "towers-language": ("experiments", *FIFTY, f"model.language={WORDS}"),
    "towers-e2": (
        *("experiments", *UNEQUAL, "data.batch_size=64", "data.mixture.labelled=0.5"),
        f"model.vision={SIGHT}",
    ),
    "towers-e2-action": (
        *("experiments", *UNEQUAL, "data.mixture.labelled=1", "strategy.kind=action_only"),
        f"model.vision={SIGHT}",
    ),
}
"""Of each screening of the learning rate, the config and what changes in it: the data of the arms."""
PARTS: dict[str, list[list[str]]] = {
    "weights": [["tower_folders", "weights"]],
    "data": [["tutti", "record", f"configs/{name}.yaml"] for name in RECORDINGS],
    **{
        part: [
            ["tutti", "tune", "--rate", f"configs/{config}.yaml", *changes, "--run", f"runs/rates/{name}"]
            for name, (config, *changes) in SCREENINGS.items()
            if name.startswith(TOWERS) == (part == "tower-rates")
        ]
        for part in ("rates", "tower-rates")
    },
    **{name: [["tutti", "compare", f"configs/studies/{name}.yaml"]] for name in STUDIES},
    "e4": [
        [
            *("demo_seeds", "--run", "runs/demo", "--first-seed", "5000", "--seeds", *map(str, DEMO_SEEDS)),
            *("--set", "model.fusion.withhold_state=false", "model.fusion.state_dropout=0.75"),
            *("--output", "benchmarks/results/demo_seeds_state"),
        ],
    ],
    "e4-stateless": [
        [
            *("demo_seeds", "--run", "runs/demo", "--first-seed", "6000"),
            *("--seeds", *map(str, STATELESS_SEEDS)),
        ],
    ],
}
"""The commands of each part, in the order in which they run. The towers need the weights of two packages."""
TOY = (
    "seeds=2",
    "evaluation.episodes=1",
    "evaluation.max_decisions=4",
    "evaluation.actions_per_query=2",
)
"""What a toy study changes, besides its data, its tasks and its base."""
TOY_BASE = ("training.schedule.warmup=1", "training.validation.every=2", "data.validation_windows=16")
TOY_TASKS = {"metaworld-8": "[push, faucet-open]", "three-goals": "[reach-red, reach-blue]"}


def toy_commands(study: str, work: Path) -> list[str]:
    """The command of a study at toy size, in a folder of its own below `work`."""
    config = load_config(ROOT / "configs" / ("three-goals.yaml" if study == "e3" else "demo.yaml"))
    suite = config.record.suite
    run = work / suite
    folder = RunFolder(run)
    if folder.begin("record", config, "record"):
        with folder.stage("record"):
            folder.write_json(RECORDING, {"seeds": [10_000, 10_107]})
            synthetic_run(run, config, per_task=108, length=9)
    steps = 12 if study == "e5" else 4  # its strategies have up to three phases
    overrides = [*TOY, f"budget.steps={steps}", f"data_from={run}", f"evaluation.tasks={TOY_TASKS[suite]}"]
    overrides += [f"base.{one}" for one in TOY_BASE]
    if study not in ("e2", "e3", "blind", "towers-e2"):
        overrides.append("episodes_per_task=[5]")
    return ["tutti", "compare", f"configs/studies/{study}.yaml", *overrides, "--folder", str(work / study)]


def kept(study: str, folder: Path) -> Path:
    """The file of a study's finished trainings, brought up to date with `folder`, and that with the file.

    A training's folder has a hash of its config and data in its name, so no other training takes its result.
    """
    path, cells = folder / f"{study}_cells.json", ROOT / "runs" / "studies" / study / CELLS
    found = read_json(path) if path.exists() else {}
    for name in found.keys() - {one.parent.name for one in cells.glob(f"*/{RESULT}")}:
        (cells / name).mkdir(parents=True, exist_ok=True)
        write_json(cells / name / RESULT, found[name])
    found |= {one.parent.name: read_json(one) for one in cells.glob(f"*/{RESULT}")}
    if found:
        lines = (f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
        write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def run_study(command: list[str]) -> int:
    """`run` of a study, whose finished trainings are kept, also when it ends early."""
    study = Path(command[2]).stem
    kept(study, RESULTS)
    try:
        return run(command)
    finally:
        kept(study, RESULTS)


def run(command: list[str]) -> int:
    """Runs one command in the repository's root, shown as it would be typed; its exit code."""
    print_line(f"$ {' '.join(command)}")
    program = ["-m", "tutti"] if command[0] == "tutti" else [f"benchmarks/{command[0]}.py"]
    return subprocess.run([sys.executable, *program, *command[1:]], cwd=ROOT, check=False).returncode


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--toy", action="store_true", help="every study at toy size")
    parser.add_argument("--work", type=Path, default=Path("runs/toy"), help="folder of the toy studies")
    return parser.parse_args(given)


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0, or the exit code of the first command that failed; the parts behind it do not run."""
    arguments = parse(given)
    parts = arguments.parts or [*PARTS]
    if arguments.toy:
        work = arguments.work.resolve()
        own = [part for part in parts if part in STUDIES and (arguments.parts or part not in TOWERS)]
        commands = [toy_commands(part, work) for part in own]
    else:
        commands = [command for part in parts for command in PARTS[part]]
    runs = ((run if arguments.toy or command[1] != "compare" else run_study, command) for command in commands)
    return next((code for one, command in runs if (code := one(command))), 0)


if __name__ == "__main__":
    sys.exit(main())

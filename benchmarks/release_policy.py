"""Makes of a run the policy that comes with Tutti: a folder of about 2 MB with its model card and checksums.

python benchmarks/release_policy.py runs/demo exports the run's averaged weights in float16 to
src/tutti/released/demo, where `tutti play` finds them, plays these very weights on the starts of the run's
evaluation, and writes README.md (the model card) and SHA256SUMS beside them. Every number of the card is read
from the run or from that evaluation. The exit code is 1 if the folder is too large to be kept in git.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import prints_user_errors

from tutti import pipeline
from tutti.config.files import released_policy, require_run
from tutti.config.run_config import RunConfig, load_run_config
from tutti.evaluation import ControlsConfig, EvaluationConfig
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line
from tutti.serving import export_policy
from tutti.storage.reading import read_json, read_text
from tutti.types import UserError

CARD, SUMS = "README.md", "SHA256SUMS"
MOST = 3_000_000
"""Bytes of the folder."""
NO_CONTROLS = ControlsConfig(expert=0, noop=0, no_image=0, wrong_instruction=0)
CURE = "Evaluate the run first: tutti evaluate RUN."


def release(run: Path, to: Path, trust: bool = False) -> Path:
    """Makes the folder `to`, whole or not at all; the evaluation of its weights stays in
    RUN/evaluations/released.

    Raises: UserError if the run has no finished evaluation in a simulator, or `to` exists.
    """
    require_run(run)
    if to.exists():
        raise UserError(f"{to} exists. Delete it, or give --to another folder.")
    config, made = load_run_config(run / "config.yaml", trust), circumstances()
    before = read_json(run / "evaluation" / "results.json", cure=CURE)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as scratch:
        settings = config.evaluation
        policy = export_policy(
            run, Path(scratch) / to.name, settings.weights, settings.checkpoint, half=True, trust_code=trust
        )
        played = _evaluate(policy, run, settings, trust)
        (policy / CARD).write_text(card(run, config, before, played, made), encoding="utf-8")
        (policy / SUMS).write_text(sums(policy), encoding="utf-8")
        os.rename(policy, to)
    return to


def _evaluate(policy: Path, run: Path, settings: EvaluationConfig, trust: bool) -> dict[str, Any]:
    """The scores of the rounded weights, without controls and videos."""
    alone = settings.model_copy(
        update={"controls": NO_CONTROLS, "videos_per_task": 0, "checkpoint": "latest"}
    )
    folder = pipeline.evaluate(
        policy, alone, to=run / "evaluations" / "released", redo=True, trust_code=trust
    )
    return read_json(folder / "results.json", cure=CURE)


def sums(folder: Path) -> str:
    """A line for each file, as sha256sum writes and checks it."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def check_release(folder: Path) -> None:
    """Raises: UserError if a file is not the one that SHA256SUMS names, is missing or is one too many."""
    listed = read_text(folder / SUMS, cure="benchmarks/release_policy.py writes it.")
    if listed != sums(folder):
        differ = sorted(
            {line.split("  ")[1] for line in set(listed.splitlines()) ^ set(sums(folder).splitlines())}
        )
        raise UserError(f"{folder}: not as {SUMS} says: {', '.join(differ)}. Make the release again.")


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def card(
    run: Path, config: RunConfig, before: dict[str, Any], played: dict[str, Any], made: dict[str, Any]
) -> str:
    """The model card: what it is, what it was trained on, scores with intervals, controls, limits."""
    data, model = (read_json(run / name, cure=CURE) for name in ("data.json", "model.json"))
    summary = read_json(run / "summary.json", cure="Write it: tutti report RUN.")
    protocol, suite = before["protocol"], config.evaluation.suite
    starts = f"starts {protocol['seed_first']} to {protocol['seed_last']}"
    sentences = "held-out sentences" if protocol["split"] == "held_out" else "sentences of the training"
    trained = ", ".join(protocol["trained_seeds"]) or "not known"
    reads = any(one["name"] == "state" for one in model["tokens"])
    new = "which training may have had" if protocol["starts_not_known"] else "which training did not have"
    lines = [
        f"# Policy `{config.name}` of Tutti",
        "",
        f"A vision-language-action policy of {model['modules'][0]['parameters']:,} parameters for the suite "
        f"`{suite}`: pictures of {config.data.image_size} px{', state' if reads else ''} and sentence in, "
        f"{config.data.horizon} actions out. Trained from scratch, end to end; weights are kept in float16.",
        "",
        "```sh",
        "tutti play",
        "```",
        "",
        "## Training",
        "",
        f"* Data: {data['training_episodes']:,} demonstrations of the suite's scripted experts "
        f"({data['training_windows']:,} windows, {data['instructions']:,} sentences), starts {trained}; "
        f"{data['validation_episodes']:,} more held out.",
        f"* {config.training.steps:,} steps of {config.data.batch_size} windows, seed {config.seed}; "
        f"checkpoint {before['protocol']['policy']}.",
        f"* Commit {summary['commit']}, {_versions(summary['versions'])}. The whole config: config.yaml.",
        "",
        "## Scores",
        "",
        f"Closed loop on {starts}, {new}, with {sentences}. Per task Wilson's 95 % interval, of the mean "
        "Price and Bonett's: they are of this one training.",
        "",
        "| task | these weights (float16) | the run's (float32) |",
        "|---|---:|---:|",
        *_rows(played["scores"]["policy"], before["scores"]["policy"]),
        "",
        "## Controls",
        "",
        "Of the run's weights, on the first of these starts:",
        "",
        *(f"* {verdict['sentence']}" for verdict in before["verdicts"]),
        *([] if before["verdicts"] else ["* None were played."]),
        "",
        "## Limits",
        "",
        "* One simulator, one robot, one training. It knows these tasks and the words of their sentences.",
        "* No safety of any kind: not for a real robot.",
        "",
        "## Licence",
        "",
        "Apache-2.0, as Tutti. The demonstrations were recorded in Meta-World (MIT) on MuJoCo (Apache-2.0).",
        "",
        "## Files",
        "",
        "`export.json` lists size and SHA-256 of each file that is read, and loading checks them; nothing is "
        f"unpickled. `sha256sum -c {SUMS}` checks all files. {made_with(made)}",
    ]
    return "\n".join(lines) + "\n"


def _rows(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    then = {one["task"]: one for one in before["tasks"]}
    rows = [f"| {one['task']} | {_count(one)} | {_count(then[one['task']])} |" for one in now["tasks"]]
    return [*rows, f"| **mean** | **{_mean(now)}** | {_mean(before)} |"]


def _count(one: dict[str, Any]) -> str:
    return f"{one['successes']}/{one['episodes']} [{_interval(one['interval'])}]"


def _mean(score: dict[str, Any]) -> str:
    return f"{100 * score['mean']:.1f} % [{_interval(score['interval'])}]"


def _interval(interval: dict[str, Any]) -> str:
    return f"{100 * interval['low']:.0f} to {100 * interval['high']:.0f} %"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0 if the folder may be kept in git."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=released_policy())
    parser.add_argument("--trust-code", action="store_true")
    arguments = parser.parse_args(given)
    to = release(arguments.run, arguments.to, arguments.trust_code)
    print_line(f"Written: {to}, {size(to) / 1e6:.2f} MB")
    if size(to) > MOST:
        print_line(f"More than {MOST / 1e6:.0f} MB: too large for git. Keep it elsewhere: tutti play FOLDER")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

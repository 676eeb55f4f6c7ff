"""`tutti probe RUN`: which inputs the newest checkpoint uses, on held-out episodes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tutti.evaluation.open_loop import tasks_of
from tutti.evaluation.probes.occlusion import draw_maps
from tutti.evaluation.probes.run import ProbeResult, run_probes
from tutti.evaluation.probes.setup import ProbeSetup
from tutti.plugin import Trust
from tutti.report.blocks import texts
from tutti.report.sections.held_out import probe_tables
from tutti.runs.build import build_data, suite_of, training_threads, with_steps
from tutti.runs.folder import RunFolder
from tutti.runs.terminal import print_line, print_table, progress_bar
from tutti.serving.policy import Policy, find_checkpoint
from tutti.storage.files import write_atomically
from tutti.training.rng import own_randomness
from tutti.types import UserError

FOLDER = "probes"


def probe_checkpoint(folder: Path, *, trust_code: Trust = False) -> ProbeResult:
    """Writes `folder`/probes/probes.json and occlusion.png, each atomically. Needs no simulator.
    `trust_code`: classes of the user's own that the run names are imported.

    Raises: UserError if the run has no checkpoint, holds out no episode, or is of several robots.
    """
    run = RunFolder(folder, new=False, trust_code=trust_code)
    config = with_steps(run.config())
    settings, checkpoint = config.evaluation, find_checkpoint(run.path)
    policy = Policy.load(checkpoint, settings.weights, trust_code=trust_code)
    if len(robots := policy.model.spec.embodiments) > 1:
        raise UserError(
            f"{run.path}: the probes know one robot's actions, and this policy is of {', '.join(robots)}.\n"
            "  cure: tutti evaluate says the error of each robot on held-out episodes."
        )
    data = build_data(config, run.path)
    suite = suite_of(config)
    with own_randomness(config.seed):
        untrained = config.model.build(policy.model.spec)
    with training_threads(config), progress_bar("probing") as bar:
        setup = ProbeSetup(
            model=policy.model,
            untrained=untrained,
            data=data,
            groups=tasks_of(data.windows.instructions, suite),
            partners=settings.controls.partners_of(suite),
            actions_per_query=settings.actions_per_query,
            seed=config.seed,
        )
        found, maps = run_probes(setup, bar)
    about = {"checkpoint": checkpoint.name, "weights": settings.weights}
    run.write_json(f"{FOLDER}/probes.json", about | asdict(found))
    write_atomically(run.path / FOLDER / "occlusion.png", draw_maps(maps))
    return found


def print_probes(found: ProbeResult, folder: Path) -> None:
    """The tables of ablations and baselines, then every finding, the problems first."""
    for table in probe_tables(found):
        print_table(table.caption, *texts(table))
    for finding in sorted(found.findings, key=lambda one: not one.is_problem):
        print_line(f"{'! ' if finding.is_problem else '- '}{finding.text}")
    print_line(
        f"{found.windows} windows of {found.episodes} held-out episodes; 95 % intervals, over episodes. "
        "Probes do not replace rollouts."
    )
    print_line(f"Probes: {folder / FOLDER / 'probes.json'}, {folder / FOLDER / 'occlusion.png'}")

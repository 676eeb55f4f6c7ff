"""Commands that look for faults: doctor, probe, verify-resume, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tutti.cli.options import Config, Folder, Overrides, Run, TrustCode, Updates, load
from tutti.config.paths import require_run

WRONG = 1
"""Exit code where a command finds that something is wrong."""


def doctor(config: Config, overrides: Overrides = None, run: Folder = None, updates: Updates = 100) -> None:
    """Examines what a training would begin with: data, text, gradients, features. Ends with 1 if it is wrong.

    Data are read as `tutti train` would read them. Nothing is trained for good; docs/probes.md tells more.
    """
    loaded = load(config, overrides)
    from tutti.debug.doctor import print_diagnosis, run_doctor

    found = run_doctor(loaded, run, updates=updates)
    print_diagnosis(found)
    if found.problems:
        raise typer.Exit(WRONG)


def probe(run: Run, trust_code: TrustCode = False) -> None:
    """Asks a run's newest checkpoint: does it look, does it listen, or does it copy its state?

    Needs no simulator. Writes RUN/probes/; `tutti report` then shows it.
    """
    require_run(run)
    from tutti.debug.probe import print_probes, probe_checkpoint

    print_probes(probe_checkpoint(run, trust_code=trust_code), run)


def verify_resume(
    config: Config,
    overrides: Overrides = None,
    run: Folder = None,
    *,
    steps: Annotated[int, typer.Option("--steps", help="Updates to train.", min=2)] = 12,
    kills: Annotated[int, typer.Option("--kills", help="SIGKILLs at random moments.", min=1)] = 3,
    processes: Annotated[int, typer.Option("--processes", help="On so many, by torchrun.", min=1)] = 1,
) -> None:
    """Proves that this config resumes to the same bits: trains, kills, resumes, compares. Ends with 1 if not.

    Data are read as `tutti train` would read them; all else lies in a temporary folder. See docs/training.md.
    """
    loaded = load(config, overrides)
    from tutti.debug.verify_resume import print_verification, prove_resume

    found = prove_resume(loaded, run, steps=steps, kills=kills, processes=processes)
    print_verification(found)
    if not found.exact:
        raise typer.Exit(WRONG)


def replay(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one in its failures/ or spikes/.")],
    step: Annotated[int | None, typer.Option("--step", help="The update to make again, from 1.")] = None,
    failure: Annotated[bool, typer.Option("--failure", help="The newest step that was saved.")] = False,
    pdb: Annotated[
        bool, typer.Option("--pdb", help="Stop in the debugger before the backward pass.")
    ] = False,
    shell: Annotated[bool, typer.Option("--shell", help="Open a Python prompt there.")] = False,
    *,
    trust_code: TrustCode = False,
) -> None:
    """Makes one step of a run again, to the same bits, and shows its batch, terms and gradients.

    Ends with 1 if a value is not finite or the step differs from its record. See docs/debugging.md.
    """
    require_run(run)
    from tutti.debug.replay_report import run_replay

    if not run_replay(run, step, failure=failure, pdb=pdb, shell=shell, trust_code=trust_code):
        raise typer.Exit(WRONG)

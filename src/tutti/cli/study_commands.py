"""Commands about many runs or large ones: compare, plan."""

from __future__ import annotations

from typing import Annotated

import typer

from tutti.cli.options import Config, Overrides, ReportOnly, Study, StudyFolder, load
from tutti.config.paths import config_file


def compare(
    study: Study, overrides: Overrides = None, folder: StudyFolder = None, report_only: ReportOnly = False
) -> None:
    """Trains and judges arms at an equal budget over several seeds, and says which differ from the baseline.

    docs/compare.md tells how to write a study and to read its tables. Run it again, and it goes on.
    """
    file = config_file(study)
    from tutti.studies.compare import compare as run
    from tutti.studies.config import load_study

    run(load_study(file, overrides or []), folder, report_only=report_only)


def plan(
    config: Config,
    overrides: Overrides = None,
    *,
    gpus: Annotated[int, typer.Option(help="GPUs in all.")] = 1,
    device: Annotated[str, typer.Option(help="h100, h200, ..., or measured: this machine.")] = "h100",
    memory: Annotated[float | None, typer.Option(help="GB on each GPU.", show_default="device's")] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the peak reached.", show_default="assumed")
    ] = None,
    episodes: Annotated[
        float | None, typer.Option(help="Episodes to train on.", show_default="training.steps")
    ] = None,
    frames: Annotated[float, typer.Option(help="Frames of an episode; each is a sample.")] = 150.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Predicts memory, FLOPs, traffic, time and the largest batch of a training. Runs nothing.

    docs/scaling.md has the formulas: tutti plan configs/plans/3b.yaml --gpus 1000 --episodes 1e7
    """
    loaded = load(config, overrides)
    from tutti.planning.plan import plan_run
    from tutti.planning.report import print_plan

    made = plan_run(
        loaded, gpus=gpus, device=device, memory=memory, mfu=mfu, episodes=episodes, frames=frames
    )
    print_plan(made, as_json=as_json)

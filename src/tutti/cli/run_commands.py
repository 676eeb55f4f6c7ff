"""Commands that make, use and describe a run: demo, record, train, evaluate, report, export, model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tutti import __version__
from tutti.cli.options import Config, DemoConfig, Folder, Overrides, Redo, Run, TrustCode, load
from tutti.config.paths import require_run, shipped_configs
from tutti.errors import UserError


def demo(
    overrides: Overrides = None, config: DemoConfig = None, run: Folder = None, redo: Redo = False
) -> None:
    """Records, trains, evaluates and reports: the whole of Tutti on this machine.

    Ends with the path of a report to open in a browser. Run it again after an interruption, and it goes on.
    """
    loaded = load(config or shipped_configs() / "demo.yaml", overrides)
    from tutti import pipeline

    pipeline.demo(loaded, run, redo=redo)


def record(config: Config, overrides: Overrides = None, run: Folder = None, redo: Redo = False) -> None:
    """Records demonstrations with the simulator's experts as a LeRobotDataset v3.0.

    The data set lies in runs/NAME/dataset; LeRobot's own reader opens it.
    """
    loaded = load(config, overrides)
    from tutti import pipeline

    pipeline.record(loaded, run, redo=redo)


def train(config: Config, overrides: Overrides = None, run: Folder = None, redo: Redo = False) -> None:
    """Trains every module end to end; continues from the last checkpoint if there is one.

    Reads data.sources, or, where the config names none, what `tutti record` recorded for the same run.
    """
    loaded = load(config, overrides)
    from tutti import pipeline

    pipeline.train(loaded, run, redo=redo)


def evaluate(
    run: Run, overrides: Overrides = None, redo: Redo = False, trust_code: TrustCode = False
) -> None:
    """Measures a trained run: success in the simulator with intervals and controls, open-loop error.

    Overrides may name keys of the section `evaluation` only: tutti evaluate runs/demo evaluation.episodes=50
    """
    require_run(run)
    from tutti import pipeline

    for override in overrides or []:
        if not override.startswith("evaluation."):
            raise UserError(f"'{override}': a trained run is as it is; only keys of evaluation.* may change.")
    config = load(run / "config.yaml", overrides).evaluation if overrides else None
    pipeline.evaluate(run, config, redo=redo, trust_code=trust_code)


def report(run: Run) -> None:
    """Writes the run's report: one self-contained HTML page, and summary.json for machines."""
    require_run(run)
    from tutti import pipeline

    pipeline.report(run)


def export(
    run: Run,
    to: Annotated[Path, typer.Option("--to", help="A folder that does not exist yet.", metavar="FOLDER")],
    weights: Annotated[str, typer.Option("--weights", help="ema or raw.")] = "ema",
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="latest, best, or a step.")] = "latest",
    trust_code: TrustCode = False,
) -> None:
    """Writes what a policy needs of a checkpoint into a folder: weights in one file, config, normalizer."""
    require_run(run)
    from tutti.serving.export import export_command

    typer.echo(f"Written: {export_command(run, to, weights, checkpoint, trust_code=trust_code)}")


def model(config: Config, overrides: Overrides = None) -> None:
    """Prints the model's modules, parameters and FLOPs per sample, and its token sequence."""
    loaded = load(config, overrides)
    from tutti.runs.build import describe_model
    from tutti.runs.summary import print_model

    print_model(describe_model(loaded))


def schema() -> None:
    """Prints the JSON schema of a config file."""
    from tutti.config.run_config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def version() -> None:
    """Prints the version."""
    typer.echo(__version__)

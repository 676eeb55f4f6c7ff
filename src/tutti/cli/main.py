"""The command `tutti`: demo, record, train, evaluate, report, compare, plan and what else TEACH names.

The commands import the package inside their bodies. This is the one file where that is right: torch alone
takes seconds to load, and `tutti --help` or a mistyped command should answer at once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from tutti import __version__
from tutti.cli.options import (
    Config,
    DemoConfig,
    Folder,
    Overrides,
    Redo,
    ReportOnly,
    Run,
    Study,
    StudyFolder,
    TrustCode,
    Updates,
    Version,
)
from tutti.config.paths import config_file, require_run, shipped_configs
from tutti.config.yaml_reader import check_keys
from tutti.errors import UserError
from tutti.runs.terminal import TEACH, of_the_system, show_logs

if TYPE_CHECKING:
    from tutti.config.run_config import RunConfig

P = ParamSpec("P")

INTERRUPTED = 130
WRONG = 1
MISTAKE = 2

app = typer.Typer(
    name="tutti",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A mistake of the user's is a message, not a traceback; Ctrl-C says how to go on."""

    @functools.wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        errors = Console(stderr=True, highlight=False)
        try:
            show_logs()
            command(*arguments, **options)
        except KeyboardInterrupt:
            errors.print("\ninterrupted; run the same command again to continue", style="yellow")
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError, RecursionError, MemoryError) as error:
            message = str(error) if isinstance(error, UserError) else of_the_system(error)
            if not message:
                raise
            errors.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
            raise typer.Exit(MISTAKE) from None

    return run


@app.callback(help=TEACH)
def options(_: Version = False) -> None:
    """Options of `tutti` itself; the help text is TEACH."""


@app.command()
@guarded
def demo(
    overrides: Overrides = None, config: DemoConfig = None, run: Folder = None, redo: Redo = False
) -> None:
    """Records, trains, evaluates and reports: the whole of Tutti on this machine.

    Ends with the path of a report to open in a browser. Run it again after an interruption, and it goes on.
    """
    given = _load(config or shipped_configs() / "demo.yaml", overrides)
    from tutti import pipeline

    pipeline.demo(given, run, redo=redo)


@app.command()
@guarded
def record(config: Config, overrides: Overrides = None, run: Folder = None, redo: Redo = False) -> None:
    """Records demonstrations with the simulator's experts as a LeRobotDataset v3.0.

    The data set lies in runs/NAME/dataset; LeRobot's own reader opens it.
    """
    given = _load(config, overrides)
    from tutti import pipeline

    pipeline.record(given, run, redo=redo)


@app.command()
@guarded
def train(config: Config, overrides: Overrides = None, run: Folder = None, redo: Redo = False) -> None:
    """Trains every module end to end; continues from the last checkpoint if there is one.

    Reads data.sources, or, where the config names none, what `tutti record` recorded for the same run.
    """
    given = _load(config, overrides)
    from tutti import pipeline

    pipeline.train(given, run, redo=redo)


@app.command()
@guarded
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
    config = _load(run / "config.yaml", overrides).evaluation if overrides else None
    pipeline.evaluate(run, config, redo=redo, trust_code=trust_code)


@app.command()
@guarded
def report(run: Run) -> None:
    """Writes the run's report: one self-contained HTML page, and summary.json for machines."""
    require_run(run)
    from tutti import pipeline

    pipeline.report(run)


@app.command()
@guarded
def doctor(config: Config, overrides: Overrides = None, run: Folder = None, updates: Updates = 100) -> None:
    """Examines what a training would begin with: data, text, gradients, features. Ends with 1 if it is wrong.

    Data are read as `tutti train` would read them. Nothing is trained for good; docs/probes.md tells more.
    """
    given = _load(config, overrides)
    from tutti.debug.doctor import doctor, print_diagnosis

    found = doctor(given, run, updates=updates)
    print_diagnosis(found)
    if found.problems:
        raise typer.Exit(WRONG)


@app.command()
@guarded
def probe(run: Run, trust_code: TrustCode = False) -> None:
    """Asks a run's newest checkpoint: does it look, does it listen, or does it copy its state?

    Needs no simulator. Writes RUN/probes/; `tutti report` then shows it.
    """
    require_run(run)
    from tutti.debug.probe import print_probes, probe

    print_probes(probe(run, trust_code=trust_code), run)


@app.command("verify-resume")
@guarded
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
    given = _load(config, overrides)
    from tutti.debug.verify_resume import print_verification, verify_resume

    found = verify_resume(given, run, steps=steps, kills=kills, processes=processes)
    print_verification(found)
    if not found.exact:
        raise typer.Exit(WRONG)


@app.command()
@guarded
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


@app.command()
@guarded
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


@app.command()
@guarded
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


@app.command()
@guarded
def schema() -> None:
    """Prints the JSON schema of a config file."""
    from tutti.config.run_config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
@guarded
def model(config: Config, overrides: Overrides = None) -> None:
    """Prints the model's modules, parameters and FLOPs per sample, and its token sequence."""
    given = _load(config, overrides)
    from tutti.runs.build import describe_model
    from tutti.runs.summary import print_model

    print_model(describe_model(given))


@app.command()
@guarded
def plan(
    config: Config,
    overrides: Overrides = None,
    *,
    gpus: Annotated[int, typer.Option(help="GPUs in all.")] = 1,
    device: Annotated[str, typer.Option(help="h100, h200, ..., or measured: this machine.")] = "h100",
    memory: Annotated[float | None, typer.Option(help="GB on each GPU.", show_default="device's")] = None,
    tflops: Annotated[float | None, typer.Option(help="Its peak.", show_default="device's")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s between GPUs.", show_default="device's")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the peak reached.", show_default="assumed")
    ] = None,
    samples: Annotated[
        float | None, typer.Option(help="Samples to see.", show_default="training.steps")
    ] = None,
    episodes: Annotated[float | None, typer.Option(help="Episodes to see, instead of samples.")] = None,
    frames: Annotated[float, typer.Option(help="Frames of an episode; each is a sample.")] = 150.0,
    epochs: Annotated[float, typer.Option(help="Times that every episode is seen.")] = 1.0,
    overhead: Annotated[float, typer.Option(help="ms of a micro-batch that no FLOP takes.")] = 0.0,
    process: Annotated[
        float | None, typer.Option(help="MB beside the tensors.", show_default="device's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Predicts memory, FLOPs, traffic, time and the largest batch of a training. Runs nothing.

    docs/scaling.md has the formulas: tutti plan configs/plans/3b.yaml --gpus 1000 --episodes 1e7
    """
    config_given = _load(config, overrides)
    from tutti.planning.command import plan_run
    from tutti.planning.report import print_plan

    given = {"memory": memory, "tflops": tflops, "bandwidth": bandwidth, "mfu": mfu, "samples": samples}
    given |= {"episodes": episodes, "process": process}
    known: dict[str, float] = {name: value for name, value in given.items() if value is not None}
    known |= {"overhead": overhead}
    lasts = {"frames": frames, "epochs": epochs}
    print_plan(*plan_run(config_given, gpus=gpus, device=device, **lasts, **known), as_json=as_json)


@app.command()
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)


def main() -> None:
    """The console script."""
    app()


def _load(path: Path, overrides: list[str] | None) -> RunConfig:
    check_keys(file := config_file(path), overrides or [])
    from tutti.config.run_config import load_config

    return load_config(file, overrides or [])

"""The command `tutti`: demo, record, train, evaluate, report, doctor, probe, compare, schema, model, version.

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

from tutti.terminal import show_logs

if TYPE_CHECKING:
    from tutti.config import RunConfig

TEACH = """
Tutti pre-trains vision-language-action robot models end to end: vision
encoder, language encoder, fusion and action decoder learn together, from one
batch, under one loss L = sum_i lambda_i L_i.

[bold]Start here[/bold]

  tutti demo     record, train, evaluate, report: a quarter of an hour

[bold]The same in pieces, in the usual order[/bold]

  tutti record configs/demo.yaml     the simulator's experts -> dataset/
  tutti train configs/demo.yaml      demonstrations -> checkpoints/
  tutti evaluate runs/demo           checkpoint -> success per task
  tutti report runs/demo             all of it -> report.html

[bold]What is wrong, before a training and after it[/bold]

  tutti doctor configs/demo.yaml     data, model, loss: is anything broken?
  tutti probe runs/demo              does it look, listen, or copy its state?

[bold]Which way is better? At an equal budget, over seeds, with intervals[/bold]

  tutti compare configs/studies/strategies.yaml

[bold]Change anything, in the file or behind it[/bold]

  tutti train configs/demo.yaml name=short training.steps=500 \\
    'data.sources=[{path: runs/demo/dataset}]'     the demo's data again
  tutti train configs/demo.yaml name=mine 'data.sources=[{path: my/data}]'
  tutti schema > tutti.schema.json   every key, for an editor

Interrupt any command with Ctrl-C and run it again: finished work is kept.
"""

P = ParamSpec("P")

INTERRUPTED = 130
WRONG = 1
MISTAKE = 2

app = typer.Typer(
    name="tutti",
    help=TEACH,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Argument(help="A YAML file, such as configs/demo.yaml.", metavar="CONFIG")]
DemoConfig = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Another YAML file than the demo's own.", metavar="CONFIG"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values that win over the file's, such as training.steps=500.", metavar="[KEY.SUB=VALUE ...]"
    ),
]
Run = Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo.", metavar="RUN")]
Folder = Annotated[
    Path | None, typer.Option("--run", help="The run's folder.", show_default="runs/NAME", metavar="FOLDER")
]
Study = Annotated[
    Path, typer.Argument(help="A YAML file, such as configs/studies/strategies.yaml.", metavar="STUDY")
]
StudyFolder = Annotated[
    Path | None,
    typer.Option("--folder", help="The study's folder.", show_default="runs/studies/NAME", metavar="FOLDER"),
]
ReportOnly = Annotated[
    bool, typer.Option("--report-only", help="Makes the tables of what is finished, and runs nothing.")
]
Updates = Annotated[
    int, typer.Option("--updates", help="Updates before the second look at the gradients.", min=0)
]
Redo = Annotated[
    bool,
    typer.Option("--redo", help="Where the config changed, throw away what depends on it and do it again."),
]


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
        except ValueError as error:
            from tutti.types import UserError

            if not isinstance(error, UserError):
                raise
            errors.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
            raise typer.Exit(MISTAKE) from None

    return run


@app.command()
@guarded
def demo(
    overrides: Overrides = None, config: DemoConfig = None, run: Folder = None, redo: Redo = False
) -> None:
    """Records, trains, evaluates and reports: the whole of Tutti on this machine.

    Ends with the path of a report to open in a browser. Run it again after an interruption, and it goes on.
    """
    from tutti import pipeline

    pipeline.demo(_load(config or _packaged("demo.yaml"), overrides), run, redo=redo)


@app.command()
@guarded
def record(config: Config, overrides: Overrides = None, run: Folder = None, redo: Redo = False) -> None:
    """Records demonstrations with the simulator's experts as a LeRobotDataset v3.0.

    The data set lies in runs/NAME/dataset; LeRobot's own reader opens it.
    """
    from tutti import pipeline

    pipeline.record(_load(config, overrides), run, redo=redo)


@app.command()
@guarded
def train(config: Config, overrides: Overrides = None, run: Folder = None, redo: Redo = False) -> None:
    """Trains every module end to end; continues from the last checkpoint if there is one.

    Reads data.sources, or, where the config names none, what `tutti record` recorded for the same run.
    """
    from tutti import pipeline

    pipeline.train(_load(config, overrides), run, redo=redo)


@app.command()
@guarded
def evaluate(run: Run, overrides: Overrides = None, redo: Redo = False) -> None:
    """Measures a trained run: success in the simulator with intervals and controls, open-loop error.

    Overrides may name keys of the section `evaluation` only: tutti evaluate runs/demo evaluation.episodes=50
    """
    from tutti import pipeline
    from tutti.types import UserError

    for override in overrides or []:
        if not override.startswith("evaluation."):
            raise UserError(f"'{override}': a trained run is as it is; only keys of evaluation.* may change.")
    config = _load(run / "config.yaml", overrides).evaluation if overrides else None
    pipeline.evaluate(run, config, redo=redo)


@app.command()
@guarded
def report(run: Run) -> None:
    """Writes the run's report: one self-contained HTML page, and summary.json for machines."""
    from tutti import pipeline

    pipeline.report(run)


@app.command()
@guarded
def doctor(config: Config, overrides: Overrides = None, run: Folder = None, updates: Updates = 100) -> None:
    """Examines what a training would begin with: data, text, gradients, features. Ends with 1 if it is wrong.

    Data are read as `tutti train` would read them. Nothing is trained for good; docs/probes.md tells more.
    """
    from tutti.checkup.doctor import doctor, print_diagnosis

    found = doctor(_load(config, overrides), run, updates=updates)
    print_diagnosis(found)
    if found.problems:
        raise typer.Exit(WRONG)


@app.command()
@guarded
def probe(run: Run) -> None:
    """Asks a run's newest checkpoint: does it look, does it listen, or does it copy its state?

    Needs no simulator. Writes RUN/probes/; `tutti report` then shows it.
    """
    from tutti.checkup.probe import print_probes, probe

    print_probes(probe(run), run)


@app.command()
@guarded
def compare(
    study: Study, overrides: Overrides = None, folder: StudyFolder = None, report_only: ReportOnly = False
) -> None:
    """Trains and judges arms at an equal budget over several seeds, and says which differ from the baseline.

    docs/compare.md tells how to write a study and to read its tables. Run it again, and it goes on.
    """
    from tutti.studies.compare import compare as run
    from tutti.studies.config import load_study

    run(load_study(study, overrides or []), folder, report_only=report_only)


@app.command()
@guarded
def schema() -> None:
    """Prints the JSON schema of a config file."""
    from tutti.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
@guarded
def model(config: Config, overrides: Overrides = None) -> None:
    """Prints the model's modules, parameters and FLOPs per sample, and its token sequence."""
    from tutti import pipeline
    from tutti.summary import print_model

    print_model(pipeline.describe_model(_load(config, overrides)))


@app.command()
def version() -> None:
    """Prints the version."""
    from tutti import __version__

    typer.echo(__version__)


def main() -> None:
    """The console script."""
    app()


def _load(path: Path, overrides: list[str] | None) -> RunConfig:
    from tutti.config import load_config

    return load_config(path, overrides or [])


def _packaged(name: str) -> Path:
    """A config that comes with Tutti: inside an installed package, or at the root of a checkout."""
    here = Path(__file__).resolve()
    installed, checkout = here.parent / "configs" / name, here.parents[2] / "configs" / name
    return installed if installed.is_file() else checkout

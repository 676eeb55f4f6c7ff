"""The commands `tutti export`, `push` and `pull`: a policy in a folder of its own, here and on a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tutti.cli.commands import Run, TrustCode
from tutti.config.files import require_run
from tutti.errors import UserError
from tutti.runs.terminal import print_line, print_table

GRAPHS = {"none": (), "pt2": ("pt2",), "onnx": ("onnx",), "both": ("pt2", "onnx")}


def export(
    run: Run,
    to: Annotated[Path, typer.Option("--to", help="A folder that does not exist yet.", metavar="FOLDER")],
    weights: Annotated[Literal["ema", "raw"], typer.Option("--weights")] = "ema",
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="latest, best, or a step.")] = "latest",
    *,
    half: Annotated[bool, typer.Option("--half", help="Store them in float16: half the size.")] = False,
    robot: Annotated[int, typer.Option("--robot", help="The source whose conventions it answers in.")] = 0,
    graph: Annotated[
        Literal["none", "pt2", "onnx", "both"],
        typer.Option("--graph", help="Adds the policy as one graph, for programs without Tutti."),
    ] = "none",
    int8: Annotated[
        bool, typer.Option("--int8", help="Adds model.int8.onnx: smaller, and not exact.")
    ] = False,
    form: Annotated[
        Literal["tutti", "lerobot"], typer.Option("--for", help="Who reads the folder (plugins/lerobot).")
    ] = "tutti",
    trust_code: TrustCode = False,
) -> None:
    """Writes what a policy needs of a checkpoint into a folder; prints what goes into it and comes out."""
    require_run(run)
    if form == "lerobot" and (half or int8 or graph != "none"):
        raise UserError(
            "--for lerobot: its folder has no place for --half, --int8 and --graph. Leave them out."
        )
    from tutti.evaluation.folder import RESULTS
    from tutti.runs.folder import DEFAULT
    from tutti.serving.export import export_policy
    from tutti.serving.exports.lerobot import export_to_lerobot
    from tutti.serving.interface import table
    from tutti.storage.manifest import EXPORT
    from tutti.storage.reading import read_json

    which = int(checkpoint) if checkpoint.isdecimal() else checkpoint
    if form == "lerobot":
        export_to_lerobot(run, to, weights, which, robot=robot, trust_code=trust_code)
        print_line(f"Written: {to}. LeRobot reads it as --policy.path={to}, with plugins/lerobot installed.")
        return
    results = run / DEFAULT / RESULTS
    folder = export_policy(
        *(run, to, weights, which),
        half=half,
        robot=robot,
        graphs=GRAPHS[graph],
        int8=int8,
        results=read_json(results) if results.is_file() else None,
        trust_code=trust_code,
    )
    title, rows = table(read_json(folder / EXPORT))
    print_table(title, ("", "name", "unit", "smallest", "largest"), rows)
    print_line(f"Written: {folder}")


def push(
    folder: Annotated[Path, typer.Argument(help="A folder of `tutti export`.", metavar="FOLDER")],
    name: Annotated[str, typer.Argument(help="The repository on the hub.", metavar="OWNER/NAME")],
    public: Annotated[bool, typer.Option("--public", help="If it is made: for everybody to see.")] = False,
    message: Annotated[str, typer.Option("--message", "-m", help="Of the commit.", show_default=False)] = "",
) -> None:
    """Sends an export with its model card to a hub of models. Needs the network and a token."""
    require_run(folder)
    from tutti.serving.exports.hub import push_export

    print_line(f"Pushed: {push_export(folder, name, public=public, message=message)}")


def pull(
    name: Annotated[str, typer.Argument(help="The repository on the hub.", metavar="OWNER/NAME")],
    to: Annotated[Path, typer.Option("--to", help="A folder that does not exist yet.", metavar="FOLDER")],
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit.", show_default="the newest")
    ] = None,
) -> None:
    """Fetches an export from a hub of models, and checks every file. Needs the network."""
    from tutti.serving.exports.hub import pull_export

    print_line(f"Pulled: {pull_export(name, to, revision=revision)}, every file with its SHA-256")

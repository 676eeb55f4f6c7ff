"""The command `tutti play`: a trained policy acts, and one sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tutti.cli.commands import TrustCode
from tutti.config.files import default_policy, require_run
from tutti.errors import UserError


def play(
    policy: Annotated[
        Path | None,
        typer.Argument(
            help="A run's folder, a checkpoint's, or one of `tutti export`.",
            show_default="the one that comes with Tutti, or runs/demo",
            metavar="POLICY",
        ),
    ] = None,
    words: Annotated[
        str | None,
        typer.Argument(help="The same as --instruction.", show_default=False, metavar="SENTENCE"),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            help="The scene to act in; may be given again, or: all.",
            show_default="that of the sentence, or the first",
            metavar="TASK",
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            "--instruction",
            "-i",
            help="What to tell it: any sentence.",
            show_default="a wording of the task that was held out",
            metavar="TEXT",
        ),
    ] = None,
    *,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Of the start.", show_default="the first of the evaluation", min=0, max=2**31 - 1
        ),
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="The folder of the files.", metavar="FOLDER")] = Path(
        "play"
    ),
    form: Annotated[Literal["gif", "mp4", "both"], typer.Option("--format", help="Of the files.")] = "gif",
    trust_code: TrustCode = False,
) -> None:
    """Lets a trained policy act in the simulator: a moving picture of it, and whether it succeeded.

    tutti play --task faucet-open --instruction "close the tap" --seed 9001
    tutti play runs/demo --task drawer-open "open the drawer"
    """
    if words is not None and instruction is not None:
        raise UserError(f"tutti play: {words!r:.80} and --instruction {instruction!r:.80}: give one of them.")
    instruction = words if instruction is None else instruction
    policy = require_run(default_policy() if policy is None else policy)
    from tutti.runs.play import play_policy

    forms = ("gif", "mp4") if form == "both" else (form,)
    play_policy(policy, tuple(task or ()), instruction, seed=seed, to=to, forms=forms, trust_code=trust_code)

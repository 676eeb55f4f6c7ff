"""The command `tutti init`: four questions about a data set, and a commented config to train on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutti.errors import UserError
from tutti.runs.terminal import print_line

if TYPE_CHECKING:
    from tutti.data.checks.inspection import Inspected
    from tutti.data.formats.wanted import Wanted

QUESTIONS = {
    "views": ("picture", "Which cameras does the policy see?"),
    "state": ("vector", "What does the robot tell of itself (joints, hand)? none: nothing"),
    "action": ("vector", "Which vector is the action that was commanded?"),
    "text": ("text", "Where is the instruction? A feature, or a sentence that holds for all episodes"),
}
ABOUT = {
    "name": "The run lies in runs/NAME.",
    "data": "What is learned from: data.sources may name several (docs/how-to/mixtures.md). A chunk of\n"
    "# `horizon` actions is predicted at once; pictures are scaled to `image_size`. tutti data check {file}",
    "model": "tiny, small, base or large: about 1, 28, 100 or 500 million parameters.",
    "objective": "Terms beside the action; null takes one away. `share` is how much of the update it has,\n"
    "# as in recon: {{share: 0.1}} (docs/background/terms.md).",
    "evaluation": "none: held-out episodes judge, there is no simulator (docs/how-to/evaluation.md).",
    "training": "First find the learning rate: tutti tune --rate {file}. Everything else has a default that\n"
    "# `tutti config show {file}` prints.",
}


def init(
    data: Annotated[
        Path, typer.Argument(help="A data set in any format: its folder or file.", metavar="DATA")
    ],
    to: Annotated[Path, typer.Option("--to", help="The config to write.", metavar="FILE.yaml")] = Path(
        "mine.yaml"
    ),
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take every guess, ask nothing.")] = False,
) -> None:
    """Asks four questions about a data set, and writes a commented config that trains on it.

    The answers in brackets are what `tutti data inspect` guesses. Nothing is trained.
    """
    if to.exists():
        raise UserError(f"{to}: there is such a file already.\n  cure: another name, --to other.yaml")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.ya?ml", to.name) is None:
        raise UserError(f"--to: expected a name such as mine.yaml, found {to.name!r:.80}.")
    from tutti.data.checks.inspection import inspect_path
    from tutti.storage.files import write_atomically

    inspected = inspect_path(data)
    if inspected.format.is_pairs:
        raise UserError(
            f"{data}: pictures with texts, without a robot, train beside a robot's data set.\n"
            "  cure: tutti init ROBOT_DATA; then add this one: docs/how-to/picture-text.md"
        )
    if not yes:
        inspected = inspect_path(data, _ask(inspected))
    if inspected.store is None:
        raise UserError(inspected.problem)
    write_atomically(to, "".join(_config(inspected, to)))
    print_line(f"Written: {to}. Next: tutti doctor {to}")


def _ask(inspected: Inspected) -> Wanted:
    """The four answers; an empty one takes the guess."""
    from tutti.data.formats.wanted import AS_FOUND, in_words

    features, said = inspected.found.features, dict[str, Any]()
    for number, (field, (kind, question)) in enumerate(QUESTIONS.items(), start=1):
        guess = getattr(inspected.found.roles, field)
        fitting = [key for key, feature in features.items() if feature.kind == kind]
        print_line(f"\n{number}. {question}\n   there is: {', '.join(fitting) or f'no {kind}'}")
        answer = typer.prompt("  ", default=in_words(guess), prompt_suffix=" ", type=str).strip()
        if answer == in_words(guess):
            continue
        names = tuple(name.strip() for name in answer.split(",") if name.strip())
        if field == "text":
            key = "text" if answer in features else "say"
            said |= {} if answer == "none" else {key: answer}
        else:
            said[field] = () if names == ("none",) and field == "state" else names
    return replace(AS_FOUND, **said)


def _config(inspected: Inspected, file: Path) -> Iterator[str]:
    """The config with comments above its sections."""
    from tutti.data.checks.inspection import as_yaml

    values = inspected.values() | {"name": file.stem}
    episodes, texts = len(inspected.found.lengths), inspected.instructions
    yield f"# Trains on {inspected.path} ({inspected.format.name}, {episodes:,} episodes).\n"
    yield f"# Train: tutti train {file}    What is wrong before that: tutti doctor {file}\n"
    for key, value in values.items():
        yield f"\n# {ABOUT[key].format(file=file)}\n"
        if key == "data":
            yield from (f"# {line}\n" for line in inspected.comments())
            yield f"# Of its {len(texts)} instructions: {texts[0]!r:.80}\n" if texts else ""
        written = as_yaml({key: value})  # with the quotes that a name such as 2026 needs
        yield written if key != "name" else written.strip("{}\n") + "\n"

"""Gives every command of `tutti` odd and hostile arguments, each list wrong by its making.

    python benchmarks/odd_commands.py                 # 200 lists for each command
    python benchmarks/odd_commands.py --inputs 150 --output /tmp/commands

Wanted for each: exit code 2 and a message of one screen, no traceback, no raw escape sequence. Exit code 1 if
not.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from itertools import product
from typing import Any

from bounded_process import BoundedProcess, Outcome, command_line, kind_of
from hostile_folders import CONTROLS
from odd_configs import CONFIGS, OVERRIDES, REPOSITORY
from typer.testing import CliRunner

from tutti.cli.app import COMMANDS, app

NAMES = tuple(command.__name__.replace("_", "-") for command in COMMANDS)
ON_A_RUN = ("evaluate", "report", "probe", "replay", "export")
"""Commands whose first argument is a run; here there is none."""
ALONE = ("schema", "version")
OPTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "demo": (("--config", "none.yaml"), ("--run", "x"), ("--redo",)),
    "record": (("--run", "a\0b"), ("--redo",), ("--run",)),
    "train": (("--run", "x" * 5000), ("--redo",), ("--run", "/proc/1/x")),
    "evaluate": (("--redo",), ("--trust-code",), ("--redo=yes",)),
    "doctor": (("--updates", "-1"), ("--updates", "many"), ("--updates", "9" * 5000), ("--run", "x")),
    "probe": (("--trust-code",), ("--trust-code", "--trust-code"), ("--run", "x")),
    "verify-resume": (("--steps", "1"), ("--kills", "0"), ("--processes", "1e9"), ("--steps", "nan")),
    "replay": (
        *(("--step", "3", "--failure"), ("--pdb", "--shell"), ("--step", "-1"), ("--step", "9" * 400)),
        *(("--step", "1.5"), ("--failure", "--failure"), ("--step",)),
    ),
    "export": (
        *(("--to", "x", "--to", "y"), ("--weights", "best"), ("--checkpoint", "\u0663"), ("--to",)),
        *(("--to", "x", "--checkpoint", "-1"), ("--to", "")),
    ),
    "compare": (("--folder", "x"), ("--report-only",), ("--report-only", "x=y"), ("--folder",)),
    "plan": (
        ("--gpus", "0"),
        ("--gpus", "nan"),
        ("--memory", "-inf"),
        ("--device", "\x1b[31m"),
        ("--mfu", "2"),
    ),
}
ODD = (
    *(
        "--nope",
        "-Z",
        "--nope=1",
        "--",
        "-",
        "",
        "=",
        "@x",
        "%s%n",
        "{}",
        "a\0b",
        "\udcff",
        "\x1b[2J\x1b]0;t\x07",
    ),
    *(
        "x" * 10**6,
        "--" + "x" * 10**6,
        "../" * 2000,
        "a\nb\n" * 500,
        "[red]x[/]",
        "[/]",
        "\u202e",
        "~root",
        "$HOME",
    ),
    *("--step", "--to", "--run=", "--redo=1", "training.steps", "evaluation.episodes=x", "evaluation.=1"),
    *("evaluation.\x1b[31m=1", "9" * 10_000, "-1", "--updates=1e400", "nan=nan", "*=*", "name=\0", "\t=\t"),
)
WRONG = tuple(text for text in OVERRIDES if text not in ("seed=0x7f", "training={}", "seed=1 # x"))
"""Overrides that no config takes."""


def arguments(name: str, dice: random.Random) -> list[str]:
    """A list for a command that is wrong: no such run or config, no such key, or an argument too many."""
    odd = dice.choices(ODD, k=dice.randrange(3))
    options = [
        word for option in dice.choices(OPTIONS.get(name, ((),)), k=dice.randrange(3)) for word in option
    ]
    if name in ALONE:
        rest = [*(odd or ["more"]), *dice.choices(ODD[:3], k=1)]
    elif name in ON_A_RUN:
        rest = [
            dice.choice(("runs/nowhere", "a\0b", "", "\x1b[31m", "x" * 5000, "/dev/null")),
            *odd,
            *options,
        ]
    elif dice.random() < 0.5:
        config = [dice.choice(("none.yaml", "/dev/zero", "a\0b", "", "x" * 5000, "/", "\udcff"))]
        rest = [*(["--config", *config] if name == "demo" else config), *odd, *options]
    else:
        known = str(REPOSITORY / "configs" / ("studies/smoke.yaml" if name == "compare" else CONFIGS[0]))
        config = ["--config", known] if name == "demo" else [known]
        misspelt = ["training.stepz=1"] * dice.randrange(2)
        rest = [*config, *options, *odd, *misspelt, dice.choice(WRONG)]
    if dice.random() < 0.2:
        dice.shuffle(rest)
    return [name, *rest]


def answer(given: list[str]) -> dict[str, Any]:
    """The exit code of a command line, and what it said."""
    done = CliRunner().invoke(app, given)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return {"code": done.exit_code, "said": done.output}


def outcomes_of(count: int) -> list[Outcome]:
    """What became of `count` lists, as many for each command; what is taken wrongly writes elsewhere."""
    outcomes = []
    with tempfile.TemporaryDirectory() as elsewhere, contextlib.chdir(elsewhere):
        process = BoundedProcess(__file__)
        for number, name in product(range(-(-count // len(NAMES))), NAMES):
            given = arguments(name, random.Random(f"{name} {number}"))
            said = process.ask(given)
            one = said.get("answer", {"code": None, "said": ""})
            if one["code"] == 2:
                said = said | {"refused": one["said"]}
            kind = kind_of(said, "refused", lambda _: False)
            if CONTROLS.search(one["said"]):
                kind = "escapes"
            message = (one["said"] or said.get("traceback", ""))[-1500:]
            note = " ".join(repr(word[:30]) for word in given)[:200]
            outcomes.append(
                Outcome(name, number, note, "refused", kind, message, said["seconds"], said["megabytes"])
            )
        process.close()
    return outcomes


if __name__ == "__main__":
    sys.exit(command_line(__doc__, "odd_commands", 200 * len(NAMES), answer, outcomes_of))

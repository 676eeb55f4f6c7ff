"""The blocks of the README and the tutorials, run as printed and in order, in a fresh clone and environment.

python benchmarks/readme_commands.py clones the commit that is checked out here into a temporary folder and
goes through the `sh`, `python` and `yaml` blocks of README.md and docs/start/*.md: commands and programs are
run, a config must be valid. It keeps what each said, its exit code and time; the exit code is 0 if every
one ended with 0. A command whose comment says that it takes hours is listed, not run. On a machine that has
no half hour to spare, `--finished RUN` copies a finished run of the demo into the clone as runs/demo, so
`make demo` has nothing left to do; `--skip` leaves commands out and `--instead` runs others in their place.
The result says so of each. A comment in the line before a block, which readers of the page do not see, says
what else is to be done with it:

    <!-- commands: skip REASON -->              not run, and the reason is printed
    <!-- commands: with training.steps=20 -->   every `tutti` command of the block at this smaller size
    <!-- commands: file mine.yaml -->           the block is written to this file, for the blocks behind it
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tables import RESULTS, Table, publish

from tutti.errors import UserError
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 30
"""Lines kept of what a command said: the last ones."""
PATHS = re.compile(r"(file://)?(?<![\w.<])/(?:[\w.+@-]+/)+[\w.+@-]*")
BLOCK = re.compile(
    r"^(?:<!-- commands: (?P<note>[^\n]+?) -->\n)?```(?P<kind>sh|python|yaml)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
RUN = {
    "python": "python {}",
    "yaml": "python -c 'import sys, tutti; tutti.load_config(sys.argv[1])' {}",
}
PREPARED = ("make .venv/.simulation rendering", ". .venv/bin/activate")
"""What the README does first, where its own commands are not run."""
COPIED = (
    "runs/demo was a finished run of the demo, copied into the clone: `make demo` had nothing left to do."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A line for the shell, or why it is not run; before it, a file is written."""

    page: str
    line: str
    reason: str = ""
    file: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A command, its exit code (None: not run), its seconds, and the end of what it said or why not."""

    page: str
    command: str
    code: int | None
    seconds: float
    output: str


def bare(line: str) -> str:
    """A line of a shell without its comment."""
    return re.split(r"(?:^|\s)#\s", line.strip(), maxsplit=1)[0].strip()


def steps(page: str, text: str) -> Iterator[Step]:
    """What the blocks of a page ask for, in order.

    Raises: UserError for a comment that says none of the three things.
    """
    for number, block in enumerate(BLOCK.finditer(text), 1):
        verb, _, rest = (block["note"] or "").partition(" ")
        if verb not in ("", "skip", "with", "file") or (verb and not rest):
            raise UserError(
                f"{page}, block {number}: expected skip REASON, with OVERRIDES or file NAME, "
                f"found {block['note']!r}."
            )
        kind, reason = block["kind"], rest if verb == "skip" else ""
        if verb == "file":
            yield Step(page=page, line=f"cat {rest}", file=rest, text=block["text"])
        elif kind == "sh":
            for line in re.sub(r"\\\n\s*", "", block["text"]).splitlines():
                command, comment = bare(line), line.strip()[len(bare(line)) :]
                if not command:
                    continue
                if verb == "with" and command.startswith("tutti "):
                    command = f"{command} {rest}"
                hours = "its comment says that it takes hours" if "hours" in comment else ""
                yield Step(page=page, line=f"{command}{comment}", reason=reason or hours)
        else:
            file = f"{Path(page).stem}-block-{number}.{'py' if kind == 'python' else kind}"
            yield Step(page=page, line=RUN[kind].format(file), reason=reason, file=file, text=block["text"])


def changed(step: Step, skip: list[str], instead: dict[str, str]) -> Step:
    """A step as the person at the command line wants it."""
    command = bare(step.line)
    if command in skip:
        return replace(step, reason="left out by --skip")
    if command in instead:
        return replace(step, line=f"{instead[command]}    # instead of: {command}")
    return step


def run_all(todo: Iterable[Step], clone: Path) -> list[Ran]:
    """Takes the steps in turn; a line that begins with a dot (activation) holds for those behind it."""
    setup: list[str] = []
    home = clone.parent / "home"
    home.mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "LANG", "TERM") or name.startswith("PIP_")
    } | {"HOME": str(home)}
    done: list[Ran] = []
    for step in todo:
        line = step.line
        print_line(f"{step.page}$ {line}")
        if step.reason:
            print_line(f"  not run: {step.reason}")
            done.append(Ran(page=step.page, command=line, code=None, seconds=0.0, output=step.reason))
            continue
        if step.file:
            (clone / step.file).write_text(step.text, encoding="utf-8")
        began = time.monotonic()
        one = subprocess.run(
            ["bash", "-c", "\n".join(["set -e", *setup, line])],
            cwd=clone,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        seconds = time.monotonic() - began
        if line.startswith(". "):
            setup.append(line)
        said = PATHS.sub("<path>", one.stdout.replace(f"{clone}/", "").replace(str(clone), "."))
        ended = [text.rstrip() for text in said.splitlines() if not text.startswith("WARNING: Location")]
        output = "\n".join(ended[-SHOWN:])
        done.append(Ran(page=step.page, command=line, code=one.returncode, seconds=seconds, output=output))
        print_line(f"  exit {one.returncode} after {seconds:.0f} s")
    return done


def transcript(done: list[Ran]) -> str:
    """Every command with the end of what it said."""
    return "\n".join(
        f"$ {one.command}\n{one.output}\n[exit {one.code}, {one.seconds:.0f} s]\n"
        if one.code is not None
        else f"$ {one.command}\n[not run: {one.output}]\n"
        for one in done
    )


def main(given: list[str] | None = None) -> int:
    """0 if every command ended with 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "readme_commands", help="without suffix")
    parser.add_argument(
        "--pages",
        nargs="*",
        help="default: README.md and docs/start/*.md; without the README it begins by installing",
    )
    parser.add_argument(
        "--skip", nargs="*", default=[], help="commands that are not run, as printed before #"
    )
    parser.add_argument(
        "--instead", nargs="*", default=[], metavar="COMMAND=>OTHER", help="what is run in its place"
    )
    parser.add_argument("--note", default="", help="what readers of the result should know")
    parser.add_argument("--finished", type=Path, help="a finished run of the demo, copied to runs/demo")
    arguments = parser.parse_args(given)
    found_in = circumstances()
    with tempfile.TemporaryDirectory(prefix="tutti-readme-") as folder:
        clone = Path(folder) / "tutti"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        pages = arguments.pages or [
            "README.md",
            *(str(page.relative_to(clone)) for page in sorted((clone / "docs" / "start").glob("*.md"))),
        ]
        todo = [step for page in pages for step in steps(page, (clone / page).read_text(encoding="utf-8"))]
        if "README.md" not in pages:
            todo = [*(Step(page=pages[0], line=line) for line in PREPARED), *todo]
        if arguments.finished:
            shutil.copytree(arguments.finished, clone / "runs" / "demo")
        instead = dict(one.split("=>", 1) for one in arguments.instead)
        done = run_all((changed(one, arguments.skip, instead) for one in todo), clone)
    rows = []
    for one in done:
        code = "not run" if one.code is None else str(one.code)
        rows.append((one.page, f"`{bare(one.command)}`", code, f"{one.seconds:.0f}"))
    publish(
        arguments.output,
        "benchmarks/readme_commands",
        [
            Table(
                title="What the README and the tutorials tell to do, in a fresh clone",
                heads=("page", "command", "exit", "s"),
                rows=tuple(rows),
            )
        ],
        [
            *filter(None, [arguments.note, COPIED if arguments.finished else ""]),
            f"```text\n{transcript(done)}```",
            made_with(found_in),
        ],
        {**found_in, "commands": [asdict(one) for one in done]},
    )
    return int(any(one.code for one in done))


if __name__ == "__main__":
    sys.exit(main())

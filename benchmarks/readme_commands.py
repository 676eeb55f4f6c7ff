"""The blocks of the README and the tutorials, run as printed and in order, in a fresh clone and environment.

python benchmarks/readme_commands.py clones the commit that is checked out here and goes through README.md
and docs/start/*.md in the order of its index: commands and programs of `sh` and `python` blocks are run, a
`yaml` block must be a valid config, a notebook must give what it shows. It keeps what each said, its exit
code and time, after each of them; the exit code is 0 if every one ended with 0. `--list` says what would be
run. A killed run goes on with `--resume`: the clone and its finished rows are kept in `--work` until the end.

`tutti serve` is asked by a client, then told to end. `--last` (make test) runs when all others have ended:
nothing needs it. `--skip` leaves commands out and `--instead` runs others in their place; with `--finished
RUN` a finished run of the demo is copied into the clone as runs/demo. The result says so of each. Comments in
the lines before a block, which readers of the page do not see, say what else is to be done with it:

    <!-- commands: skip REASON -->              not run, and the reason is printed
    <!-- commands: shorten LINE => OTHER -->    the command OTHER instead of LINE, which takes too long
    <!-- commands: file mine.yaml -->           the block is written to this file, for the blocks behind it
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.errors import UserError
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line, quiet
from tutti.storage.files import write_json

ROOT = Path(__file__).resolve().parents[1]
INDEX = "docs/start/index.md"
SHOWN = 30
"""Lines kept of what a command said: the last ones."""
LIMIT = 2 * 3600.0
"""Seconds after which a command is killed; its exit code is then 124."""
PATHS = re.compile(r"(file://)?(?<![\w.<])/(?:[\w.+@-]+/)+[\w.+@-]*")
ADDRESSES = re.compile(r"\bhttps?://(?!127\.0\.0\.1|localhost)\S+")
PROGRESS = re.compile(r"(.*?): \d+/\d+ after ")
BLOCK = re.compile(
    r"^(?P<notes>(?:<!-- commands: [^\n]+ -->\n)*)```(?P<kind>sh|python|yaml)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
NOTE = re.compile(r"<!-- commands: ([^\n]+) -->\n")
RUN = {
    "python": "python {}",
    "yaml": "python -c 'import sys, tutti; tutti.load_config(sys.argv[1])' {}",
    "ipynb": "python benchmarks/notebook.py {} --check",
}
PREPARED = ("make .venv/.simulation rendering", ". .venv/bin/activate")
"""What the README does first, where its own commands are not run."""
COPIED = (
    "runs/demo was a finished run of the demo, copied into the clone: `make demo` had nothing left to do."
)
SERVE = "tutti serve "


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A line for the shell, or why it is not run; before it, a file is written.

    `instead` is the command that is run in its place, and `mark` says why it is not the line itself.
    """

    page: str
    line: str
    reason: str = ""
    file: str = ""
    text: str = ""
    instead: str = ""
    mark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A command as it is printed, and in `mark` whether it was another one or how it was ended; its exit code
    (None: not run), its seconds, and the end of what it said or why it was not run."""

    page: str
    command: str
    code: int | None
    seconds: float
    output: str
    mark: str = ""


def bare(line: str) -> str:
    """A line of a shell without its comment."""
    return re.split(r"(?:^|\s)#\s", line.strip(), maxsplit=1)[0].strip()


def lines_of(block: str) -> list[str]:
    """The commands of a block for the shell with their comments; a line that goes on is one."""
    return [line.strip() for line in re.sub(r"\\\n\s*", "", block).splitlines() if bare(line)]


def steps(page: str, text: str) -> Iterator[Step]:
    """What the blocks of a page ask for, in order.

    Raises: UserError for a comment that says none of the three things, or shortens what is not there.
    """
    for number, block in enumerate(BLOCK.finditer(text), 1):
        said = {"skip": "", "file": ""}
        shorter: dict[str, str] = {}
        for note in NOTE.findall(block["notes"]):
            verb, _, rest = note.partition(" ")
            line, arrow, other = rest.partition(" => ")
            if verb == "shorten" and arrow and line in map(bare, lines_of(block["text"])):
                shorter[line] = other
            elif verb in said and rest:
                said[verb] = rest
            else:
                raise UserError(
                    f"{page}, block {number}: expected skip REASON, file NAME or shorten LINE => OTHER with "
                    f"a line of the block, found {note!r}."
                )
        kind, reason, file = block["kind"], said["skip"], said["file"]
        if file:
            yield Step(page=page, line=f"cat {file}", file=file, text=block["text"])
        elif kind == "sh":
            for line in lines_of(block["text"]):
                other = shorter.get(bare(line), "")
                mark = "shortened" if other else ""
                yield Step(page=page, line=line, reason=reason, instead=other, mark=mark)
        else:
            file = f"{Path(page).stem}-block-{number}.{'py' if kind == 'python' else kind}"
            yield Step(page=page, line=RUN[kind].format(file), reason=reason, file=file, text=block["text"])


def pages_of(root: Path) -> list[str]:
    """README.md, and the tutorials in the order of their index."""
    listed = re.findall(r"\]\(([\w-]+\.(?:md|ipynb))\)", (root / INDEX).read_text(encoding="utf-8"))
    return ["README.md", *(f"docs/start/{name}" for name in listed)]


def steps_of(root: Path, pages: Iterable[str]) -> Iterator[Step]:
    """What all of these pages ask for, in their order."""
    for page in pages:
        if page.endswith(".ipynb"):
            yield Step(page=page, line=RUN["ipynb"].format(page))
        else:
            yield from steps(page, (root / page).read_text(encoding="utf-8"))


def changed(step: Step, skip: list[str], instead: dict[str, str]) -> Step:
    """A step as the person at the command line wants it."""
    command = bare(step.line)
    if command in skip:
        return replace(step, reason="left out by --skip")
    if command in instead:
        return replace(step, instead=instead[command], mark="exchanged by --instead")
    return step


def scrubbed(said: str, clone: Path) -> str:
    """The end of what a command said, without places, hosts and users of this machine; of a progress that is
    told line by line, the last."""
    said = said.replace(f"{clone}/", "").replace(str(clone), ".")
    said = PATHS.sub("<path>", ADDRESSES.sub("<address>", said))
    for name in {socket.gethostname(), socket.getfqdn(), getpass.getuser()} - {"root", "localhost", ""}:
        said = re.sub(rf"\b{re.escape(name)}\b", "<name>", said)
    kept: list[str] = []
    for line in map(str.rstrip, said.splitlines()):
        if line.startswith(("WARNING: Location", "Looking in ")):
            continue
        now, before = PROGRESS.match(line), PROGRESS.match(kept[-1]) if kept else None
        if now and before and now[1] == before[1]:
            kept.pop()
        kept.append(line)
    return "\n".join(kept[-SHOWN:])


def told(line: str, clone: Path, environment: dict[str, str], limit: float = LIMIT) -> tuple[int, str]:
    """Runs lines of a shell in the clone: the exit code, and all that they said."""
    with subprocess.Popen(
        ["bash", "-c", line],
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as one:
        try:
            said = one.communicate(timeout=limit)[0]
            return one.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(one.pid, signal.SIGKILL)
            return 124, one.communicate()[0] + f"\nkilled after {limit:.0f} s"
        finally:
            if one.poll() is None:  # Ctrl-C reaches this process alone
                os.killpg(one.pid, signal.SIGTERM)


def asked(line: str, clone: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Starts the server of the last of these lines, asks it, and ends it: its exit code, or 1 if an answer is
    wrong, and what it said."""
    from tutti.serving.client import Client
    from tutti.serving.policy import Policy

    with subprocess.Popen(
        ["bash", "-c", f"{line} --port 0"],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as server:
        assert server.stdout is not None
        said, address = "", None
        while address is None and (one := server.stdout.readline()):
            said += one
            address = re.search(r"listening on (ws://\S+?);", one)
        if address is None:
            return server.wait() or 1, said
        try:
            policy = Policy.load(clone / line.rpartition(SERVE)[2].split()[0], warn=False)
            random, spec = np.random.default_rng(0), policy.spec
            images = {view: random.integers(0, 256, (48, 48, 3), np.uint8) for view in spec.views}
            state = np.zeros(spec.state_dim, np.float32)
            with Client(address[1]) as client:
                got = client.infer({"images": images, "state": state, "prompt": "go to the red square"})
            equal = np.array_equal(got["actions"], policy.predict(images, state, "go to the red square"))
            web = address[1].replace("ws:", "http:")
            with urllib.request.urlopen(f"{web}/healthz", timeout=30) as answer:
                healthy = answer.status == 200
        finally:
            os.killpg(server.pid, signal.SIGTERM)
        said += server.stdout.read()
        said += f"[a client: actions equal to those of Policy.predict: {equal}; /healthz answers: {healthy}]"
    return server.returncode or int(not (equal and healthy)), said


def environment_of(home: Path) -> dict[str, str]:
    """That of a newcomer: nothing of this shell but where programs and pip's packages are."""
    home.mkdir(exist_ok=True)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "LANG", "TERM") or name.startswith("PIP_")
    }
    return kept | {"HOME": str(home)}


def run_all(
    todo: Iterable[Step], clone: Path, finished: Iterable[Ran] = (), limit: float = LIMIT
) -> Iterator[Ran]:
    """Takes the steps in turn, but the first ones, which are finished; a line that begins with a dot
    (activation) holds for those behind it.

    Raises: UserError if those that are finished are not the first steps.
    """
    setup: list[str] = []
    environment, before = environment_of(clone.parent / "home"), iter(finished)
    for step in todo:
        line = step.line
        if line.startswith(". "):
            setup.append(line)
        if one := next(before, None):
            if (one.page, one.command) != (step.page, line):
                raise UserError(
                    f"{clone.parent}: expected {step.page}: {line}, found a finished {one.page}: "
                    f"{one.command}. Begin again in another --work."
                )
            continue
        print_line(f"{step.page}$ {line}")
        if step.reason:
            print_line(f"  not run: {step.reason}")
            yield Ran(page=step.page, command=line, code=None, seconds=0.0, output=step.reason)
            continue
        if step.file:
            (clone / step.file).write_text(step.text, encoding="utf-8")
        command, mark = bare(line), ""
        if step.instead:
            command, mark = step.instead, f"{step.mark}: `{step.instead}`"
        shell = "\n".join(["set -e", *setup, command])
        began = time.monotonic()
        if command.startswith(SERVE):
            mark = "asked by a client, then told to end"
            code, said = asked(shell, clone, environment)
        else:
            code, said = told(shell, clone, environment, limit)
        seconds = time.monotonic() - began
        print_line(f"  exit {code} after {seconds:.0f} s{mark and f' ({mark})'}")
        output = scrubbed(said, clone)
        yield Ran(page=step.page, command=line, code=code, seconds=seconds, output=output, mark=mark)


def transcript(done: list[Ran]) -> str:
    """Every command with the end of what it said."""
    parts: list[str] = []
    for one in done:
        parts += [f"$ {one.command}", *([f"[{one.mark}]"] if one.mark else [])]
        if one.code is None:
            parts += [f"[not run: {one.output}]", ""]
        else:
            parts += [*([one.output] if one.output else []), f"[exit {one.code}, {one.seconds:.0f} s]", ""]
    return "\n".join(parts)


def keep(output: Path, done: list[Ran], total: int, notes: list[str], found_in: dict[str, Any]) -> None:
    """Writes the result as it is now."""
    rows = [
        (
            one.page,
            f"`{bare(one.command).replace('|', chr(92) + '|')}`",
            "not run" if one.code is None else str(one.code),
            f"{one.seconds:.0f}",
            one.output if one.code is None else one.mark,
        )
        for one in done
    ]
    minutes = sum(one.seconds for one in done) / 60
    unfinished = f"Not finished: {len(done)} of {total} commands." if len(done) < total else ""
    with quiet(len(done) < total):
        publish(
            output,
            "benchmarks/readme_commands",
            [
                Table(
                    title="What the README and the tutorials tell to do, in a fresh clone",
                    heads=("page", "command", "exit", "s", "not as printed"),
                    rows=tuple(rows),
                )
            ],
            [
                *filter(None, [unfinished, *notes]),
                f"{len(done)} commands in {minutes:.0f} minutes; "
                f"{sum(bool(one.code) for one in done)} of them failed.",
                f"```text\n{transcript(done)}```",
                made_with(found_in),
            ],
            {**found_in, "commands": [asdict(one) for one in done]},
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
    parser.add_argument("--last", nargs="*", default=["make test"], help="commands that wait for all others")
    parser.add_argument("--note", default="", help="what readers of the result should know")
    parser.add_argument("--finished", type=Path, help="a finished run of the demo, copied to runs/demo")
    parser.add_argument("--work", type=Path, help="folder of the clone (default: TMPDIR/tutti-readme-COMMIT)")
    parser.add_argument("--resume", action="store_true", help="go on in --work, with its commit")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one command (7200)")
    parser.add_argument("--list", action="store_true", help="print what would be run, and end")
    arguments = parser.parse_args(given)
    head = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True)
    found_in = circumstances() | {"commit": head.strip()}
    found_in["command"] = PATHS.sub("<path>", found_in["command"])
    instead = dict(one.split("=>", 1) for one in arguments.instead)
    work = arguments.work or Path(tempfile.gettempdir()) / f"tutti-readme-{found_in['commit'][:12]}"
    clone, rows = work / "tutti", work / "rows.json"

    def todo_in(root: Path) -> list[Step]:
        pages = arguments.pages or pages_of(root)
        found = [changed(one, arguments.skip, instead) for one in steps_of(root, pages)]
        if "README.md" not in pages:
            found = [*(Step(page=pages[0], line=line) for line in PREPARED), *found]
        return sorted(found, key=lambda one: bare(one.line) in arguments.last)

    if arguments.list:
        for step in todo_in(ROOT):
            why = f"  # not run: {step.reason}" if step.reason else ""
            print_line(f"{step.page}$ {step.instead or bare(step.line)}{why}")
        return 0
    if work.exists() and not arguments.resume:
        raise UserError(f"{work} is there from a run before: --resume goes on with it; or remove it.")
    if not clone.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if arguments.finished:
            shutil.copytree(arguments.finished, clone / "runs" / "demo")
        write_json(rows, {**found_in, "commands": []})
    kept = json.loads(rows.read_text(encoding="utf-8"))
    done = [Ran(**one) for one in kept.pop("commands")]
    todo, notes = todo_in(clone), [arguments.note, COPIED if arguments.finished else ""]
    print_line(f"{len(todo)} commands, {len(done)} done; if killed: --work {work} --resume")
    for one in run_all(todo, clone, tuple(done), arguments.limit):
        done.append(one)
        write_json(rows, {**kept, "commands": [asdict(one) for one in done]})
        keep(arguments.output, done, len(todo), notes, kept)
    failed = any(one.code for one in done)
    if not failed:
        shutil.rmtree(work)
    return int(failed)


if __name__ == "__main__":
    sys.exit(prints_user_errors(main)())

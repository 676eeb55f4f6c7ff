"""The README's commands, run as printed and in order, in a fresh clone with a fresh environment.

python benchmarks/readme_commands.py clones the commit that is checked out here into a temporary folder, runs
every command of the README's `sh` blocks there, and keeps what each said, its exit code and time. A command
whose comment says that it takes hours is listed, not run. The exit code is 0 if every command ended with 0.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tables import RESULTS, Table, publish

from tutti.runs.provenance import circumstances, made_with
from tutti.runs.terminal import print_line

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 30
"""Lines kept of what a command said: the last ones."""
PATHS = re.compile(r"(file://)?(?<![\w.<])/(?:[\w.+@-]+/)+[\w.+@-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A command, its exit code (None: not run), its seconds, and the end of what it said."""

    command: str
    code: int | None
    seconds: float
    output: str


def commands(readme: str) -> list[str]:
    """The lines of all `sh` blocks, continued lines joined, comments kept."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*", "", "".join(blocks)).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def run_all(lines: list[str], clone: Path) -> list[Ran]:
    """Runs the lines in turn; one that begins with a dot (activation) holds for those behind it."""
    setup: list[str] = []
    home = clone.parent / "home"
    home.mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "LANG", "TERM") or name.startswith("PIP_")
    } | {"HOME": str(home)}
    done: list[Ran] = []
    for line in lines:
        if "hours" in line.partition("#")[2]:
            done.append(Ran(command=line, code=None, seconds=0.0, output=""))
            continue
        print_line(f"$ {line}")
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
        done.append(Ran(command=line, code=one.returncode, seconds=seconds, output="\n".join(ended[-SHOWN:])))
        print_line(f"  exit {one.returncode} after {seconds:.0f} s")
    return done


def transcript(done: list[Ran]) -> str:
    """Every command with the end of what it said."""
    return "\n".join(
        f"$ {one.command}\n{one.output}\n[exit {one.code}, {one.seconds:.0f} s]\n"
        if one.code is not None
        else f"$ {one.command}\n[not run]\n"
        for one in done
    )


def main(given: list[str] | None = None) -> int:
    """0 if every command ended with 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "readme_commands", help="without suffix")
    parser.add_argument(
        "--skip", nargs="*", default=[], help="commands that are not run, as printed before #"
    )
    arguments = parser.parse_args(given)
    found_in = circumstances()
    with tempfile.TemporaryDirectory(prefix="tutti-readme-") as folder:
        clone = Path(folder) / "tutti"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        lines = commands((clone / "README.md").read_text(encoding="utf-8"))
        lines = [line for line in lines if line.partition("#")[0].strip() not in arguments.skip]
        done = run_all(lines, clone)
    rows = []
    for one in done:
        code = "not run" if one.code is None else str(one.code)
        rows.append((f"`{one.command.partition('#')[0].strip()}`", code, f"{one.seconds:.0f}"))
    publish(
        arguments.output,
        "benchmarks/readme_commands",
        [
            Table(
                title="The README's commands in a fresh clone",
                heads=("command", "exit", "s"),
                rows=tuple(rows),
            )
        ],
        [f"```text\n{transcript(done)}```", made_with(found_in)],
        {**found_in, "commands": [asdict(one) for one in done]},
    )
    return int(any(one.code for one in done))


if __name__ == "__main__":
    sys.exit(main())

"""Calls a function in another process, one request after another, and measures memory and time."""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tables import RESULTS, Table, publish

from tutti.errors import UserError
from tutti.runs.provenance import circumstances, made_with

SECONDS, MEGABYTES = 60, 2000
"""What one request may take; the seconds are a processor's."""
LINES, CHARACTERS = 25, 2500
"""A message that fits a screen."""
FRESH = 200
"""Megabytes: a process that keeps so much more than after its first request is replaced, so that the next has
its own peak."""
BAD = (
    "executed",
    "outside",
    "silent",
    "hang",
    "memory",
    "died",
    "traceback",
    "long",
    "too strict",
    "escapes",
    "unclear",
    "poisoned",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one input: `kind` is taken, refused, or one of BAD; `judged`: what was known before."""

    line: str
    number: int
    note: str
    judged: str
    kind: str
    message: str
    seconds: float
    megabytes: int


class BoundedProcess:
    """`script --serve` in a process of its own, started anew after one that died, hung or grew."""

    def __init__(self, script: str, environment: dict[str, str] | None = None) -> None:
        self._script = script
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Any) -> dict[str, Any]:
        """Its `answer`, `refused`, `traceback`, `hang` or `died`, with `seconds` and `megabytes`."""
        if self._process is None:
            command = [sys.executable, self._script, "--serve"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        begun = time.perf_counter()
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        ready = self._wait(process, begun)
        line = process.stdout.readline() if ready else ""
        said = (
            json.loads(line)
            if line
            else {"died" if ready else "hang": True, "megabytes": 0, "left": FRESH + 1}
        )
        if said["left"] > FRESH:
            self.close()
        return said | {"seconds": round(time.perf_counter() - begun, 2)}

    @staticmethod
    def _wait(process: subprocess.Popen[str], begun: float) -> bool:
        """Whether it answers: within SECONDS of a processor's time, or ten times that on a clock, so that a
        busy machine makes no hang."""
        clock = os.sysconf("SC_CLK_TCK")

        def used() -> float:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / clock

        before = used()
        while not select.select([process.stdout], [], [], 0.5)[0]:
            if used() - before > SECONDS or time.perf_counter() - begun > 10 * SECONDS:
                return False
        return True

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve(answer: Callable[[Any], Any]) -> None:
    """Answers the requests that standard input gives, one on a line, until it ends."""
    first = None
    for line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        try:
            said: dict[str, Any] = {"answer": answer(json.loads(line))}
        except UserError as error:
            said = {"refused": str(error)}
        except BaseException:
            said = {"traceback": traceback.format_exc()[-1500:]}
        now = _memory("VmRSS")
        first = now if first is None else first
        print(json.dumps(said | {"megabytes": _memory("VmHWM"), "left": now - first}), flush=True)


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(row for row in status if row.startswith(name)).split()[1]) // 1024


def command_line(
    description: str | None,
    name: str,
    count: int,
    answer: Callable[[Any], Any],
    judge: Callable[[int], list[Outcome]],
) -> int:
    """The `main` of a benchmark: answers requests as a process of its own, or judges many inputs and
    publishes the result under `name`. Gives the exit code: 1 if any input ended badly.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--inputs", type=int, default=count, help=f"how many; {count} unless given")
    parser.add_argument("--output", type=Path, default=RESULTS / name)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(answer)
        return 0
    return int(
        publish_outcomes(options.output, name.replace("_", " ").capitalize(), judge(options.inputs)) > 0
    )


def kind_of(said: dict[str, Any], judged: str, same: Callable[[Any], bool]) -> str:
    """The kind of an outcome. `judged` begins with "refused" where the input had to be refused; `same` says
    whether an answer is the right one.
    """
    for bad in ("hang", "died", "traceback"):
        if bad in said:
            return bad
    if said["megabytes"] > MEGABYTES:
        return "memory"
    must_refuse = judged.startswith("refused")
    if "refused" in said:
        text = said["refused"]
        if len(text.splitlines()) > LINES or len(text) > CHARACTERS:
            return "long"
        return "refused" if must_refuse else "too strict"
    return "silent" if must_refuse or not same(said["answer"]) else "taken"


def publish_outcomes(path: Path, title: str, outcomes: Sequence[Outcome]) -> int:
    """A row for each line, and every bad outcome in the JSON; gives the number of bad outcomes."""
    rows = []
    for line in dict.fromkeys(one.line for one in outcomes):
        of_line = [one for one in outcomes if one.line == line]
        counts = Counter(one.kind for one in of_line)
        refuse = sum(one.judged.startswith("refused") for one in of_line)
        told = (len(of_line), refuse, counts["refused"], counts["taken"], sum(counts[kind] for kind in BAD))
        bad = ", ".join(f"{counts[kind]} {kind}" for kind in BAD if counts[kind]) or "none"
        rows.append((line, *map(str, told), bad))
    heads = ("line", "inputs", "must be refused", "refused", "taken as judged", "bad", "which")
    made = circumstances()
    bad_ones = [asdict(one) for one in outcomes if one.kind in BAD]
    table = Table(title=f"{len(outcomes)} inputs", heads=heads, rows=tuple(rows))
    publish(path, title, [table], [made_with(made)], {"bad": bad_ones, "rows": rows, **made})
    return len(bad_ones)

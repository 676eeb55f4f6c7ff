"""Gives hundreds of hostile runs, checkpoints, exports and studies to every command that reads them.

    python benchmarks/hostile_folders.py        # 360 folders, benchmarks/results/hostile_folders.{md,json}
    python benchmarks/hostile_folders.py --inputs 36 --output /tmp/hostile

benchmarks/hostile_rules.py spoils copies of a sound world by rule and number. Each command works on a copy of
its own, in a process whose memory and time are bounded and whose every opened file, connection and import is
watched. Wanted: a message of one screen, or the very result of the sound folder; the report is made of
whatever is there. Exit code 1 if not.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from bounded_process import BoundedProcess, Outcome, command_line, kind_of
from hostile_rules import CHECKPOINT, EXPORT, RULES, RUN, STUDY, Case
from hostile_world import build
from typer.testing import CliRunner

from tutti.cli.app import app
from tutti.errors import UserError
from tutti.serving.policy import Policy

COMMANDS: dict[str, tuple[str, ...]] = {
    RUN: ("report", "train", "replay", "replay saved", "evaluate", "probe", "export"),
    CHECKPOINT: ("load", "train", "fork", "replay", "evaluate", "probe", "export", "report"),
    EXPORT: ("load",),
    STUDY: ("compare",),
}
"""What reads each kind of folder."""
ADDRESS_SPACE = 12 * 2**30
PROGRAMS = ("gs", "ffmpeg", "sh", "git")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
watched: dict[str, Any] = {"outside": "", "events": []}


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes every look outside of the folder and everything that would run a stranger's code."""
    outside = watched["outside"]
    if event == "open" and outside and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        followed = not (arguments[2] or 0) & os.O_NOFOLLOW  # else the system opens no link
        if followed and path.startswith(f"{outside}/secret"):
            watched["events"].append(f"outside: opened {path}")
    elif event == "socket.connect":
        watched["events"].append(f"outside: connected to {arguments[1]!r:.80}")
    elif event == "import" and str(arguments[0]).startswith("canary_module"):
        watched["events"].append(f"executed: imported {arguments[0]}")


def arguments_of(command: str, home: Path) -> list[str]:
    """What the command line of a command is."""
    run, out = str(home / "run"), str(home / "out")
    lines = {
        "report": ["report", run],
        "train": ["train", str(home / "mine.yaml"), "--run", run],
        "fork": ["train", str(home / "mine.yaml"), "--run", out, f"training.fork={{run: {run}}}"],
        "replay": ["replay", run, "--step", "3"],
        "replay saved": ["replay", run, "--failure"],
        "evaluate": ["evaluate", run],
        "probe": ["probe", run],
        "export": ["export", run, "--to", out],
        "compare": [
            "compare",
            str(home / "mine-study.yaml"),
            "--folder",
            str(home / "study"),
            "--report-only",
        ],
    }
    return lines[command]


def answer(request: list[str]) -> dict[str, Any]:
    """Runs a command on the world in a folder; what it said, and a digest of its result."""
    command, folder, target = request
    home = Path(folder)
    if not watched["outside"]:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        sys.addaudithook(watch)
        sys.path.insert(0, str(home.parent / "traps"))
    watched["outside"], watched["events"] = str(home.parent / "outside"), []
    said, code = "", 0
    if command == "load":
        try:
            said = str(predicted(home / ("export" if target == EXPORT else "run")))
        except UserError as error:
            said, code = str(error), 2
    else:
        done = CliRunner().invoke(app, arguments_of(command, home))
        said, code = done.output, done.exit_code
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
    watched["outside"] = "nowhere"
    result = result_of(command, home) if code == 0 else ""
    events = list(dict.fromkeys(watched["events"]))
    return {
        "said": said,
        "code": code,
        "result": said if command == "load" and not code else result,
        "events": events,
    }


def predicted(folder: Path) -> str:
    """A digest of what the policy of a folder does."""
    policy = Policy.load(folder)
    edge = policy.spec.image_size
    images = {view: np.full((edge, edge, 3), 99, np.uint8) for view in policy.spec.views}
    actions = policy.predict(images, np.full(policy.spec.state_dim, 0.1, np.float32), "push the box")
    return hashlib.sha256(np.ascontiguousarray(actions).tobytes()).hexdigest()


def result_of(command: str, home: Path) -> str:
    """A digest of what a command has made that must not change unnoticed."""
    file = {
        "train": home / "run/checkpoints/step-000004/model.safetensors",
        "fork": home / "out/checkpoints/step-000004/model.safetensors",
        "export": home / "out/model.safetensors",
        "evaluate": home / "run/evaluation/open_loop.json",
    }.get(command)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else ""


class Page(HTMLParser):
    """Counts what would run in a browser."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.bad = 0, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes a script, a handler, an address that runs or leads elsewhere."""
        self.scripts += tag == "script"
        for name, value in attrs:
            text = (value or "").strip().lower()
            runs = text.startswith(("javascript:", "data:text", "vbscript:", "file:"))
            if name.startswith("on") or (name in ("src", "href", "action") and runs):
                self.bad.append(f"<{tag} {name}={text[:40]}>")
        if tag in ("iframe", "object", "embed", "base", "form"):
            self.bad.append(f"<{tag}>")


def poison_in(page: Path, scripts: int) -> str:
    """What would run in a page that Tutti has written, which has so many scripts of its own."""
    found = Page()
    found.feed(page.read_text(encoding="utf-8", errors="replace"))
    more = [f"{found.scripts - scripts} scripts more"] if found.scripts > scripts else []
    return ", ".join([*found.bad, *more])


def kind_of_command(
    said: dict[str, Any], case: Case, command: str, sound: dict[str, Any], page: str
) -> tuple[str, str]:
    """How it ended, and the words about it."""
    if "answer" not in said:
        return kind_of(said, "refused", lambda _: False), said.get("traceback", "")
    one = said["answer"]
    text, code = one["said"], one["code"]
    shown = {"refused": text[text.find("error:") :]} if code == 2 else {"answer": one}
    kind = kind_of(said | shown if code == 2 else said, "refused" if code == 2 else "", lambda _: True)
    for event in one["events"]:
        kind, text = event.split(":")[0], event
    if CONTROLS.search(one["said"]):
        kind, text = "escapes", repr(CONTROLS.search(one["said"]))
    # A result that cannot be read is left out of what a finished evaluation shows, in words.
    elif code == 0 and (
        command in case.refused_by
        or (
            not case.free
            and one["result"] != sound["result"]
            and not (command == "evaluate" and "left out: " in one["said"])
        )
    ):
        kind = "silent"
    elif code not in (0, 1, 2) or "Traceback" in one["said"]:
        kind = "traceback"
    elif page:
        kind, text = "poisoned", page
    elif (
        command == "report"
        and code
        and not case.note.startswith(("run/stages.json", "run/.lock", "run/report.html", "run/summary.json"))
    ):
        kind = "too strict"
    return kind, text


def copies(template: Path, work: Path, rule: str, number: int, command: str) -> Case:
    """A copy of the world for a command, spoilt."""
    home = work / "world"
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(template, home, symlinks=True)
    book = json.loads((home / "run" / "stages.json").read_text())
    book["train"]["finished"] = command != "train"
    if command == "evaluate":
        del book["evaluate"]
    (home / "run" / "stages.json").write_text(json.dumps(book))
    shutil.rmtree(work / "outside", ignore_errors=True)
    (work / "outside" / "sub").mkdir(parents=True)
    case = Case(home, work / "outside", work / "canary", random.Random(f"{rule} {number}"))
    if rule in RULES:
        RULES[rule](case)
    return case


def measured(
    template: Path, work: Path, process: BoundedProcess, rule: str, number: int
) -> Iterator[Outcome]:
    """A spoilt folder in all commands that read it."""
    target = copies(template, work, rule, number, "").target
    for command in COMMANDS[target]:
        case = copies(template, work, rule, number, command)
        said = process.ask([command, str(case.home), target])
        page = ""
        for written in (case.home / "run" / "report.html", case.home / "study" / "report.html"):
            if command in ("report", "compare") and written.is_file() and not written.is_symlink():
                page = page or poison_in(written, sound_scripts[command])
        kind, message = kind_of_command(said, case, command, sound_results[command, target == EXPORT], page)
        if case.canary.exists():
            shutil.rmtree(case.canary)
            kind, message = "executed", "the canary was made"
        judged = "refused" if command in case.refused_by else "as if sound, or refused"
        note = f"{command}: {case.note}"
        yield Outcome(rule, number, note, judged, kind, message[-1500:], said["seconds"], said["megabytes"])


sound_results: dict[tuple[str, bool], Any] = {}
sound_scripts: dict[str, int] = {}


def outcomes_of(count: int) -> list[Outcome]:
    """`count` hostile folders, as many of each rule, in all commands."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="tutti-hostile-") as name:
        work, template = Path(name), Path(name) / "template"
        os.environ["TUTTI_CACHE"] = str(work / "cache")
        template.mkdir()
        build(template)
        shutil.copy(template / "study" / "study.yaml", template / "mine-study.yaml")
        traps = work / "traps" / "canary_module"
        traps.mkdir(parents=True)
        for file in ("__init__", "inner"):
            (traps / f"{file}.py").write_text(
                f"import os\nos.makedirs({str(work / 'canary')!r}, exist_ok=True)\n"
            )
        programs = work / "programs"
        programs.mkdir()
        for program in PROGRAMS[:-1]:
            (programs / program).write_text(f"#!/bin/bash\nmkdir {work / 'canary'}\n")
            (programs / program).chmod(0o755)
        process = BoundedProcess(__file__, {"PATH": f"{programs}:{os.environ['PATH']}"})
        readers = {(one, target == EXPORT) for target, commands in COMMANDS.items() for one in commands}
        for command, export in sorted(readers):
            case = copies(template, work, "sound", 0, command)
            said = process.ask([command, str(case.home), EXPORT if export else RUN])
            if said.get("answer", {}).get("code") not in ((0, 1) if command == "replay saved" else (0,)):
                raise RuntimeError(f"{command} does not take the sound folder: {said}")
            sound_results[command, export] = said["answer"]
            page = case.home / ("study" if command == "compare" else "run") / "report.html"
            if command in ("report", "compare"):
                found = Page()
                found.feed(page.read_text())
                sound_scripts[command] = found.scripts
        for number in range(-(-count // len(RULES))):
            for rule in RULES:
                outcomes += measured(template, work, process, rule, number)
        process.close()
    return outcomes


if __name__ == "__main__":
    sys.exit(command_line(__doc__, "hostile_folders", 20 * len(RULES), answer, outcomes_of))

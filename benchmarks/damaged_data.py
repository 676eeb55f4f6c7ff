"""Reads thousands of damaged data sets and counts what Tutti makes of them.

    python benchmarks/damaged_data.py                 # 2,000 sets, benchmarks/results/damaged_data.{md,json}
    python benchmarks/damaged_data.py --inputs 100 --output /tmp/damaged

An independent reader (benchmarks/independent_reader.py) judges each set beforehand: it says one thing, or it
must be refused. Each set is then opened and read whole by Tutti, in a process that is measured. Wanted: what
says one thing is read exactly so, and all else is refused with a message of one screen. Exit code 1 if not.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from bounded_process import BoundedProcess, Outcome, command_line, kind_of
from damaged_sets import LINES, VIEWS, damage, write_sound
from independent_reader import Content, Refuse, judge

from tutti.data.formats.lerobot.reader import LeRobotStore

CANARY = "canary"
"""A file that a program makes which a picture started."""
PROGRAMS = ("gs", "ffmpeg", "sh")


def read(names: list[str]) -> dict[str, Any]:
    """All that the data set in the first folder says, as Tutti reads it; arrays go into the second file."""
    store = LeRobotStore(Path(names[0]))
    rows = np.arange(store.spec.num_frames)
    pictures = {view: store.frames(view, rows) for view in store.spec.views}
    np.savez(names[1], states=store.states, actions=store.actions, **pictures)
    return {
        "fps": store.spec.fps,
        "lengths": [episode.length for episode in store.episodes],
        "texts": [store.instructions[int(task)] for task in store.instruction_of],
    }


def judged_before(folder: Path) -> tuple[Content | None, str]:
    """What the set says, or None and the reason why it must be refused."""
    try:
        return judge(folder), "one content"
    except Refuse as error:
        return None, f"refused: {error}"
    except Exception as error:  # a form that the judge does not foresee is no sound set
        return None, f"refused: {type(error).__name__}: {error}"[:120]


def outcome(line: str, number: int, sound: dict[str, Path], reader: BoundedProcess, work: Path) -> Outcome:
    """Spoils a set, judges it, has it read, and compares."""
    place, canary = work / "sets", work / CANARY
    place.mkdir()
    kept = place / "read.npz"
    case = damage(line, number, place / "set", sound)
    expected, judged = (None, "refused: hostile") if case.must_refuse else judged_before(place / "set")

    def same(answer: dict[str, Any]) -> bool:
        with np.load(kept) as arrays:
            pictures = {view: arrays[view] for view in VIEWS if view in arrays}
            numbers = arrays["states"], arrays["actions"]
        lengths, texts = tuple(answer["lengths"]), tuple(answer["texts"])
        return expected is not None and expected.equals(
            Content(answer["fps"], lengths, *numbers, texts, pictures)
        )

    said = reader.ask([str(place / "set"), str(kept)])
    kind = kind_of(said, judged, same)
    if any(path.stat().st_atime > 1 for path in case.reads):
        kind = "outside"
    if canary.exists():
        canary.unlink()
        kind = "executed"
    shutil.rmtree(place)
    message = said.get("refused") or said.get("traceback") or ""
    return Outcome(line, number, case.note, judged, kind, message, said["seconds"], said["megabytes"])


def outcomes_of(lines: list[str], sets: int) -> list[Outcome]:
    """`sets` damaged sets, as many of each line."""
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        kinds: tuple[Literal["image", "video"], ...] = ("image", "video")
        sound: dict[str, Path] = {storage: work / storage for storage in kinds}
        for storage in kinds:
            write_sound(sound[storage], storage)
        programs = work / "programs"
        programs.mkdir()
        for program in PROGRAMS:
            (programs / program).write_text(f"#!/bin/bash\ntouch {work / CANARY}\n")
            (programs / program).chmod(0o755)
        reader = BoundedProcess(__file__, {"PATH": f"{programs}:{os.environ['PATH']}"})
        for number in range(-(-sets // len(lines))):
            outcomes += [outcome(line, number, sound, reader, work) for line in lines]
        reader.close()
    return outcomes


if __name__ == "__main__":
    sys.exit(command_line(__doc__, "damaged_data", 2000, read, lambda count: outcomes_of(list(LINES), count)))

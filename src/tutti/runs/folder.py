"""A run's folder and its book: which stages are finished, made with which config, and how long they took.

The book is `stages.json`, replaced atomically. A stage whose config has not changed is kept if it is finished
and continued if it was interrupted; if its config has changed, that is an error until the user says --redo.
Seconds add up over interruptions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutti.config.paths import require_run
from tutti.config.run_config import RunConfig, load_run_config, to_yaml
from tutti.distributed.world import launched_world_size, world
from tutti.nested import changed_keys, indented
from tutti.plugin import Trust
from tutti.runs.terminal import print_line
from tutti.storage.files import explain_full_disk, lock_file, write_atomically
from tutti.storage.reading import read_json, shown
from tutti.types import UserError

STAGES: dict[str, tuple[str, ...]] = {
    "record": ("dataset", "recording", "recording.json"),
    "train": (
        *("checkpoints", "records.jsonl", "tensorboard", "failures", "spikes"),
        *("first_batch.png", "shapes.txt", "model.json", "data.json", "probes", "replays"),
    ),
    "evaluate": ("evaluation", "videos"),
    "report": ("report.html", "summary.json"),
}
"""The stages in their order, each with what it makes in the run's folder."""

WORK = {"train": ("checkpoints", "records.jsonl", "failures")}
"""Of a stage's outputs those that cost work, where others are written before it begins."""

WITHOUT_EFFECT = ("workers", "prefetch", "parallel", "diagnostics", "checkpoints")
"""Keys that may change at any time, because no result depends on them."""

ENTRY = {"finished": bool, "seconds": int | float, "inputs": dict}
"""What the book keeps of a stage."""
BOOK_CURE = "Tutti alone writes this file; delete it to begin anew."
HEARTBEAT = 2.0


class RunFolder:
    """Where a run lies, and the book of its stages."""

    def __init__(
        self, path: Path, *, redo: bool = False, new: bool = True, trust_code: Trust = False
    ) -> None:
        """`redo`: a changed config may throw away what the old one made. `new`: the folder may be made.
        `trust_code`: which classes that its config.yaml names may be imported.

        Raises: UserError, if the folder is absent, cannot be made, or its book cannot be read.
        """
        self.path, self.redo, self.trust_code = path, redo, trust_code
        self._lock = threading.Lock()
        if not new:
            require_run(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be a run's folder: {error.strerror}.") from error
        self._book = _read(path / "stages.json")

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each stage so far, interrupted tries included."""
        return {name: round(entry["seconds"], 1) for name, entry in self._book.items()}

    def config(self) -> RunConfig:
        """The config that the run's stages were made with."""
        return load_run_config(self.path / "config.yaml", self.trust_code)

    def begin(self, stage: str, config: RunConfig, *sections: str) -> bool:
        """True if there is something to do for `stage`, which depends on these sections of `config`.

        On several processes the first one finds out, and writes.

        Raises: UserError, if the stage was begun with other values there and `redo` was not asked for, or
        several processes were started for a stage that runs on one.
        """
        if launched_world_size() > 1 and world().ranks.count == 1:
            raise UserError(
                f"{launched_world_size()} processes were started, but the stage '{stage}' runs on one: only "
                "`tutti train` is for torchrun. Start it by itself."
            )
        return world().on_rank_zero(lambda: self._begin(stage, config, sections))

    def _begin(self, stage: str, config: RunConfig, sections: tuple[str, ...]) -> bool:
        asked = config.sections(*sections)
        inputs = with_effect(asked)
        entry = self._book.get(stage)
        changes = changed_keys(with_effect(_present(entry["inputs"], asked)), inputs) if entry else []
        if entry and changes and not self.redo:
            raise UserError(self._refusal(stage, changes))
        if entry and not changes:
            done = entry["finished"]
            how = "done before in" if done else "was interrupted after"
            print_line(f"{stage}: {how} {entry['seconds']:.0f} s, {'kept' if done else 'continues'}")
            return not done
        if changes:
            print_line(f"{stage}: the config has changed, doing it again ({'; '.join(changes[:3])})")
        with self._alone(), self._full_disk(stage):
            self._forget(stage)  # nothing that was made otherwise may be taken for this stage's
            self._note_config(config, sections)
            self._book[stage] = {"finished": False, "seconds": 0.0, "hash": _hash(inputs), "inputs": inputs}
            self._write()
        return True

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Times the block, and notes the stage as finished when it ends well.

        A full disk becomes a UserError. A stage that ends with one before it has made anything is forgotten:
        the config was at fault, and the mended one must not be refused as another. On several processes only
        the first one keeps the book.
        """
        if not world().first:
            yield
            return
        entry = self._book.setdefault(stage, {"finished": False, "seconds": 0.0, "hash": "", "inputs": {}})
        if entry["finished"]:  # asked for once more
            entry.update(finished=False, seconds=0.0)
        with self._alone(), self._full_disk(stage):
            self._write()
            try:
                with self._clock(entry):
                    yield
            except UserError:
                made = WORK.get(stage, STAGES[stage])
                if not any((self.path / name).exists() for name in made):
                    del self._book[stage]
                    self._write()
                raise
            entry["finished"] = True
            self._write()

    def require(self, stage: str, cure: str) -> None:
        """Raises: UserError with the cure, if `stage` is not finished."""
        if not self._book.get(stage, {}).get("finished"):
            state = "was interrupted" if stage in self._book else "has not run"
            raise UserError(f"{self.path}: the stage '{stage}' {state}. {cure}")

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of the run atomically, on the first of several processes."""
        if not world().first:
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(value, indent=1) + "\n")

    def discard(self, name: str) -> None:
        """Removes a file or a folder of the run, if it is there."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _forget(self, stage: str) -> None:
        """Unmakes a stage and all later ones; killed at any point, none of them counts as finished."""
        names = tuple(STAGES)
        doomed = names[names.index(stage) :]
        for name in doomed:
            self._book.get(name, {})["finished"] = False
        self._write()
        for name in doomed:
            for output in STAGES[name]:
                self.discard(output)
            self._book.pop(name, None)
        self._write()

    def _note_config(self, config: RunConfig, sections: tuple[str, ...]) -> None:
        """Writes config.yaml: these sections as given, the others as the stages that read them were made."""
        path = self.path / "config.yaml"
        if path.exists() and self._book:
            given = {name: getattr(config, name) for name in ("name", "seed", *sections)}
            config = self.config().model_copy(update=given)
        write_atomically(path, to_yaml(config))

    def _refusal(self, stage: str, changes: list[str]) -> str:
        names = tuple(STAGES)
        lost = ", ".join(name for name in names[names.index(stage) :] if name in self._book)
        fork = ""
        if stage == "train" and all(line.startswith("training.") for line in changes):
            fork = f"\nAnother run may go on from a checkpoint of this one: training.fork.run={self.path}"
        return (
            f"{self.path}: the stage '{stage}' was made with another config (then -> now):\n"
            f"{indented(changes)}\n"
            f"Give this run another name (name=...), or add --redo to throw away and repeat: {lost}.{fork}"
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes from working on this run; the system lifts the lock if this one is killed."""
        with lock_file(self.path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.path}: another process is at work on this run. Wait for it, or give this run "
                    "another name (name=...)."
                ) from None
            yield

    @contextmanager
    def _clock(self, entry: dict[str, Any]) -> Iterator[None]:
        """Counts wall time into the entry, saved every two seconds so that a kill loses no more than that."""
        before, started, stop = entry["seconds"], time.monotonic(), threading.Event()

        def beat() -> None:
            while not stop.wait(HEARTBEAT):
                entry["seconds"] = before + time.monotonic() - started
                try:
                    self._write()
                except UserError:
                    return  # a full disk is the stage's to report

        ticker = threading.Thread(target=beat, name="tutti-clock", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            stop.set()
            ticker.join()
            entry["seconds"] = before + time.monotonic() - started

    def _write(self) -> None:
        with self._lock:
            write_atomically(self.path / "stages.json", json.dumps(self._book, indent=1) + "\n")

    @contextmanager
    def _full_disk(self, stage: str) -> Iterator[None]:
        with explain_full_disk(self.path, f"the stage '{stage}'"):
            yield


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not os.path.lexists(path):
        return {}
    book = read_json(path, finite=True, cure=BOOK_CURE)
    for stage, entry in book.items():
        for key, kinds in ENTRY.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise UserError(f"{path}: {shown(stage)}: {key} is {shown(value)}. {BOOK_CURE}")
    return book


def _present(inputs: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What a stage was made with, under the keys of today: those that are younger than its book have their
    defaults, as they had then. Values that are not valid any more are given as they are.

    The book lacks the keys that have no effect, of which others may demand a value: they are as `asked`.
    """
    try:
        return RunConfig.model_validate(_with_the_rest(inputs, asked)).sections(*asked)
    except ValidationError:
        return inputs


def _with_the_rest(inputs: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs`, with the keys that have no effect from `asked`, at any depth."""
    made = {**inputs, **{key: value for key, value in asked.items() if key in WITHOUT_EFFECT}}
    for key, value in made.items():
        other = asked.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            made[key] = _with_the_rest(value, other)
    return made


def with_effect(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that no result depends on, at any depth; as it looks after a trip through JSON."""
    kept = {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
    return {key: with_effect(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _hash(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]

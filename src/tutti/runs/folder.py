"""A run's folder and its manifest: which stages are finished, with which config, and how long they took.

The manifest is `stages.json`, replaced atomically. A stage whose config has not changed is kept if it is
finished and continued if it was interrupted. If its config has changed, that is an error unless the user adds
--redo, which does the stage again in any case; or, where only the last bits may differ (key_effects.py),
--allow-inexact, which goes on and is noted. Seconds add up over interruptions.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tutti.config.files import require_run
from tutti.config.run_config import RunConfig, load_run_config, to_yaml
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.distributed.world import launched_world_size, world
from tutti.key_effects import of_effect
from tutti.nested_dicts import changed_keys, indented
from tutti.plugin import Trust
from tutti.runs.terminal import print_line
from tutti.storage.files import (
    discard,
    exclusive_lock,
    explain_disk_errors,
    explain_full_disk,
    write_atomically,
    write_json,
)
from tutti.storage.reading import read_json, shown
from tutti.types import UserError

DEFAULT, OTHERS = "evaluation", "evaluations"
"""The folder of the evaluation that the report shows, and that of all others (`tutti.runs.evaluations`)."""
STAGES: dict[str, tuple[str, ...]] = {
    "record": ("dataset", "recording", "recording.json"),
    "train": (
        *("checkpoints", "records.jsonl", "tensorboard", "failures", "spikes"),
        *("first_batch.png", "first_batch.json", "init_from.json", "shapes.txt", "model.json"),
        *("tracking", "training_evaluations"),
        *("data.json", "data_content.json", "data_findings.json", "frame_cache.json", "probes", "replays"),
    ),
    "evaluate": (DEFAULT, OTHERS),
    "report": ("report.html", "summary.json"),
}
"""The stages in their order, each with what it makes in the run's folder."""

WORK = {
    "train": ("checkpoints", "records.jsonl", "failures"),
    "evaluate": (f"{DEFAULT}/policy", f"{DEFAULT}/open_loop.json"),
}
"""Of a stage's outputs those that cost work, where others are written before it begins."""

Redo = bool | Literal["if changed"]

ENTRY = {"finished": bool, "seconds": int | float, "inputs": dict}
"""What the manifest holds for each stage."""
FORMER_DEFAULTS = {"state": STATE, "action": ACTION}
MANIFEST = "stages.json"
MANIFEST_CURE = "Only Tutti writes this file; delete it to start again."
SAVE_SECONDS = 2.0
"""How often the time of a running stage is saved: a kill loses no more of it."""


class RunFolder:
    """The folder of a run, with the manifest of its stages."""

    def __init__(
        self,
        path: Path,
        *,
        redo: Redo = False,
        allow_inexact: bool = False,
        new: bool = True,
        trust_code: Trust = False,
    ) -> None:
        """`redo`: a stage begins again always, or if its config changed. `allow_inexact`: it goes on although
        keys have changed that may change the last bits. `new`: the folder may be made. `trust_code`: which
        classes that its config.yaml names may be imported.

        Raises: UserError, if the folder does not exist, cannot be made, or its manifest cannot be read.
        """
        self.path, self.redo, self.allow_inexact, self.trust_code = path, redo, allow_inexact, trust_code
        self._lock = threading.Lock()
        if not new:
            require_run(path)
        with explain_disk_errors(path, "the folder of a run"):
            path.mkdir(parents=True, exist_ok=True)
        self._manifest = _read_manifest(path / MANIFEST)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each stage so far, interrupted tries included."""
        return {name: round(entry["seconds"], 1) for name, entry in self._manifest.items()}

    @property
    def inexact(self) -> list[str]:
        """The keys that were changed between interruptions and may have changed the last bits."""
        return [line for entry in self._manifest.values() for line in entry.get("inexact", ())]

    def config(self) -> RunConfig:
        """The config that the run's stages were made with."""
        return load_run_config(self.path / "config.yaml", self.trust_code)

    def begin(self, stage: str, config: RunConfig, *sections: str) -> bool:
        """True if `stage`, which depends on these sections of `config`, has to run or to continue.

        Of several processes rank 0 decides, and writes.

        Raises: UserError, if the stage was started with other values and `redo` is not set, or
        several processes were started for a stage that runs on one.
        """
        require_one_process(stage)
        return world().on_rank_zero(lambda: self._begin(stage, config, sections))

    def _begin(self, stage: str, config: RunConfig, sections: tuple[str, ...]) -> bool:
        values = config.sections(*sections)
        entry = self._manifest.get(stage)
        before = _in_todays_keys(entry["inputs"], values) if entry else values
        changed = changed_keys(before, values)
        other, inexact = of_effect(changed, "another result"), of_effect(changed, "last bits")
        changes = other if self.allow_inexact else [*other, *inexact]
        if entry and changes and not self.redo:
            raise UserError(self._refusal(stage, changes, may_go_on=not other))
        if entry and not changes and self.redo is not True:
            done = entry["finished"]
            if inexact and done:
                print_line(f"{stage}: stays as it was made, whatever the last bits: {'; '.join(inexact[:3])}")
            elif changed:
                self._take_over(stage, config, sections, inexact, of_effect(changed, "none"))
            elif self.config().sections("logging") != config.sections("logging"):
                with self._writing(stage):
                    self._write_config(config, ())
            how = "done before in" if done else "was interrupted after"
            print_line(f"{stage}: {how} {entry['seconds']:.0f} s, {'kept' if done else 'continues'}")
            return not done
        if entry:
            why = f"the config has changed ({'; '.join(changes[:3])})" if changes else "--redo"
            print_line(f"{stage}: starting again: {why}")
        with self._writing(stage):
            self._delete_from(stage)  # results of another config must not be mistaken for this stage's
            self._write_config(config, sections)
            self._manifest[stage] = {"finished": False, "seconds": 0.0, "inputs": values}
            self._save()
        return True

    def _take_over(
        self, stage: str, config: RunConfig, sections: tuple[str, ...], inexact: list[str], free: list[str]
    ) -> None:
        """Goes on with the present values of these keys, and says so."""
        entry = self._manifest[stage]
        if free:
            print_line(f"{stage}: taken over, since no result depends on it: {'; '.join(free[:3])}")
        if inexact:
            print_line(f"{stage}: taken over and noted, the last bits may differ: {'; '.join(inexact[:3])}")
        entry["inputs"] = config.sections(*sections)
        if inexact:
            entry["inexact"] = [*entry.get("inexact", ()), *inexact]
        with self._writing(stage):
            self._write_config(config, sections)
            self._save()

    @contextmanager
    def stage(self, stage: str, *, goes_on: bool = False) -> Iterator[None]:
        """Times the block, and marks the stage as finished when the block succeeds. `goes_on`: the time is
        added to that of a finished stage, which the block extends.

        A full disk becomes a UserError. A stage that fails with a UserError before it has made anything is
        forgotten: its config was wrong, and the corrected one must not be refused as another. Of several
        processes only rank 0 writes the manifest.
        """
        if not world().first:
            yield
            return
        entry = self._manifest.setdefault(stage, {"finished": False, "seconds": 0.0, "inputs": {}})
        if entry["finished"]:  # it runs once more
            entry.update(finished=False, seconds=entry["seconds"] if goes_on else 0.0)
        with self._writing(stage):
            self._save()
            try:
                with self._timed(entry):
                    yield
            except UserError:
                outputs = WORK.get(stage, STAGES[stage])
                if not any((self.path / name).exists() for name in outputs):
                    del self._manifest[stage]
                    self._save()
                raise
            entry["finished"] = True
            self._save()

    def require(self, stage: str, cure: str) -> None:
        """Raises: UserError with the cure, if `stage` is not finished."""
        if not self._manifest.get(stage, {}).get("finished"):
            state = "was interrupted" if stage in self._manifest else "has not run"
            raise UserError(f"{self.path}: the stage '{stage}' {state}. {cure}")

    def keep_config(self, config: RunConfig, section: str) -> None:
        """Puts this section into config.yaml."""
        with self._writing(section):
            self._write_config(config, (section,))

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of the run atomically, on rank 0 only."""
        if world().first:
            write_json(self.path / name, value)

    def _delete_from(self, stage: str) -> None:
        """Deletes the outputs of this stage and all later ones; after a kill none of them is finished."""
        for name in _stages_from(stage):
            self._manifest.get(name, {})["finished"] = False
        self._save()
        for name in _stages_from(stage):
            for output in STAGES[name]:
                discard(self.path / output)
            self._manifest.pop(name, None)
        self._save()

    def _write_config(self, config: RunConfig, sections: tuple[str, ...]) -> None:
        """Writes config.yaml: these sections as given, the others as the stages that read them were made."""
        path = self.path / "config.yaml"
        if path.exists() and self._manifest:
            given = {name: getattr(config, name) for name in ("name", "seed", "logging", *sections)}
            config = self.config().model_copy(update=given)
        write_atomically(path, to_yaml(config))

    def _refusal(self, stage: str, changes: list[str], *, may_go_on: bool) -> str:
        lost = ", ".join(name for name in _stages_from(stage) if name in self._manifest)
        more = ""
        if may_go_on:
            more = "\nThese change how sums are rounded, no more: --allow-inexact goes on from where it is."
        elif stage == "train" and all(line.startswith("training.") for line in changes):
            more = f"\nAnother run may go on from a checkpoint of this one: training.fork.run={self.path}"
        return (
            f"{self.path}: the stage '{stage}' was made with another config (saved -> now):\n"
            f"{indented(changes)}\n"
            f"Give this run another name (name=...), or add --redo to throw away and repeat: {lost}.{more}"
        )

    @contextmanager
    def _writing(self, stage: str) -> Iterator[None]:
        """Locks the run for this process, and explains a full disk."""
        busy = (
            f"{self.path}: another process is working on this run. Wait for it, or give this run another "
            "name (name=...)."
        )
        with exclusive_lock(self.path, busy), explain_full_disk(self.path, f"the stage '{stage}'"):
            yield

    @contextmanager
    def _timed(self, entry: dict[str, Any]) -> Iterator[None]:
        """Adds the wall time of the block to the entry, and saves it every SAVE_SECONDS."""
        before, started, stop = entry["seconds"], time.monotonic(), threading.Event()

        def save_elapsed() -> None:
            while not stop.wait(SAVE_SECONDS):
                entry["seconds"] = before + time.monotonic() - started
                try:
                    self._save()
                except UserError:
                    return  # the stage itself will report the full disk

        ticker = threading.Thread(target=save_elapsed, name="tutti-clock", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            stop.set()
            ticker.join()
            entry["seconds"] = before + time.monotonic() - started

    def _save(self) -> None:
        with self._lock:
            write_json(self.path / MANIFEST, self._manifest)


def require_one_process(stage: str) -> None:
    """Raises: UserError, if several processes were started for a stage that runs on one."""
    if launched_world_size() > 1 and world().ranks.count == 1:
        raise UserError(
            f"{launched_world_size()} processes were started, but the stage '{stage}' runs on one: only "
            "`tutti train` is for torchrun. Start it by itself."
        )


def _stages_from(stage: str) -> tuple[str, ...]:
    names = tuple(STAGES)
    return names[names.index(stage) :]


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not os.path.lexists(path):
        return {}
    manifest = read_json(path, finite=True, cure=MANIFEST_CURE)
    for stage, entry in manifest.items():
        for key, kinds in ENTRY.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise UserError(f"{path}: {shown(stage)}: {key} is {shown(value)}. {MANIFEST_CURE}")
    return manifest


def _in_todays_keys(inputs: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a stage with the keys of today, those of `now`: a key younger than its manifest has its
    default, as it had then. Inputs that are no longer valid are returned as they are.

    Before a source had a `format`, every data set was LeRobot's, where `auto` is what the defaults of state
    and action were then; so those are `auto` where they are now.
    """
    try:
        before = RunConfig.model_validate(inputs).sections(*now)
    except ValidationError:
        return inputs
    sources = (values.get("data", {}).get("sources", ()) for values in (inputs, before, now))
    for was, old, new in zip(*sources, strict=False):
        for key, usual in FORMER_DEFAULTS.items():
            if "format" not in was and old[key] == usual and new[key] == "auto":
                old[key] = "auto"
    return before

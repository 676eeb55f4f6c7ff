"""The folder of one evaluation: of which policy it is, so that it is extended and never mixed with another.

FOLDER/
  evaluation.json           policy, simulator, config, and whether it is finished
  results.json              scores and verdicts        open_loop.json   errors on held-out episodes
  against.json              the difference to a baseline
  policy/TASK/SEED.json     a record of each rollout, of the controls likewise        videos/   some of them
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from tutti.errors import UserError
from tutti.evaluation.closed_loop.rollouts import CONDITIONS, Rollout
from tutti.evaluation.config import EvaluationConfig
from tutti.nested_dicts import changed_keys, indented
from tutti.plugin import Origin, Trust
from tutti.storage.files import (
    discard,
    exclusive_lock,
    explain_disk_errors,
    explain_full_disk,
    write_json,
)
from tutti.storage.reading import read_json

MANIFEST, RESULTS, OPEN_LOOP, VIDEOS = "evaluation.json", "results.json", "open_loop.json", "videos"
AGAINST = "against.json"
OWN = (*CONDITIONS, VIDEOS, RESULTS, OPEN_LOOP, AGAINST, MANIFEST)
"""What an evaluation makes in its folder, in the order in which it is deleted."""
SAME_ROLLOUTS = {
    *("tasks", "episodes", "workers", "videos_per_task", "checkpoint", "weights"),
    *(f"controls.{name}" for name in ("expert", "noop", "no_image", "wrong_instruction", "other_wording")),
    *("controls.wrong_instruction_tasks", "sentences"),
}
"""Keys that change which rollouts are played, never what happens in one; of the policy its own files tell. A
rollout that was told another sentence is played again."""
NO_EFFECT = {"workers"}
SECTION = "evaluation"
"""Of a run's config."""
Redo = bool | Literal["if changed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPolicy:
    """A checkpoint and which of its weights; `files` is a hash of its checksums, `fingerprint` of all that it
    does, on which the versions of torch and Tutti count too."""

    checkpoint: str
    weights: str
    files: str
    fingerprint: str

    @property
    def name(self) -> str:
        """As in "step-000200, ema"."""
        return f"{self.checkpoint}, {self.weights}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    policy: JudgedPolicy
    environment: str
    config: dict[str, Any]
    finished: bool


class EvaluationFolder:
    """One evaluation on disk. `other` tells how to give another one a folder of its own, as "--name NAME"."""

    def __init__(self, path: Path, other: str = "--name NAME") -> None:
        """Raises: UserError, if the folder holds something else, or evaluation.json cannot be read."""
        self.path, self.other = path, other
        self.extended = False
        self._manifest = self._read()
        if self._manifest is None and path.is_dir():
            foreign = [one.name for one in path.iterdir() if one.name not in OWN and one.name[0] != "."]
            if foreign:
                raise UserError(
                    f"{path}: is no folder of an evaluation: it holds {', '.join(sorted(foreign)[:3])}. Name "
                    "an empty or a new one."
                )

    def config(self, trust: Trust = False) -> EvaluationConfig | None:
        """The section `evaluation` that it was last made with; None if it has not begun. A suite of the
        user's own is imported only where `trust` allows it.

        Raises: UserError, if it is of another version of Tutti.
        """
        if self._manifest is None:
            return None
        try:
            origin = Origin(self.path / MANIFEST, trust)
            return EvaluationConfig.model_validate(self._manifest.config, context=origin)
        except ValidationError as error:
            raise self._unusable(error) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process, and makes it.

        Raises: UserError, if another process holds it, or it cannot be written.
        """
        busy = (
            f"{self.path}: another process is working on this evaluation. Wait for it, or use {self.other}."
        )
        with explain_disk_errors(self.path, "the folder of an evaluation"):
            self.path.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.path, busy), explain_full_disk(self.path, "the evaluation"):
            self._manifest = self._read()  # another process may just have ended
            yield

    def begin(
        self, config: EvaluationConfig, policy: JudgedPolicy, environment: str, redo: Redo = False
    ) -> tuple[bool, str]:
        """Whether there is something to do, and a line that says what. More or fewer rollouts extend it.

        `environment` is the fingerprint of the suite. `redo`: everything is done again, always or if it
        cannot be extended.

        Raises: UserError, naming the changes, if its rollouts are of another policy, simulator or protocol.
        """
        before, values = self._manifest, config.model_dump(mode="json")
        made = before is not None and any((self.path / name).exists() for name in (*CONDITIONS, OPEN_LOOP))
        now = _Manifest(policy=policy, environment=environment, config=values, finished=False)
        self.extended = False
        if before is None or not made:
            for name in (RESULTS, OPEN_LOOP, AGAINST):  # of a version without evaluation.json
                discard(self.path / name)
            self._write(now)
            return True, f"{policy.name}, into {self.path}"
        changes = changed_keys(_in_todays_keys(before.config), values, SECTION)
        done = before.finished and any((self.path / name).exists() for name in (RESULTS, OPEN_LOOP))
        todo = not done or any(_key(line) not in NO_EFFECT for line in changes)
        versions_alone = (policy.files, policy.weights) == (before.policy.files, before.policy.weights)
        wrong = [line for line in changes if not _keys(line) & SAME_ROLLOUTS]
        if before.policy.fingerprint != policy.fingerprint:
            how = " with other files" if before.policy.name == policy.name else ""
            other = f"{before.policy.name} -> {policy.name}{how}"
            wrong.insert(0, f"policy: {'other versions of torch or Tutti' if versions_alone else other}")
        if before.environment != environment:
            wrong.append(f"simulator: {before.environment} -> {environment}")
        kept = f"done before, kept: {self.path}"
        if wrong and not changes and not todo and versions_alone and not redo:
            return False, f"{kept} (differs now: {'; '.join(wrong)})"
        if redo is True or (wrong and redo):
            for name in OWN:
                discard(self.path / name)
            self._manifest = None
            self._write(now)
            return True, f"starting again: {'; '.join(wrong[:3]) or '--redo'}"
        if wrong:
            own = self.other.replace("NAME", _suggested(wrong[0], before.policy, policy))
            raise UserError(
                f"{self.path}: these rollouts are of another evaluation (saved -> now):\n{indented(wrong)}\n"
                f"Keep both: give this one its own folder ({own}), or add --redo to play all of it again."
            )
        self._write(replace(now, finished=not todo))
        if not todo:
            return False, kept
        self.extended = True
        discard(self.path / AGAINST)  # of the results before
        extended = [line for line in changes if _key(line) not in NO_EFFECT]
        return True, f"goes on: {'; '.join(extended) or 'it was interrupted'}"

    def write(self, name: str, value: Any) -> None:
        """Writes a file of the evaluation atomically."""
        write_json(self.path / name, value)

    def finish(self) -> None:
        """Notes that it is finished."""
        assert self._manifest is not None
        self._write(replace(self._manifest, finished=True))

    def not_counted(self, rollouts: tuple[Rollout, ...]) -> int:
        """How many records lie here that are not among `rollouts`: of starts or tasks asked for before."""
        counted = {(one.condition, one.task, str(one.seed)) for one in rollouts}
        there = {path.relative_to(self.path).with_suffix("").parts for path in self._records()}
        return len(there - counted)

    def _records(self) -> list[Path]:
        return [path for name in CONDITIONS for path in (self.path / name).glob("*/*.json")]

    def _read(self) -> _Manifest | None:
        path = self.path / MANIFEST
        if not os.path.lexists(path):
            return None
        values = read_json(path, cure=f"Delete {self.path} to evaluate anew.")
        try:
            return TypeAdapter(_Manifest).validate_python(values)
        except ValidationError as error:
            raise self._unusable(error) from error

    def _write(self, manifest: _Manifest) -> None:
        if manifest != self._manifest:
            self._manifest = manifest
            self.write(MANIFEST, asdict(manifest))

    def _unusable(self, error: ValidationError) -> UserError:
        first = error.errors(include_url=False, include_input=False)[0]
        where = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return UserError(
            f"{self.path / MANIFEST}: cannot be used ({where}). Delete {self.path} to evaluate anew."
        )


def _in_todays_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A key younger than its evaluation has its default, as it had then."""
    try:
        return EvaluationConfig.model_validate(config).model_dump(mode="json")
    except ValidationError:
        return config


def _key(change: str) -> str:
    """The key of a line of `changed_keys`, inside its section."""
    return change.partition(": ")[0].removeprefix(f"{SECTION}.")


def _keys(change: str) -> set[str]:
    """The key of a line, and the key that it lies below."""
    return {_key(change), _key(change).partition(".")[0]}


def _suggested(change: str, before: JudgedPolicy, now: JudgedPolicy) -> str:
    """A name that says what is different."""
    if _key(change) == "policy":
        name = now.checkpoint if now.checkpoint != before.checkpoint else now.weights
    else:
        name = f"{_key(change)}-{change.rpartition(' -> ')[2]}"
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)[:40].strip("-.") or "other"

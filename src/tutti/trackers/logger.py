"""The socket of a tracker: what it is told of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

FOLDER = "tracking"
"""In the run's folder: what trackers keep of their own, with what they print."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a tracker begins with. `step` updates were made before; `config` is the run's, as plain values.

    `trains`: what was told of later steps does not count any more. False where results of a checkpoint are
    added to those of a training, which may have gone on from there.
    """

    run: Path
    name: str
    step: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = True

    def identity(self, kind: str, new: str = "") -> str:
        """What the run is called by a service of this kind, kept in the run's folder, so that a resumed run
        goes on under it; where there is none yet `new`, or a random one."""
        path = self.run / FOLDER / f"{kind}.id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new or uuid4().hex[:12], encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()


class Logger(ABC):
    """A tracker of the user's own is a subclass, built as `Class(start, **options)` and closed at the end.

    It lives in a process of its own: what it draws, raises or waits for never reaches the training. An
    exception counts as a failure of that one call; after three in a row it is switched off.
    """

    @abstractmethod
    def scalars(self, step: int, kind: str, values: Mapping[str, float], seconds: float) -> None:
        """The values after `step` updates; `kind` is train, validation, diagnostics, event or evaluation, and
        `seconds` the clock's time since 1970."""

    def text(self, name: str, text: str, step: int) -> None:  # noqa: B027
        """A text, such as the config."""

    def picture(self, name: str, path: Path, step: int) -> None:  # noqa: B027
        """A PNG file, such as the first batch."""

    def video(self, name: str, path: Path, step: int) -> None:  # noqa: B027
        """An MP4 file of a rollout."""

    def rewind(self, step: int) -> None:  # noqa: B027
        """The run goes on from `step` again: what was told of later steps does not count any more."""

    def close(self) -> None:  # noqa: B027
        """Nothing more will come."""

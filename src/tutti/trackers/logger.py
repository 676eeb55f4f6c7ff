"""The socket of a tracker: what it is told of a run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from tutti.storage.files import write_atomically

FOLDER = "tracking"
"""In the run's folder: what trackers keep of their own, with what they print."""


def _new() -> str:
    """The time comes first: of several runs of a name the last one has the last of these."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:6]}"


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

    def identity(self, kind: str, new: Callable[[], str] = _new, known: Callable[[str], bool] = bool) -> str:
        """What the run is called by a service of this kind, kept in the run's folder, so that a resumed run
        goes on under it; what `new` gives where there is none yet (an empty text), or one not `known`."""
        path = self.run / FOLDER / f"{kind}.id"
        found = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if not known(found):
            write_atomically(path, found := new())
        return found


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

"""Instructions for each Meta-World task: sentences to train on, and others held out for evaluation.

Meta-World has no language; the sentences in instructions.toml are ours. A held-out sentence is new as a
whole, but every word of it occurs in the training sentences of the same task: a model trained from scratch
cannot know a word that it has never read.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

from tutti.errors import UserError
from tutti.suites.environment import Split

SENTENCES = Path(__file__).with_suffix(".toml")


def instructions(task: str, split: Split = "train") -> tuple[str, ...]:
    """The sentences of a task: at least 8 to train on, at least 4 held out. None occurs twice anywhere.

    Raises:
        UserError: there are no sentences for this task.
    """
    sentences = _read()[split]
    if task not in sentences:
        raise UserError(
            f"tasks: there are no instructions for {task!r}. Known: {', '.join(sentences)}. "
            f"Add its sentences to {SENTENCES.name} of tutti.suites.metaworld."
        )
    return tuple(sentences[task])


@functools.cache
def _read() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads(SENTENCES.read_text(encoding="utf-8"))

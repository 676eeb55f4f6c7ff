"""Whether data sets are still those that a run was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tutti.data.content import Content
from tutti.data.episodes import EpisodeStore
from tutti.errors import UserError
from tutti.storage.reading import read_json


def check_unchanged(stores: Sequence[EpisodeStore], kept: Path) -> None:
    """Refuses data sets that are no longer those of a run; `kept` is its file of digests, if it has one.

    Raises: UserError naming what differs, and in which episodes.
    """
    if not kept.exists():
        return
    cure = "  cure: put the former data back, or train anew (--redo, or another name=...)."
    try:
        contents = [Content.from_dict(source) for source in read_json(kept)["sources"]]
    except (KeyError, TypeError, ValueError):
        problem = "is damaged, or of another version of Tutti: the data of this run cannot be compared"
        raise UserError(f"{kept} {problem}.\n{cure}") from None
    for store, before in zip(stores, contents, strict=False):
        if lines := store.content.differences(before):
            problem = f"is no longer the data set that this run was trained on: {'; '.join(lines)}"
            raise UserError(f"{store.name} {problem}.\n{cure}")

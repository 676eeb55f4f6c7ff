"""RLDS as one of the formats: how it is recognised, and how a source opens it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tutti.data.cache import CacheConfig
from tutti.data.episodes import EpisodeStore
from tutti.data.formats.chosen import Chosen
from tutti.data.formats.mapped import MappedStore
from tutti.data.formats.rlds.info import find_version, read_info, version_folder
from tutti.data.formats.rlds.presets import find_preset
from tutti.data.formats.rlds.reader import RldsReader
from tutti.data.formats.wanted import Found, Wanted
from tutti.errors import UserError

NAME = "rlds"


def recognises(path: Path) -> str:
    """The file that makes a folder an RLDS set; "" where it is none."""
    folder = find_version(path)
    return str((folder / "features.json").relative_to(path)) if folder else ""


def rate(path: Path) -> float | None:
    """Steps a second, by the preset of the set's name; no set stores it."""
    preset = find_preset(read_info(version_folder(path)).name)
    return preset.fps if preset else None


def look(path: Path) -> Found:
    """What is in it: its features, and the headers of its records."""
    return Found.by(_read(path))


def open_source(path: Path, wanted: Wanted, chosen: Sequence[Chosen]) -> EpisodeStore:
    """The store of what a source says."""
    return MappedStore(_read(path, wanted.split), wanted, chosen, NAME)


def _read(path: Path, split: str | None = None) -> RldsReader:
    try:
        cache = CacheConfig().home()
    except UserError:  # no home folder
        cache = None
    return RldsReader(path, split=split, cache=cache)

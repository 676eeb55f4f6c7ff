"""RLDS as one of the formats: how it is recognised, and which rate and reader it has."""

from __future__ import annotations

from pathlib import Path

from tutti.data import formats
from tutti.data.cache import CacheConfig
from tutti.data.formats.interface import EpisodeReader
from tutti.data.formats.rlds.info import find_version, read_info, version_folder
from tutti.data.formats.rlds.presets import find_preset
from tutti.errors import UserError


def recognises(path: Path) -> str:
    """The file that makes a folder an RLDS set; "" where it is none."""
    folder = find_version(path)
    return str((folder / "features.json").relative_to(path)) if folder else ""


def rate(path: Path) -> float | None:
    """Steps a second, by the preset of the set's name; no set stores it."""
    preset = find_preset(read_info(version_folder(path)).name)
    return preset.fps if preset else None


def read(path: Path, split: str | None) -> EpisodeReader:
    """The reader, whose protobuf is imported by those who have such a set."""
    try:
        cache = CacheConfig().home()
    except UserError:  # no home folder
        cache = None
    return formats.RldsReader(path, split=split, cache=cache)

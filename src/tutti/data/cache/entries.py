"""What lies in the folder of caches: decoded pictures, features of towers, fetched data sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tutti.errors import UserError
from tutti.storage.files import remove_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One cache: its name, the path below the folder of caches; its bytes; when it was last used, in seconds
    since 1970."""

    name: str
    size: int
    used: float


def entries(home: Path) -> list[Entry]:
    """All caches, the largest first: the highest folders that hold files."""
    found = [
        Entry(name=str(folder.relative_to(home)), size=_size(folder), used=folder.stat().st_mtime)
        for folder in _folders(home)
    ]
    return sorted(found, key=lambda entry: (-entry.size, entry.name))


def evict(home: Path, name: str) -> None:
    """Deletes one cache, which is built again when it is needed. Raises: UserError if there is none."""
    if name not in (names := [entry.name for entry in entries(home)]):
        raise UserError(
            f"{home} has no cache {name!r}.\n  expected: {', '.join(names[:20]) or 'none: it is empty'}\n"
            "  cure: tutti data cache lists them"
        )
    remove_folder(home / name)


def _folders(home: Path) -> Iterator[Path]:
    for child in sorted(home.iterdir()) if home.is_dir() else ():
        if child.is_dir() and not child.is_symlink():
            yield from [child] if any(one.is_file() for one in child.iterdir()) else _folders(child)


def _size(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.rglob("*") if one.is_file() and not one.is_symlink())

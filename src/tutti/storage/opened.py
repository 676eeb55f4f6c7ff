"""Opened: some files that are kept open, those that were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
File = TypeVar("File")


class Opened(Generic[Key, File]):
    """What `opens` gives of a key, once: the `most` that were used last are kept, the others are closed."""

    def __init__(
        self, opens: Callable[[Key], File], most: int, closes: Callable[[File], object] = lambda _: None
    ) -> None:
        self._opens, self._most, self._closes = opens, most, closes
        self._kept: OrderedDict[Key, File] = OrderedDict()

    def __getitem__(self, key: Key) -> File:
        if key not in self._kept:
            while len(self._kept) >= self._most:
                self._closes(self._kept.popitem(last=False)[1])
            self._kept[key] = self._opens(key)
        self._kept.move_to_end(key)
        return self._kept[key]

    def drop(self, key: Key) -> None:
        """Closes one, whose next use opens it again."""
        if (file := self._kept.pop(key, None)) is not None:
            self._closes(file)

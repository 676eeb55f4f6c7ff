"""Reads picture-text pairs: each is an episode of one step with one view and a text, without a robot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from jaxtyping import Int64, UInt8

from tutti.data.formats.errors import data_error
from tutti.data.formats.interface import EpisodeReader, Feature, Roles
from tutti.data.formats.picture_text.lines import LinesTable
from tutti.data.formats.picture_text.parquet import ParquetTable
from tutti.data.formats.picture_text.paths import KINDS, find_tables
from tutti.data.formats.picture_text.table import PairTable
from tutti.data.formats.picture_text.tars import TarTable
from tutti.data.formats.pictures import as_rgb
from tutti.storage.reading import shown

VIEWED = 256
"""Edge in pixels of the squares that pictures of any size are looked at as. Training takes their own size."""
_PICTURES = ("image", "picture", "img", "file_name", "image_path", "path", "jpg")
_TEXTS = ("text", "caption", "sentence", "description", "json.caption", "json.text")
_SHOWN = 12


class PairsReader(EpisodeReader):
    """JSON lines beside their pictures, Parquet files, or tar shards; a file, or a folder of them.

    Features are the columns of pictures and of texts. Pictures are 8-bit PNG, JPEG or WEBP of any size and
    colours (`as_rgb`); where a step's picture is asked for it is given in its own size.

    Raises: UserError as EpisodeReader says.
    """

    is_pairs = True
    fps = None
    embodiment = "none"

    def __init__(self, path: Path) -> None:
        self.name, files = str(path), find_tables(path)
        if not files:
            raise data_error(f"{path} has no file *{' or *'.join(KINDS)}.", cure="name one, or its folder.")
        kind = (LinesTable, ParquetTable, TarTable)[KINDS.index(files[0].suffix)]
        self._table: PairTable = kind(files)
        table = self._table
        if not table.count:
            raise data_error(
                f"{path}: there is no pair in it.", found=f"{len(files)} files *{files[0].suffix}"
            )
        self.lengths = np.ones(table.count, np.int64)
        picture, text = Feature(kind="picture", shape=(VIEWED, VIEWED)), Feature(kind="text")
        self.features = dict.fromkeys(table.pictures, picture) | dict.fromkeys(table.texts, text)
        line = f"passed over, neither pictures nor texts: {', '.join(table.passed_over[:_SHOWN])}"
        self.remarks = (f"{self.name}: {line}",) * bool(table.passed_over)

    def roles(self) -> Roles:
        """One view and the text, by usual names, else the first."""
        reasons: dict[str, str] = {}
        chosen: dict[str, str | None] = {}
        known = {"views": (_PICTURES, self._table.pictures), "text": (_TEXTS, self._table.texts)}
        for role, (usual, keys) in known.items():
            chosen[role] = next((key for key in (*usual, *keys) if key in keys), None)
            if len(keys) > 1:
                reasons[role] = f"one of {', '.join(keys[:_SHOWN])}"
        views = (chosen["views"],) if chosen["views"] else ()
        return Roles(views=views, text=chosen["text"], reasons=reasons)

    def numbers(self, key: str, episode: int) -> NoReturn:
        """There are none. Raises: KeyError."""
        raise KeyError(key)

    def texts(self, key: str, episode: int) -> Sequence[str]:
        """The one text."""
        text = self._table.text(key, episode)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._table.wrong(episode, f"{shown(key)} is no text", found=error) from None
        return (text,)

    def pictures(
        self, key: str, episode: int, steps: Int64[np.ndarray, " k"]
    ) -> UInt8[np.ndarray, "k h w 3"]:
        """The picture in its own size, upright and RGB."""
        content = self._table.picture(key, episode)
        try:
            picture = as_rgb(content)
        except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead to
            why = shown(str(error), 300, quoted=False)
            raise self._table.wrong(episode, f"the picture {shown(key)} cannot be read: {why}") from error
        return np.repeat(picture[None], len(steps), axis=0)

    def another_reader(self) -> PairsReader | None:
        """This one, where the table keeps nothing of what it has read."""
        return self if self._table.for_threads else None

    def picture_files(self, key: str, episode: int) -> Sequence[Path]:
        """The file of the picture, or the shard that it lies in."""
        return (self._table.picture_file(key, episode),)

    def picture_digest(self, key: str, episode: int) -> int:
        """Of the stored picture's length, beginning and end."""
        return self._table.sampled(key, episode)

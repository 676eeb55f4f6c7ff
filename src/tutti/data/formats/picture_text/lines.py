"""A folder of pictures with a table of JSON lines: paths of pictures, and texts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

from tutti.data.formats.errors import data_error
from tutti.data.formats.picture_text.table import MAX_COLUMNS, SUFFIXES, StretchTable
from tutti.errors import UserError
from tutti.storage.reading import parse_json, read_lines, shown


class LinesTable(StretchTable):
    """The rows of `files`, one JSON object a line; blank lines are none. A column is a key whose values are
    texts: of pictures, where the first that is not empty ends as names of pictures do. Paths are those from
    the file's own folder, and stay inside of it.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, columns = files, dict[str, list[str]]()
        self._places: list[tuple[int, int]] = []
        self._damaged: dict[int, str] = {}
        others: dict[str, array[int]] = {}
        for number, path in enumerate(files):
            for line, content in enumerate(read_lines(path, links=True), 1):
                if content is None or content.strip():
                    row = len(self._places)
                    self._places.append((number, line))
                    for key, value in self._parsed(row, content).items():
                        if isinstance(value, str):
                            column = columns.setdefault(key, [])
                            column += [""] * (row - len(column)) + [value]
                        elif value is not None:
                            others.setdefault(key, array("q")).append(row)
                    if len(columns) + len(others) > MAX_COLUMNS:
                        raise data_error(f"{self.where(row)}: more than {MAX_COLUMNS} different keys.")
        for key in others.keys() & columns.keys():
            why = f"{shown(key)} is no text, as in other lines"
            self._damaged = dict.fromkeys(others[key], why) | self._damaged
        self.count = len(self._places)
        self._columns = columns
        first = {key: next((one for one in column if one), "") for key, column in columns.items()}
        self.pictures = tuple(key for key, one in first.items() if one.lower().endswith(SUFFIXES))
        self.texts = tuple(key for key in columns if key not in self.pictures)
        self.passed_over = tuple(key for key in others if key not in columns)

    def _parsed(self, row: int, content: str | None) -> dict[str, object]:
        try:
            if content is None:
                raise UserError("it is too long, or no UTF-8")
            return parse_json(content, self.where(row))
        except UserError as error:
            self._damaged[row] = f"the line cannot be read: {error}"
            return {}

    def where(self, row: int) -> str:
        """The file and the line."""
        number, line = self._places[row]
        return f"{self._files[number]}, line {line}"

    def text(self, key: str, row: int) -> str:
        """The value of a key, "" where it is missing or null."""
        if row in self._damaged:
            raise self.wrong(row, self._damaged[row])
        column = self._columns[key]
        return column[row] if row < len(column) else ""

    def stretch(self, key: str, row: int) -> tuple[Path, int, int | None]:
        """The whole file that the line names."""
        folder = self._files[self._places[row][0]].parent
        return self.beside(folder, key, row, self.text(key, row))

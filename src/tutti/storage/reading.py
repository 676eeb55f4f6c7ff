"""Reads JSON and YAML files that anybody may have written, within bounds; an error names the file."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

import yaml
from pydantic import ValidationError

from tutti.errors import UserError

MAX_BYTES = 64 * 2**20
"""A larger JSON or text file is refused before it is read."""
MAX_VALUES = 1_000_000
"""Values in a JSON file: a parsed one takes some 60 bytes, where its text may take two."""
MAX_SIZE = sys.maxsize
"""No bound: of a file that is read piece by piece."""
YAML_BYTES, YAML_NODES, YAML_DEPTH = 2**19, 20_000, 50
"""Bounds of a YAML text; a node counts as often as aliases repeat it."""
LINES_BYTES, LINE_BYTES = 2**30, 2**20
"""Bounds of a file of JSON lines, and of a line in it."""
SHOWN = 60
T = TypeVar("T")
_ORDINARY_FLOAT = r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?"


def open_plain(path: Path, most: int = MAX_SIZE, cure: str = "", inside: Path | None = None) -> BinaryIO:
    """A plain file of at most `most` bytes, open for reading.

    With `inside`, a link in its place may not lead out of that folder. Raises: UserError as `read_bytes`.
    """
    real, flags = path, os.O_RDONLY | os.O_NONBLOCK
    if inside is not None:
        real, flags = Path(os.path.realpath(path)), flags | os.O_NOFOLLOW
        if not real.is_relative_to(os.path.realpath(inside)):
            found = f"expected a file of this folder, found a link to {real}"
            raise _wrong(path, found, f"Put a copy in its place. {cure}")
    try:
        status = real.stat()
        # Not blocking, and looked at once more: between the look and the opening a pipe could take its place.
        if stat.S_ISREG(status.st_mode):
            handle = os.open(real, flags)
            status = os.fstat(handle)
            if stat.S_ISREG(status.st_mode) and status.st_size <= most:
                return os.fdopen(handle, "rb")
            os.close(handle)
    except FileNotFoundError:
        raise _wrong(path, "missing", cure) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, cure) from error
    if stat.S_ISREG(status.st_mode):
        raise _too_large(path, status.st_size, most, cure)
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    found = kinds.get(stat.S_IFMT(status.st_mode), "a device")
    raise _wrong(path, f"expected a plain file, found {found}", cure)


def read_bytes(path: Path, most: int = MAX_BYTES, cure: str = "", inside: Path | None = None) -> bytes:
    """The content of a plain file. A FIFO or a device, which could block for ever, is not opened.

    Raises: UserError, naming the file, if it is missing, no plain file, larger than `most`, unreadable, or
    leads out of the folder `inside`.
    """
    with open_plain(path, most, cure, inside) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise _unreadable(path, error, cure) from error
    if len(content) > most:  # such as /proc/kcore, whose size says nothing
        raise _too_large(path, len(content), most, cure)
    return content


def read_text(path: Path, most: int = MAX_BYTES, cure: str = "", inside: Path | None = None) -> str:
    """The same as text. Raises: UserError as `read_bytes`, or if it is not UTF-8."""
    return decoded(read_bytes(path, most, cure, inside), path, cure)


def decoded(content: bytes, path: Path, cure: str = "") -> str:
    """The text in the bytes of a file. Raises: UserError if it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(path, f"not UTF-8 text ({error.reason} at byte {error.start})", cure) from None


def read_json(path: Path, *, finite: bool = False, cure: str = "", links: bool = False) -> dict[str, Any]:
    """The object in a JSON file; with `finite`, NaN and infinity are refused.

    Only with `links` may it be a link that leads out of its folder, as in a cache of data sets.

    Raises: UserError, naming the file, for a missing, damaged, oversized or foreign one; `cure` ends it.
    """
    text = read_text(path, cure=cure, inside=None if links else path.parent)
    return parse_json(text, path, finite=finite, cure=cure)


def read_valid(path: Path, validate: Callable[[Any], T], cure: str = "") -> T:
    """What a JSON file says, as pydantic's `validate` gives it.

    Raises: UserError as `read_json`, or naming the key whose value is of another type.
    """
    values = read_json(path, cure=cure)
    try:
        return validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _wrong(path, f"{shown(where, quoted=False)}: {first['msg']}", cure) from None


def parse_json(text: str, source: Path | str, *, finite: bool = False, cure: str = "") -> dict[str, Any]:
    """The object of a JSON text; `source` is named in errors. Raises: UserError as `read_json`."""
    value = parse_value(text, source, finite=finite, cure=cure)
    if not isinstance(value, dict):
        raise _wrong(source, f"expected an object, found {shown(value)}", cure)
    return value


def parse_value(text: str, source: Path | str, *, finite: bool = False, cure: str = "") -> Any:
    """The value of a JSON text, whatever it is. Raises: UserError as `read_json`."""
    if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        raise _wrong(source, f"more than {MAX_VALUES:,} values", cure)
    numbers: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_once, **numbers)
    except RecursionError:
        raise _wrong(source, "nested too deeply", cure) from None
    except ValueError as error:
        raise _wrong(source, f"not valid JSON ({error})", cure) from None


def read_lines(path: Path, *, links: bool = False) -> Iterator[str | None]:
    """The lines of a file of JSON lines one by one; None for one that is too long or not UTF-8.

    Raises: UserError as `read_bytes`, unless `links` also for a link that leads out of its folder.
    """
    with open_plain(path, LINES_BYTES, inside=None if links else path.parent) as file:
        while line := file.readline(LINE_BYTES):
            whole = len(line) < LINE_BYTES or line.endswith(b"\n")
            while len(line) == LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(LINE_BYTES)
            try:
                yield line.decode("utf-8") if whole else None
            except UnicodeDecodeError:
                yield None


def parse_yaml(text: str, source: Path | str) -> Any:
    """The plain value of a YAML text; `source` is named in errors.

    `off` is a word, 1e-3 a number, a date text, and a key written twice a mistake. Only the tags of plain
    values are known.

    Raises: UserError, naming the line where there is one, if it is not valid, or larger than a config can be.
    """
    if len(text) > YAML_BYTES:
        raise UserError(f"{source}: {len(text):,} characters; a config has at most {YAML_BYTES:,}.")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {}, set())
        return loader.construct_document(node)
    except UserError:
        raise
    except Exception as error:  # PyYAML's constructors raise whatever a value leads to
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = shown(str(getattr(error, "problem", None) or error), 300, quoted=False)
        raise UserError(f"{source}{line}: not valid YAML: {problem}") from None


def shown(value: Any, most: int = SHOWN, *, quoted: bool = True) -> str:
    """A value for a message, cut to `most` characters; only as much of it as can be shown is looked at."""
    if isinstance(value, str) and not quoted:
        return value if len(value) <= most else f"{value[: most - 3]}..."
    text = json.dumps(_head(value, most), default=lambda one: repr(one)[:most])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _head(value: Any, most: int, depth: int = 4) -> Any:
    """The beginning of a value, in every direction."""
    if isinstance(value, str):
        return value[:most]
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        few = list(zip(value.items(), range(most), strict=False)) if depth else []
        return {str(_head(key, most, 0))[:most]: _head(item, most, depth - 1) for (key, item), _ in few}
    if isinstance(value, list | tuple):
        return [_head(item, most, depth - 1) for item in value[:most]] if depth else []
    return value


def _unreadable(path: Path, error: Exception, cure: str) -> UserError:
    return _wrong(path, f"cannot be read ({getattr(error, 'strerror', None) or error})", cure)


def _too_large(path: Path, size: int, most: int, cure: str) -> UserError:
    return _wrong(path, f"{size:,} bytes; such a file has at most {most:,}", cure)


def _wrong(source: Path | str, what: str, cure: str) -> UserError:
    return UserError(f"{source}: {shown(what, 300, quoted=False)}. {cure}".rstrip())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)[:40]!r} is given twice")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _expanded(node: yaml.Node, known: dict[int, int], inside: set[int]) -> int:
    """The nodes in `node`, those that aliases repeat counted each time."""
    if id(node) in inside:
        raise _problem(node, "an alias inside its own anchor")
    if id(node) not in known:
        inside.add(id(node))
        below = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        count = 1
        if not isinstance(node, yaml.ScalarNode):
            count += sum(_expanded(part, known, inside) for part in below)
        inside.remove(id(node))
        known[id(node)] = count
        if count > YAML_NODES:
            raise _problem(node, f"more than {YAML_NODES:,} values, aliases repeated")
    return known[id(node)]


def _problem(at: yaml.Node | yaml.Event, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(None, None, problem, at.start_mark)


_READ_OTHERWISE = ("bool", "float", "int", "timestamp")


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1: it reads off, on, yes, no as booleans, 1e-3 as text, 010 as 8 and 1:30
    as 90, makes dates, and of two equal keys silently keeps the last. This loader does none of that, and
    counts what it composes.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in _READ_OTHERWISE]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth, self._count = self._depth + 1, self._count + 1
        if self._depth > YAML_DEPTH:
            raise _problem(self.peek_event(), f"nested deeper than {YAML_DEPTH} levels")
        if self._count > YAML_NODES:
            raise _problem(self.peek_event(), f"more than {YAML_NODES:,} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem(key_node, "a list or a mapping as a key")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _problem(key_node, f"'{str(key)[:SHOWN]}' is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """An integer; Python refuses to read one of thousands of digits, and torch takes 64 bits."""
        value = self.construct_yaml_int(node)
        if abs(value) >= 2**63:
            raise _problem(node, "an integer beyond 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"^{_ORDINARY_FLOAT}$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)

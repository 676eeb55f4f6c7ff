"""Damaged, hostile and odd files of picture-text pairs: one message with file and cure, in bounded memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fixtures import pair_sets
from fixtures.pair_sets import add, encoded
from tutti.data.formats.picture_text.reader import PairsReader
from tutti.data.sources import SourceConfig
from tutti.errors import UserError

COUNT, MOST_BYTES, LONGEST_MESSAGE = 6, 400 * 2**20, 2500
RED = np.full((4, 5, 3), (200, 0, 0), np.uint8)
GOOD = encoded(RED)


def read_everything(path: Path) -> tuple[list[str], list[bytes]]:
    """All texts and pictures, as a training would read them."""
    store = SourceConfig(path=path).open()
    (view,) = store.spec.views
    assert store.fingerprint
    shown = [picture.tobytes() for picture in store.rising(view, np.arange(store.spec.num_frames))]
    return [store.instructions[i] for i in store.instruction_of], shown


def refusal(path: Path, named: str = "") -> str:
    """The message for a set that must be refused."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read_everything(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
    text = str(caught.value)
    assert len(text) < LONGEST_MESSAGE and (named or path.name) in text and "cure:" in text.lower(), text
    return text


# --- JSON lines


def lines(folder: Path, *changes: Any) -> Path:
    """A set whose second line is another one: text, or the bytes themselves."""
    pair_sets.write(folder, "lines", COUNT)
    file = folder / "pairs.jsonl"
    every = file.read_bytes().splitlines()
    every[1:2] = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in changes]
    file.write_bytes(b"\n".join(every))
    return folder


def pair(**changes: Any) -> dict[str, Any]:
    return {"file_name": "pictures/001.png", "text": "a cup"} | changes


LINES: dict[str, Any] = {
    "no json": b"{",
    "a list": [1, 2],
    "a text": "words",
    "a number": 3,
    "a key twice": b'{"text": "a", "text": "b", "file_name": "pictures/001.png"}',
    "no utf-8": b'{"text": "\xff", "file_name": "pictures/001.png"}',
    "nested too deeply": b"[" * 100_000,
    "half a surrogate pair": b'{"text": "\\ud800", "file_name": "pictures/001.png"}',
    "a number as text": pair(text=3),
    "a list as text": pair(text=["a", "b"]),
    "an object as text": pair(text={"a": 1}),
    "true as text": pair(text=True),
    "a blank text": pair(text="  "),
    "no text": {"file_name": "pictures/001.png"},
    "null as text": pair(text=None),
    "a long text": pair(text="a" * 5000),
    "a number as path": pair(file_name=1),
    "no path": {"text": "a cup"},
    "an empty path": pair(file_name=""),
    "an absolute path": pair(file_name="/etc/hostname"),
    "a path that leaves": pair(file_name="pictures/../../secret.png"),
    "a path with a zero byte": pair(file_name="a\0.png"),
    "a path of 5,000 characters": pair(file_name="a" * 5000 + ".png"),
    "a folder": pair(file_name="pictures"),
    "a picture that is missing": pair(file_name="pictures/nobody.png"),
    "an address": pair(file_name="https://example.org/a.png"),
    "windows' path": pair(file_name="pictures\\001.png"),
}


@pytest.mark.parametrize("damage", LINES)
def test_a_line_that_is_wrong_is_named_and_can_be_left_out(tmp_path: Path, damage: str) -> None:
    folder = lines(tmp_path / "set", LINES[damage])
    refusal(folder)
    told, shown = (list(one) for one in zip(*zip(*read_without(folder, 1), strict=True), strict=True))
    assert (
        told == [text for n, text in enumerate(pair_sets.texts(COUNT)) if n != 1] and len(shown) == COUNT - 1
    )


def read_without(folder: Path, row: int) -> tuple[list[str], list[bytes]]:
    store = SourceConfig(path=folder, exclude=(row,)).open()
    (view,) = store.spec.views
    shown = [picture.tobytes() for picture in store.rising(view, np.arange(store.spec.num_frames))]
    return [store.instructions[i] for i in store.instruction_of], shown


def of_size(width: int, height: int) -> bytes:
    """A PNG of kilobytes that says that it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def bmp() -> bytes:
    return encoded(RED, "BMP")


def deep() -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(content, "PNG")
    return content.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"x",
    "text": lambda: b"<svg></svg>",
    "cut short": lambda: GOOD[: len(GOOD) // 2],
    "the head alone": lambda: GOOD[:33],
    "a bomb of 60,000 pixels": lambda: of_size(60_000, 60_000),
    "one edge too long": lambda: of_size(9000, 1),
    "the largest that there is": lambda: of_size(2**31 - 1, 2**31 - 1),
    "nothing wide": lambda: of_size(0, 4),
    "pixels that are missing": lambda: of_size(4, 4),
    "no sum of a chunk": lambda: GOOD[:29] + b"\0\0\0\0" + GOOD[33:],
    "another kind": bmp,
    "a pickle": lambda: pickle.dumps(RED),
    "16 bits": deep,
    "a jpeg cut short": lambda: encoded(RED, "JPEG")[:200],
    "a webp cut short": lambda: encoded(RED, "WEBP")[:20],
}


@pytest.mark.parametrize("damage", PICTURES)
@pytest.mark.parametrize("layout", ["lines", "parquet", "tar"])
def test_a_picture_that_is_wrong_is_named_in_every_layout(tmp_path: Path, damage: str, layout: str) -> None:
    (folder := tmp_path / "set").mkdir()
    shown = [GOOD, PICTURES[damage](), GOOD]
    if layout == "lines":
        for number, content in enumerate(shown):
            (folder / f"{number}.png").write_bytes(content)
        pair_sets.write_lines(folder, [{"image": f"{n}.png", "text": f"text {n}"} for n in range(3)])
    elif layout == "parquet":
        table = pa.table({"image": pa.array(shown, pa.binary()), "text": [f"text {n}" for n in range(3)]})
        pq.write_table(table, folder / "set.parquet")
    else:
        with tarfile.open(folder / "set.tar", "w") as archive:
            for number, content in enumerate(shown):
                add(archive, f"{number}.png", content)
                add(archive, f"{number}.txt", f"text {number}".encode())
    text = refusal(folder)
    assert "exclude=[1]" in text
    assert read_without(folder, 1) == (["text 0", "text 2"], [RED.tobytes()] * 2)


def test_a_file_that_would_block_is_not_opened(tmp_path: Path) -> None:
    folder = lines(tmp_path / "set", pair(file_name="pipe.png"))
    os.mkfifo(folder / "pipe.png")
    assert "FIFO" in refusal(folder)


def test_a_million_keys_and_no_rows_are_refused(tmp_path: Path) -> None:
    (folder := tmp_path / "set").mkdir()
    (folder / "a.jsonl").write_text(json.dumps({f"key {n}": "a" for n in range(5000)}))
    assert "different keys" in refusal(folder, "a.jsonl")
    (folder / "a.jsonl").write_text("\n \n")
    assert "there is no pair in it" in refusal(folder)
    (folder / "a.jsonl").write_text('{"text": "no picture"}\n')
    assert "nothing tells which picture" in refusal(folder)


# --- tar


def tar(folder: Path, fill: Callable[[tarfile.TarFile], None], form: int = tarfile.PAX_FORMAT) -> Path:
    """A set of a good pair, what `fill` adds, and another good one."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "a.tar", "w", format=form) as archive:
        for name in ("a", "z"):
            add(archive, f"{name}.png", GOOD)
            add(archive, f"{name}.txt", b"a text")
            if name == "a":
                fill(archive)
    return folder


def member(archive: tarfile.TarFile, kind: bytes, target: str = "/etc/hostname") -> None:
    add(archive, "b.txt", b"b text")
    add(archive, "b.png", b"", type=kind, linkname=target)


def adds(*members: tuple[str, bytes]) -> Callable[[tarfile.TarFile], None]:
    def fill(archive: tarfile.TarFile) -> None:
        for name, content in members:
            add(archive, name, content)

    return fill


B = ("b.png", GOOD)
TARS: dict[str, Callable[[tarfile.TarFile], None]] = {
    "a symbolic link": lambda archive: member(archive, tarfile.SYMTYPE),
    "a link in the archive": lambda archive: member(archive, tarfile.LNKTYPE, "a.png"),
    "a device": lambda archive: member(archive, tarfile.CHRTYPE),
    "a fifo": lambda archive: member(archive, tarfile.FIFOTYPE),
    "a member twice": adds(B, B),
    "a pair without picture": adds(("b.txt", b"alone")),
    "a pair without text": adds(B),
    "no utf-8": adds(B, ("b.txt", b"\xff")),
    "a text of megabytes": adds(B, ("b.txt", bytes(2**21))),
    "a pair apart": adds(B, ("c.txt", b"c"), ("b.txt", b"b")),
    "a sparse file": lambda archive: add(
        archive, "b.png", GOOD, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    ),
    "a size elsewhere": lambda archive: add(archive, "b.png", GOOD, pax_headers={"size": str(2**60)}),
    "a name of megabytes": adds(("b" * 2**21 + ".png", GOOD)),
    "many endings": adds(*((f"b.x{n}", b"") for n in range(300))),
}


@pytest.mark.parametrize("damage", TARS)
def test_a_member_that_is_wrong_is_named(tmp_path: Path, damage: str) -> None:
    text = refusal(tar(tmp_path / "set", TARS[damage]))
    assert "a.tar" in text or "no instruction, such as 1" in text


def test_names_that_would_leave_the_archive_are_names_alone(tmp_path: Path) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        for name in ("../../out", "/abs/out", "a/../b", "long/" + "n" * 300):
            add(archive, f"{name}.png", GOOD)
            add(archive, f"{name}.txt", name[-4:].encode())
        add(archive, "folder", b"", type=tarfile.DIRTYPE)
        add(archive, "._a.png", b"of a Mac")

    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        folder = tar(tmp_path / f"set{form}", fill, form)
        told, shown = read_everything(folder)
        assert told == ["a text", "/out", "/out", ".../b"[-4:], "nnnn", "a text"] and set(shown) == {
            RED.tobytes()
        }
    assert sorted(one.name for one in tmp_path.iterdir()) == ["set1", "set2"]


def test_headers_with_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = tar(tmp_path / "set", lambda _: None)
    whole = (folder / "a.tar").read_bytes()

    def resized(size: bytes) -> bytes:
        """The archive whose first header says another size, its sum in order."""
        head = bytearray(whole[:512])
        head[124:136], head[148:156] = size, b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return bytes(head) + whole[512:]

    sizes = {
        "negative": b"\xff" * 11 + b"\x00",
        "minus one": b"\xff" * 12,
        "exabytes": b"\x80" + b"\x00" * 3 + b"\x7f" + b"\xff" * 7,
        "more than there is": b"77777777777\0",
    }
    for size in sizes.values():
        (folder / "a.tar").write_bytes(resized(size))
        refusal(folder, "a.tar")
    for cut in (1, 100, 511, 513, 600, 1100):
        (folder / "a.tar").write_bytes(whole[:cut])
        refusal(folder, "a.tar")
    for content in (b"", b"x" * 1024, b"\x1f\x8b" + bytes(1022), pickle.dumps(list(range(2000)))):
        (folder / "a.tar").write_bytes(content)
        refusal(folder, "a.tar")
    for content in (whole + whole, whole[: whole.index(bytes(1024))]):  # two laid end to end; no end
        (folder / "a.tar").write_bytes(content)
        refusal(folder, "a.tar")


# --- Parquet


def parquet(folder: Path, **columns: Any) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder


NONE_AS_BYTES = {"bytes": None, "path": None}
TABLES: dict[str, Callable[[], dict[str, Any]]] = {
    "no picture": lambda: {"text": ["a", "b"]},
    "no text": lambda: {"image": [GOOD, GOOD]},
    "numbers": lambda: {"image": [1, 2], "text": ["a", "b"]},
    "null as picture": lambda: {"image": pa.array([GOOD, None], pa.binary()), "text": ["a", "b"]},
    "null as text": lambda: {"image": [GOOD, GOOD], "text": ["a", None]},
    "no rows": lambda: {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())},
    "a path that leaves": lambda: {"image": ["a.png", "../b.png"], "text": ["a", "b"]},
    "a struct that leaves": lambda: {
        "image": [{"bytes": None, "path": "/etc/hostname"}] * 2, "text": ["a", "b"]},
    "an empty struct": lambda: {
        "image": pa.array([NONE_AS_BYTES] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "text": ["a", "b"]},
    "null as struct": lambda: {
        "image": pa.array([None] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "text": ["a", "b"]},
    "a list of texts": lambda: {"image": [GOOD], "text": [["a", "b"]]},
    "many columns": lambda: {f"text {n}": ["a"] for n in range(300)} | {"image": [GOOD]},
}  # fmt: skip


@pytest.mark.parametrize("damage", TABLES)
def test_a_table_that_is_wrong_is_named(tmp_path: Path, damage: str) -> None:
    refusal(parquet(tmp_path / "set", **TABLES[damage]()))


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    for number, other in enumerate(({"image": [GOOD]}, {"text": ["c"]}, {"image": [1], "text": ["c"]})):
        folder = parquet(tmp_path / f"set{number}", image=[GOOD, GOOD], text=["a", "b"])
        pq.write_table(pa.table(other), folder / "b.parquet")
        refusal(folder, "b.parquet")


def test_text_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    text = pa.array([b"a", b"\xff\xfe"], pa.binary()).view(pa.string())
    refusal(parquet(tmp_path / "set", image=[GOOD, GOOD], text=text), "a.parquet")


def spoilt(content: bytes, seed: int) -> Iterator[bytes]:
    """The content cut short, and with bytes of some places changed."""
    random = np.random.default_rng(seed)
    for _ in range(4):
        yield content[: int(random.integers(0, len(content)))]
    for _ in range(16):
        changed = bytearray(content)
        for place in random.integers(0, len(content), int(random.integers(1, 4))):
            changed[place] = int(random.integers(0, 256))
        yield bytes(changed)
    yield content + bytes(100)


@pytest.mark.parametrize("layout", ["lines", "parquet", "tar", "json"])
def test_bytes_that_changed_are_noticed_or_harmless(tmp_path: Path, layout: str) -> None:
    """Whatever a byte becomes: the set is read, or one message says what is wrong with it."""
    folder = pair_sets.write(tmp_path / "set", layout, COUNT)
    file = sorted(one for one in folder.iterdir() if one.is_file())[0]
    refused, whole = 0, file.read_bytes()
    for content in spoilt(whole, len(layout)):
        file.write_bytes(content)
        try:
            told, shown = read_everything(folder)
            assert len(told) == len(shown)
        except UserError as error:
            refused += 1
            assert str(folder) in str(error) and "cure:" in str(error).lower(), error
    assert refused > 3


def test_a_set_is_read_from_its_name_alone(tmp_path: Path) -> None:
    """A folder of pictures without a table is none, and a file of another kind neither."""
    (tmp_path / "a.png").write_bytes(GOOD)
    with pytest.raises(UserError, match="in no format that Tutti reads"):
        SourceConfig(path=tmp_path).open()
    with pytest.raises(UserError, match=r"has no file \*\.jsonl"):
        PairsReader(tmp_path)

"""Unpacks the chunks of Zarr arrays: no more bytes than an array says, and no codec that runs code."""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

Unpack = Callable[[bytes, np.ndarray], Any]
"""Of packed bytes and the empty chunk that they are to fill: its bytes, or the filled chunk."""


class MissingPackage(ValueError):
    """What unpacks a chunk is not installed."""


def unpack(codec: str | None, content: bytes, empty: np.ndarray) -> np.ndarray:
    """The chunk that is packed in `content`, of the shape and type of `empty`.

    Raises: ValueError if it has more or fewer bytes, or is damaged; and what the codec's library raises.
    """
    found = content if codec is None else CODECS[codec](content, empty)
    size = found.nbytes if isinstance(found, np.ndarray) else len(found)
    if size != empty.nbytes:
        raise ValueError(f"{size:,} bytes where the array says {empty.nbytes:,}")
    return np.frombuffer(found, empty.dtype)


def _deflated(window: int) -> Unpack:
    return lambda content, empty: zlib.decompressobj(window).decompress(content, empty.nbytes + 1)


def _bz2(content: bytes, empty: np.ndarray) -> bytes:
    return bz2.BZ2Decompressor().decompress(content, empty.nbytes + 1)


def _blosc(content: bytes, empty: np.ndarray) -> bytes:
    """Its header says how large the chunk is and how many bytes it takes."""
    said = [int.from_bytes(content[place : place + 4], "little") for place in (4, 12)]
    if said != [empty.nbytes, len(content)]:
        raise ValueError(f"Blosc's header says {said[0]:,} bytes where the array says {empty.nbytes:,}")
    return _library("numcodecs", "blosc").decompress(content)


def _zstd(content: bytes, empty: np.ndarray) -> bytes:
    """One frame that says how large it is (RFC 8878, 3.1.1.1)."""
    flags = content[4] if content[:4] == b"\x28\xb5\x2f\xfd" and len(content) > 4 else 0
    single, width = flags >> 5 & 1, (1, 2, 4, 8)[flags >> 6]
    begin = 6 - single + (0, 1, 2, 4)[flags & 3]
    said = int.from_bytes(content[begin : begin + width], "little") + 256 * (width == 2)
    if not flags & 0xE0 or said != empty.nbytes:
        raise ValueError(f"no frame of Zstandard that says {empty.nbytes:,} bytes, as the array does")
    return _library("numcodecs", "zstd").decompress(content)


def _picture(kind: str) -> Unpack:
    """A picture of three axes; the library refuses another size before it decodes."""

    def unpack_picture(content: bytes, empty: np.ndarray) -> np.ndarray:
        into = np.empty(empty.shape[-3:], empty.dtype)
        if into.size != empty.size:
            raise ValueError(f"a picture in a chunk of {empty.shape}; one picture a chunk is read")
        return getattr(_library("imagecodecs", ""), f"{kind}_decode")(content, out=into)

    return unpack_picture


CODECS: Mapping[str, Unpack] = {
    "blosc": _blosc,
    "zstd": _zstd,
    "zlib": _deflated(zlib.MAX_WBITS),
    "gzip": _deflated(zlib.MAX_WBITS | 16),
    "bz2": _bz2,
    "imagecodecs_jpegxl": _picture("jpegxl"),
    "imagecodecs_jpeg2k": _picture("jpeg2k"),
}
"""By their names in `.zarray`. Others are refused: among those of numcodecs is `pickle`."""


def _library(package: str, part: str) -> Any:
    """An optional package, or a part of it. Raises: MissingPackage."""
    try:
        return import_module(f"{package}.{part}" if part else package)
    except ImportError as error:
        raise MissingPackage(f"the package {package} is not installed ({error})") from None

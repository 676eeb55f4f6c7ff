"""Sharded checkpoints: a folder of tensors that many processes write and any number can read.

    rank-00000.safetensors ...    the pieces that each process has written, each under its tensor's name
    index.json                    {"format": 1, "files": [name, ...], "tensors": {name: {"dtype": "F32",
                                  "shape": [...], "pieces": [[number of the file, offset, lengths], ...]}}}

A piece is the block of its tensor that begins at `offset` and has the sizes `lengths`; the pieces of a tensor
cover it once. A process writes the shares that it holds; what several hold in equal form is written once, the
work divided among them. A reader opens the pieces that overlap its own share.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tutti.errors import UserError
from tutti.storage.manifest import SHARD_INDEX, SHARDS, Crc32, Size
from tutti.storage.reading import read_bytes

FORMAT = 1
MAX_INDEX = 1 << 28
"""Bytes of an index."""
_PICKLED = ".metadata"
"""The index that torch.distributed.checkpoint writes, a pickle: never opened here."""
_FILE = re.compile(r"rank-\d{5,9}\.safetensors")
_MAX_DIMENSIONS = 64

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    **{"BOOL": torch.bool, "C64": torch.complex64},
}
"""As safetensors names them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Numbers = tuple[int, ...]


class Piece(NamedTuple):
    """A block of a tensor that a process holds."""

    name: str
    dtype: str
    shape: Numbers
    offset: Numbers
    lengths: Numbers

    @property
    def bytes(self) -> int:
        """Its size in memory and in a file."""
        return math.prod(self.lengths) * DTYPES[self.dtype].itemsize


class Entry(NamedTuple):
    """A tensor of a checkpoint; the pieces are (file, offset, lengths)."""

    dtype: torch.dtype
    shape: Numbers
    pieces: tuple[tuple[str, Numbers, Numbers], ...]


def local_pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
    """What this process holds of each tensor: of a DTensor its share, any other one whole.

    Raises: UserError for a type of numbers that safetensors does not know.
    """
    pieces: list[Piece] = []
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise UserError(
                f"{name}: {tensor.dtype} cannot be saved in shards. Use training.checkpoints.format=whole."
            )
        shape = tuple(tensor.shape)
        pieces.append(Piece(name, NAMES[tensor.dtype], shape, *region(tensor, shape)))
    return pieces


def write(
    folder: Path, tensors: Mapping[str, Tensor], all_pieces: Sequence[Sequence[Piece]], rank: int
) -> dict[str, Size]:
    """Writes this process's part of the work into `folder`, to the disk itself; the first one also the index.

    `all_pieces` are the `local_pieces` of each process, in the order of the ranks. Nothing is gathered, no
    process waits for another. Gives size and checksum of each file written, by its name.

    Raises: OSError if it cannot be written; ValueError if the processes hold different tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers = _assign_writers(all_pieces)
    sizes: dict[str, Size] = {}
    mine = [piece for piece, writer in writers.items() if writer == rank]
    if mine:
        # Large numbers first: all lie at multiples of their own size, as safetensors has them.
        mine.sort(key=lambda piece: (-DTYPES[piece.dtype].itemsize, piece.name))
        header: dict[str, Any] = {}
        end = 0
        for piece in mine:
            place = [end, end := end + piece.bytes]
            header[piece.name] = {"dtype": piece.dtype, "shape": piece.lengths, "data_offsets": place}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        content = (_bytes(tensors[piece.name]) for piece in mine)
        sizes[_file(rank)] = _write(folder / _file(rank), [len(text).to_bytes(8, "little"), text], content)
    if rank == 0:
        index = _index(all_pieces, writers)
        _entries(index)
        text = json.dumps(index, separators=(",", ":")).encode()
        sizes["index.json"] = _write(folder / "index.json", [text])
    return sizes


def index_of(folder: Path) -> dict[str, Entry]:
    """What the folder shards/ holds, by the names of the tensors.

    Raises: UserError if the index is missing or damaged, or its pieces do not cover a tensor exactly once.
    """
    path = folder.parent / SHARD_INDEX
    if not os.path.lexists(path) and os.path.lexists(folder / _PICKLED):
        raise UserError(
            f"{folder}: these shards were made by an older Tutti, whose index {_PICKLED} is a pickle. It is "
            "not opened, for a pickle can run any code. Go on with the version that wrote it, or use that "
            "version's tutti export."
        )
    content = read_bytes(path, MAX_INDEX, inside=folder.parent)
    try:
        return _entries(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}).") from error


def region(tensor: Tensor, shape: Numbers) -> tuple[Numbers, Numbers]:
    """Offset and lengths of what this process holds of a tensor of that shape."""
    if not isinstance(tensor, DTensor):
        return (0,) * len(shape), shape
    lengths, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(lengths)


def _assign_writers(all_pieces: Sequence[Sequence[Piece]]) -> dict[Piece, int]:
    """The rank that writes each piece: the one with the least to write so far of those that hold it."""
    holders: dict[Piece, list[int]] = {}
    for rank, pieces in enumerate(all_pieces):
        for piece in pieces:
            if piece.bytes:
                holders.setdefault(piece, []).append(rank)
    written = [0] * len(all_pieces)
    writers: dict[Piece, int] = {}
    for piece in sorted(holders, key=lambda one: (-one.bytes, one)):
        writers[piece] = rank = min(holders[piece], key=lambda one: written[one])
        written[rank] += piece.bytes
    return writers


def _index(all_pieces: Sequence[Sequence[Piece]], writers: Mapping[Piece, int]) -> dict[str, Any]:
    ranks = sorted(set(writers.values()))
    tensors: dict[str, dict[str, Any]] = {}
    for piece in (piece for pieces in all_pieces for piece in pieces):
        tensors.setdefault(piece.name, {"dtype": piece.dtype, "shape": piece.shape, "pieces": []})
    for piece, rank in sorted(writers.items()):
        tensors[piece.name]["pieces"].append([ranks.index(rank), piece.offset, piece.lengths])
    return {"format": FORMAT, "files": [_file(rank) for rank in ranks], "tensors": tensors}


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write(path: Path, *content: Iterable[Any]) -> Size:
    """Writes the pieces one after the other, to the disk itself."""
    digest, length = Crc32(), 0
    with path.open("wb") as file:
        for part in content:
            for piece in part:
                file.write(piece)
                digest.update(piece)
                length += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": length, "crc32": digest.value}


def _bytes(tensor: Tensor) -> Any:
    """What this process holds, as it lies in memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _entries(index: Any) -> dict[str, Entry]:
    """The tensors of an index.

    Raises: ValueError, KeyError, TypeError or AttributeError if it is wrong.
    """
    if index["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, found {index['format']!r:.40}")
    names = index["files"]
    if not all(isinstance(name, str) and _FILE.fullmatch(name) for name in names):
        raise ValueError("a name of a file is not like rank-00000.safetensors")
    return {name: _entry(name, given, names) for name, given in index["tensors"].items()}


def _entry(name: str, given: Any, files: Sequence[str]) -> Entry:
    """Of one tensor in an index.

    Raises: ValueError, KeyError or TypeError if it is wrong.
    """
    shape, dtype = _numbers(given["shape"]), DTYPES[given["dtype"]]
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(1, length) for length in shape) >= 1 << 60:
        raise ValueError(f"{name:.80}: no tensor is so large")
    pieces: list[tuple[str, Numbers, Numbers]] = []
    for number, offset, lengths in given["pieces"]:
        (place,), start, size = _numbers([number]), _numbers(offset), _numbers(lengths)
        if place >= len(files) or len(start) != len(shape) or len(size) != len(shape):
            raise ValueError(f"{name:.80}: a piece is not of this tensor")
        pieces.append((f"{SHARDS}/{files[place]}", start, size))
    blocks = [tuple(zip(start, size, strict=True)) for _, start, size in pieces]
    if not (_covers_once(shape, blocks) if math.prod(shape) else not blocks):
        raise ValueError(f"{name:.80}: its pieces do not cover it exactly once")
    return Entry(dtype, shape, tuple(pieces))


def _numbers(given: Any) -> Numbers:
    if not isinstance(given, list | tuple) or any(type(one) is not int or one < 0 for one in given):
        raise ValueError("expected a list of whole numbers, none below 0")
    return tuple(given)


def _covers_once(shape: Numbers, blocks: Sequence[tuple[tuple[int, int], ...]]) -> bool:
    """Whether the blocks, (start, length) of each dimension, cover the shape exactly once: cut into slices
    along the first dimension, each slice cut along the others."""
    if not shape:
        return len(blocks) == 1
    end = 0
    for (start, length), group in groupby(sorted(blocks), key=lambda block: block[0]):
        if start != end or length < 1 or not _covers_once(shape[1:], [block[1:] for block in group]):
            return False
        end += length
    return end == shape[0]

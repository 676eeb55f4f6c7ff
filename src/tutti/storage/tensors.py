"""Reads the tensors of a checkpoint or an export: whole files of weights and shards alike, or shares of them.

To the reader a file of weights that one process has written whole holds tensors in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from tutti.errors import UserError
from tutti.storage.manifest import SHARD_INDEX, SHARDS, WEIGHTS, Manifest, Weights
from tutti.storage.shards import DTYPES, NAMES, Entry, Numbers, index_of, region

MAX_HEADER = 1 << 24
"""Bytes of the header of a file of tensors."""
Slices = tuple[slice, ...]


def weights_in(manifest: Manifest, weights: Weights) -> tuple[Weights, dict[str, tuple[int, ...]]]:
    """`weights`, or the raw ones where training has kept no average; with the shapes of their tensors.

    Raises: UserError if there are none, or a header or the index is damaged.
    """
    entries = entries_of(manifest)
    for kept in dict.fromkeys((weights, "raw")):
        start = _start(kept)
        shapes = {name.removeprefix(start): e.shape for name, e in entries.items() if name.startswith(start)}
        if shapes:
            return kept, shapes
    raise manifest.error(manifest.name, f"lists no file {WEIGHTS['raw']}.")


def read_weights(manifest: Manifest, weights: Weights) -> dict[str, Tensor]:
    """The model's weights; the raw ones where training has kept no average.

    Raises: UserError if they are missing, damaged, or not finite.
    """
    start = _start(weights_in(manifest, weights)[0])
    named = read(manifest, start)
    return check_finite(manifest.folder, {name.removeprefix(start): value for name, value in named.items()})


def _start(weights: Weights) -> str:
    """What the names of the tensors begin with."""
    return f"{Path(WEIGHTS[weights]).stem}/"


def check_finite(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives the tensors back.

    Raises: UserError if one of them holds NaN or infinity.
    """
    bad = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise UserError(
            f"{folder}: the weights hold NaN or infinity in {len(bad)} of {len(tensors)} tensors, such as "
            f"{bad[0]}. No robot can act by them. Take an older checkpoint, and find in the records of the "
            "training where the loss went wrong."
        )
    return tensors


def read(
    manifest: Manifest,
    below: str = "",
    forms: Mapping[str, Tensor] | None = None,
    *,
    verified: bool = False,
) -> dict[str, Tensor]:
    """The tensors whose names begin with `below`: whole and on the CPU, or this process's shares of them.

    Where `forms` has a DTensor of the same size under a tensor's name, or under the name up to its last "/",
    only the share is read that this process holds of that one. No process waits for another. Each file is
    compared with its checksum before it is opened, unless it was `verified` before.

    Raises: UserError if a file is missing, damaged, or holds other tensors than the index says.
    """
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = _Files(manifest, verified, stack)
        for name, entry in entries_of(manifest).items():
            if name.startswith(below):
                form = (forms or {}).get(name, (forms or {}).get(name.rpartition("/")[0]))
                tensors[name] = _read(files, name, entry, form)
    return tensors


def entries_of(manifest: Manifest) -> dict[str, Entry]:
    """What a checkpoint or an export holds, by names such as model/vision.weight: by the headers of its files
    of weights or else by the index of its shards. No tensor is read.

    Raises: UserError if a header or the index is missing or damaged.
    """
    whole = [name for name in manifest.files if name.endswith(".safetensors") and "/" not in name]
    if not whole and SHARD_INDEX in manifest.files:
        manifest.check(SHARD_INDEX)
        return index_of(manifest.folder / SHARDS)
    entries: dict[str, Entry] = {}
    for file in whole:
        with _open(manifest, file) as content:
            for key in content.keys():  # noqa: SIM118 (no dict)
                block = content.get_slice(key)
                dtype, shape = block.get_dtype(), tuple(block.get_shape())
                if dtype not in DTYPES:
                    raise manifest.error(file, f"damaged, {key:.80} is of the unknown type {dtype}.")
                pieces = ((file, (0,) * len(shape), shape),)
                entries[f"{Path(file).stem}/{key}"] = Entry(DTYPES[dtype], shape, pieces)
    return entries


def _open(manifest: Manifest, file: str) -> Any:
    """A listed file of tensors, with its header read. Raises: UserError if it is none."""
    with manifest.opened(file) as content:
        if int.from_bytes(content.read(8), "little") > MAX_HEADER:
            raise manifest.error(file, f"damaged, its header has more than {MAX_HEADER:,} bytes.")
    try:
        return safe_open(manifest.folder / file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise manifest.error(file, f"damaged, not a file of tensors ({error}).") from error


class _Files:
    """The files of a checkpoint, opened when they are first asked for."""

    def __init__(self, manifest: Manifest, verified: bool, stack: ExitStack) -> None:
        self.manifest, self.verified, self.stack = manifest, verified, stack
        self.opened: dict[str, Any] = {}

    def block(self, file: str, name: str, entry: Entry, lengths: Numbers) -> Any:
        """The piece of a tensor in a file, not yet read.

        Raises: UserError if the file has it not, or in another form.
        """
        if file not in self.opened:
            if not self.verified:
                self.manifest.check(file)
            self.opened[file] = self.stack.enter_context(_open(self.manifest, file))
        try:
            block = self.opened[file].get_slice(name if "/" in file else name.partition("/")[2])
        except SafetensorError as error:
            raise self.manifest.error(file, f"damaged ({error}).") from error
        form = (block.get_dtype(), tuple(block.get_shape()))
        if form != (NAMES[entry.dtype], lengths):
            expected = f"{NAMES[entry.dtype]} {lengths} by the index"
            raise self.manifest.error(
                file, f"damaged: {name} is {expected}, {form[0]} {form[1]} in the file."
            )
        return block


def _read(files: _Files, name: str, entry: Entry, form: Tensor | None) -> Tensor:
    """One tensor, whole or in the form of a DTensor of its size. What it needs is looked at before there is
    room for it."""
    share = form if isinstance(form, DTensor) and tuple(form.shape) == entry.shape else None
    offset, lengths = ((0,) * len(entry.shape), entry.shape) if share is None else region(share, entry.shape)
    blocks: list[tuple[Any, Slices, Slices]] = []
    for file, start, size in entry.pieces:
        ends = [
            (max(a, b), min(a + n, b + m)) for a, n, b, m in zip(start, size, offset, lengths, strict=True)
        ]
        if all(first < last for first, last in ends):
            block = files.block(file, name, entry, size)
            blocks.append((block, _slices(ends, start), _slices(ends, offset)))
    if share is None:
        local = torch.empty(entry.shape, dtype=entry.dtype)
    else:
        local = torch.empty_like(share.to_local().detach(), dtype=entry.dtype)
    for block, source, target in blocks:
        local[target].copy_(block[source or ...])
    if share is None:
        return local
    as_it = {"shape": share.shape, "stride": share.stride()}
    return DTensor.from_local(local, share.device_mesh, share.placements, run_check=False, **as_it)


def _slices(ends: Sequence[tuple[int, int]], offset: Numbers) -> Slices:
    return tuple(slice(first - a, last - a) for (first, last), a in zip(ends, offset, strict=True))

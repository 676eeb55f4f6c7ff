"""Tokens of pictures and texts that a frozen tower has seen before, by their bytes: in memory, or on disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tutti.storage.files import explain_disk_errors, write_json

MIB = 2**20
ENTRY = np.dtype([("key", "V16"), ("crc", "<u4")])
FEATURES = "features"
"""The folder of features below the folder of caches."""
ANEW: ContextVar[bool] = ContextVar("ANEW", default=False)
"""True where all is computed: a cost that is counted may not depend on what was seen before."""


class StoredTokens:
    """Tokens on disk, in one file that only grows: record n belongs to the picture of entry n in `keys.bin`.

    Several processes and runs may read and write at once. A record is written before its entry, so what a
    crash leaves is overwritten; one whose checksum is another is as if it were not there. `most` bytes are
    kept, what comes later is not.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], most: int, about: Mapping[str, Any]) -> None:
        self.folder, self.shape, self.size, self.most = folder, shape, 4 * int(np.prod(shape)), most
        self.places: dict[bytes, tuple[int, int]] = {}
        self.count, self.about = 0, about
        self._map = np.empty((0, self.size), np.uint8)
        self._read_entries()

    def get(self, key: bytes) -> Tensor | None:
        """The tokens of a picture; None where they are not there."""
        place, crc = self.places.get(key, (-1, 0))
        if place < 0:
            return None
        if place >= len(self._map):
            try:
                whole = np.memmap(self.folder / "tokens.f32", np.uint8, "r")
            except (FileNotFoundError, ValueError):  # it was deleted, or emptied
                return None
            self._map = whole[: len(whole) // self.size * self.size].reshape(-1, self.size)
        if place >= len(self._map) or zlib.crc32(self._map[place]) != crc:
            return None
        return torch.from_numpy(self._map[place].view("<f4").astype(np.float32).reshape(self.shape))

    def add(self, found: Mapping[bytes, Tensor]) -> None:
        """Writes what is not there yet, as far as there is room. Raises: UserError for a full disk."""
        with explain_disk_errors(self.folder, "the feature cache (model.vision.cache)"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "about.json").exists():
                write_json(self.folder / "about.json", {**self.about, "shape": list(self.shape)})
            files = [self.folder / name for name in ("keys.bin", "tokens.f32")]
            for file in files:
                file.touch()
            with files[0].open("r+b") as keys, files[1].open("r+b") as records:
                fcntl.flock(keys, fcntl.LOCK_EX)
                self._read_entries()
                for key, tokens in found.items():
                    if (self.count + 1) * self.size > self.most:
                        return
                    content = tokens.contiguous().numpy().astype("<f4").tobytes()
                    if self.places.get(key, (-1, 0))[1] == (crc := zlib.crc32(content)):
                        continue
                    records.seek(self.count * self.size)
                    records.write(content)
                    records.flush()
                    keys.seek(self.count * ENTRY.itemsize)
                    keys.write(np.array([(key, crc)], ENTRY).tobytes())
                    self.places[key] = self.count, crc
                    self.count += 1

    def _read_entries(self) -> None:
        """Those that it does not know yet, of this process or another."""
        if not (self.folder / "keys.bin").exists():
            return
        with (self.folder / "keys.bin").open("rb") as file:
            file.seek(self.count * ENTRY.itemsize)
            content = file.read()
        entries = np.frombuffer(content[: len(content) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
        for key, crc in zip(entries["key"], entries["crc"].tolist(), strict=True):
            self.places[key.tobytes()] = self.count, crc
            self.count += 1


class Remembered:
    """Keeps the tokens of pictures or texts: those of the first epoch serve the others, up to `memory` MiB of
    them; pictures' with `disk` MiB below `home` also other runs, by what `about` says that they depend on.

    Each is computed alone, so that its tokens are a function of nothing else: what is kept, and in which
    order they came, changes no bit. Behind the last MiB nothing more is kept. Any thread may ask.
    """

    def __init__(self, memory: int, disk: int = 0, home: Path = Path()) -> None:
        self.memory, self.disk, self.home = memory, disk, home
        self.kept: dict[bytes, Tensor] = {}
        self.used = self.filled = 0  # bytes that are kept, and of which weights they are
        self.stored: dict[str, StoredTokens] = {}

    def forget_others(self, filled: int) -> None:
        """Forgets what is of other weights: those before the tower was filled for the `filled`th time."""
        if filled != self.filled:
            self.kept, self.used, self.filled = {}, 0, filled

    def text(self, ids: Int[Tensor, " l"], compute: Callable[[], Tensor]) -> Float[Tensor, "l d"]:
        """What `compute` gives for a text."""
        key = ids.numpy().tobytes() + _number_type(ids.device.type)
        tokens = None if ANEW.get() else self.kept.get(key)
        return self._keep(key, compute()) if tokens is None else tokens

    def tokens(
        self,
        images: Float[Tensor, "b 3 h w"],
        compute: Callable[[Tensor], Tensor],
        about: Mapping[str, Any] | None = None,
        *,
        keep: bool = True,
    ) -> Float[Tensor, "b n d"]:
        """`compute` of each picture. What is new is kept on disk only if `about` is given and `keep` is."""
        if ANEW.get():
            return torch.cat([compute(own[None]) for own in images])
        found, new = list[Tensor](), dict[bytes, Tensor]()
        store: StoredTokens | None = None
        on_host = images.cpu()  # of a GPU the one wait
        numbers = _number_type(images.device.type)
        for image, own in zip(on_host, images, strict=True):
            key = hashlib.blake2b(image.float().contiguous().numpy().data, digest_size=16).digest()
            tokens = new.get(key, self.kept.get(key + numbers))
            if tokens is None and about is not None and self.disk:
                store = store or self._store(about, lambda own=own: compute(own[None])[0])
                tokens = store.get(key)
            if tokens is None:
                tokens = compute(own[None])[0].float() if about is not None else compute(own[None])[0]
                new[key] = self._keep(key + numbers, tokens).cpu()
            found.append(tokens.to(images.device))
        if store is not None and keep and new:
            store.add(new)
        return torch.stack(found)

    def _keep(self, key: bytes, tokens: Tensor) -> Tensor:
        """Keeps them, as far as there is room."""
        if key not in self.kept and self.used + tokens.nbytes <= self.memory * MIB and not ANEW.get():
            self.kept[key], self.used = tokens, self.used + tokens.nbytes
        return tokens

    def _store(self, about: Mapping[str, Any], sample: Callable[[], Tensor]) -> StoredTokens:
        """The records of what depends on the same; the shape of one is looked at in the first `sample`."""
        text = json.dumps(about, sort_keys=True)
        if text not in self.stored:
            name = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
            folder = self.home / FEATURES / f"{about['kind']}-{about['image_size']}px-{name}"
            shape = tuple(sample().shape)
            self.stored[text] = StoredTokens(folder, shape, self.disk * MIB, about)
        return self.stored[text]


def _number_type(device: str) -> bytes:
    """The type that a tower computes in here."""
    return str(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)).encode()

"""The manifest of a checkpoint or an export: its files by name, with sizes and checksums, verified when read.

The one list of names that every writer and reader uses:

model.safetensors      weights; ema.safetensors their moving average
objective.safetensors  heads of the terms, if they have any state; objective_ema.safetensors likewise
optimizer.pt  rng.pt   moments of the optimisers; random states
shards/                instead of the .safetensors files and the tensors of optimizer.pt, if each rank has
                       written its own shares (see tutti.storage.shards)
config.yaml            the run's config
spec.json  normalizer.json  tokenizer.json     what the policy must know of the data
conventions.json       what the numbers of each robot are, where the model has learned them in another form
starts.json            the simulator's starts that the training data hold, which no evaluation may use
state.json             manifest of a checkpoint: step, loader position, metrics, versions, checksums
export.json            manifest of an export, in place of state.json

The manifest holds a table `files`: name -> {"bytes", "crc32"} or {"bytes", "sha256"}. A file is found by its
name in that table and never by looking into the folder. It must be a plain file inside the folder: a pipe or
a device would block the reader, a link could lead anywhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from tutti.errors import UserError
from tutti.storage.reading import MAX_BYTES, MAX_SIZE, decoded, open_plain, parse_json, read_text

Weights = Literal["ema", "raw"]
WEIGHTS: dict[Weights, str] = {"ema": "ema.safetensors", "raw": "model.safetensors"}
OPTIMIZER_FILE, RNG_FILE = "optimizer.pt", "rng.pt"
SHARDS, SHARD_INDEX = "shards", "shards/index.json"
CONFIG = "config.yaml"
SPEC, NORMALIZER, TOKENIZER = "spec.json", "normalizer.json", "tokenizer.json"
STARTS = "starts.json"
"""The simulator's starts in the training data, so that no evaluation uses them; older checkpoints lack it."""
CONVENTIONS = "conventions.json"
"""Of a policy whose numbers are not learned as they are recorded; others have none."""
DATA_FILES = (SPEC, NORMALIZER, TOKENIZER)
"""What a checkpoint says of its data; a resumed or forked run must have the same."""
POLICY_FILES = (CONFIG, *DATA_FILES)
"""What a policy reads beside the weights."""
STATE, EXPORT = "state.json", "export.json"
"""The manifests: of a checkpoint, its last file to be written; and of an export."""
BEST_MARK = "best.json"
"""Beside the checkpoints of a run: step, metric, mode and value of the best one."""

PIECE = 1 << 24
Size = dict[str, Any]
"""bytes, and crc32 or sha256, of a file."""
_NAME = re.compile(r"(shards/)?(?!\.\.?$)[\w.][\w.-]{0,199}")


class Crc32:
    """The checksum of `zlib.crc32` with the methods of a hash of hashlib."""

    def __init__(self, data: bytes = b"") -> None:
        self.value = zlib.crc32(data)

    def update(self, piece: Any) -> None:
        """Adds the bytes of `piece`."""
        self.value = zlib.crc32(piece, self.value)

    def hexdigest(self) -> int:
        """A number, as state.json holds it."""
        return self.value


HASHES = {"crc32": Crc32, "sha256": hashlib.sha256}


def size_of(data: bytes, checksum: Literal["crc32", "sha256"] = "crc32") -> Size:
    """The entry of a file with this content in the manifest of a checkpoint (crc32) or an export (sha256)."""
    return {"bytes": len(data), checksum: HASHES[checksum](data).hexdigest()}


@dataclass(frozen=True, slots=True)
class Manifest:
    """`table` is all of the JSON file `name` in `folder`; `files` are the files that it lists."""

    folder: Path
    name: str
    table: dict[str, Any]
    files: dict[str, Size]

    @classmethod
    def of(cls, folder: Path, name: str = STATE) -> Self:
        """Reads the manifest `name` of a folder.

        Raises: UserError if it is missing, is no such table, or lists a name that is not a plain one.
        """
        unread = cls(folder, name, {}, {})
        with unread._with_cure(name):
            table = parse_json(read_text(folder / name, inside=folder), folder / name)
        return cls(folder, name, table, unread._files_of(table))

    def read(self, name: str, most: int = MAX_SIZE) -> bytes:
        """The content of a listed file of at most `most` bytes, which has the size and the checksum listed.

        Raises: UserError if it is not listed, missing, too large, truncated or changed.
        """
        return b"".join(self.pieces(name, most))

    def text(self, name: str) -> str:
        """`read` of a text file.

        Raises: UserError as `read`, or if it is not UTF-8.
        """
        content = self.read(name, MAX_BYTES)
        with self._with_cure(name):
            return decoded(content, self.folder / name)

    def check(self, name: str) -> None:
        """As `read`, but the content is not kept."""
        for _ in self.pieces(name):
            pass

    def check_sizes(self) -> None:
        """Raises: UserError if a listed file is missing or has another size."""
        for name in self.files:
            self.opened(name).close()

    def error(self, name: str, problem: str) -> UserError:
        """The message about the file `name` of the folder, with the cure."""
        if not self.folder.exists():
            cure = "Its run has removed it meanwhile (training.checkpoints.keep): take a newer one."
        elif self.name == EXPORT:
            cure = "Export again: tutti export RUN --to FOLDER."
        else:
            cure = f"Delete the folder {self.folder} to continue from the checkpoint before it."
        return UserError(f"{self.folder / name}: {problem} {cure}")

    def _files_of(self, table: dict[str, Any]) -> dict[str, Size]:
        """The table `files` of the manifest. Raises: UserError saying what is wrong with it."""
        files = table.get("files")
        if not isinstance(files, dict):
            raise self.error(self.name, "its key 'files' is no table.")
        for name, size in files.items():
            if not _NAME.fullmatch(name):
                raise self.error(self.name, f"it lists {name[:80]!r}, which is no plain name of a file.")
            known = isinstance(size, dict) and {key: type(value) for key, value in size.items()}
            forms = ({"bytes": int, "crc32": int}, {"bytes": int, "sha256": str})
            if known not in forms or size["bytes"] < 0:
                raise self.error(self.name, f"it has no size and checksum of {name}.")
        return files

    def opened(self, name: str, most: int = MAX_SIZE) -> BinaryIO:
        """A listed file, found to have the size listed. Raises: UserError if not."""
        if name not in self.files:
            raise self.error(self.name, f"lists no file {name}.")
        expected = self.files[name]["bytes"]
        if expected > most:
            raise self.error(name, f"expected at most {most} bytes, found {expected}.")
        with self._with_cure(name):
            file = open_plain(self.folder / name, inside=self.folder)
        size = os.fstat(file.fileno()).st_size
        if size != expected:
            file.close()
            damage = "truncated" if size < expected else "damaged"
            raise self.error(name, f"{damage}, {expected} bytes expected, {size} found.")
        return file

    def pieces(self, name: str, most: int = MAX_SIZE) -> Iterator[bytes]:
        """As `read`, piece by piece. A wrong checksum is raised after the last one."""
        with self.opened(name, most) as file, self._with_cure(name):
            ((kind, expected),) = ((k, value) for k, value in self.files[name].items() if k != "bytes")
            digest = HASHES[kind]()
            while piece := file.read(PIECE):
                digest.update(piece)
                yield piece
        if digest.hexdigest() != expected:
            raise self.error(name, "damaged, its checksum differs.")

    @contextmanager
    def _with_cure(self, name: str) -> Iterator[None]:
        """Ends an error about the file `name` with the cure."""
        try:
            yield
        except OSError as error:
            raise self.error(name, f"cannot be read ({error.strerror or error}).") from error
        except UserError as error:
            raise self.error(name, str(error).removeprefix(f"{self.folder / name}: ")) from error

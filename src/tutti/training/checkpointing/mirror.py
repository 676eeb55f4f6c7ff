"""Copies checkpoints to an object store, or any file system of fsspec, in the background, and verified."""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path
from typing import Any

from tutti.storage.manifest import HASHES, PIECE, STATE, Manifest
from tutti.trackers.logger import Start
from tutti.types import UserError

log = logging.getLogger("tutti.training")

TRIES, PAUSE = 3, 5.0
"""Tries of a checkpoint, and the seconds after the first failure; twice as many after each further one."""
END_SECONDS = 300.0
"""How long the end of a training waits for its last copies."""
BLOCK = 1 << 26
"""Bytes that go to a store, or come from it, at once. S3 takes 10,000 such parts of a file, so 670 GB."""


class Mirror:
    """Copies checkpoints to URL/RUN-ID/step-N in a thread, one at a time, always the newest next.

    The ID is kept in the run's folder. Another run of this name, or this one begun anew, has another: none
    writes over what another has copied. Of those that come while a copy is made only the newest is copied: a
    store that is too slow for all of them has that.

    A copy counts when its state.json is there, which comes last and lists size and checksum of every file.
    Each file is read back and compared before that. No copy is ever deleted there. A failure is said and
    stops no training.
    """

    def __init__(self, url: str, run: Path) -> None:
        self._url, self._run = url.rstrip("/"), run
        self.held = [Path(), Path()]
        """What must not be deleted yet: the checkpoint that is being copied, and the newest; first, none."""
        self._queue: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def send(self, folder: Path) -> None:
        """Begins to copy a whole checkpoint, when the copy that is being made is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tutti-mirror", daemon=True)
            self._thread.start()
        self.held[1] = folder
        self._queue.put(folder)

    def close(self) -> None:
        """Waits until the newest is copied, END_SECONDS at most."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            log.warning("no copy in %s after %.0f s; the same command makes it", self._url, END_SECONDS)
        self._thread = None

    def _work(self) -> None:
        while (folder := self._queue.get()) is not None:
            if folder == self.held[1]:  # else a newer one has taken its place
                self.held[0] = folder
                self._copy(folder)
                self.held[0] = Path()

    def _copy(self, folder: Path) -> None:
        for number in range(TRIES):
            try:
                name = f"{self._run.resolve().name}-{Start(run=self._run, name='').identity('mirror')}"
                return copy_checkpoint(folder, f"{self._url}/{name}/{folder.name}")
            except Exception as error:  # a store may raise anything
                last = number == TRIES - 1 or not folder.exists()  # a rollback deletes it
                how = "it has no copy there" if last else "it is tried again"
                log.warning("%s could not be copied to %s, %s: %s", folder.name, self._url, how, error)
                if last:
                    return
                time.sleep(PAUSE * 2**number)


def copy_checkpoint(folder: Path, target: str) -> None:
    """Copies a checkpoint to an fsspec address, unless a whole copy of it is there. In pieces, both ways: a
    file may be larger than the memory that the training leaves.

    Raises: UserError where a file is not what the checkpoint's state.json lists, here or there; whatever the
    store raises.
    """
    import fsspec

    found: Any = fsspec.url_to_fs(target)
    system, root = found
    manifest, state, mark = Manifest.of(folder), (folder / STATE).read_bytes(), f"{root}/{STATE}"
    if system.exists(mark):
        if system.cat_file(mark) == state:
            return
        system.rm_file(mark)  # first: the step was made anew, after a rollback, and its files are replaced
    for name, size in manifest.files.items():
        path = f"{root}/{name}"
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        with system.open(path, "wb", block_size=BLOCK) as file:
            for piece in manifest.pieces(name):
                file.write(piece)
        ((digest, expected),) = ((HASHES[kind](), value) for kind, value in size.items() if kind != "bytes")
        with system.open(path, "rb", block_size=BLOCK) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
            if (file.tell(), digest.hexdigest()) != (size["bytes"], expected):
                raise UserError(f"{target}/{name}: what was read back is not what was written.")
    system.pipe_file(mark, state)
    if system.cat_file(mark) != state:
        raise UserError(f"{target}/{STATE}: what was read back is not what was written.")

"""JPEG frames: one memory-mapped file a view with an index of offsets, decoded when a batch is gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from tutti.data.cache.building import FrameFiles, build
from tutti.data.cache.frames import ARRAYS, Frames
from tutti.data.episodes import EpisodeStore, Progress
from tutti.data.formats.pictures import decode_picture
from tutti.errors import UserError
from tutti.storage.reading import shown

Decode = Callable[[Any], UInt8[np.ndarray, "s s 3"]]
Packed = list[list[bytes]]
"""For each view its pictures."""


class JpegFiles(FrameFiles):
    """For each view the JPEG files of all rows behind one another, and where each begins and the last ends.

    Chroma is halved, as usual. Pillow alone encodes, so that the bytes are those of its libjpeg.
    """

    def __init__(self, store: EpisodeStore, folder: Path, image_size: int, quality: int) -> None:
        self.quality, self.label = quality, f" (JPEG, quality {quality})"
        self.key = {"kind": "jpeg", "quality": quality}
        views = range(len(store.spec.views))
        self.names = (*(f"{n}.jpegs" for n in views), *(f"{n}-offsets.i64" for n in views))
        super().__init__(store, folder, image_size)

    def sizes(self, said: Mapping[str, Any], rows: int) -> list[int]:
        """As was said of the pictures; an offset more than rows."""
        return [*map(int, said["bytes"]), *[8 * (rows + 1)] * self.shape[1]]

    def begin(self, files: Sequence[IO[bytes]], said: Mapping[str, Any]) -> None:
        """Cuts off what lies behind the last finished shard."""
        views = self.shape[1]
        self._pictures, self._offsets = files[:views], files[views:]
        self._bytes = list(said["bytes"]) if said else [0] * views
        end = int(said["end"]) if said else 0
        for file, size in zip(files, self.sizes({"bytes": self._bytes}, end), strict=True):
            file.truncate(size)
            file.seek(size)
        if not said:
            for file in self._offsets:
                file.seek(0)
                file.write(np.zeros(1, np.int64).tobytes())

    def pack(self, pictures: UInt8[np.ndarray, "k v 3 s s"]) -> Packed:
        """Encoded, view by view."""
        upright = np.ascontiguousarray(pictures.transpose(1, 0, 3, 4, 2))
        return [[self._encoded(picture) for picture in view] for view in upright]

    def write(self, first: int, packed: Packed) -> None:
        """Behind what is there."""
        for view, pictures in enumerate(packed):
            ends = self._bytes[view] + np.cumsum([len(one) for one in pictures], dtype=np.int64)
            self._pictures[view].write(b"".join(pictures))
            self._offsets[view].write(ends.tobytes())
            self._bytes[view] = int(ends[-1])

    def state(self) -> dict[str, Any]:
        """Bytes of each view."""
        return {"bytes": list(self._bytes)}

    def expected(self, rows: int) -> int:
        """In proportion to those that are there; before, as long as the index."""
        index = 8 * self.shape[1] * (self.shape[0] + 1)
        return index + round(sum(self._bytes) / rows * self.shape[0]) if rows else index

    def _encoded(self, picture: UInt8[np.ndarray, "s s 3"]) -> bytes:
        buffer = BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


class JpegFrames(Frames):
    """The pictures of complete JpegFiles, decoded by simplejpeg where it is installed, else by Pillow, to the
    same pixels."""

    def __init__(self, files: JpegFiles, threads: int = 1) -> None:
        self.shape, self._home = files.shape, files.home
        views, self._paths = files.shape[1], files.paths()
        mapped = [np.memmap(path, np.uint8, "r") for path in self._paths]
        # Plain arrays over the same pages, as of raw frames.
        self._pictures = [np.asarray(one) for one in mapped[:views]]
        self._offsets = [np.asarray(one).view(np.int64) for one in mapped[views:]]
        self._decode = decoder(files.image_size)
        self._threads, self._pool = (
            threads,
            ThreadPoolExecutor(threads, "tutti-jpeg") if threads > 1 else None,
        )

    def gather(self, wanted: Sequence[Int64[np.ndarray, " _"]]) -> list[UInt8[np.ndarray, "_ v 3 s s"]]:
        """Each picture is decoded once for every place that it is wanted in."""
        out = [ARRAYS.empty((len(rows), *self.shape[1:])) for rows in wanted]
        pieces = [
            (rows[first :: self._threads], pictures[first :: self._threads])
            for rows, pictures in zip(wanted, out, strict=True)
            for first in range(self._threads)
        ]
        for _ in (self._pool.map if self._pool else map)(self._fill, *zip(*pieces, strict=True)):
            pass
        return out

    def _fill(self, rows: Int64[np.ndarray, " b"], out: UInt8[np.ndarray, "b v 3 s s"]) -> None:
        for view, (content, offsets) in enumerate(zip(self._pictures, self._offsets, strict=True)):
            for place, (row, begin, end) in enumerate(
                zip(rows.tolist(), offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
            ):
                try:
                    out[place, view] = self._decode(content[begin:end]).transpose(2, 0, 1)
                except Exception as error:  # decoders raise whatever damaged bytes lead to
                    why = shown(str(error), 200, quoted=False)
                    raise UserError(
                        f"{self._paths[view]}: the picture of frame row {row} cannot be decoded: {why}.\n"
                        f"  cure: delete the folder {self._home}; the next run builds it anew."
                    ) from error


def decoder(size: int) -> Decode:
    """From the bytes of a JPEG of `size` pixels an edge to its RGB pixels."""
    shape = (size, size, 3)
    try:
        import simplejpeg  # pyright: ignore[reportMissingImports]
    except ImportError:
        return lambda content: decode_picture(bytes(content), shape, "the frame cache")

    def decode(content: Any) -> UInt8[np.ndarray, "s s 3"]:
        # A buffer of the right size: a damaged header cannot ask for more.
        return simplejpeg.decode_jpeg(content, "RGB", buffer=np.empty(shape, np.uint8))

    return decode


def jpeg_frames(
    store: EpisodeStore,
    folder: Path,
    image_size: int,
    *,
    quality: int = 90,
    threads: int = 1,
    progress: Progress | None = None,
) -> JpegFrames:
    """The frames of a store's episodes as JPEG files below `folder`, which are built where they are not there
    (`build`). Raises: UserError where a picture cannot be read, or the disk has not the room."""
    files = JpegFiles(store, folder, image_size, quality)
    build(files, progress)
    return JpegFrames(files, threads)

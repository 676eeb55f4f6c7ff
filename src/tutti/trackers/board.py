"""TensorBoard's event files in RUN/tensorboard, and JSON lines in a file of one's own."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils.tensorboard.writer import SummaryWriter

from tutti.trackers.logger import Logger, Start

GIF_FRAMES, GIF_MILLISECONDS = 50, 100


class TensorBoardLogger(Logger):
    """Curves, the config as text, the first batch, and videos as moving pictures."""

    def __init__(self, start: Start) -> None:
        self.folder = start.run / "tensorboard"
        self._begin(start.step + 1 if start.trains else None)

    def rewind(self, step: int) -> None:
        self.close()
        self._begin(step + 1)

    def _begin(self, first: int | None) -> None:
        """A new file of events; from the step `first` on it replaces what was told before."""
        self._board: SummaryWriter | None = SummaryWriter(str(self.folder), purge_step=first)

    def scalars(self, step: int, kind: str, values: Mapping[str, float], seconds: float) -> None:
        for name, value in values.items():
            self._open.add_scalar(name, value, step, walltime=seconds)

    def text(self, name: str, text: str, step: int) -> None:
        indented = "".join(
            f"    {line}\n" for line in text.splitlines()
        )  # Markdown's way to leave it as it is
        self._open.add_text(name, indented, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._add_image(name, path.read_bytes(), step)

    def video(self, name: str, path: Path, step: int) -> None:
        self._add_image(name, as_gif(path), step)

    def close(self) -> None:
        if (board := getattr(self, "_board", None)) is not None:
            self._board = None
            board.close()

    @property
    def _open(self) -> SummaryWriter:
        assert self._board is not None
        return self._board

    def _add_image(self, name: str, content: bytes, step: int) -> None:
        """The file as it is: TensorBoard shows PNG and GIF."""
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        writer = self._open.file_writer
        assert writer is not None
        writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)


class JsonLinesLogger(Logger):
    """All that a tracker is told, one JSON object a line, appended to a file."""

    def __init__(self, start: Start, path: Path) -> None:
        self._run, self._file = start.name, path.open("a", encoding="utf-8")

    def _write(self, step: int, **values: Any) -> None:
        self._file.write(json.dumps({"run": self._run, "step": step, **values}, ensure_ascii=False) + "\n")
        self._file.flush()

    def scalars(self, step: int, kind: str, values: Mapping[str, float], seconds: float) -> None:
        self._write(step, kind=kind, time=seconds, **values)

    def text(self, name: str, text: str, step: int) -> None:
        self._write(step, kind="text", name=name, text=text)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._write(step, kind="picture", name=name, path=str(path))

    def video(self, name: str, path: Path, step: int) -> None:
        self._write(step, kind="video", name=name, path=str(path))

    def rewind(self, step: int) -> None:
        self._write(step, kind="rewind")

    def close(self) -> None:
        self._file.close()


def as_gif(path: Path) -> bytes:
    """An MP4 file as a GIF of at most GIF_FRAMES pictures."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    some = frames[:: -(-len(frames) // GIF_FRAMES)]
    content = io.BytesIO()
    options = {"save_all": True, "append_images": some[1:], "duration": GIF_MILLISECONDS, "loop": 0}
    some[0].save(content, format="GIF", **options)
    return content.getvalue()

"""Writes and reads the videos of a LeRobotDataset with PyAV: one mp4 per camera and file number."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Float64, UInt8

from tutti.data.formats.lerobot.metadata import data_error

CODEC = "libsvtav1"
OPTIONS = {"crf": "30", "preset": "12", "svtav1-params": "fast-decode=0"}
KEYFRAME_EVERY = 2
FILE_BYTES = 200 * 2**20
FILES_PER_CHUNK = 1000
_OPEN_FILES = 4
_FORWARD_SECONDS = 0.5
"""A frame this little ahead is reached by decoding on; further ahead a seek is cheaper."""


class VideoWriter:
    """Episodes end to end into the mp4 files of one camera; a new file when one reaches its full size."""

    def __init__(self, folder: Path, view: str, pattern: str, fps: int | float) -> None:
        self._folder, self._view, self._pattern = folder, view, pattern
        self._rate = Fraction(fps).limit_denominator(1000)
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._number, self._frames, self._bytes = -1, 0, 0

    def describe(self, shape: list[int]) -> dict[str, Any]:
        """The `info` entry of the feature."""
        height, width, channels = shape
        if height % 2 or width % 2:
            problem = f"{self._view}: pictures of {height}x{width} pixels cannot be stored as yuv420p video."
            raise data_error(problem, cure="record with even sizes, or use storage='image'.")
        return {
            "video.height": height,
            "video.width": width,
            "video.codec": "av1",
            "video.pix_fmt": "yuv420p",
            "is_depth_map": False,
            "video.fps": float(self._rate),
            "video.channels": channels,
            "has_audio": False,
            "video.g": KEYFRAME_EVERY,
            "video.crf": int(OPTIONS["crf"]),
        }

    def add(self, images: UInt8[np.ndarray, "t h w 3"]) -> tuple[int, int, float, float]:
        """Encodes one episode; gives (chunk index, file index, from, to) with times in seconds."""
        if self._container is None or self._bytes >= FILE_BYTES:
            self._open(images.shape[1], images.shape[2])
        assert self._stream is not None
        start = self._frames
        for image in images:
            frame = VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = self._frames, 1 / self._rate
            self._mux(frame)
            self._frames += 1
        chunk, file = divmod(self._number, FILES_PER_CHUNK)
        return chunk, file, float(start / self._rate), float(self._frames / self._rate)

    def close(self) -> None:
        """Flushes the encoder and closes the file."""
        if self._container is None:
            return
        container, self._container = self._container, None
        assert self._stream is not None
        try:
            container.mux(self._stream.encode(None))
        finally:
            container.close()

    def _mux(self, frame: VideoFrame) -> None:
        assert self._stream is not None and self._container is not None
        for packet in self._stream.encode(frame):
            self._bytes += packet.size
            self._container.mux(packet)

    def _open(self, height: int, width: int) -> None:
        self.close()
        self._number, self._frames, self._bytes = self._number + 1, 0, 0
        chunk, file = divmod(self._number, FILES_PER_CHUNK)
        path = self._folder / self._pattern.format(video_key=self._view, chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("SVT_LOG", "1")  # errors only; else every file prints a page of settings
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        stream = self._container.add_stream(CODEC, rate=self._rate, options=dict(OPTIONS))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = KEYFRAME_EVERY
        stream.codec_context.thread_count = 1
        self._stream = stream


@dataclass(slots=True)
class _Decoder:
    """One open mp4, where its decoder stands, and the last picture it gave."""

    container: InputContainer
    stream: VideoStream
    frames: Iterator[VideoFrame]
    time: float
    last: UInt8[np.ndarray, "h w 3"] | None


class VideoReader:
    """Exact frames of mp4 files by time; keeps a few files open, and decodes on one thread."""

    def __init__(self, fps: float) -> None:
        # Half a frame would be ambiguous; pts are exact in files that LeRobot or this project wrote.
        self._tolerance = 0.25 / fps
        self._open: OrderedDict[Path, _Decoder] = OrderedDict()

    def read(self, path: Path, times: Float64[np.ndarray, " k"]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The pictures of `path` at `times` (seconds, ascending).

        Raises UserError where the file is missing or damaged, or has no frame at a time asked for.
        """
        try:
            decoder = self._decoder(path)
            for time in times.tolist():
                yield self._frame(decoder, path, time)
        except (av.error.FFmpegError, IndexError) as error:
            self._open.pop(path, None)
            raise data_error(
                f"{path} cannot be decoded: {error}.",
                expected="a complete mp4 file",
                found="one that is truncated, damaged or without video",
            ) from error

    def _decoder(self, path: Path) -> _Decoder:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= _OPEN_FILES:
            self._open.popitem(last=False)[1].container.close()
        container = av.open(str(path), "r")
        stream = container.streams.video[0]
        # Threads inside a decoder cost up to 2.6 times the CPU at one frame a call.
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        decoder = _Decoder(container, stream, container.decode(stream), -np.inf, None)
        self._open[path] = decoder
        return decoder

    def _frame(self, decoder: _Decoder, path: Path, time: float) -> UInt8[np.ndarray, "h w 3"]:
        if decoder.last is not None and abs(decoder.time - time) <= self._tolerance:
            return decoder.last
        if not 0.0 < time - decoder.time <= _FORWARD_SECONDS:
            base = decoder.stream.time_base
            assert base is not None
            decoder.container.seek(int(time / base), stream=decoder.stream, backward=True, any_frame=False)
            decoder.frames = decoder.container.decode(decoder.stream)
        for frame in decoder.frames:
            if frame.time is not None and frame.time >= time - self._tolerance:
                decoder.time, decoder.last = frame.time, frame.to_ndarray(format="rgb24")
                break
        else:
            decoder.time, decoder.last = -np.inf, None
        if decoder.last is None or abs(decoder.time - time) > self._tolerance:
            found = f"the next frame is at {decoder.time:.4f} s" if decoder.last is not None else "the end"
            raise data_error(
                f"{path} has no frame at {time:.4f} s (within {self._tolerance:.4f} s); {found}.",
                expected="the frame that timestamp and from_timestamp of the data set name",
                cure="copy or convert the data set again; video and meta do not belong together.",
            )
        return decoder.last

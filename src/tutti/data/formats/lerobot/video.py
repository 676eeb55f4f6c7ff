"""Writes and reads the videos of a LeRobotDataset with PyAV: one mp4 per camera and file number."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import Float64, Int64, UInt8

from tutti.data.formats.chosen import TOLERANCE
from tutti.data.formats.errors import data_error, no_permission
from tutti.errors import UserError
from tutti.storage.opened import Opened

CODEC = "libsvtav1"
OPTIONS = {"crf": "30", "preset": "12", "svtav1-params": "fast-decode=0"}
KEYFRAME_EVERY = 2
FILE_BYTES = 200 * 2**20
FILES_PER_CHUNK = 1000
Span = tuple[int, int, float, float]
"""Where an episode lies: chunk index, file index, and its times from and to in that file (s)."""
_OPEN_FILES = 64
_SEEK_COST, _SEEN = 0.5, 8
"""What a seek itself costs, in decoded frames, and of how many of them what follows a seek is the mean."""
_SAME_IN_PLANES, _PLANE_STEP = ("yuv420p", "yuvj420p"), 32
"""Pixels of which FFmpeg makes the same RGB bytes channel by channel, if the width is a multiple of this."""


@contextmanager
def priority_kept() -> Iterator[None]:
    """Inside, video may be encoded; afterwards this thread is scheduled as before.

    SVT-AV1 makes the thread that opens it a real-time one (SCHED_FIFO 99) where the process is root's, as in
    most containers. It would stay so, with every thread that it starts: a training whose threads wait for
    each other in loops then takes all cores from whatever it waits for.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, parameters)


class VideoWriter:
    """Episodes end to end into the mp4 files of one camera; a new file when one reaches its full size."""

    def __init__(self, folder: Path, view: str, pattern: str, fps: int | float) -> None:
        self._folder, self._view, self._pattern = folder, view, pattern
        self._rate = Fraction(fps).limit_denominator(1000)
        self._container: Any = None
        self._stream: Any = None
        self._encodes = False
        self._number, self._frames, self._bytes = -1, 0, FILE_BYTES  # none is open

    def describe(self, shape: list[int]) -> dict[str, Any]:
        """The `info` entry of the feature."""
        height, width, channels = shape
        if height % 2 or width % 2:
            problem = f"{self._view}: pictures of {height}x{width} pixels cannot be stored as yuv420p video."
            cure = (
                "record with even sizes, or store PNG (storage='image', tutti data convert --pictures png)."
            )
            raise data_error(problem, cure=cure)
        info = {"height": height, "width": width, "codec": "av1", "pix_fmt": "yuv420p"}
        described = {f"video.{name}": value for name, value in info.items()} | {"is_depth_map": False}
        described |= {"video.fps": float(self._rate), "video.channels": channels, "has_audio": False}
        return described | {"video.g": KEYFRAME_EVERY, "video.crf": int(OPTIONS["crf"])}

    def add(self, images: Iterable[UInt8[np.ndarray, "h w 3"]]) -> Span:
        """Encodes one episode; gives where it lies."""
        start = None
        for image in images:
            with priority_kept():  # the first frame opens the encoder
                if start is None:
                    start = self._next_episode()
                    self._stream = self._stream or self._encoder(*image.shape[:2])
                frame = VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = self._frames, 1 / self._rate
                for packet in self._stream.encode(frame):
                    self._mux(packet)
                self._frames += 1
        return self._span(start or 0)

    def join(self, path: Path) -> Span:
        """Appends one episode that was encoded before, a file of its own, as it is; gives where it lies."""
        start = self._next_episode()
        with av.open(str(path), "r", format="mp4") as source:
            stream = source.streams.video[0]
            self._stream = self._stream or self._container.add_stream_from_template(stream, opaque=True)
            base: Any = stream.time_base
            moved = round(start / (self._rate * base))
            for packet in source.demux(stream):
                if packet.pts is not None and packet.dts is not None:
                    packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
                    packet.stream = self._stream
                    self._mux(packet)
                    self._frames += 1
        return self._span(start)

    def close(self) -> None:
        """Flushes the encoder and closes the file."""
        container, self._container = self._container, None
        stream, self._stream, encodes = self._stream, None, self._encodes
        if container is not None:
            with container:
                if encodes:
                    container.mux(stream.encode(None))

    def _mux(self, packet: Any) -> None:
        self._bytes += packet.size
        self._container.mux(packet)

    def _span(self, start: int) -> Span:
        chunk, file = divmod(self._number, FILES_PER_CHUNK)
        return chunk, file, float(start / self._rate), float(self._frames / self._rate)

    def _next_episode(self) -> int:
        """The frame at which an episode begins, in a new file where the old one is full."""
        if self._bytes >= FILE_BYTES:
            self.close()
            self._number, self._frames, self._bytes, self._encodes = self._number + 1, 0, 0, False
            chunk, file = divmod(self._number, FILES_PER_CHUNK)
            named = self._pattern.format(video_key=self._view, chunk_index=chunk, file_index=file)
            path = self._folder / named
            path.parent.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("SVT_LOG", "1")  # errors only; else every file prints a page of settings
            self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        return self._frames

    def _encoder(self, height: int, width: int) -> Any:
        stream = self._container.add_stream(CODEC, rate=self._rate, options=dict(OPTIONS))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = KEYFRAME_EVERY, 1
        self._encodes = True
        return stream


class VideoReader:
    """Exact frames of mp4 files by time; keeps a few files open, and decodes on one thread."""

    def __init__(self, fps: float, allowed: float = TOLERANCE) -> None:
        # Half a frame would be ambiguous; pts are exact in files that LeRobot or this project wrote.
        self._tolerance, self._allowed = TOLERANCE / fps, allowed / fps

        def opens(path: Path, near: float = self._tolerance) -> _Decoder:
            return _Decoder(path, near)

        self._open = Opened(opens, _OPEN_FILES, lambda decoder: decoder.container.close())
        self._times: dict[Path, Float64[np.ndarray, " n"]] = {}

    def read(
        self, path: Path, times: Float64[np.ndarray, " k"], planes: bool = False
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The pictures of `path` at `times` (seconds, ascending), channel by channel if asked and free.

        Raises UserError where the file is missing or damaged, or has no frame at a time asked for.
        """
        try:
            decoder = self._open[path]
            decoder.planes = planes
            yield from map(decoder.frame, times.tolist())
        except (av.error.FFmpegError, IndexError) as error:
            self._open.drop(path)
            raise _undecodable(path, error) from error

    def by_number(
        self,
        path: Path,
        span: tuple[float, float],
        times: Float64[np.ndarray, " k"],
        frames: Int64[np.ndarray, " k"],
        length: int,
    ) -> Float64[np.ndarray, " k"]:
        """The exact times of these `frames` of an episode that lies at `span` (seconds) in a video.

        Where as many frames as the episode has, `length`, lie there, they are taken in order; else the one
        nearest to each of `times`, if it is as near as allowed.
        """
        if path not in self._times:
            try:
                self._times[path] = frame_times(path)
            except (av.error.FFmpegError, IndexError) as error:
                raise _undecodable(path, error) from error
        first, last = np.searchsorted(self._times[path], np.array(span) - 2 * self._tolerance)
        stored = self._times[path][first:last]
        if len(stored) == length:
            return stored[frames]
        nearest = stored[np.abs(stored - times[:, None]).argmin(1)] if len(stored) else times
        return np.where(np.abs(nearest - times) <= self._allowed, nearest, times)


def _undecodable(path: Path, error: Exception) -> UserError:
    if isinstance(error, PermissionError):
        return no_permission(path)
    found = "one that is truncated, damaged or without video"
    return data_error(f"{path} cannot be decoded: {error}.", expected="a complete mp4 file", found=found)


def frame_times(path: Path) -> Float64[np.ndarray, " n"]:
    """The time of each frame of a video in seconds, ascending, without decoding a picture."""
    with av.open(str(path), "r", format="mp4") as container:
        stream = container.streams.video[0]
        stamps = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        base: Any = stream.time_base
        return np.array([float(stamp * base) for stamp in stamps])


def frames_and_end(path: Path) -> tuple[int, float]:
    """How many frames a video has by its header, 0 where that does not tell, and when the last ends (s)."""
    try:
        with av.open(str(path), "r", format="mp4") as container:
            stream = container.streams.video[0]
            base: Any = stream.time_base
            start, duration = stream.start_time or 0, stream.duration
            return stream.frames, np.inf if duration is None else float((start + duration) * base)
    except (av.error.FFmpegError, IndexError) as error:
        raise _undecodable(path, error) from error


class _Decoder:
    """One open mp4, the place at which its decoder stands, and the last picture it gave.

    A frame ahead is reached by decoding on where that takes no more frames than a seek did of late: to the
    keyframe before it and on from there.
    """

    def __init__(self, path: Path, tolerance: float) -> None:
        self._path = path
        self.container = av.open(str(path), "r", format="mp4")
        self._stream = self.container.streams.video[0]
        # Threads inside a decoder cost up to 2.6 times the CPU at one frame a call.
        self._stream.thread_type, self._stream.codec_context.thread_count = "NONE", 1
        self._frames = self.container.decode(self._stream)
        base: Any = self._stream.time_base
        # A frame's own reformatter would prepare the conversion of its colours anew each time.
        self._base, self._colours = float(base), VideoReformatter()
        self._near = tolerance / self._base
        self._step = 1 / (float(self._stream.average_rate or 30) * self._base)
        self._place, self._last = -np.inf, np.empty(0, np.uint8)
        self._reach, self.planes = 1.0, False

    def frame(self, time: float) -> UInt8[np.ndarray, "h w 3"]:
        """The picture at a time in seconds, valid until the next call."""
        wanted = time / self._base
        if abs(self._place - wanted) <= self._near:
            return self._last
        sought = not 0.0 < wanted - self._place <= (self._reach + _SEEK_COST) * self._step
        if sought:
            self.container.seek(int(wanted), stream=self._stream, backward=True, any_frame=False)
            self._frames = self.container.decode(self._stream)
        self._place, least, count = -np.inf, wanted - self._near, 0
        for frame in self._frames:
            count += 1
            if frame.pts is not None and frame.pts >= least:
                self._place, self._last = frame.pts, self._pixels(frame)
                break
        if sought:
            self._reach += (count - self._reach) / _SEEN
        if abs(self._place - wanted) > self._near:
            at, within = self._place * self._base, self._near * self._base
            found = "the end" if self._place == -np.inf else f"the next frame is at {at:.4f} s"
            raise data_error(
                f"{self._path} has no frame at {time:.4f} s (within {within:.4f} s); {found}.",
                expected="the frame that timestamp and from_timestamp of the data set name",
                cure="copy or convert the data set again, if video and meta do not belong together; of times "
                "by a clock take the frames by number: sources.tolerance=0.5 (in frames).",
            )
        return self._last

    def _pixels(self, frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        """Its RGB bytes, where the decoder's library holds them: rows may have a gap behind them."""
        if self.planes and frame.format.name in _SAME_IN_PLANES and frame.width % _PLANE_STEP == 0:
            green, blue, red = self._colours.reformat(frame, format="gbrp").planes
            apart = np.empty((3, frame.height, frame.width), np.uint8)
            for target, plane in zip(apart, (red, green, blue), strict=True):
                target[:] = _rows(plane)
            return apart.transpose(1, 2, 0)
        plane: Any = self._colours.reformat(frame, format="rgb24").planes[0]
        return _rows(plane, 3).reshape(plane.height, plane.width, 3)


def _rows(plane: Any, channels: int = 1) -> UInt8[np.ndarray, "h _w"]:
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : channels * plane.width]

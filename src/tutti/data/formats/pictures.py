"""Decodes the pictures that data sets of any format keep as PNG, JPEG or WEBP, within bounds."""

from __future__ import annotations

import importlib.util
import struct
from functools import cache
from io import BytesIO
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from tutti.data.formats.interface import MAX_EDGE

PICTURES = ("PNG", "JPEG", "WEBP")
SAMPLED_BYTES = 2**28
"""Bytes of pictures of a view that its digests look at, at most."""
BLOCK = 2**16
_of_thread = local()


def open_picture(content: bytes) -> Image.Image:
    """A picture whose size and mode are known; nothing is decoded yet. Of Pillow's many formats, some of
    which start other programs, only `PICTURES` are tried.

    Raises: ValueError for another format, and what Pillow raises.
    """
    try:
        return Image.open(BytesIO(content), formats=PICTURES)
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(PICTURES)}") from None


def picture_size(content: bytes) -> tuple[int, int]:
    """(height, width) of a picture by its header. Raises: ValueError if it is too large, or no picture."""
    with open_picture(content) as image:
        if max(image.size) > MAX_EDGE:
            raise ValueError(f"it has {image.height} x {image.width} pixels; {MAX_EDGE} an edge are read")
        return image.height, image.width


def decode_picture(content: bytes, shape: tuple[int, ...], promised_by: str) -> UInt8[np.ndarray, "h w 3"]:
    """A picture's RGB bytes. Its size is looked at first, so that a small file cannot fill the memory;
    `promised_by` names what says that it is `shape` (h, w, 3).

    Raises: ValueError for another size, or other than 8-bit RGB, and what Pillow raises.
    """
    fast = _plain_jpeg if content.startswith(b"\xff\xd8") else _plain_png
    if (picture := fast(content, shape)) is not None:
        return picture
    with open_picture(content) as image:
        if (image.height, image.width) != tuple(shape[:2]):
            raise ValueError(f"it has {image.height} x {image.width} pixels; {promised_by} says {shape}")
        deep = image.format == "PNG" and content[24] != 8  # Pillow would cut 16 bits a channel to 8
        if image.mode != "RGB" or deep:
            raise ValueError(
                f"it is {'16-bit ' if deep else ''}{image.mode}; convert the pictures to 8-bit RGB"
            )
        return np.asarray(image)


@cache
def _simplejpeg() -> Any:
    """The package, or None where it is not installed: to look for it costs as much as a small picture."""
    return importlib.import_module("simplejpeg") if importlib.util.find_spec("simplejpeg") else None


def _plain_jpeg(content: bytes, shape: tuple[int, ...]) -> UInt8[np.ndarray, "h w 3"] | None:
    """The pixels of a colour JPEG of this size, by simplejpeg where it is installed, in half of Pillow's time
    and equal to its; None for any other picture and wherever anything is odd."""
    if (simplejpeg := _simplejpeg()) is None:
        return None
    try:
        if simplejpeg.decode_jpeg_header(content)[:3] != (*shape[:2], "YCbCr"):
            return None
        return simplejpeg.decode_jpeg(content, "RGB")
    except ValueError:
        return None


def _plain_png(content: bytes, shape: tuple[int, ...]) -> UInt8[np.ndarray, "h w 3"] | None:
    """The pixels of a whole 8-bit RGB PNG of this size, by FFmpeg, which takes two thirds of Pillow's time;
    None for any other picture and wherever anything is odd, which Pillow then sees to."""
    height, width = shape[:2]
    header = struct.pack(">8sI4sII5B", b"\x89PNG\r\n\x1a\n", 13, b"IHDR", width, height, 8, 2, 0, 0, 0)
    if not (content.startswith(header) and content.endswith(b"\0\0\0\0IEND\xaeB`\x82")):
        return None
    import av  # pictures are used where videos are not
    import av.error

    decoder: Any = getattr(_of_thread, "decoder", None)
    if decoder is None:
        decoder = av.CodecContext.create("png", "r")
        decoder.thread_type, decoder.thread_count = "NONE", 1
        decoder.options = {"err_detect": "crccheck+explode"}
    _of_thread.decoder = None  # it is not used again after an error
    packet = av.Packet(content)
    packet.is_keyframe = True  # else it would be drawn over the one before
    try:
        (frame,) = decoder.decode(packet)
    except (av.error.FFmpegError, ValueError):
        return None
    if frame.format.name != "rgb24" or (frame.height, frame.width) != (height, width):
        return None
    _of_thread.decoder = decoder
    picture = np.array(frame.to_ndarray())
    # FFmpeg does not mind where the data end before the picture does. Its memory is 0 at first and used
    # again: so a last row of 0 was drawn black, or not at all.
    np.frombuffer(frame.planes[0], np.uint8)[-frame.planes[0].line_size :] = 0
    return picture if picture[-1].any() else None


def as_rgb(content: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of any size as RGB, turned as its EXIF orientation says. Grey, palettes and CMYK are
    converted, what is transparent is laid on white. Its size is looked at before it is decoded.

    Raises: ValueError for an edge of over `MAX_EDGE` pixels or more than 8 bits a channel, and what Pillow
    raises.
    """
    picture_size(content)
    with open_picture(content) as image:
        if (image.format == "PNG" and content[24] > 8) or image.mode[0] in "IF":
            raise ValueError(f"it has over 8 bits a channel ({image.mode}); convert it to 8-bit RGB")
        image.load()
        found = ImageOps.exif_transpose(image)
        if found.has_transparency_data:
            found = found.convert("RGBA")
            found = Image.alpha_composite(Image.new("RGBA", found.size, (255, 255, 255, 255)), found)
        return np.asarray(found.convert("RGB"))


def resized(picture: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """A picture as a square of `size` pixels: triangle filter with antialiasing (Pillow's BILINEAR)."""
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))


def sampled_bytes(path: Path, most: int, block: int = BLOCK) -> bytes:
    """A file's content; its size and evenly spread blocks, at least four, where it is larger than `most`."""
    size = path.stat().st_size
    count = max(4, most // block)
    with path.open("rb") as file:
        if size <= count * block:
            return file.read()
        parts = [size.to_bytes(8, "little")]
        for place in np.linspace(0, size - block, count).astype(np.int64).tolist():
            file.seek(place)
            parts.append(file.read(block))
    return b"".join(parts)

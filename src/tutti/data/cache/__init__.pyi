from .choice import decide, open_frames
from .config import CacheConfig, CacheKind
from .decoding import resize_images
from .frames import Frames, gathered
from .jpeg import JpegFrames
from .live import LiveFrames
from .raw import cached_frames
from .sharing import give_back, share, shared

__all__ = [
    "CacheConfig",
    "CacheKind",
    "Frames",
    "JpegFrames",
    "LiveFrames",
    "cached_frames",
    "decide",
    "gathered",
    "give_back",
    "open_frames",
    "resize_images",
    "share",
    "shared",
]

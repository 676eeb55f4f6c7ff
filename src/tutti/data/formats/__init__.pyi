from .hdf5.reader import HDF5Reader
from .lerobot.pieces import EpisodeRecord
from .lerobot.reader import LeRobotStore
from .lerobot.writer import write_lerobot
from .picture_text.reader import PairsReader
from .rlds.reader import RldsReader
from .zarr.reader import ZarrReader

__all__ = [
    "EpisodeRecord",
    "HDF5Reader",
    "LeRobotStore",
    "PairsReader",
    "RldsReader",
    "ZarrReader",
    "write_lerobot",
]

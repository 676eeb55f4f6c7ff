from .hdf5.reader import HDF5Reader
from .lerobot.pieces import EpisodeRecord
from .lerobot.reader import LeRobotStore
from .lerobot.writer import write_lerobot
from .rlds.reader import RldsReader

__all__ = ["EpisodeRecord", "HDF5Reader", "LeRobotStore", "RldsReader", "write_lerobot"]

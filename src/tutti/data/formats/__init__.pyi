from .lerobot.reader import LeRobotStore
from .lerobot.writer import EpisodeRecord, write_lerobot

__all__ = ["EpisodeRecord", "LeRobotStore", "write_lerobot"]

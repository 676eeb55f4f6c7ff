from .checkpoint import Checkpoint, checkpoints, load, save, save_sharded, verify
from .files import write_atomically, write_folder
from .find_checkpoint import read_weights
from .layout import Weights
from .manifest import Manifest

__all__ = [
    "Checkpoint",
    "Manifest",
    "Weights",
    "checkpoints",
    "load",
    "read_weights",
    "save",
    "save_sharded",
    "verify",
    "write_atomically",
    "write_folder",
]

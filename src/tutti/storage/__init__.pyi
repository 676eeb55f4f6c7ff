from .checkpoint import Checkpoint, checkpoints, load, save, save_sharded, verify
from .files import write_atomically, write_folder
from .manifest import Manifest, Weights
from .tensors import read_weights

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

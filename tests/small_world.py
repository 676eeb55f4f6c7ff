"""What the small worlds of the tests share: sizes of the data, a small model, endless numbered batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tutti.storage.layout import EXPORT, STATE
from tutti.storage.manifest import crc32_of, sha256_of
from tutti.types import Batch, DataSpec

SPEC = DataSpec(
    views=("right", "left"),
    image_size=32,
    state_dim=4,
    action_dim=3,
    horizon=5,
    vocab_size=20,
    text_length=6,
    embodiments=("sawyer",),
    fps=20.0,
)
MODEL: dict[str, Any] = {
    "vision": {"stem": {"channels": (8, 16, 16)}, "width": 16},
    "language": {"width": 16},
    "fusion": {"width": 32, "depth": 1},
    "action": {"hidden": 32},
}


def relist(folder: Path, name: str = STATE) -> Path:
    """Makes the manifest of a checkpoint or an export list the files as they are. Gives the folder."""
    path, of = folder / name, sha256_of if name == EXPORT else crc32_of
    table = json.loads(path.read_text()) if path.exists() else {"step": 1}
    files = [file for file in folder.rglob("*") if file.is_file() and file != path]
    table["files"] = {str(file.relative_to(folder)): of(file.read_bytes()) for file in sorted(files)}
    path.write_text(json.dumps(table))
    return folder


class NumberedLoader:
    """Endless batches that know their place; batch number i, from 1, is `make(i)`."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make
        self.position = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.position += 1
            yield self.make(self.position)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

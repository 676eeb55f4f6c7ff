"""What the small worlds of the tests share: sizes of the data, a small model, endless numbered batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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


class NumberedLoader:
    """Endless batches that know their place; batch number i, from 1, is `make(i)`."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make
        self.position = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.position += 1
            yield self.make(self.position)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

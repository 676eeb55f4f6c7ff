"""Place: one robot of a model of several: its views, numbers and conventions, and where they lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8

from tutti.data.cache import resize_images
from tutti.data.conventions.conversion import Conversion
from tutti.data.conventions.served import Served
from tutti.serving.observation import Pictures, State, pictures, state_vector
from tutti.types import DataSpec, Robots, robots_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The robot `name` in a model of this `whole` spec; of one robot everything is its own. `learned` is what
    the model has of it, `spec` the same as it was recorded, before the `conversion`."""

    whole: DataSpec
    name: str
    learned: DataSpec
    spec: DataSpec
    conversion: Conversion | None
    needs_state: bool
    """False where the state changes nothing: the model does not read it, and no action is told by it."""

    @classmethod
    def of(
        cls,
        whole: DataSpec,
        name: str,
        served: Served | None,
        convention: int | Literal["learned"],
        *,
        reads_state: bool = True,
    ) -> Self:
        """Like the source number `convention`, where that is of it, else like the first that is.

        Raises: UserError for a number that is none.
        """
        learned, source = whole.alone(name), None
        if served is not None and convention != "learned":
            source = served.source_of(name, convention)
        if served is None or source is None:
            spec, conversion = learned, None
        else:
            spec, conversion = served.spec(learned, source), served.conversion(source)
        needs = learned.state_dim > 0 and (reads_state or conversion is not None)
        return cls(
            whole=whole, name=name, learned=learned, spec=spec, conversion=conversion, needs_state=needs
        )

    @property
    def shown(self) -> Bool[np.ndarray, " v"]:
        """Which of the model's views it has."""
        return np.array([view in self.learned.views for view in self.whole.views])

    @property
    def feels(self) -> bool:
        """Whether the model is told its state; where no robot has one, there is nothing to tell."""
        return self.learned.state_dim > 0 or self.whole.state_dim == 0

    def rows(self, count: int, device: torch.device) -> Robots | None:
        """What the model is told of so many rows of it."""
        number = torch.full((count,), self.whole.embodiments.index(self.name), device=device)
        return robots_of(self.whole, number)

    def images(self, given: Pictures, use_images: bool) -> UInt8[torch.Tensor, "1 v 3 s s"]:
        """Bytes of all views of the model; zeros where no picture is to be seen. Raises: UserError."""
        views, size, own = self.whole.views, self.whole.image_size, self.spec.views
        found = np.zeros((len(views), 3, size, size), np.uint8)
        for view, picture in zip(own, pictures(given, own), strict=True) if use_images else ():
            found[views.index(view)] = resize_images(picture[None], size)[0]
        return torch.from_numpy(found)[None]

    def felt(self, state: State) -> Float32[np.ndarray, " s"]:
        """A state that the robot gives, as it is learned; 0 for None if none is needed. Raises: UserError."""
        if state is None and not self.needs_state:
            return np.zeros(self.learned.state_dim, np.float32)
        vector = state_vector(state, self.spec)
        return vector if self.conversion is None else self.conversion.learn_state(vector)

    def state(self, own: Float32[np.ndarray, "*b s"]) -> Float32[np.ndarray, "*b m"]:
        """Normalised states at their places in the model's, 0 elsewhere."""
        found = np.zeros((*own.shape[:-1], self.whole.state_dim), np.float32)
        found[..., list(self.whole.robot(self.name).state_slots)] = own
        return found

    def chunk(self, own: Float32[np.ndarray, "t a"]) -> Float32[np.ndarray, "t m"]:
        """Normalised actions at their places in the model's, 0 elsewhere."""
        found = np.zeros((len(own), self.whole.action_dim), np.float32)
        found[:, list(self.whole.robot(self.name).action_slots)] = own
        return found

    def taken(self, chunk: Float32[np.ndarray, "t m"]) -> Float32[np.ndarray, "t a"]:
        """The robot's own numbers of the model's chunk."""
        return chunk[:, list(self.whole.robot(self.name).action_slots)]

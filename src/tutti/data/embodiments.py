"""Several robots in one training: what their sources have in common, and where the numbers of each lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

from tutti.data.conventions.slots import Slots, places_in
from tutti.data.episodes import VECTORS, EpisodeStore, StoreSpec, Vector
from tutti.data.normalize import Normalizer
from tutti.types import Dimensions, Embodiment, Robots


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonSpec(StoreSpec):
    """The views and sizes that all sources fit into. `own` are those of each embodiment, by its name.

    `robots` say where the views and numbers of each lie, in the order of `own`; empty where all are alike.
    """

    own: Mapping[str, StoreSpec] = field(default_factory=dict)
    robots: tuple[Embodiment, ...] = ()

    @property
    def each(self) -> tuple[Embodiment, ...]:
        """What each embodiment is, in the order of `own`, also where all are alike."""
        return self.robots or tuple(map(_whole, self.own.values()))

    def places(self, embodiment: str, vector: Vector) -> list[int] | None:
        """Where the numbers of an embodiment stand in the model's vector; None: all of it, in order."""
        if not self.robots or embodiment not in self.own:
            return None
        return list(getattr(self.robots[list(self.own).index(embodiment)], f"{vector}_slots"))

    def present(self, vector: Vector) -> Bool[np.ndarray, "e d"] | None:
        """Which dimensions each embodiment has, and last, those of no robot: none. None: all have all."""
        table = np.zeros((len(self.robots) + 1, getattr(self, f"{vector}_dim")), bool)
        for row, robot in zip(table, self.robots, strict=False):
            row[list(getattr(robot, f"{vector}_slots"))] = True
        return None if table[:-1].all() else table

    def having(self, embodiment: str, actions: tuple[int, ...]) -> tuple[int, ...]:
        """Those of some places of the model's action that an embodiment has."""
        places = self.places(embodiment, "action")
        return actions if places is None else tuple(one for one in actions if one in places)

    def normalised(
        self, store: EpisodeStore, known: Bool[np.ndarray, " n"], normalizer: Normalizer, vector: Vector
    ) -> Float32[np.ndarray, "n d"]:
        """The normalised states or actions of all rows of a data set at their places in the model's vector, 0
        where they are not `known` and where its robot has none."""
        dim: int = getattr(self, f"{vector}_dim")
        if not known.any():
            return np.zeros((len(known), dim), np.float32)
        apply = normalizer.apply_state if vector == "state" else normalizer.apply_action
        values = apply(store.states if vector == "state" else store.actions, store.spec.embodiment)
        values[~known] = 0
        if (places := self.places(store.spec.embodiment, vector)) is None:
            return values
        placed = np.zeros((len(known), dim), np.float32)
        placed[:, places] = values
        return placed


def robots_in(number: Int64[np.ndarray, " b"], has: Mapping[str, Bool[np.ndarray, "e d"] | None]) -> Robots:
    """Those of rows of these embodiments; `has` are their dimensions (`CommonSpec.present`)."""
    state, action = (None if table is None else torch.from_numpy(table[number]) for table in has.values())
    return Robots(number=torch.from_numpy(number), state=state, action=action)


def specs_of_robots(stores: Sequence[EpisodeStore]) -> dict[str, StoreSpec]:
    """The spec of the first data set of each embodiment; that of the first one where none is of a robot."""
    found: dict[str, StoreSpec] = {}
    for store in (store for store in stores if not store.is_pairs):
        found.setdefault(store.spec.embodiment, store.spec)
    return found or {stores[0].spec.embodiment: stores[0].spec}


def common_spec(own: Mapping[str, StoreSpec], slots: Mapping[str, Slots] | None = None) -> CommonSpec:
    """What embodiments have in common: every view that one of them has, by its name, and vectors that the
    widest fits into. Names and units of the numbers only where they are those of all.

    With the canonical `slots` of the numbers of each, these stand slot by slot, and names are theirs.
    """
    specs = list(own.values())
    shapes: dict[str, tuple[int, int]] = {}
    for spec in specs:
        shapes = dict(zip(spec.views, spec.image_shapes, strict=True)) | shapes
    views = tuple(dict.fromkeys(view for spec in specs for view in spec.views))
    robots = tuple(map(_whole, specs))
    found: dict[str, Any] = {entry.name: getattr(specs[0], entry.name) for entry in fields(StoreSpec)}
    found["fps"] = max(spec.fps for spec in specs)
    named: dict[str, tuple[str, ...]] = {}
    for vector in VECTORS if slots is not None else ():
        assert slots is not None
        places, named[f"{vector}_names"] = places_in([slots[name][vector] for name in own])
        each = zip(robots, places, strict=True)
        robots = tuple(replace(robot, **{f"{vector}_slots": place}) for robot, place in each)
    plain = all(robot == one for robot, one in zip(robots, map(_whole, specs), strict=True))
    if plain and all(robot == robots[0] for robot in robots):
        return CommonSpec(**found, own=own)
    found |= {"views": views, "image_shapes": tuple(shapes[view] for view in views)}
    for what in VECTORS:
        sizes = [1 + max(getattr(robot, f"{what}_slots"), default=-1) for robot in robots]
        found[f"{what}_dim"] = max(sizes)
    for entry in fields(Dimensions):
        each = {getattr(spec, entry.name) for spec in specs}
        found[entry.name] = each.pop() if len(each) == 1 and not slots else ()
    found |= named
    return CommonSpec(**found, own=own, robots=robots)


def _whole(spec: StoreSpec) -> Embodiment:
    """An embodiment whose numbers stand first, in their own order."""
    return Embodiment(
        views=spec.views,
        state_slots=tuple(range(spec.state_dim)),
        action_slots=tuple(range(spec.action_dim)),
        **spec.dimensions(),
    )

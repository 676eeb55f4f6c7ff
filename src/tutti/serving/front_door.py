"""The front door: pictures, state and instruction, found in what a client sends or a robot observes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tutti.errors import near_miss
from tutti.serving.observation import Picture, State, as_array, describe, listed, sentence, short_names
from tutti.types import DataSpec, UserError

if TYPE_CHECKING:
    Given = Mapping[str, Any]
else:  # whatever comes is looked at, and refused in words
    Given = Any

SCENE, WRIST = "scene", "wrist"
_AT_WRIST = re.compile("wrist|hand|gripper")
PICTURES_OF_CLIENTS = {
    "observation.image": SCENE,
    "observation.wrist_image": WRIST,  # LIBERO
    "observation.exterior_image_1_left": SCENE,
    "observation.wrist_image_left": WRIST,  # DROID
    "observation.primary_image": SCENE,  # SimplerEnv
}
"""What the pictures of known clients show. ALOHA's have the names of its cameras."""
STATES = (
    ("observation.state",),
    ("state",),
    ("observation.joint_position", "observation.gripper_position"),  # DROID
)
"""Where the state may lie; several parts are joined in this order."""
INSTRUCTIONS = ("prompt", "task", "instruction")
MAX_NAME = 256
"""Characters of a whole name. Maps in maps repeat those before: 16 MiB of them would take gigabytes."""


class Seen(NamedTuple):
    """The arguments of `Policy.predict`."""

    images: Mapping[str, Picture]
    state: State
    instruction: str

    def copied(self) -> Seen:
        """With arrays of its own."""
        images = {name: _own(one) for name, one in self.images.items()}
        state: Any = self.state
        named = isinstance(state, Mapping)
        own = {name: _own(one) for name, one in state.items()} if named else _own(state)
        return Seen(images, own, self.instruction)


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """Finds pictures, state and instruction in a mapping, such as what an openpi client sends.

    Mappings may be nested; in names "/" and "." mean the same. A view goes by its own name, as in `pictures`;
    where a policy has one view of the scene, or one at the wrist, the pictures of LIBERO's, DROID's and
    SimplerEnv's clients stand for it. The state is that of `STATES`. What is not needed is left alone.

    `names` say what else a key is: the name of a view, "state" (several keys: joined in their order) or
    "instruction". `instruction` is taken where a message has none; without `needs_state` a message may have
    no state.
    """

    spec: DataSpec
    names: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None
    needs_state: bool = True

    def __post_init__(self) -> None:
        """Raises: UserError where `names` name nothing that the policy takes."""
        known = [*short_names(self.spec.views), "state", "instruction"]
        for key, what in self.names.items():
            if what not in known:
                raise UserError(
                    f"names: {key!r:.80} is said to be {what!r:.80}; expected state, instruction, or one of "
                    f"the views {listed(self.spec.views)}.{near_miss(what, known)}"
                )

    def __call__(self, given: Given) -> Seen:
        """Raises: UserError, naming what is missing and what is there."""
        if not isinstance(given, Mapping):
            raise UserError(f"observation: expected names and values, found {describe(given)}.")
        values: dict[str, Any] = {}
        for key, value in _flat(given):
            if key in values:
                raise UserError(f"observation: {key!r:.80} is given twice; '/' and '.' mean the same.")
            values[key] = value
        meant = {_dotted(key): what for key, what in self.names.items()}
        return Seen(self._images(values, meant), self._state(values, meant), self._instruction(values, meant))

    def _images(self, values: Mapping[str, Any], meant: Mapping[str, str]) -> dict[str, Any]:
        called, found = short_names(self.spec.views), dict[str, Any]()
        for key, value in values.items():
            name = meant.get(key) or key.removeprefix("observation.").removeprefix("images.")
            view = called.get(name)
            if view is not None and view in found:
                raise UserError(f"images: {key!r:.80} is the view {view}, which is given twice.")
            if view is not None:
                found[view] = value
        for role in (SCENE, WRIST):
            views = [view for view in self.spec.views if _role(view) == role]
            sent = [key for key in values if PICTURES_OF_CLIENTS.get(key) == role and key not in meant]
            if len(views) == len(sent) == 1 and views[0] not in found:
                found[views[0]] = values[sent[0]]
        if lacking := [view for view in self.spec.views if view not in found]:
            raise UserError(
                f"images: the view {listed(lacking)} is missing; found {_names(values)}. "
                f"The views are {listed(self.spec.views)}; another name of a view must be said (names)."
            )
        return found

    def _state(self, values: Mapping[str, Any], meant: Mapping[str, str]) -> Any:
        if not self.spec.state_dim:
            return None
        said = tuple(key for key, what in meant.items() if what == "state")
        ways = (said,) if said else STATES
        for keys in ways:
            if all(key in values for key in keys):
                if len(keys) == 1:
                    return values[keys[0]]
                return np.concatenate([_part(key, values[key]) for key in keys])
            inside = f"{keys[0]}."
            if named := {k.removeprefix(inside): v for k, v in values.items() if k.startswith(inside)}:
                own = {_dotted(name): name for name in self.spec.state_names}
                return {own.get(name, name): value for name, value in named.items()}
        if not self.needs_state:
            return None
        expected = " or ".join(" and ".join(keys) for keys in ways)
        raise UserError(f"state: expected {expected}; found {_names(values)}.")

    def _instruction(self, values: Mapping[str, Any], meant: Mapping[str, str]) -> str:
        said = tuple(key for key, what in meant.items() if what == "instruction")
        given = (values[key] for key in said or INSTRUCTIONS if values.get(key) is not None)
        text = next(given, self.instruction)
        if text is None:
            raise UserError(
                f"instruction: expected {' or '.join(said or INSTRUCTIONS)}, or a default for all."
            )
        alone: Any = text.item() if isinstance(text, np.ndarray) and text.ndim == 0 else text
        return sentence(alone.decode("utf-8", "replace") if isinstance(alone, bytes) else alone)


def _own(value: Any) -> Any:
    """A copy of numbers; of what is none, itself."""
    array = as_array(value)
    return value if array is None else array.copy()


def _part(key: str, value: Any) -> np.ndarray:
    """Numbers of a state in several parts. Raises: UserError where they are none."""
    part = as_array(value)
    if part is None:
        raise UserError(f"state: {key}: expected numbers in data units, found {describe(value)}.")
    return np.ravel(part)


def _names(values: Mapping[str, Any]) -> str:
    return listed(list(values)) or "nothing"


def _dotted(key: str) -> str:
    return key.replace("/", ".")


def _flat(given: Mapping[Any, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its whole name."""
    for key, value in given.items():
        if not isinstance(key, str):
            raise UserError(f"observation: expected names, found the key {key!r:.80}.")
        name = _dotted(inside + key)
        if len(name) > MAX_NAME:
            raise UserError(
                f"observation: expected names of at most {MAX_NAME} characters, found {name[:80]!r}..."
            )
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _role(view: str) -> str:
    return WRIST if _AT_WRIST.search(view.lower()) else SCENE

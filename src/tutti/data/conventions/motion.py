"""Motion: the part of an action that moves the robot, as targets, changes of the state, or of the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float, Float64

from tutti.data.conventions.config import CanonicalConfig, Frame, LearnedKind, MotionConfig, places
from tutti.data.conventions.rotations import (
    RotationForm,
    inverse,
    of_quaternions,
    product,
    rotate,
    to_quaternions,
)
from tutti.data.conventions.vectors import Layout, check_places
from tutti.data.formats.errors import data_error


@dataclass(frozen=True, slots=True)
class Turn:
    """A rotation in learned vectors: of the action and of the state, with their forms. `position` are the
    three plain numbers of the motion before it, by their order among these."""

    action: slice
    state: slice
    action_form: RotationForm
    state_form: RotationForm
    position: slice


@dataclass(frozen=True, slots=True)
class Motion:
    """Actions as they are recorded, `kind`, along `frame` and in `scale` units of the state, and as they are
    learned. `action` and `state` are places of plain numbers in the learned vectors, one for one; `turns` are
    the rotations.

        base:  target = state + scale * change     R_target = R_change R_state
        hand:  target = state + R_state change     R_target = R_state R_change

    All arrays are learned vectors in float64, of shape (..., a) and (..., s), and broadcast.
    """

    kind: LearnedKind
    frame: Frame
    scale: float
    learned: LearnedKind
    learned_frame: Frame
    action: list[int]
    state: list[int]
    turns: tuple[Turn, ...]
    near: Sequence[float]

    @classmethod
    def of(
        cls, said: MotionConfig, canonical: CanonicalConfig, action: Layout, state: Layout
    ) -> Motion | None:
        """Of what a source says; None where its actions are learned as they are.

        Raises: UserError for dimensions that are not there, or do not stand for the same in both.
        """
        of_state = places(said.of_state)
        check_places(f"{action.key}.motion.dimensions", [places(said.dimensions)], action.dim)
        if canonical.actions == "keep" or not converts(said, canonical):
            return None
        check_places(f"{action.key}.motion.state", [of_state], state.dim)
        plain: list[tuple[int, int]] = []
        turns: list[Turn] = []
        here, there = places(said.dimensions).start, of_state.start
        while here < places(said.dimensions).stop and there < of_state.stop:
            mine, its = action.rotation(here), state.rotation(there)
            if (mine is None) != (its is None):
                lacks = action.key if mine is None else state.key
                raise data_error(
                    f"{action.key}.motion pairs dimension {here} of the action with {there} of the state, of "
                    "which only one is a rotation.",
                    expected="rotations in the same places of both",
                    cure=f"name the other one too ({lacks}.rotation), or correct motion.state.",
                )
            if mine is not None and its is not None:
                assert mine.form and its.form
                position = slice(len(plain) - 3, len(plain))
                turns.append(Turn(mine.there, its.there, mine.form, its.form, position))
                here, there = mine.here.stop, its.here.stop
            else:
                plain.append((action.place(here), state.place(there)))
                here, there = here + 1, there + 1
        if (here, there) != (places(said.dimensions).stop, of_state.stop):
            raise data_error(
                f"{action.key}.motion: the dimensions of action and state are not as many.",
                expected=f"{said.dimensions} of the action to stand for as many of the state",
                found=said.of_state,
                cure="correct motion.state; a rotation counts as one.",
            )
        frames = {said.frame, canonical.frame}
        if "hand" in frames and (not turns or any(turn.position.start < 0 for turn in turns)):
            raise data_error(
                f"{action.key}.motion: axes of the hand need its position and rotation.",
                expected="three numbers and then a rotation, in action and state",
                cure="name the rotations of both (rotation), or use the frame base.",
            )
        return cls(
            *(said.kind, said.frame, said.scale, canonical.actions, canonical.frame),
            action=[one for one, _ in plain],
            state=[one for _, one in plain],
            turns=tuple(turns),
            near=canonical.near,
        )

    @property
    def moved(self) -> set[int]:
        """The numbers of the learned action that move the robot."""
        turns = (range(turn.action.start, turn.action.stop) for turn in self.turns)
        return {*self.action, *chain(*turns)}

    def learn(
        self, actions: Float64[np.ndarray, "*n a"], states: Float64[np.ndarray, "*n s"]
    ) -> Float64[np.ndarray, "*n a"]:
        """Recorded actions as targets or changes from the state of the same row; those to be learned as
        relative as targets, since a row belongs to many chunks."""
        if self.kind == "delta":
            actions = self._target(actions, states, self.frame, self.scale)
        return self._change(actions, states, self.learned_frame) if self.learned == "delta" else actions

    def relative(
        self, targets: Float[np.ndarray, "*n t a"], states: Float[np.ndarray, "*n s"]
    ) -> Float64[np.ndarray, "*n t a"]:
        """Chunks of targets as changes from the state at their start."""
        return self._change(
            targets.astype(np.float64), states[..., None, :].astype(np.float64), self.learned_frame
        )

    def record(
        self, chunk: Float64[np.ndarray, "t a"], state: Float64[np.ndarray, " s"]
    ) -> Float64[np.ndarray, "t a"]:
        """A learned chunk as it would be recorded, from the state at its start. What is told from the states
        of later steps takes it that each target is reached."""
        if self.learned == "delta":
            targets, now = np.empty_like(chunk), state
            for step, action in enumerate(chunk):
                targets[step] = self._target(action, now, self.learned_frame)
                now = self._reached(targets[step], state)
        elif self.learned == "relative":
            targets = self._target(chunk, state, self.learned_frame)
        else:
            targets = chunk
        if self.kind == "absolute":
            return targets
        later = self._reached(targets[:-1], np.broadcast_to(state, (len(chunk) - 1, len(state))))
        return self._change(targets, np.concatenate([state[None], later]), self.frame, self.scale)

    def _target(
        self, changes: np.ndarray, states: np.ndarray, frame: Frame, scale: float = 1.0
    ) -> Float64[np.ndarray, "*n a"]:
        out, moves = changes.copy(), scale * changes[..., self.action]
        for turn in self.turns:
            now, change = self._turned(changes, states, turn)
            if frame == "hand":
                moves[..., turn.position] = rotate(now, moves[..., turn.position])
            target = product(change, now) if frame == "base" else product(now, change)
            out[..., turn.action] = of_quaternions(target, turn.action_form, self.near)
        out[..., self.action] = states[..., self.state] + moves
        return out

    def _change(
        self, targets: np.ndarray, states: np.ndarray, frame: Frame, scale: float = 1.0
    ) -> Float64[np.ndarray, "*n a"]:
        out, moves = targets.copy(), targets[..., self.action] - states[..., self.state]
        for turn in self.turns:
            now, target = self._turned(targets, states, turn)
            if frame == "hand":
                moves[..., turn.position] = rotate(inverse(now), moves[..., turn.position])
            change = product(target, inverse(now)) if frame == "base" else product(inverse(now), target)
            out[..., turn.action] = of_quaternions(change, turn.action_form)
        out[..., self.action] = moves / scale
        return out

    def _turned(self, actions: np.ndarray, states: np.ndarray, turn: Turn) -> tuple[np.ndarray, np.ndarray]:
        """The rotations of the state and of the action."""
        now = to_quaternions(states[..., turn.state], turn.state_form)
        asked = to_quaternions(actions[..., turn.action], turn.action_form)
        return now, asked

    def _reached(self, targets: np.ndarray, states: np.ndarray) -> Float64[np.ndarray, "*n s"]:
        """The states with the targets in them."""
        out = states.copy()
        out[..., self.state] = targets[..., self.action]
        for turn in self.turns:
            asked = to_quaternions(targets[..., turn.action], turn.action_form)
            out[..., turn.state] = of_quaternions(asked, turn.state_form)
        return out


def converts(said: MotionConfig, canonical: CanonicalConfig) -> bool:
    """Whether actions as a source says they are become others."""
    alike = said.kind == "absolute" or (said.scale == 1 and said.frame == canonical.frame)
    return canonical.actions != "keep" and not (canonical.actions == said.kind and alike)

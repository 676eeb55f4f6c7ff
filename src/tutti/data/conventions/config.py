"""Config of conventions: what a source's numbers mean, and in which form the model learns them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from tutti.data.conventions.rotations import IDENTITY, RotationForm, size_of
from tutti.frozen_config import FrozenConfig

Span = Annotated[str, Field(pattern=r"^\d{1,4}-\d{1,4}$")]
Frame = Literal["base", "hand"]
"""A change is along the axes of the robot's base, or along those of the hand as it is."""
MotionKind = Literal["absolute", "delta"]
LearnedKind = Literal["absolute", "delta", "relative"]


def places(span: str) -> range:
    """The dimensions of "3-5", both ends included."""
    first, last = map(int, span.split("-"))
    return range(first, last + 1)


def _rising(span: str) -> str:
    if not places(span):
        raise ValueError(f'expected a rising range of dimensions, such as "3-5", found {span!r}')
    return span


class GripperConfig(FrozenConfig):
    """A gripper: the number that opens and closes it, which becomes 0 closed to 1 open."""

    dimension: int = Field(
        ge=-4096, le=4095, description="The dimension of the source's vector; -1 is the last."
    )
    open: float = Field(description="Its value where the gripper is open.")
    closed: float = Field(description="Its value where the gripper is closed.")
    values: Literal["range", "clipped", "two", "changes"] = Field(
        default="range",
        description="range: between these two, others are refused. clipped: others are cut off. two: only "
        "these two; a policy answers the nearer one. changes: a command to open or close, what lies halfway "
        "keeps the gripper as it is.",
    )

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.open == self.closed:
            raise ValueError(f"open and closed are both {self.open:g}; expected two different values")
        return self


class RotationConfig(FrozenConfig):
    """A rotation: which numbers it has, and their form."""

    dimensions: Span = Field(description='The dimensions of the source\'s vector, both ends included: "3-5".')
    form: RotationForm = Field(
        description="Euler orders as scipy names them: euler_xyz about fixed axes (roll, pitch, yaw), "
        "euler_XYZ about turning ones."
    )
    scale: float = Field(
        default=1.0, gt=0, description="Radians that 1 stands for, of Euler angles or an axis-angle."
    )

    @field_validator("dimensions")
    @classmethod
    def _check_span(cls, span: str) -> str:
        return _rising(span)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        size, count = size_of(self.form), len(places(self.dimensions))
        if size != count:
            raise ValueError(f"dimensions: {self.form} has {size} numbers, {self.dimensions!r} are {count}")
        if self.scale != 1 and size != 3:
            raise ValueError(f"scale is for angles; {self.form} has none")
        return self


class MotionConfig(FrozenConfig):
    """The part of an action that moves the robot: as targets, or as changes from the state of its step."""

    kind: MotionKind = Field(description="absolute: where to be. delta: how far from the state of the step.")
    dimensions: Span = Field(description='The dimensions of the action, rotations included: "0-5".')
    state: Span | Literal["same"] = Field(
        default="same", description="The dimensions of the state that they change, in the same order."
    )
    frame: Frame = Field(
        default="base", description="Axes of a delta: of the robot's base, or of the hand as it is."
    )
    scale: float = Field(
        default=1.0,
        gt=0,
        description="How many units of the state a delta of 1 is (LIBERO: 0.05); rotations have their own.",
    )

    @field_validator("dimensions", "state")
    @classmethod
    def _check_spans(cls, span: str) -> str:
        return span if span == "same" else _rising(span)

    @model_validator(mode="after")
    def _of_deltas(self) -> Self:
        if self.kind == "absolute" and (self.scale != 1 or self.frame != "base"):
            raise ValueError("scale and frame are those of a delta; absolute actions have none")
        return self

    @property
    def of_state(self) -> str:
        """The dimensions of the state."""
        return self.dimensions if self.state == "same" else self.state


class VectorConventions(FrozenConfig):
    """What the numbers of a state are; those that nothing is said of stay as they are."""

    gripper: GripperConfig | tuple[GripperConfig, ...] = Field(
        default=(), description="The gripper, or one for each hand."
    )
    rotation: RotationConfig | tuple[RotationConfig, ...] = Field(
        default=(), description="The rotation, or one for each hand."
    )

    @property
    def grippers(self) -> tuple[GripperConfig, ...]:
        """All of them."""
        return self.gripper if isinstance(self.gripper, tuple) else (self.gripper,)

    @property
    def rotations(self) -> tuple[RotationConfig, ...]:
        """All of them."""
        return self.rotation if isinstance(self.rotation, tuple) else (self.rotation,)


class ActionConventions(VectorConventions):
    """What the numbers of an action are; those that nothing is said of stay as they are."""

    motion: MotionConfig | None = Field(
        default=None, description="What moves the robot: targets, or changes of the state."
    )


class ConventionsConfig(FrozenConfig):
    """What the numbers of a source are, dimension by dimension, as they are recorded."""

    state: VectorConventions = Field(default_factory=VectorConventions, description="Those of the state.")
    action: ActionConventions = Field(default_factory=ActionConventions, description="Those of the action.")

    @field_validator("state")
    @classmethod
    def _is_a_state(cls, state: VectorConventions) -> VectorConventions:
        if any(hand.values == "changes" for hand in state.grippers):
            raise ValueError("gripper.values is changes; those are commands, and a state has none")
        return state

    def lines(self) -> Iterator[tuple[str, str]]:
        """Key and value in words, for each thing that is said."""
        for name, vector in (("state", self.state), ("action", self.action)):
            for hand in vector.grippers:
                said = {"changes": ", changes alone", "clipped": ", clipped", "two": ", nothing between"}
                how = said.get(hand.values, "")
                yield (
                    f"{name}.gripper",
                    f"dimension {hand.dimension}: {hand.open:g} open, {hand.closed:g} closed{how}",
                )
            for turn in vector.rotations:
                unit = f", {turn.scale:g} rad each" * (turn.scale != 1)
                yield f"{name}.rotation", f"dimensions {turn.dimensions}: {turn.form}{unit}"
        if moved := self.action.motion:
            along = ", along the hand" * (moved.frame == "hand") + f", {moved.scale:g} each" * (
                moved.scale != 1
            )
            value = f"dimensions {moved.dimensions}: {moved.kind}{along}, of state {moved.of_state}"
            yield "action.motion", value


NOTHING_SAID = ConventionsConfig()


class CanonicalConfig(FrozenConfig):
    """The form that all sources are brought to and the model learns; a policy answers in its robot's own.

    A gripper that a source tells of is always 0 closed to 1 open.
    """

    rotation: RotationForm | Literal["keep"] = Field(
        default="keep",
        description="The form of all rotations that the sources name; rotation_6d has no jumps.",
    )
    near: tuple[float, float, float, float] = Field(
        default=IDENTITY,
        description="Of a quaternion and its negative, which are one rotation, the one nearer to this (w "
        "first) is learned.",
    )
    actions: LearnedKind | Literal["keep"] = Field(
        default="keep",
        description="absolute: where to be. delta: from the state of the same step. relative: from the "
        "state at the start of the chunk. For the dimensions of action.motion.",
    )
    frame: Frame = Field(
        default="base", description="Axes of delta and relative actions: of the base, or of the hand."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any(self.near):
            raise ValueError("near: expected a quaternion, found only zeros")
        if self.frame == "hand" and self.actions not in ("delta", "relative"):
            raise ValueError("frame is for delta and relative actions")
        return self


KEPT = CanonicalConfig()

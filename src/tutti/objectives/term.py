"""What a loss term is: it reads features and a batch, owns its head, and gives one scalar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from tutti.distributed.ranks import Counted, micro_part
from tutti.types import Batch, DataSpec, Features, Future, LaterStates, Tokens, UserError

Boundary = Literal["vision", "language", "fused"]
"""Where a gradient may be stopped. `fused` is both the readout and the fused vision tokens."""


@runtime_checkable
class Encoder(Protocol):
    """A part of the model as a term's head needs to know it."""

    @property
    def width(self) -> int:
        """The d of what it gives."""
        ...


@runtime_checkable
class ViewEncoder(Encoder, Protocol):
    """The vision encoder as a term needs to know it."""

    @property
    def tokens_per_view(self) -> int:
        """Its tokens for each view; they cover the picture as a square grid, row by row."""
        ...

    def __call__(self, images: Float[Tensor, "b v 3 h w"], image_mask: Bool[Tensor, "b v"]) -> Tokens:
        """Prepared pictures to tokens, for a term that must look at other pictures than the present ones."""
        ...


@runtime_checkable
class ChunkDecoder(Protocol):
    """The model's action decoder as a term needs to know it."""

    def __call__(self, features: Features, batch: Batch) -> Float[Tensor, "b t a"]:
        """The training error of each action, unreduced."""
        ...

    def predict(self, features: Features) -> Float[Tensor, "b t a"]:
        """The chunk of normalised actions."""
        ...


@runtime_checkable
class Model(Protocol):
    """The model as the objectives see it: sizes, and the action decoder. `tutti.models.vla.VLA` fits."""

    @property
    def spec(self) -> DataSpec: ...
    @property
    def vision(self) -> ViewEncoder: ...
    @property
    def language(self) -> Encoder: ...
    @property
    def fusion(self) -> Encoder: ...
    @property
    def action(self) -> ChunkDecoder: ...
    def prepare(self, images: Tensor) -> Float[Tensor, "b v 3 h w"]:
        """Bytes to what the vision encoder takes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TermValue:
    """A term's scalar, not yet weighted, and what else it reports: detached scalars named `term/metric`."""

    value: Float[Tensor, ""]
    metrics: dict[str, Tensor]


OF_NO_ROW = frozenset({"temperature", "bias", "skipped"})
"""Metrics of a comparison that are no means over rows."""


class Term(nn.Module, ABC):
    """One L_i of the unified loss.

    Write `compute`; `forward` is final: it stops the gradient where `stop_gradient` says, then computes.
    `needs_futures` asks the data for the observations that many actions later, `needs_states` for the states
    at those offsets (0: the episode's last, -1: the next key frame's, where one of the action dimensions
    `grippers` opens or closes); the batch of several terms holds what any of them asks for. `no_decay` names
    parameters of the term that weight decay must leave alone.
    Metrics are named `<name>/...`: the same class may serve under two names. The model is used but never
    registered as a submodule: keep it in a tuple, `self._model = (model,)`.
    """

    no_decay: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        name: str,
        stop_gradient: Collection[Boundary] = (),
        needs_futures: Sequence[int] = (),
        needs_states: Sequence[int] = (),
        grippers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.stop_gradient = frozenset(stop_gradient)
        self.needs_futures = tuple(needs_futures)
        self.needs_states = tuple(needs_states)
        self.grippers = tuple(grippers)
        if -1 in self.needs_states and not self.grippers:
            raise UserError(
                f"objective.{name} needs the states at the next key frames (-1), but names no gripper, whose "
                "opening and closing makes them: give `grippers`, its dimensions in the action."
            )

    @abstractmethod
    def compute(self, features: Features, batch: Batch) -> TermValue:
        """The raw value and metrics; formula, shapes and reduction belong into the docstring."""

    def forward(self, features: Features, batch: Batch) -> TermValue:
        """`compute` on features that are detached at the boundaries in `stop_gradient`."""
        return self.compute(stopped(features, self.stop_gradient), batch)

    def __call__(self, features: Features, batch: Batch) -> TermValue:
        return super().__call__(features, batch)

    def after_step(self) -> None:
        """Called after each optimizer step; a term with a slowly following target moves it here."""

    def compared(self, found: TermValue, rows: Counted) -> TermValue:
        """A loss that compares the rows of a batch, as the part of a micro-batch in its update: its value and
        metrics, but for those in `OF_NO_ROW`, count as much as the `rows` that take part. Metrics that have
        no term's name yet get it."""
        metrics = {
            f"{self.name}/{key}": metric if key in OF_NO_ROW else micro_part(metric, rows)
            for key, metric in found.metrics.items()
        }
        return TermValue(value=micro_part(found.value, rows), metrics=metrics)

    def future(self, batch: Batch, offset: int) -> Future:
        """The observation `offset` actions later.

        Raises: UserError if the batch was made without it.
        """
        if offset not in batch.futures:
            raise UserError(
                f"objective.{self.name} needs the observation {offset} actions later, but the batch holds "
                f"{sorted(batch.futures) or 'none'}; build the data with DataNeeds(objective.needs_futures, "
                "objective.needs_states, objective.grippers)."
            )
        return batch.futures[offset]

    def later_states(self, batch: Batch) -> LaterStates:
        """The states at `needs_states`, in that order.

        Raises: UserError if the batch was made without them.
        """
        found = batch.later_states.offsets if batch.later_states is not None else ()
        if batch.later_states is None or not set(self.needs_states) <= set(found):
            raise UserError(
                f"objective.{self.name} needs the states at {self.needs_states}, but the batch holds "
                f"{found or 'none'}; build the data with DataNeeds(objective.needs_futures, "
                "objective.needs_states, objective.grippers)."
            )
        return batch.later_states.at(self.needs_states)


def stopped(features: Features, boundaries: Collection[Boundary]) -> Features:
    """The same values; no gradient passes the given boundaries."""
    if "vision" in boundaries:
        features = replace(features, vision=_detached(features.vision))
    if "language" in boundaries:
        features = replace(features, language=_detached(features.language))
    if "fused" in boundaries:
        fused_vision = _detached(features.fused_vision)
        features = replace(features, readout=features.readout.detach(), fused_vision=fused_vision)
    return features


def _detached(tokens: Tokens) -> Tokens:
    return replace(tokens, values=tokens.values.detach())

"""Term: one loss L_i, which reads features and a batch, owns its head, and gives one scalar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Shaped
from pydantic import Field
from torch import Tensor, nn

from tutti.distributed.ranks import Counted, micro_part, shared_mean
from tutti.objectives.weight_schedule import WeighedConfig
from tutti.types import (
    Batch,
    DataNeeds,
    DataSpec,
    Features,
    Future,
    FutureLabel,
    Label,
    LaterStates,
    StateLabel,
    Tokens,
    UserError,
    at_least_float32,
    masked_mean,
)

Boundary = Literal["vision", "language", "fused"]
"""Where a gradient may be stopped. `fused` is the readout, the fused tokens, and every layer of a VLM."""


@runtime_checkable
class Encoder(Protocol):
    """A part of the model as a term's head needs to know it: `width` is the d of what it gives."""

    width: int


@runtime_checkable
class ViewEncoder(Encoder, Protocol):
    """The vision encoder as a term needs to know it: the `tokens_per_view` cover each picture as a square
    grid, row by row."""

    tokens_per_view: int

    def __call__(self, images: Float[Tensor, "b v 3 h w"], image_mask: Bool[Tensor, "b v"]) -> Tokens:
        """Prepared pictures to tokens, for a term that must look at other pictures than the present ones."""
        ...


@runtime_checkable
class Writer(Encoder, Protocol):
    """The language encoder as a term needs to know it: it may be able to write (`LanguageEncoder.write`)."""

    @property
    def require_writer(self) -> Callable[[str], None]: ...
    @property
    def held(self) -> Callable[[Collection[Boundary]], AbstractContextManager[None]]: ...
    @property
    def write(self) -> Callable[..., Tensor]: ...


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
    def language(self) -> Writer: ...
    @property
    def fusion(self) -> Encoder: ...
    @property
    def action(self) -> ChunkDecoder: ...
    def prepare(self, images: Tensor) -> Float[Tensor, "b v 3 h w"]:
        """Bytes to what the vision encoder takes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TermValue:
    """A term's scalar, not yet weighted, and what else it reports: detached scalars named `term/metric`, and
    on held-out data values of each window, which `Term.joined` is given for all windows at once. `by_source`
    is filled in by `Term` where there are k > 1 sources and the value is the sum of p means over rows: of
    each mean the sum of what it counts and the count (or weight), in the rows of each source alone."""

    value: Float[Tensor, ""]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    per_window: Mapping[str, Shaped[Tensor, "b ..."]] = field(default_factory=dict)
    by_source: Float64[Tensor, "p 2 k"] | None = None


class BaseTermConfig(WeighedConfig, ABC):
    """The keys and methods that the configs of all terms have."""

    required: ClassVar[tuple[Label, ...]] = ()
    """The labels without which a row has nothing to teach this term."""

    kind: Any  # a literal in each subclass
    stop_gradient: tuple[Boundary, ...] = Field(
        default=(), description="Boundaries that this term's gradient does not pass."
    )

    def needs(self, name: str) -> DataNeeds:
        """What the term called `name` asks of the data: rows with the `required` labels, unless
        overridden."""
        return DataNeeds(labels=self.required)

    def arguments(self, name: str) -> dict[str, Any]:
        """What `Term.__init__` takes."""
        return {"name": name, "stop_gradient": self.stop_gradient, "needed": self.needs(name)}

    @abstractmethod
    def build(self, model: Model, name: str) -> Term:
        """The term called `name`, for sizes as those of `model`. Raises UserError where sizes clash."""


def require_in_chunk(offset: int, model: Model, key: str) -> None:
    """Raises: UserError if an offset is beyond the horizon."""
    if offset > model.spec.horizon:
        raise UserError(
            f"{key} is {offset}, but must lie in 1..{model.spec.horizon}, the horizon: what comes after the "
            "chunk is not the policy's. Lower it or raise data.horizon."
        )


def two_layers(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """The head of several terms: linear, ReLU, linear."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.ReLU(), nn.Linear(hidden, width_out))


Averaged = tuple[Tensor, Tensor]
"""What a mean is taken of, one row after the other, and which of it counts or by what weight."""

OF_NO_ROW = frozenset({"temperature", "bias", "skipped"})
"""Metrics of a comparison that are no means over rows."""


class Term(nn.Module, ABC):
    """One L_i of the unified loss.

    Write `compute`; `forward` is final: it stops the gradient where `stop_gradient` says, computes, and
    splits the value by the rows' sources, if `mean`, `masked_mean`, `weighted_mean` or `sum_of` gave it.
    A custom term that reads more than the window itself also writes `needs`.
    Metrics are named `<name>/...`: the same class may serve under two names. The model comes as an argument:
    a term may use its parts, but not register them.

    >>> class SmallReadout(Term):
    ...     def compute(self, features, batch, model):
    ...         return TermValue(value=self.mean(features.readout.square(), batch))
    >>> SmallReadout(name="small").needs()
    DataNeeds(futures=(), states=(), grippers=(), labels=())
    """

    def __init__(
        self, *, name: str, stop_gradient: Collection[Boundary] = (), needed: DataNeeds = DataNeeds()
    ) -> None:
        super().__init__()
        self.name = name
        self.stop_gradient = frozenset(stop_gradient)
        self.needed = needed
        self._means: dict[int, tuple[Tensor, list[Averaged]]] | None = None

    @classmethod
    def needs(cls, *args: Any, **options: Any) -> DataNeeds:
        """What a custom term asks of the data, by the `options` of its config (a built-in one: its config's
        `needs`). The batch holds what any of the terms asks for; `needed` is what this one does."""
        return DataNeeds()

    @abstractmethod
    def compute(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """The raw value and metrics; formula, shapes and reduction belong into the docstring.

        `model` made the features: for a term that looks at other pictures, or asks the action decoder.
        """

    def forward(self, features: Features, batch: Batch, model: Model) -> TermValue:
        """`compute` on features that are detached at the boundaries in `stop_gradient`; of several sources
        also `by_source`."""
        self._means = None if batch.source is None else {}
        try:
            found = self.compute(stopped(features, self.stop_gradient), batch, model)
            averaged = self._means.get(id(found.value)) if self._means else None
        finally:
            self._means = None  # it holds the graph
        if averaged is None or batch.source is None:
            return found
        parts, size = averaged[1], len(batch.source)
        if any(len(errors) % size for errors, _ in parts):  # a term of the user's own, and no mean over rows
            return found
        return replace(found, by_source=torch.stack([_split(*one, batch.source) for one in parts]))

    if TYPE_CHECKING:
        __call__ = forward

    def update_targets(self, model: Model) -> None:
        """Called after each update of the weights of `model`, for a target that follows them slowly."""

    def compared(self, found: TermValue, rows: Counted) -> TermValue:
        """A loss that compares the rows of a batch, as the part of a micro-batch in its update: its value and
        metrics, but for those in `OF_NO_ROW`, count as much as the `rows` that take part. Metrics that have
        no term's name yet get it."""
        metrics = {
            f"{self.name}/{key}": metric if key in OF_NO_ROW else micro_part(metric, rows)
            for key, metric in found.metrics.items()
        }
        return replace(found, value=micro_part(found.value, rows), metrics=metrics)

    def joined(self, per_window: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics over all held-out windows, by the `per_window` of all batches, laid end to end."""
        return {}

    def rows(self, batch: Batch) -> Bool[Tensor, " b"]:
        """The windows that count in `mean`: those that have all `needed.labels`, and whose later observations
        all lie in the episode.

        To be overridden where others count; a function of the batch alone.
        """
        inside = batch.labelled(self.needed.labels)
        for label in self.needed.futures:
            inside = inside & self.future(batch, label).mask
        return inside

    def mean(self, errors: Float[Tensor, "b ..."], batch: Batch) -> Float[Tensor, ""]:
        """The mean of the errors over everything in the `rows` that count, of all micro-batches and ranks."""
        rows = self.rows(batch)
        return self.masked_mean(errors, rows.view(-1, *(1,) * (errors.ndim - 1)), self.rows)

    def masked_mean(
        self, errors: Float[Tensor, "m ..."], mask: Bool[Tensor, "m ..."], mask_of: Counted
    ) -> Float[Tensor, ""]:
        """The mean of the errors where the mask is True, of all micro-batches and ranks; `mask_of(batch)` is
        the mask of any batch. m is b, or a multiple: the whole batch several times."""
        return self.remembered(masked_mean(errors, mask, mask_of=mask_of), errors, mask)

    def weighted_mean(
        self, errors: Float[Tensor, "m ..."], weight: Float[Tensor, "m ..."], weight_of: Counted
    ) -> Float[Tensor, ""]:
        """sum w e / sum w, likewise; 0 where every weight is 0."""
        mean = shared_mean((weight * errors).sum(), weight.sum(), weight_of)
        return self.remembered(mean, errors, weight)

    def sum_of(self, means: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """The sum of several such means."""
        total, known = torch.stack(list(means)).sum(), self._means or {}
        if all(id(mean) in known for mean in means):
            known[id(total)] = total, [one for mean in means for one in known[id(mean)][1]]
        return total

    def remembered(self, mean: Float[Tensor, ""], errors: Tensor, weight: Tensor) -> Float[Tensor, ""]:
        """`mean` itself, which is known from here on as the mean of these rows."""
        if self._means is not None:
            self._means[id(mean)] = mean, [(errors.detach(), weight.detach())]
        return mean

    def future(self, batch: Batch, label: FutureLabel) -> Future:
        """The observation so many actions later, or the episode's "last" one.

        Raises: UserError if the batch was made without it.
        """
        if label not in batch.futures:
            asked = "the episode's last observation" if label == "last" else f"the one {label} actions later"
            raise UserError(
                f"objective.{self.name} needs of later observations {asked}, but the batch holds "
                f"{list(batch.futures) or 'none'}; build the data with config.objective.needs(), and let "
                "the term's `needs` ask for it."
            )
        return batch.futures[label]

    def encode_later(self, future: Future, model: Model, *, stopped: bool = False) -> Tokens:
        """The vision encoder's tokens of later pictures, masked where `future` is, in one more pass: with its
        gradient, unless it is `stopped` here or at the boundary `vision`."""
        there = future.mask[:, None] & future.observation.image_mask
        stopped = stopped or "vision" in self.stop_gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stopped):
            return model.vision(model.prepare(future.observation.images), there)

    def views_in_both(self, batch: Batch, offset: int) -> Bool[Tensor, "b v"]:
        """The views that are there now and `offset` actions later; none if that is past the episode's end."""
        future = self.future(batch, offset)
        return batch.observation.image_mask & future.observation.image_mask & future.mask[:, None]

    def later_states(self, batch: Batch, labels: Sequence[StateLabel]) -> LaterStates:
        """The later states of these labels, in that order.

        Raises: UserError if the batch was made without them.
        """
        present = batch.later_states.labels if batch.later_states is not None else ()
        if batch.later_states is None or not set(labels) <= set(present):
            raise UserError(
                f"objective.{self.name} needs the states at {tuple(labels)}, but the batch holds "
                f"{present or 'none'}; build the data with config.objective.needs(), and let the term's "
                "`needs` ask for them."
            )
        return batch.later_states.at(labels)


def stopped(features: Features, boundaries: Collection[Boundary]) -> Features:
    """The same values; no gradient passes the given boundaries."""
    if "vision" in boundaries:
        features = replace(features, vision=_detached(features.vision))
    if "language" in boundaries:
        features = replace(features, language=_detached(features.language))
    if "fused" in boundaries:
        fused_vision, text = _detached(features.fused_vision), features.fused_language
        features = replace(features, readout=features.readout.detach(), fused_vision=fused_vision)
        layers = tuple(map(_detached, features.layers))
        features = replace(features, fused_language=text and _detached(text), layers=layers)
    return features


@torch.no_grad()
def _split(
    errors: Float[Tensor, "m ..."], weight: Shaped[Tensor, "m ..."], source: Bool[Tensor, "b k"]
) -> Float64[Tensor, "2 k"]:
    """The sums of weight * errors and of the weights over the rows of each source."""
    errors, full = at_least_float32(errors), weight.expand_as(errors)
    counted = torch.where(full != 0, errors, 0) * full  # what does not count may be NaN
    rows = torch.stack([counted, full.to(counted.dtype)]).reshape(2, -1, len(source), errors[0].numel())
    # By where, not by a product: a NaN stays in its own source.
    return torch.where(source, rows.sum((1, 3), dtype=torch.float64)[..., None], 0.0).sum(1)


def _detached(tokens: Tokens) -> Tokens:
    return replace(tokens, values=tokens.values.detach())

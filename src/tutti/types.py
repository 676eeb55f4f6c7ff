"""The types that packages share: what a batch holds, what a model gives, what a loss returns.

Shape letters, used in every annotation of the package:

    b batch    v camera views    h w pixels      l text tokens    s state
    t action steps (horizon)     a action        n tokens         d width       o offsets
    m earlier moments
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Float64, Int, UInt8
from torch import Tensor

from tutti.dimensions import UNNAMED, DataSpec, Dimensions, Embodiment, dimension_label  # noqa: F401
from tutti.distributed.ranks import Counted, shared_mean
from tutti.errors import UserError  # noqa: F401 (what lies above takes it from here)
from tutti.masks import moved


class Movable:
    """Gives a dataclass of tensors (nested or optional) the methods `apply`, `to` and `first`."""

    __slots__ = ()

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same value with `function` applied to every tensor in it."""
        changed: dict[str, Any] = {}
        for entry in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                changed[entry.name] = function(value)
            elif isinstance(value, Movable):
                changed[entry.name] = value.apply(function)
            elif isinstance(value, Mapping):
                changed[entry.name] = {key: item.apply(function) for key, item in value.items()}
            elif isinstance(value, tuple) and value and isinstance(value[0], Movable):
                changed[entry.name] = tuple(item.apply(function) for item in value)
        return replace(self, **changed)  # pyright: ignore[reportArgumentType]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same value with every tensor on `device`. What is seen in a mask here is known there."""
        return self.apply(lambda value: moved(value, value.to(device, non_blocking=non_blocking)))

    def first(self, count: int) -> Self:
        """The first `count` of the batch: every tensor in it begins with b. Views, no copies."""
        return self.apply(lambda value: value[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class History(Movable):
    """Pictures and states of earlier moments, those of `DataSpec.history` but the present, the earliest
    first. A moment before the episode's start has no True in either mask, whatever stands in its place."""

    images: UInt8[Tensor, "b m v 3 h w"] | Float[Tensor, "b m v 3 h w"]
    image_mask: Bool[Tensor, "b m v"]
    state: Float[Tensor, "b m s"]
    state_mask: Bool[Tensor, "b m"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Robots(Movable):
    """Which of several robots each row is of: its number in `DataSpec.embodiments`, -1 where there is none.
    `state` and `action` are True at the dimensions that this robot has; None: all have every one."""

    number: Int[Tensor, " b"]
    state: Bool[Tensor, "b s"] | None = None
    action: Bool[Tensor, "b a"] | None = None


def robots_of(spec: DataSpec, number: Int[Tensor, " b"]) -> Robots | None:
    """Rows of these embodiments of a spec, counted from 0, -1 for none; None where it has only one."""
    if len(spec.embodiments) == 1:
        return None
    has: dict[str, Tensor | None] = {}
    for what in ("state", "action"):
        table = spec.present(what)
        has[what] = None if table is None else torch.tensor(table, device=number.device)[number]
    return Robots(number=number, **has)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation(Movable):
    """What the robot sees, is told and feels at one moment, for a batch; and before, if `history` is there.

    `images` are bytes in [0, 255], or floats in [-1, 1] once prepared. A view whose `image_mask` is
    False is absent: its tokens are removed, whatever its pixels say. `state` is normalised; in a row whose
    `state_mask` is False it is not known: its token is removed, and what it holds changes nothing. `robots`
    tells which robot each row is of, and which dimensions it has; None: there is one robot.
    """

    images: UInt8[Tensor, "b v 3 h w"] | Float[Tensor, "b v 3 h w"]
    image_mask: Bool[Tensor, "b v"]
    text: Int[Tensor, "b l"]
    text_mask: Bool[Tensor, "b l"]
    state: Float[Tensor, "b s"]
    state_mask: Bool[Tensor, " b"]
    history: History | None = None
    robots: Robots | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Future(Movable):
    """The observation k steps after each window's own, or the episode's last one. Where t + k lies past the
    episode's end, `mask` is False and the last frame stands in; the last one itself is always there."""

    observation: Observation
    mask: Bool[Tensor, " b"]


Label = Literal["actions", "text", "state", "answer"]  # what an episode may lack, and a loss term may need
LABELS: tuple[Label, ...] = ("actions", "text", "state")  # of a recording; only pairs have answers
FutureLabel = int | Literal["last"]  # which later observation: so many actions later, or the episode's last
StateLabel = int | Literal["last", "next_key"]  # which later state; next_key: that at its next key frame


@dataclass(frozen=True, slots=True, kw_only=True)
class LaterStates(Movable):
    """The normalised states that `labels` name, one column each. `mask` is False past the episode's end,
    where the state is not known, and at a next key frame that no actions tell."""

    labels: tuple[StateLabel, ...]
    values: Float[Tensor, "b o s"]
    mask: Bool[Tensor, "b o"]

    def at(self, labels: Sequence[StateLabel]) -> LaterStates:
        """The columns of these labels, in that order.

        Raises: ValueError if one of them is not here.
        """
        if tuple(labels) == self.labels:
            return self
        # One column after the other: a list as an index would be copied to the GPU, which synchronises.
        values, mask = (
            torch.stack([columns[:, self.labels.index(label)] for label in labels], dim=1)
            for columns in (self.values, self.mask)
        )
        return LaterStates(labels=tuple(labels), values=values, mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataNeeds:
    """What loss terms ask of the data besides the window itself: the later observations of these labels, and
    the `states` of these. The next key frame is where one of `grippers`, dimensions of the action
    (negative ones from the end), opens or closes. `labels` are those that a row must have to count."""

    futures: tuple[FutureLabel, ...] = ()
    states: tuple[StateLabel, ...] = ()
    grippers: tuple[int, ...] = ()
    labels: tuple[Label, ...] = ()

    @property
    def offsets(self) -> tuple[int, ...]:
        """Those of `futures` that are numbers of actions, rising."""
        return tuple(sorted(label for label in self.futures if isinstance(label, int)))

    @property
    def steps_ahead(self) -> tuple[int, ...]:
        """How many actions later any of it lies, rising; what has a name is not among them."""
        return tuple(sorted({label for label in (*self.futures, *self.states) if isinstance(label, int)}))

    @classmethod
    def union(cls, needs: Iterable[DataNeeds]) -> Self:
        """Whatever any of them asks for: offsets rising, then the named ones."""
        needs = tuple(needs)
        futures = DataNeeds(futures=tuple({label for each in needs for label in each.futures}))
        labels = {label for each in needs for label in each.states}
        offsets = sorted(label for label in labels if isinstance(label, int))
        named: tuple[StateLabel, ...] = ("last", "next_key")
        return cls(
            futures=(*futures.offsets, *(("last",) if "last" in futures.futures else ())),
            states=(*offsets, *(label for label in named if label in labels)),
            grippers=tuple(sorted({dimension for each in needs for dimension in each.grippers})),
            labels=tuple(one for one in (*LABELS, "answer") if any(one in each.labels for each in needs)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Movable):
    """Training windows: an observation at time t, the actions from t on, the instruction's identity.

    `actions` are normalised; steps past the episode's end are False in `action_mask` and never count, and so
    are all of a row without actions and dimensions that its robot lacks. A row without text has no True in
    `observation.text_mask`, one without a state none in `observation.state_mask` (`labelled`).
    `instruction_id` is equal exactly where the instruction's normalised text is, `task_id` where the texts
    are wordings of one task; None: no groups of wordings are known. `window` is the number of the training
    example in its data set, which names a batch in errors and replays it. `futures[k]` is the observation k
    steps later, for each k that a term asked for, `futures["last"]` the episode's last one, `later_states`
    the states that terms asked for. `embodiment` numbers the robots of the data, -1 where there is none, in a
    picture with a text. `progress` is t / (length - 1), how much of the episode lies behind,
    0 to 1. `source` is True at the one of `data.sources` that the window is of; None: there is one. `answer`
    are the tokens to be said about the picture, the last of them ends it; there where a term asks for them.
    """

    observation: Observation
    actions: Float[Tensor, "b t a"]
    action_mask: Bool[Tensor, "b t a"]
    instruction_id: Int[Tensor, " b"]
    embodiment: Int[Tensor, " b"]
    window: Int[Tensor, " b"]
    futures: Mapping[FutureLabel, Future] = field(default_factory=dict)
    later_states: LaterStates | None = None
    progress: Float[Tensor, " b"] | None = None
    task_id: Int[Tensor, " b"] | None = None
    source: Bool[Tensor, "b k"] | None = None
    answer: Int[Tensor, "b j"] | None = None
    answer_mask: Bool[Tensor, "b j"] | None = None

    @property
    def tasks(self) -> Int[Tensor, " b"]:
        """`task_id`, or where it is not known `instruction_id`: each instruction as a task of its own."""
        return self.instruction_id if self.task_id is None else self.task_id

    def labelled(self, labels: Collection[Label]) -> Bool[Tensor, " b"]:
        """The rows that have all of these labels: an action, a token of text, the state, an answer."""
        seen, acts = self.observation, self.action_mask.flatten(1)
        has = {"actions": acts, "text": seen.text_mask, "state": seen.state_mask[:, None]}
        has["answer"] = torch.zeros_like(acts) if self.answer_mask is None else self.answer_mask
        every = torch.ones_like(self.window, dtype=torch.bool)
        return torch.stack([every, *(has[label].any(dim=1) for label in labels)]).all(dim=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Movable):
    """A sequence of vectors with the mask that says which of them exist; never one without the other."""

    values: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]

    def mean(self) -> Float[Tensor, "b d"]:
        """The masked mean over the tokens: sum m x / max(1, sum m), shape (b, d)."""
        return masked_mean(self.values, self.mask.unsqueeze(-1), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Features(Movable):
    """What the encoders and the fusion make of an observation.

    `vision` and `language` are the encoders' own tokens, before either has seen the other. `readout` is
    the fused summary that actions are read from; `fused_vision` are the vision tokens after the fusion,
    in the order of `vision` (view by view, row by row), so they know the instruction and the state.
    A VLM also gives `fused_language`, the text's tokens after it, and `layers`, by block what vision and
    language, one behind the other, are behind it (b, n, d), or for pi0's decoder their keys and values in it;
    and `state`, that of the observation, 0 where it is withheld or unknown. `robots` are the observation's.
    """

    vision: Tokens
    language: Tokens
    readout: Float[Tensor, "b d"]
    fused_vision: Tokens
    fused_language: Tokens | None = None
    layers: tuple[Tokens, ...] = ()
    state: Float[Tensor, "b s"] | None = None
    robots: Robots | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The unified loss of one batch: each raw term, its lambda, and total = sum_i lambda_i * values_i.

    All are scalars. `metrics` holds what the terms report besides (for example `align/accuracy`),
    already detached; nothing in it is part of the total. `per_window` has by term what it keeps
    of each held-out window, for its metrics over all of them; `by_source` is as in `TermValue`.
    """

    values: dict[str, Tensor]
    lambdas: dict[str, Tensor]
    total: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    per_window: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    by_source: dict[str, Float64[Tensor, "p 2 k"]] = field(default_factory=dict)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 if it has fewer bits, else itself: what errors and their means are taken in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_mean(
    values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None, *, mask_of: Counted | None = None
) -> Tensor:
    """sum(mask * values) / max(1, sum(mask)), over `dim` or everything.

    `mask` broadcasts to `values` and its count is that of the broadcast mask, so a mean over "b t a"
    with a mask "b t 1" divides by the number of elements, not of rows. Where the mask is False the value
    does not count even if it is NaN. Nothing left gives 0, with gradient 0. It is at least float32.

    Over everything it counts the rows of all ranks that share the batch (`distributed.ranks`): the mean over
    the ranks is that over the whole batch. Where an update has several micro-batches their counts must be
    known beforehand, by `mask_of(batch)`, the mask of any batch: then the mean over the micro-batches is that
    over all their rows, without it the mean of their means. Over a `dim` it is of these rows alone.
    """
    values, full = at_least_float32(values), mask.expand_as(values)
    kept = torch.where(full, values, torch.zeros((), dtype=values.dtype, device=values.device))
    if dim is None:
        return shared_mean(kept.sum(), full.sum(), mask_of, repeats=values.numel() // max(1, mask.numel()))
    return kept.sum(dim) / full.sum(dim).clamp(min=1)


def effective_rank(rows: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """exp(-sum_k p_k log p_k), p_k = s_k / sum_l s_l, s the singular values of `rows`: from 1 (all rows point
    one way) to min(n, d) (Roy & Vetterli 2007); of all zeros 0. The rows are not centred. From the
    eigenvalues of the smaller Gram matrix in float64, which is exact to about 1e-6 and cheap.
    """
    x = rows.detach().double()
    gram = x @ x.mT if x.shape[0] < x.shape[1] else x.mT @ x
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    shares = singular / torch.where(total > 0, total, 1)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0.0)

"""The reach table: which loss term moves which part of the model, measured on real gradients."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tutti.objectives.unified import UnifiedLoss
from tutti.training.backward.term_gradients import term_gradients
from tutti.training.rng import own_randomness, without_side_effects
from tutti.types import Batch

CUTS = {"vision": ("vision", "fused"), "language": ("language", "fused"), "fusion": ("fused",)}
"""The boundaries of `stop_gradient` that can keep a term from a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachTable:
    """`norms[term][part]` is |d L_term / d part|, the raw term's, over all parameters of the part.

    It is None where no gradient comes: the part is not in the term's graph, is frozen, or is forbidden to the
    term; 0.0 where one comes and is exactly zero. `parts` are those of the model, then the terms' own heads
    ("recon head"), and only what has parameters; `heads` gives the head of a term that has one. `frozen` are
    the parts of which no parameter learns, `stops` the `stop_gradient` of each term, `allowed` the parts of
    the model that a masked term may move.
    """

    terms: tuple[str, ...]
    parts: tuple[str, ...]
    norms: Mapping[str, Mapping[str, float | None]]
    heads: Mapping[str, str]
    frozen: tuple[str, ...]
    stops: Mapping[str, tuple[str, ...]]
    allowed: Mapping[str, tuple[str, ...]]

    def reached(self, term: str) -> set[str]:
        """The parts in which the term's gradient is there and not all zero."""
        return {part for part, norm in self.norms[term].items() if norm is not None and norm != 0}

    def rows(self) -> list[tuple[str, ...]]:
        """Lines of a table, the head first: a norm, 0, or "." where no gradient comes; "frozen" and "masked"
        where that is why."""
        return [("term", *self.parts), *((term, *self._cells(term)) for term in self.terms)]

    def _cells(self, term: str) -> Iterator[str]:
        for part, norm in self.norms[term].items():
            if part in self.frozen:
                yield "frozen"
            elif norm is None:
                yield "masked" if _is_masked(self, term, part) else "."
            else:
                yield "0" if norm == 0 else f"{norm:.2e}"


def reach(
    model: nn.Module,
    objective: UnifiedLoss,
    batch: Batch,
    *,
    only: Collection[str] | None = None,
    frozen: Collection[str] = (),
    mask: Mapping[str, Collection[str]] | None = None,
    progress: float = 0.0,
) -> ReachTable:
    """The table of one batch, at the cost of a forward pass and a backward pass for each term.

    As in a phase of the training: `only` names the terms that count (None: all), `frozen` the parts of the
    model that do not learn, `mask` (`moves` of the backward's config) the parts that a term may move, where
    that is not all of them; its own head it always may. A term whose weight is 0 at `progress` is not in the
    table, nor is its head. The batch lies on the model's device. Weights, buffers, modes, `.grad` and random
    states stay as they were.

    Raises: UserError if the batch lacks what a term needs.
    """
    allowed = {term: tuple(parts) for term, parts in (mask or {}).items()}
    sections = {name: list(part.parameters()) for name, part in model.named_children()}
    with without_side_effects(model, objective), own_randomness(0), torch.enable_grad():
        model.train()
        objective.train()
        for part in frozen:
            for parameter in sections[part]:
                parameter.requires_grad_(False)
        values = objective(model(batch.observation), batch, model, progress, only).values
        own = {term: list(objective.terms[term].parameters()) for term in values}
        heads = {term: f"{term} head" for term, parameters in own.items() if parameters}
        sections |= {head: own[term] for term, head in heads.items()}
        sections = {part: parameters for part, parameters in sections.items() if parameters}
        still = tuple(part for part, found in sections.items() if not any(p.requires_grad for p in found))
        norms = {
            term: _norms(value, sections, allowed.get(term), heads.get(term))
            for term, value in values.items()
        }
    return ReachTable(
        terms=tuple(values),
        parts=tuple(sections),
        norms=norms,
        heads=heads,
        frozen=still,
        stops={term: tuple(sorted(objective.terms[term].stop_gradient)) for term in values},  # pyright: ignore
        allowed=allowed,
    )


def problems(tables: Sequence[ReachTable]) -> list[str]:
    """What is wrong over all phases of a run (one table each), a sentence each, with the cure.

    A part that learns in some phase must be reached in one; a term must move a part of the model, and not
    only its own head, in one; no gradient may be NaN or infinite.
    """
    found: list[str] = []
    terms, parts = (_names(getattr(t, what) for t in tables) for what in ("terms", "parts"))
    for part in parts:
        learning = [table for table in tables if part in table.parts and part not in table.frozen]
        owners = {term for table in tables for term, head in table.heads.items() if head == part}
        moved = any(part in table.reached(term) for table in learning for term in table.terms)
        # A term that reaches nothing at all is named below, not a second time for its head.
        silent = owners and not any(table.reached(t) for table in learning for t in owners & {*table.terms})
        if learning and not moved and not silent:
            start = f"{part} gets no gradient from any term, though its parameters learn: "
            if part == "action" and not any("action" in table.terms for table in learning):
                found.append(f"{start}does the action term count (its weight, the phase's terms)?")
            else:
                found.append(start + _why_not(terms, [part], learning))
    for term in terms:
        own = [table for table in tables if term in table.terms]
        heads = {table.heads.get(term) for table in own}
        reached = {part for table in own for part in table.reached(term)}
        if not reached - heads:
            only_head = "moves only its own head, so nothing of the model learns from it: "
            start = f"term '{term}' {only_head if reached else 'reaches nothing: '}"
            found.append(start + _why_not([term], [part for part in parts if part not in heads], own))
        wild = [part for part in parts if any(not math.isfinite(t.norms[term].get(part) or 0.0) for t in own)]
        if wild:
            found.append(
                f"term '{term}': its gradient in {', '.join(wild)} is NaN or infinite; look for such values "
                "in the batch."
            )
    return found


def _why_not(terms: Sequence[str], parts: Sequence[str], tables: Sequence[ReachTable]) -> str:
    """Why these terms do not move these parts, as far as the tables know, with the cure."""
    pairs = [
        (table, term, part) for table in tables for term in table.terms for part in parts if term in terms
    ]
    if any(table.norms[term].get(part) == 0 for table, term, part in pairs):
        return (
            "its gradient is exactly zero on this batch. Is all of it masked (no labels, the episode's end, "
            "absent views, fewer than two instructions), or are outputs dead? Try a larger batch."
        )
    masked = _names(
        [term] for table, term, part in pairs if part in table.parts and _is_masked(table, term, part)
    )
    if masked:
        allowed = _names(table.allowed[term] for table in tables for term in masked if term in table.allowed)
        lets = f"only {', '.join(allowed)}" if allowed else "no part of the model"
        return f"backward.may_train lets {', '.join(masked)} move {lets}. Allow another part."
    cuts = _names(CUTS.get(part, ()) for part in parts)
    stops = {
        term: ", ".join(own)
        for term in terms
        if (own := [c for c in cuts if any(c in table.stops.get(term, ()) for table in tables)])
    }
    if stops:
        listed = "; ".join(f"{term} ({own})" for term, own in stops.items())
        return (
            f"is it stopped? stop_gradient of objective: {listed}. Take a boundary out, set the term's "
            "weight to 0, or freeze the part in the strategy."
        )
    frozen = _names((part for part in table.frozen if part in parts) for table in tables)
    if frozen:
        return f"what it could move is frozen ({', '.join(frozen)}). Let one of these learn."
    return (
        "is it detached, or frozen? Mend it, set the term's weight to 0, or freeze the part in the strategy."
    )


def _is_masked(table: ReachTable, term: str, part: str) -> bool:
    """True if the mask forbids the term this part."""
    return term in table.allowed and part not in (*table.allowed[term], table.heads.get(term))


def _norms(
    value: Tensor,
    sections: Mapping[str, list[nn.Parameter]],
    allowed: Collection[str] | None,
    head: str | None,
) -> dict[str, float | None]:
    """The norm of one term's gradient in each part that it may move."""
    parameters = [parameter for found in sections.values() for parameter in found]
    gradients = iter(term_gradients({"term": value}, parameters)["term"])
    norms = {part: _norm([next(gradients) for _ in found]) for part, found in sections.items()}
    return {
        part: norm if allowed is None or part == head or part in allowed else None
        for part, norm in norms.items()
    }


def _norm(gradients: Sequence[Tensor | None]) -> float | None:
    """The Euclidean norm, in float64: nothing of a float32 underflows where it is squared."""
    present = [g for g in gradients if g is not None and g.numel()]
    norms = [float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) for gradient in present]
    return math.hypot(*norms) if norms else None


def _names(groups: Iterable[Iterable[str]]) -> list[str]:
    """Every name once, in the order of its first mention."""
    return list(dict.fromkeys(name for group in groups for name in group))

"""The reach table: which loss term moves which part of the model, measured on real gradients."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tutti.objectives.unified import UnifiedLoss
from tutti.training.backward.term_gradients import term_gradients
from tutti.training.diagnostics.side_effects import without_side_effects
from tutti.training.rng import own_randomness
from tutti.types import Batch, UserError

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

    def problems(self) -> list[str]:
        """What is wrong, a sentence each, with the cure; empty if all is well."""
        return problems([self])

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

    Raises: UserError if a term or a part that is named does not exist, or if the batch lacks what a term
    needs.
    """
    allowed = {term: tuple(parts) for term, parts in (mask or {}).items()}
    sections = {name: list(part.parameters()) for name, part in model.named_children()}
    _check_names("term", {*(only or ()), *allowed}, objective.names)
    _check_names("part", {*frozen, *(part for parts in allowed.values() for part in parts)}, sections)
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
    for part in _names(table.parts for table in tables):
        learning = [table for table in tables if part in table.parts and part not in table.frozen]
        owners = {term for table in tables for term, head in table.heads.items() if head == part}
        moved = any(part in table.reached(term) for table in learning for term in table.terms)
        # A term that reaches nothing at all is named below, not a second time for its head.
        silent = owners and not any(table.reached(t) for table in learning for t in owners & {*table.terms})
        if learning and not moved and not silent:
            found.append(_unreached_part(part, learning))
    for term in _names(table.terms for table in tables):
        own = [table for table in tables if term in table.terms]
        reached = {part for table in own for part in table.reached(term)}
        if not reached - {table.heads.get(term) for table in own}:
            found.append(_useless_term(term, own, head=bool(reached)))
        wild = [
            part
            for part in _names(table.parts for table in own)
            if any(not math.isfinite(table.norms[term].get(part) or 0.0) for table in own)
        ]
        if wild:
            found.append(
                f"term '{term}': its gradient in {', '.join(wild)} is NaN or infinite; look for such values "
                "in the batch."
            )
    return found


def _unreached_part(part: str, tables: Sequence[ReachTable]) -> str:
    """The sentence for a part that learns and that no term reaches."""
    start = f"{part} gets no gradient from any term, though its parameters learn: "
    stops = [
        f"{term} ({', '.join(cuts)})"
        for term in _names(table.terms for table in tables)
        if (cuts := [c for c in CUTS.get(part, ()) if any(c in t.stops.get(term, ()) for t in tables)])
    ]
    masked = [t for t in _names(x.terms for x in tables) if any(_is_masked(x, t, part) for x in tables)]
    if stops:
        return (
            f"{start}is it stopped everywhere? stop_gradient of {'; '.join(stops)}. Take a boundary out of "
            f"one of them, or freeze {part} in the strategy. (Else it is detached.)"
        )
    if masked:
        return f"{start}backward.may_train forbids it to {', '.join(masked)}. Allow it to one of them."
    if part == "action":
        return f"{start}does the action term count (its weight, the phase's terms), and use this decoder?"
    if any(table.norms[term].get(part) == 0 for table in tables for term in table.terms):
        return f"{start}what comes is exactly zero. Are its outputs dead, or all of the batch masked?"
    return f"{start}is it detached, or frozen? If it should not learn, freeze it in the strategy."


def _useless_term(term: str, tables: Sequence[ReachTable], *, head: bool) -> str:
    """The sentence for a term that moves no part of the model."""
    start = (
        f"term '{term}' moves only its own head, so nothing of the model learns from it: "
        if head
        else f"term '{term}' reaches nothing: "
    )
    of_model = [
        (part, norm)
        for table in tables
        for part, norm in table.norms[term].items()
        if part != table.heads.get(term)
    ]
    stops = _names(table.stops.get(term, ()) for table in tables)
    frozen = _names((p for p in table.frozen if p != table.heads.get(term)) for table in tables)
    if any(norm == 0 for _, norm in of_model):
        return (
            f"{start}its gradient is exactly zero on this batch. Is all of it masked (past the episodes' "
            "end, absent views, fewer than two instructions)? Try a larger batch."
        )
    if any(_is_masked(table, term, part) for table in tables for part, _ in of_model if part in table.parts):
        parts = ", ".join(_names(table.allowed[term] for table in tables if term in table.allowed))
        only = f"only {parts}" if parts else "no part of the model"
        return f"{start}backward.may_train.{term} lets it move {only}. Allow it another part."
    if stops:
        return (
            f"{start}stop_gradient of objective.{term} is {', '.join(stops)}. Take a boundary out of it, or "
            f"set the term's weight to 0."
        )
    if frozen:
        return f"{start}what it could move is frozen ({', '.join(frozen)}). Let one of these learn."
    return f"{start}is its value made of detached features? Mend the term, or set its weight to 0."


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
    """The Euclidean norm, 0 only if every number is 0: nothing underflows."""
    norms: list[float] = []
    for gradient in gradients:
        if gradient is not None and gradient.numel():
            largest = gradient.abs().max()
            inner = 0.0 if largest == 0 else float(torch.linalg.vector_norm(gradient / largest))
            norms.append(float(largest) * inner)
    return math.hypot(*norms) if norms else None


def _check_names(what: str, named: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(named) - set(known))
    if unknown:
        raise UserError(
            f"reach: there is no {what} called {', '.join(unknown)}; there are {', '.join(known)}."
        )


def _names(groups: Iterable[Iterable[str]]) -> list[str]:
    """Every name once, in the order of its first mention."""
    return list(dict.fromkeys(name for group in groups for name in group))

"""The records of a run as columns, and what its diagnostic steps are about: terms, parts, halves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import fmean, median

from tutti.report.formatting import WORDS, Number

Span = tuple[Number, Number]
"""The first and the last of some steps."""
EVER: Span = (-math.inf, math.inf)
LAST_FRACTION = 4
"""What is said of the end of a run is said of its last quarter ..."""
DIAGNOSTIC_STEPS_MIN = 3
"""... but of at least three diagnostic steps, because a single one is noise."""
PRIMARY = "action"
"""The term that the others are there to help."""
PARTS: dict[str, str] = WORDS["parts"]


def part_words(part: str) -> str:
    """A part of the model in a sentence."""
    return PARTS.get(part, f"the part '{part}'")


@dataclass(frozen=True, kw_only=True)
class Records:
    """The training records as columns: for each metric the steps at which it was written and its values.

    `restarts` are the steps at which a line's step was not above the one before it: the run was resumed. The
    later line of a step counts. A value that is not finite is kept as NaN, and `not_finite` names it.
    """

    columns: Mapping[str, tuple[list[int], list[float]]]
    restarts: tuple[int, ...] = ()
    not_finite: tuple[str, ...] = ()
    broken_lines: int = 0

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def get(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values), both empty if nothing of that name was recorded."""
        return self.columns.get(name, ([], []))

    def named(self, pattern: str) -> list[tuple[str, ...]]:
        """For each metric of a pattern such as "loss/*/raw" what stands for its asterisks."""
        fits = re.compile(re.escape(pattern).replace(r"\*", "([^/]+)")).fullmatch
        return [found.groups() for found in map(fits, self.columns) if found]

    def values(self, name: str, span: Span = EVER) -> list[float]:
        """The finite values at the steps of `span`, its ends included."""
        first, last = span
        columns = zip(*self.get(name), strict=True)
        return [v for step, v in columns if first <= step <= last and math.isfinite(v)]

    def last(self, name: str) -> float | None:
        """The newest finite value."""
        return next(reversed(self.values(name)), None)

    def mean(self, name: str, span: Span = EVER) -> float | None:
        """The mean of the finite values; None if there is none."""
        values = self.values(name, span)
        return fmean(values) if values else None

    def median(self, name: str, span: Span = EVER) -> float | None:
        """The median of the finite values; None if there is none."""
        values = self.values(name, span)
        return median(values) if values else None

    @property
    def loss_terms(self) -> list[str]:
        """The terms of the loss, action first, then in the order in which they were recorded."""
        return sorted((term for (term,) in self.named("loss/*/raw")), key=lambda term: term != PRIMARY)

    @property
    def batch_size(self) -> float | None:
        """Windows in an update, from what was consumed; None if that was not recorded."""
        steps, samples = self.get("data/samples")
        return samples[-1] / steps[-1] if steps and steps[-1] > 0 and math.isfinite(samples[-1]) else None

    @cached_property
    def diagnostic_steps(self) -> list[int]:
        """The steps with gradient norms of the terms; empty if there were no diagnostics."""
        names = (f"diag/norm/{term}/{part}" for term, part in self.named("diag/norm/*/*"))
        return sorted({step for name in names for step in self.get(name)[0]})

    @cached_property
    def terms(self) -> list[str]:
        """The terms of the diagnostic steps, action first."""
        terms = dict.fromkeys(term for term, _ in self.named("diag/norm/*/*"))
        return sorted(terms, key=lambda term: term != PRIMARY)

    @cached_property
    def parts(self) -> list[str]:
        """The parts of the model in the diagnostic steps, those that every model has first."""
        order = list(PARTS)
        parts = dict.fromkeys(part for _, part in self.named("diag/norm/*/*"))
        return sorted(parts, key=lambda part: order.index(part) if part in order else len(order))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of terms that have a cosine somewhere."""
        names = dict.fromkeys(pair for pair, _ in self.named("diag/cosine/*/*") if pair.count("~") == 1)
        return [(a, b) for a, _, b in (name.partition("~") for name in names)]

    @property
    def end(self) -> Span:
        """The last quarter of the diagnostic steps."""
        count = max(DIAGNOSTIC_STEPS_MIN, math.ceil(len(self.diagnostic_steps) / LAST_FRACTION))
        return next(iter(self.diagnostic_steps[-count:]), 0), math.inf

    @property
    def halves(self) -> tuple[Span, Span]:
        """The first and last step of the first half and of the second, which has the middle one."""
        steps = self.diagnostic_steps or [0]
        middle = len(steps) // 2
        return (steps[0], steps[max(0, middle - 1)]), (steps[middle], steps[-1])

    def against(self, term: str, reference: str) -> list[tuple[float, float]]:
        """(term, reference) in each quarter of the records of both, means: on held-out data where it was
        recorded there, else in training. `reference` such as "copy_baseline", or "copy_baseline/8"."""
        offset = reference.partition("/")[2]
        for held_out, own in (("valid/", f"valid/{term}"), ("", f"loss/{term}/raw")):
            first = f"{held_out}metric/{term}"
            values = self.get(f"{first}/value/{offset}" if offset else own)
            theirs = dict(zip(*self.get(f"{first}/{reference}"), strict=True))
            pairs = [(v, theirs.get(step, math.nan)) for step, v in zip(*values, strict=True)]
            if pairs := [pair for pair in pairs if all(map(math.isfinite, pair))]:
                ends = [part * len(pairs) // LAST_FRACTION for part in range(LAST_FRACTION + 1)]
                return [
                    (fmean(v for v, _ in pairs[a:b]), fmean(r for _, r in pairs[a:b]))
                    for a, b in pairwise(ends)
                    if a < b
                ]
        return []

    def is_frozen(self, part: str, span: Span) -> bool:
        """Whether the part had no gradient in these steps because it did not learn."""
        return not any(self.values(f"diag/norm/{term}/{part}", span) for term in self.terms)

    def reaches(self, term: str, part: str) -> bool | None:
        """Whether the term had a gradient in the part in the last quarter; None if it was not computed."""
        norms = self.values(f"diag/norm/{term}/{part}", self.end)
        return any(norm > 0 for norm in norms) if norms else None

    def updates_in(self, span: Span) -> Span:
        """`span`, or the whole run where no window of updates ended in it."""
        names = (f"diag/update_share/{term}/{part}" for term, part in self.named("diag/update_share/*/*"))
        return span if any(self.values(name, span) for name in names) else EVER

    def update_share(self, term: str, part: str, span: Span = EVER) -> float | None:
        """The median share of the update in `updates_in` these steps."""
        return self.median(f"diag/update_share/{term}/{part}", self.updates_in(span))

    def conflict(self, a: str, b: str, part: str) -> tuple[float, float, int] | None:
        """Share of the diagnostic steps with a cosine below 0, the mean cosine, and their number."""
        cosines = self.values(f"diag/cosine/{a}~{b}/{part}")
        if not cosines:
            return None
        return sum(cosine < 0 for cosine in cosines) / len(cosines), fmean(cosines), len(cosines)


def single_step(values: Mapping[str, float]) -> Records:
    """One diagnostic step that was never written: `values` by their names in the records without "diag/"."""
    return Records(columns={f"diag/{name}": ([1], [value]) for name, value in values.items()})

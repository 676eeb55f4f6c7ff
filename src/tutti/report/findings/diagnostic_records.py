"""The diagnostic steps of a run, read from its records: terms, parts, medians, the last quarter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from tutti.report.inputs import Records

LAST_FRACTION = 4
"""What is said of the end of a run is said of its last quarter ..."""
DIAGNOSTIC_STEPS_MIN = 3
"""... but of at least three diagnostic steps, because a single one is noise."""
PARTS = ("vision", "language", "fusion", "action")
PRIMARY = "action"
"""The term that the others are there to help."""
PART_WORDS = {
    "vision": "the vision encoder",
    "language": "the language encoder",
    "fusion": "the fusion",
    "action": "the action decoder",
}


def part_words(part: str) -> str:
    """A part of the model in a sentence."""
    return PART_WORDS.get(part, f"the part '{part}'")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosticRecords:
    """The columns of the kind `diagnostics`, by what they are about. Empty `steps`: nothing was recorded."""

    records: Records
    steps: tuple[int, ...]
    terms: tuple[str, ...]
    parts: tuple[str, ...]

    @property
    def last(self) -> int:
        """The first step of the last quarter."""
        count = max(DIAGNOSTIC_STEPS_MIN, math.ceil(len(self.steps) / LAST_FRACTION))
        return self.steps[max(0, len(self.steps) - count)] if self.steps else 0

    @property
    def span(self) -> tuple[int, int]:
        """The first step and the last one."""
        return self.steps[0], self.steps[-1]

    @property
    def halves(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The first and last step of the first half and of the second, which has the middle one."""
        steps = self.steps or (0,)
        middle = len(steps) // 2
        return (steps[0], steps[max(0, middle - 1)]), (steps[middle], steps[-1])

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of terms that have a cosine somewhere."""
        names = dict.fromkeys(name.split("/")[2] for name in self.records.columns if _is(name, "cosine"))
        pairs = [tuple(pair.split("~")) for pair in names if pair.count("~") == 1]
        return [(a, b) for a, b in pairs]

    def values(self, name: str, since: int = 0, until: int | None = None) -> list[float]:
        """The finite values of `diag/<name>` from step `since` to step `until`."""
        steps, values = self.records.get(f"diag/{name}")
        return [
            v
            for s, v in zip(steps, values, strict=True)
            if s >= since and (until is None or s <= until) and math.isfinite(v)
        ]

    def median(self, name: str, since: int = 0, until: int | None = None) -> float | None:
        """Their median; None if there is none."""
        values = self.values(name, since, until)
        return median(values) if values else None

    def mean(self, name: str, since: int = 0) -> float | None:
        """Their mean; None if there is none."""
        values = self.values(name, since)
        return fmean(values) if values else None

    def is_frozen(self, part: str, since: int, until: int) -> bool:
        """Whether the part had no gradient in these steps because it did not learn."""
        return not any(self.values(f"norm/{term}/{part}", since, until) for term in self.terms)

    def reaches(self, term: str, part: str) -> bool | None:
        """Whether the term had a gradient in the part in the last quarter; None if it was not computed."""
        norms = self.values(f"norm/{term}/{part}", self.last)
        return any(norm > 0 for norm in norms) if norms else None

    def conflict(self, a: str, b: str, part: str) -> tuple[float, float, int] | None:
        """Share of the diagnostic steps with a cosine below 0, the mean cosine, and their number."""
        cosines = self.values(f"cosine/{a}~{b}/{part}")
        if not cosines:
            return None
        return sum(cosine < 0 for cosine in cosines) / len(cosines), fmean(cosines), len(cosines)


def read_diagnostics(records: Records) -> DiagnosticRecords:
    """What the records hold of the kind `diagnostics`."""
    norms = [name for name in records.columns if _is(name, "norm")]
    steps = sorted({step for name in norms for step in records.get(name)[0]})
    terms = dict.fromkeys(name.split("/")[2] for name in norms)
    parts = dict.fromkeys(name.split("/")[3] for name in norms)
    return DiagnosticRecords(
        records=records,
        steps=tuple(steps),
        terms=tuple(sorted(terms, key=lambda term: term != PRIMARY)),
        parts=tuple(sorted(parts, key=_place)),
    )


def single_step(values: Mapping[str, float]) -> DiagnosticRecords:
    """One diagnostic step that was never written: `values` by their names in the records without "diag/"."""
    columns = {f"diag/{name}": ([1], [value]) for name, value in values.items()}
    return read_diagnostics(Records(columns=columns, restarts=(), not_finite=(), broken_lines=0))


def batch_size(records: Records) -> float | None:
    """Windows in an update, from what was consumed; None if that was not recorded."""
    steps, samples = records.get("data/samples")
    return samples[-1] / steps[-1] if steps and steps[-1] > 0 and math.isfinite(samples[-1]) else None


def listed(words: Sequence[str]) -> str:
    """Words as people list them: "a, b and c"."""
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else "".join(words)


def _is(name: str, family: str) -> bool:
    pieces = name.split("/")
    return len(pieces) == 4 and pieces[:2] == ["diag", family]


def _place(part: str) -> int:
    return PARTS.index(part) if part in PARTS else len(PARTS)

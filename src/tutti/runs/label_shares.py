"""Which share of each source's windows feeds each loss term, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutti.config.run_config import RunConfig
from tutti.data.bundle import DataBundle
from tutti.data.sources import SourceShare
from tutti.durations import resolved
from tutti.report.formatting import plain
from tutti.runs.terminal import print_line, print_table
from tutti.types import DataNeeds, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelShares:
    """`shares[term][i]` of source i's training windows feed the term: they have its labels, and at least one
    of its later targets lies in the episode. `masked[term][target]` of all windows with the labels lack that
    target, such as "+8". `windows` are those of each source.
    """

    sources: Sequence[str]
    windows: Sequence[int]
    needs: dict[str, DataNeeds]
    shares: dict[str, list[float]]
    masked: dict[str, dict[str, float]]

    @property
    def may_differ(self) -> bool:
        """Whether there are several sources, or one feeds a term with some of its windows alone."""
        partly = [name for name, shares in self.shares.items() if name not in self.masked and min(shares) < 1]
        return len(self.sources) > 1 or bool(partly)

    def print(self) -> None:
        """The table, and a line for each term with later targets."""
        rows = [
            (name, ", ".join(self.needs[name].labels) or "-", *(f"{100 * share:.0f} %" for share in shares))
            for name, shares in self.shares.items()
        ]
        print_table(
            "Share of each source's windows that feed a term",
            ("term", "needs", *self.sources),
            rows,
            last=("windows", "", *(f"{count:,}" for count in self.windows)),
            narrow=True,
        )
        for name, masked in self.masked.items():
            said = ", ".join(f"{target} {100 * share:.0f} %" for target, share in masked.items())
            print_line(f"{name}: masked targets, past the episode's end or without a label: {said}")


def mixture_lines(config: RunConfig, shares: Sequence[SourceShare]) -> list[str]:
    """A line for each of several sources: how much of it a training of `config` sees, and why."""
    if len(shares) < 2:
        return []
    steps, temperature = config.training.steps, config.data.mixture.temperature
    samples = config.training.num_batches * config.data.batch_size
    why = f" (auto: windows^(1/{temperature:g}))"
    return [
        f"source {number}, {one.name}: {one.windows:,} windows to train on, weight {one.weight:.6g}"
        f"{why if source.weight == 'auto' else ''}, {plain(100 * one.share)} % of a batch, "
        f"{plain(one.epochs(samples))} epochs in {steps:,} steps"
        for number, (one, source) in enumerate(zip(shares, config.data.sources, strict=True))
    ]


def label_shares(config: RunConfig, data: DataBundle) -> LabelShares:
    """Counted over all training windows, without a picture.

    Raises: UserError if a term that is on is fed by no source.
    """
    stores = [source.store for source in data.windows.sources]
    rows = [data.windows.rows_of(stores.index(part.store), part.training) for part in data.parts]
    if config.data.mixture.labelled == 1:  # the others are not drawn
        rows = [data.windows.having("actions", own) for own in rows]
    needs = resolved(config, data.spec.fps)[0].objective.needs_of_terms()
    shares, masked = dict[str, list[float]](), dict[str, dict[str, float]]()
    for name, asked in needs.items():
        every = [data.windows.targets(own, asked) for own in rows]
        fed = [np.any([*targets.values()], axis=0) if targets else known for known, targets in every]
        labelled = sum(int(known.sum()) for known, _ in every)
        if not any(own.any() for own in fed):
            raise _unfed(name, asked, labelled)
        shares[name] = [float(own.mean()) if len(own) else 0.0 for own in fed]
        if targets := every[0][1]:
            masked[name] = {k: 1 - sum(int(own[k].sum()) for _, own in every) / labelled for k in targets}
    names = [f"{number}: {part.name}" for number, part in enumerate(data.parts)]
    windows = [len(own) for own in rows]
    return LabelShares(sources=names, windows=windows, needs=needs, shares=shares, masked=masked)


def _unfed(name: str, asked: DataNeeds, labelled: int) -> UserError:
    out = "" if name == "action" else f", or take the term out (objective.{name}=null)"
    needed, targets = " and ".join(asked.labels), (*asked.offsets, *asked.states)
    wrong = f"it needs {needed}, which no training window of any source has"
    keys = {"answer": "answer=COLUMN"}
    cure = " ".join(f"data.sources.{keys.get(label, f'labels.{label}=true')}" for label in asked.labels)
    cure = f"set {cure} where the data have them, add a source that has them"
    if labelled:
        reach = ", ".join(f"+{k}" if isinstance(k, int) else k for k in targets)
        wrong = f"no training window reaches {reach} inside of its episode, with a label there"
        cure = "name smaller offsets"
    return UserError(f"objective.{name} learns from nothing: {wrong}.\n  cure: {cure}{out}.")

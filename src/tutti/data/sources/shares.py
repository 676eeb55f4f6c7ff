"""How much of a mixture each source is: weights by size, shares of a batch, epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tutti.data.embodiments import CommonSpec
from tutti.data.episodes import bounds_of, mask_of
from tutti.data.sources.parts import Labelled, Part, labelled_rows, stores_of


def weight_of(windows: int, temperature: float) -> float:
    """The weight of a source of n windows: n^(1/T), so p_i = n_i^(1/T) / sum_j n_j^(1/T) of what is drawn.

    Source: sampling by temperature, Arivazhagan et al. (1907.05019), of the sentences of languages. Differs:
    they choose T = 5 and draw at random; here T is 2 unless given, and shares are exact.
    """
    return float(windows ** (1 / temperature))


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShare:
    """What a source has of a mixture: its windows to train on, its weight, as decided, and its share of a
    batch."""

    name: str
    windows: int
    weight: float
    share: float

    def epochs(self, samples: int) -> float:
        """How often each of its windows is drawn, on average, where so many of all sources are."""
        return samples * self.share / max(1, self.windows)


def weighed(parts: Sequence[Part], temperature: float) -> list[Part]:
    """The parts with weights by their windows to train on (`weight_of`)."""
    sizes = [int(bounds_of(part.training)[1].sum()) for part in parts]
    return [
        replace(part, weight=weight_of(size, temperature)) for part, size in zip(parts, sizes, strict=True)
    ]


def source_shares(
    parts: Sequence[Part],
    spec: CommonSpec,
    labelled: float | Literal["by_weight"],
    rows: Labelled | None = None,
) -> tuple[SourceShare, ...]:
    """What each source has of a batch, of which the share `labelled` has actions, if it is a number. At 1
    windows without actions do not count. `spec` is what the parts have in common, `rows` those with each
    label, where they are known."""
    rows = rows or {store: labelled_rows(store, parts, spec) for store in stores_of(parts)}
    known = {store: own["actions"] for store, own in rows.items()}
    trained = [mask_of(part.training, part.store.spec.num_frames) for part in parts]
    acting = np.array([(known[part.store] & own).sum() for part, own in zip(parts, trained, strict=True)])
    windows, weights = np.array([own.sum() for own in trained]), np.array([part.weight for part in parts])
    kinds = [(1.0, windows)]
    if labelled != "by_weight":
        kinds = [(labelled, acting), (1 - labelled, windows - acting)]
        windows = acting if labelled == 1 else windows
    shares = np.zeros(len(parts))
    for share, own in kinds:
        there = weights * (own > 0)
        shares += share * there / max(there.sum(), 1e-300)
    columns = zip(parts, windows.tolist(), weights.tolist(), shares.tolist(), strict=True)
    return tuple(
        SourceShare(name=part.name, windows=size, weight=weight, share=share)
        for part, size, weight, share in columns
    )


def masked_line(part: Part, share: float) -> str:
    """How much of the actions in the chunks of a source is masked, for the user."""
    fps, percent = part.store.spec.fps, f"{100 * share:.0f} %"
    return (
        f"{part.name}: {fps:g} steps a second; {percent} of the actions in its chunks are masked, past the "
        "end of the episode or of the time that data.horizon is in other sources"
    )

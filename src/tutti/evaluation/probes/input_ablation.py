"""Input ablation: swap the instruction, remove the text, one view, all views or the state.

Inputs are removed as tokens, by their masks: a black image is an input too, and misleads (94 % success with
the tokens removed, 27 % with black images, in one report). A model that was never trained without an input
may do worse without it than it would have to, so an ablation shows what this model uses, not what the task
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tutti.data.samples import Sample
from tutti.data.tokenize import Tokenizer
from tutti.evaluation.open_loop import swapped_texts
from tutti.evaluation.probes.predictions import masked_sums, predict
from tutti.evaluation.statistics.intervals import Estimate, ratio_of_sums
from tutti.models.vla import VLA
from tutti.types import Batch, Observation

Change = Callable[[Batch], Observation]
SWAP, NO_TEXT, NO_VISION, NO_STATE = "instruction swapped", "no instruction", "no images", "no state"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputAblation:
    """Effect of one input on the actions. With o the observation, o' the changed one and a* the recorded
    actions, over the executed part:

    `action_shift` = sum m |a(o) - a(o')| / sum m |a(o) - a*|: how far the actions move, in errors.
    `increase` = sum m |a(o') - a*| / sum m |a(o) - a*| - 1: by what share the error grows.
    """

    name: str
    action_shift: Estimate
    increase: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class InputAblations:
    """All ablations. `error` is the masked mean |a(o) - a*| over the executed part, in normalised units."""

    error: Estimate
    rows: tuple[InputAblation, ...]

    def find(self, name: str) -> InputAblation | None:
        """The row of this name, if it was measured."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSums:
    """The model's sum m |a - a*| of each window over the executed part, and sum m."""

    error: np.ndarray
    count: np.ndarray


def input_changes(
    model: VLA, tokenizer: Tokenizer, texts: Sequence[str], groups: Sequence[str], partners: Mapping[str, str]
) -> dict[str, Change]:
    """Every change of the observation by name, in the order of the table.

    The swapped text is that of the task which `partners` names, else of the next task by name; there is no
    swap where all texts are of one task. The withheld state is 0 in normalised units: the mean of the
    training states under `standard`, the middle between q01 and q99 under `quantile`.
    """
    changes: dict[str, Change] = {}
    other = swapped_texts(groups, partners)
    if other is not None:
        ids, mask = tokenizer.encode([texts[int(number)] for number in other])

        def swap(batch: Batch) -> Observation:
            row = batch.instruction_id
            return replace(batch.observation, text=ids[row], text_mask=mask[row])

        changes[SWAP] = swap
    changes[NO_TEXT] = lambda batch: replace(
        batch.observation, text_mask=torch.zeros_like(batch.observation.text_mask)
    )
    views = model.spec.views
    for number, view in enumerate(views if len(views) > 1 else ()):
        changes[f"no {view.rsplit('.', 1)[-1]} view"] = _without_view(number)
    changes[NO_VISION] = lambda batch: replace(
        batch.observation, image_mask=torch.zeros_like(batch.observation.image_mask)
    )
    changes[NO_STATE] = lambda batch: replace(
        batch.observation, state=torch.zeros_like(batch.observation.state)
    )
    return changes


def ablate(
    model: VLA, sample: Sample, changed: Mapping[str, Change], *, executed: int, seed: int = 0
) -> tuple[InputAblations, ErrorSums]:
    """Predicts every window of `sample` as it is and under every change. Intervals: over episodes."""
    sums: dict[str, list[np.ndarray]] = {"error": [], "count": []}
    sums |= {f"{what}/{name}": [] for name in changed for what in ("moved", "error")}
    for batch in sample.batches():
        mask = batch.action_mask
        unchanged = predict(model, batch.observation)
        sums["error"].append(masked_sums(unchanged - batch.actions, mask, executed))
        sums["count"].append(masked_sums(mask.float(), mask, executed))
        for name, change in changed.items():
            other = predict(model, change(batch))
            sums[f"moved/{name}"].append(masked_sums(other - unchanged, mask, executed))
            sums[f"error/{name}"].append(masked_sums(other - batch.actions, mask, executed))
    table = {name: np.concatenate(parts) for name, parts in sums.items()}
    error, episode = table["error"], sample.episode
    rows = tuple(
        InputAblation(
            name=name,
            action_shift=ratio_of_sums(table[f"moved/{name}"], error, episode, seed=seed),
            increase=ratio_of_sums(table[f"error/{name}"], error, episode, seed=seed).affine(1, -1),
        )
        for name in changed
    )
    whole = ratio_of_sums(error, table["count"], episode, seed=seed)
    return InputAblations(error=whole, rows=rows), ErrorSums(error=error, count=table["count"])


def _without_view(number: int) -> Change:
    def change(batch: Batch) -> Observation:
        mask = batch.observation.image_mask.clone()
        mask[:, number] = False
        return replace(batch.observation, image_mask=mask)

    return change

"""How the predicted actions depend on each input, and whether successive chunks agree.

Inputs are removed as tokens, by their masks: a black image is an input too, and misleads (94 % success with
the tokens removed, 27 % with black images, in one report). A model that was never trained without an input
may do worse without it than it would have to, so an ablation shows what this model uses, not what the task
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tutti.data.bundle import spread
from tutti.evaluation.open_loop import swapped_texts
from tutti.evaluation.probes.setup import Change, ProbeSetup, masked_sums
from tutti.evaluation.statistics.intervals import Estimate
from tutti.types import Batch, Label, Observation

SWAP, NO_TEXT, NO_VISION, NO_STATE = "instruction swapped", "no instruction", "no images", "no state"
NO_HISTORY, NO_PAST_IMAGES, NO_PAST_STATES = "no history", "no earlier images", "no earlier states"
DEAD_BAND = 0.1
MAX_PAIRS = 1000


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


def input_changes(setup: ProbeSetup) -> dict[str, Change]:
    """Every change of the observation by name, in the order of the table.

    The swapped text is that of the task which `partners` names, else of the next task by name; there is no
    swap where all texts are of one task. The withheld state is 0 in normalised units: the mean of the
    training states under `standard`, the middle between q01 and q99 under `quantile`.
    """

    def zeroed(field: str, view: int | slice = slice(None)) -> Change:
        def change(batch: Batch) -> Observation:
            values, past = getattr(batch.observation, field).clone(), batch.observation.history
            values[:, view] = 0
            if past is not None and field != "text_mask":  # earlier pictures would show it too
                earlier = getattr(past, field).clone()
                earlier[..., view] = 0
                past = replace(past, **{field: earlier})
            return replace(batch.observation, **{field: values, "history": past})

        return change

    changes: dict[str, Change] = {}
    other = swapped_texts(setup.groups, setup.partners)
    if other is not None:
        texts = setup.data.windows.instructions
        ids, mask = setup.data.tokenizer.encode([texts[int(number)] for number in other])

        def swap(batch: Batch) -> Observation:
            row = batch.instruction_id
            return replace(batch.observation, text=ids[row], text_mask=mask[row])

        changes[SWAP] = swap
    changes[NO_TEXT] = zeroed("text_mask")
    views = setup.model.spec.views
    for number, view in enumerate(views if len(views) > 1 else ()):
        changes[f"no {view.rsplit('.', 1)[-1]} view"] = zeroed("image_mask", number)
    changes[NO_VISION] = zeroed("image_mask")
    reads_state = setup.model.spec.state_dim > 0 and setup.model.fusion.reads_state
    changes |= {NO_STATE: zeroed("state")} if reads_state else {}
    if len(setup.model.spec.history) > 1:
        hidden = {NO_HISTORY: ("image_mask", "state_mask"), NO_PAST_IMAGES: ("image_mask",)}
        hidden |= {NO_PAST_STATES: ("state_mask",)} if reads_state else {}
        changes |= {name: partial(_forgetting, masks) for name, masks in hidden.items()}
    return changes


def _forgetting(masks: Sequence[str], batch: Batch) -> Observation:
    """Without these parts of the history."""
    past = batch.observation.history
    assert past is not None
    gone = {name: torch.zeros_like(getattr(past, name)) for name in masks}
    return replace(batch.observation, history=replace(past, **gone))


def ablate(setup: ProbeSetup) -> InputAblations:
    """Predicts every held-out window as it is and under every change."""
    error, count = setup.own_error
    rows: list[InputAblation] = []
    of: dict[str, Label] = {NO_TEXT: "text", NO_STATE: "state"}
    for name, change in input_changes(setup).items():
        # Where the input is not there anyway, taking it away changes nothing.
        known = setup.held.known(of.get(name, "actions"))
        if not known.any():
            continue
        other = setup.predict(setup.held, change)
        moved, wrong = setup.sums(other - setup.predicted), setup.sums(other - setup.recorded[0])
        shift, worse = (setup.ratio(part * known, error * known) for part in (moved, wrong))
        rows.append(InputAblation(name=name, action_shift=shift, increase=worse.affine(1, -1)))
    return InputAblations(error=setup.ratio(error, count), rows=tuple(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkConsistency:
    """Agreement of the chunks predicted at t and t + k of an episode, k = `distance` the actions per query:

    `chunk_disagreement` = mean |a^t_{t+k+j} - a^{t+k}_{t+k+j}| over the steps that both chunks cover, as a
    share of the masked mean error |a^ - a*| there (None where chunks do not overlap);
    `sign_flips` = of the pairs of consecutive executed actions of which both are larger than `DEAD_BAND` in
    size, each dimension by itself, the share whose signs differ; `recorded_flips` is that share in the
    recorded actions. Sizes are in the data's units divided by the normalisation's scale, so 0 is a command
    of 0.
    """

    distance: int
    chunk_disagreement: Estimate | None
    sign_flips: Estimate
    recorded_flips: Estimate


def chunk_consistency(setup: ProbeSetup) -> ChunkConsistency | None:
    """At most `MAX_PAIRS` pairs of held-out windows. None if no episode is long enough for a pair."""
    spec, index, rows = setup.model.spec, setup.held.index, setup.held.rows
    distance = min(setup.executed, spec.horizon)
    overlap = spec.horizon - distance
    inside = rows + distance < index.episodes_of(rows)
    if not inside.any():
        return None
    first = spread(index, rows[inside], MAX_PAIRS)
    second = spread(index, first.rows + distance, MAX_PAIRS)
    command_of_0 = setup.data.normalizer.apply_action(np.zeros(spec.action_dim), spec.embodiments[0])
    zero = torch.from_numpy(command_of_0).float()

    samples = first, second
    old, new = (setup.predict(sample) for sample in samples)
    recorded, present = zip(*(index.chunks(sample.rows) for sample in samples), strict=True)
    disagreement = None
    if overlap:
        mask, later = present[1][:, :overlap], new[:, :overlap]
        moved = masked_sums(old[:, distance:] - later, mask)
        error = masked_sums(later - recorded[1][:, :overlap], mask)
        disagreement = setup.ratio(moved, error, first)

    def flips(chunks: Sequence[Tensor]) -> Estimate:
        actions, there = (torch.cat([c[:, :distance] for c in both], dim=1) for both in (chunks, present))
        return setup.ratio(*_sign_flips(actions - zero, there), first)

    return ChunkConsistency(
        distance=distance,
        chunk_disagreement=disagreement,
        sign_flips=flips((old, new)),
        recorded_flips=flips(recorded),
    )


def _sign_flips(actions: Tensor, present: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each window: how many consecutive pairs change sign, of how many that are large enough."""
    large = (actions.abs() > DEAD_BAND) & present
    both = large[:, 1:] & large[:, :-1]
    flipped = both & (actions[:, 1:].sign() != actions[:, :-1].sign())
    return flipped.double().sum((1, 2)).numpy(), both.double().sum((1, 2)).numpy()

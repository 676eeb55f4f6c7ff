"""How the predicted actions depend on each input, and whether successive chunks agree.

Inputs are removed as tokens, by their masks: a black image is an input too, and misleads (94 % success with
the tokens removed, 27 % with black images, in one report). A model that was never trained without an input
may do worse without it than it would have to, so an ablation shows what this model uses, not what the task
needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tutti.data.bundle import spread
from tutti.evaluation.open_loop import swapped_texts
from tutti.evaluation.probes.setup import ProbeSetup, joined, masked_sums, predict
from tutti.evaluation.statistics.intervals import Estimate
from tutti.types import Batch, Observation

Change = Callable[[Batch], Observation]
SWAP, NO_TEXT, NO_VISION, NO_STATE = "instruction swapped", "no instruction", "no images", "no state"
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
            values = getattr(batch.observation, field).clone()
            values[:, view] = 0
            return replace(batch.observation, **{field: values})

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
    return changes | {NO_VISION: zeroed("image_mask"), NO_STATE: zeroed("state")}


def ablate(setup: ProbeSetup) -> tuple[InputAblations, dict[str, np.ndarray]]:
    """Predicts every held-out window as it is and under every change. Also gives the model's own sums of
    each window over the executed part: "error" is sum m |a - a*|, "count" sum m."""
    changes = input_changes(setup)

    def measure(batch: Batch) -> dict[str, np.ndarray]:
        mask, executed = batch.action_mask, setup.executed
        unchanged = predict(setup.model, batch.observation)
        sums = {
            "error": masked_sums(unchanged - batch.actions, mask, executed),
            "count": masked_sums(mask.float(), mask, executed),
        }
        for name, change in changes.items():
            other = predict(setup.model, change(batch))
            sums[f"moved/{name}"] = masked_sums(other - unchanged, mask, executed)
            sums[f"error/{name}"] = masked_sums(other - batch.actions, mask, executed)
        return sums

    table = joined(map(measure, setup.held.batches()))
    rows = tuple(
        InputAblation(
            name=name,
            action_shift=setup.ratio(table[f"moved/{name}"], table["error"]),
            increase=setup.ratio(table[f"error/{name}"], table["error"]).affine(1, -1),
        )
        for name in changes
    )
    return InputAblations(error=setup.ratio(table["error"], table["count"]), rows=rows), table


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

    def measure(one: Batch, two: Batch) -> dict[str, np.ndarray]:
        sums: dict[str, np.ndarray] = {}
        chunks = predict(setup.model, one.observation), predict(setup.model, two.observation)
        if overlap:
            mask, new = two.action_mask[:, :overlap], chunks[1][:, :overlap]
            sums["disagreement"] = masked_sums(chunks[0][:, distance:] - new, mask, overlap)
            sums["error"] = masked_sums(new - two.actions[:, :overlap], mask, overlap)
        present = torch.cat([batch.action_mask[:, :distance] for batch in (one, two)], dim=1)
        for name, actions in (("predicted", chunks), ("recorded", (one.actions, two.actions))):
            executed = torch.cat([chunk[:, :distance] for chunk in actions], dim=1) - zero
            sums[f"{name}/flips"], sums[f"{name}/pairs"] = _sign_flips(executed, present)
        return sums

    table = joined(map(measure, first.batches(), second.batches()))

    def ratio(top: str, bottom: str) -> Estimate:
        return setup.ratio(table[top], table[bottom], first)

    return ChunkConsistency(
        distance=distance,
        chunk_disagreement=ratio("disagreement", "error") if overlap else None,
        sign_flips=ratio("predicted/flips", "predicted/pairs"),
        recorded_flips=ratio("recorded/flips", "recorded/pairs"),
    )


def _sign_flips(actions: Tensor, present: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of each window: how many consecutive pairs change sign, of how many that are large enough."""
    large = (actions.abs() > DEAD_BAND) & present
    both = large[:, 1:] & large[:, :-1]
    flipped = both & (actions[:, 1:].sign() != actions[:, :-1].sign())
    return flipped.double().sum((1, 2)).numpy(), both.double().sum((1, 2)).numpy()

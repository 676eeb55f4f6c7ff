"""Is it alive: which units of the features tell samples apart at all, and how many directions they span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tutti.debug.remarks import Remark, problem
from tutti.models.vla import VLA
from tutti.training.diagnostics.measures import dead_share, effective_rank
from tutti.types import Batch, Tokens

DEAD, FLAT = 0.5, 1.5
"""Above this share of dead units, below this effective rank: an encoder that says one thing at most."""
LEAST_SAMPLES, LEAST_TEXTS = 8, 4
"""So many samples, or distinct texts, are needed before a low rank can mean anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Of one kind of features: the share of units that do not change from sample to sample, and the effective
    rank of their masked means (samples x units, the mean over the samples taken off); None where too few
    differ for a rank to mean anything."""

    features: str
    dead: float
    rank: float | None


@torch.no_grad()
def activity(model: VLA, batches: Sequence[Batch]) -> tuple[Activity, ...]:
    """Over all samples of `batches`, in evaluation mode. Language is left out below two instructions."""
    was_training = model.training
    model.eval()
    try:
        found = [model(batch.observation) for batch in batches]
    finally:
        model.train(was_training)
    kinds: dict[str, list[Tokens]] = {
        "vision": [features.vision for features in found],
        "language": [features.language for features in found],
        "fused vision": [features.fused_vision for features in found],
        "readout": [_as_tokens(features.readout) for features in found],
    }
    texts = len({number for batch in batches for number in batch.instruction_id.tolist()})
    if texts < 2:
        del kinds["language"]
    rows: list[Activity] = []
    for name, parts in kinds.items():
        tokens = Tokens(
            values=torch.cat([part.values for part in parts]), mask=torch.cat([part.mask for part in parts])
        )
        share, means = dead_share(tokens.values, tokens.mask), tokens.mean()
        enough = texts >= LEAST_TEXTS if name == "language" else len(means) >= LEAST_SAMPLES
        rank = effective_rank(means - means.mean(0, keepdim=True)) if enough else None
        if share is not None:
            rows.append(Activity(features=name, dead=share, rank=rank))
    return tuple(rows)


def judge(when: str, rows: Sequence[Activity]) -> list[Remark]:
    """A problem for each kind of features that is dead or flat; `when` names the model looked at."""
    remarks: list[Remark] = []
    for row in rows:
        cause = "its weights or biases may have died (all zero, or below every ReLU)"
        if row.dead > DEAD:
            text = (
                f"{when}, {100 * row.dead:.0f} % of the {row.features} units do not change from one sample "
                f"to another: {cause}, or its inputs are all alike. Start from fresh weights, or lower the "
                "learning rate."
            )
            remarks.append(problem("activity", text))
        elif row.rank is not None and row.rank < FLAT:
            text = (
                f"{when}, the {row.features} features differ in {row.rank:.1f} directions only (effective "
                "rank): they have collapsed, or the samples are all alike."
            )
            remarks.append(problem("activity", text))
    return remarks


def _as_tokens(readout: Tensor) -> Tokens:
    return Tokens(
        values=readout[:, None], mask=torch.ones(len(readout), 1, dtype=torch.bool, device=readout.device)
    )

"""Feature checks of a model: dead units and effective rank over many windows, as a training records them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tutti.models.vla import VLA
from tutti.training.diagnostics.measures import feature_measures
from tutti.types import Batch, Features, Tokens


@torch.no_grad()
def check_features(model: VLA, batches: Sequence[Batch]) -> dict[str, float]:
    """`dead/*`, `rank/*` and `rank_limit/*` over all windows of `batches`, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        features = [model(batch.observation) for batch in batches]
    finally:
        model.train(was_training)
    joined = Features(
        vision=_join([one.vision for one in features]),
        language=_join([one.language for one in features]),
        fused_vision=_join([one.fused_vision for one in features]),
        readout=torch.cat([one.readout for one in features]),
    )
    return feature_measures(joined, torch.cat([batch.instruction_id for batch in batches]))


def _join(tokens: Sequence[Tokens]) -> Tokens:
    return Tokens(
        values=torch.cat([part.values for part in tokens]), mask=torch.cat([part.mask for part in tokens])
    )

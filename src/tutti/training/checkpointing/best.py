"""Which checkpoint counts as the best, and whether checkpoints are made where they are to be kept."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tutti.training.metrics import describe_metric


class KeepBestConfig(BaseModel):
    """The checkpoint with the best value of a validation's metric is marked and never deleted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str = Field(default="valid/total", description="a metric that a validation records")
    mode: Literal["min", "max"] = Field(default="min", description="min: the smaller the better")

    @field_validator("metric")
    @classmethod
    def _is_of_validations(cls, metric: str) -> str:
        if not metric.startswith(("valid/", "valid_raw/")) or describe_metric(metric) is None:
            raise ValueError(
                f"'{metric}' is recorded by no validation; give a name that begins with valid/ (or valid_raw/"
                "), such as valid/total or valid/action (docs/metrics.md)"
            )
        return metric


KeepBest = KeepBestConfig | Literal["off"]


def check_keeping(every: int, best: KeepBest, checkpoint_every: int, validate_every: int) -> None:
    """Refuses a wish for checkpoints that are never made, or never validated.

    Raises: ValueError that names the keys and the cure.
    """
    if every and (not checkpoint_every or every % checkpoint_every):
        raise ValueError(
            f"keep_every is {every}, but checkpoints are made every {checkpoint_every} steps "
            "(checkpoint_every; 0: only at the end). Make keep_every a multiple of checkpoint_every."
        )
    if best == "off":
        return
    if not validate_every or checkpoint_every % validate_every:
        raise ValueError(
            f"keep_best compares checkpoints by '{best.metric}' of a validation at the same step, but "
            f"checkpoint_every is {checkpoint_every} and validate_every {validate_every}. Make "
            "checkpoint_every a multiple of validate_every."
        )

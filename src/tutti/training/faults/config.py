"""Configuration of gradients: clipping, non-finite values and rollbacks."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tutti.frozen_config import FrozenConfig
from tutti.training.optim.clipping import ZClipConfig


class RollbackConfig(FrozenConfig):
    """Where the total loss stays high, go back to an older checkpoint and skip the data read since.

    The total of an update is high if (total - mean) / deviation > `z_threshold`, with the exponential mean
    and standard deviation of the totals that were not high themselves. After `patience` high totals in a row
    the run takes weights and optimiser from its newest checkpoint that is at least `rewind_steps` updates
    old, and goes on with the data that come next: what was read since is not read again (PaLM, 2204.02311,
    section 5.1). After `max_rollbacks` rollbacks the next divergence stops the run.
    """

    z_threshold: float = Field(
        default=6.0, gt=0, description="Standard deviations above the mean at which a total loss is high."
    )
    patience: int = Field(default=50, ge=1, description="High totals in a row that count as a divergence.")
    rewind_steps: int = Field(default=200, ge=1, description="Updates to go back, at least.")
    max_rollbacks: int = Field(
        default=2, ge=1, description="Rollbacks in a run; the next divergence stops it."
    )
    warmup: int = Field(default=100, ge=1, description="Totals to see, in each phase, before judging one.")
    decay: float = Field(default=0.99, gt=0, lt=1, description="Decay of mean and variance, each update.")

    @model_validator(mode="after")
    def _rewinds_far_enough(self) -> Self:
        if self.rewind_steps < self.patience:
            raise ValueError(
                f"rewind_steps is {self.rewind_steps}, but a divergence is known only after patience = "
                f"{self.patience} updates: the checkpoint would lie within it. Raise rewind_steps."
            )
        return self


class GradientsConfig(FrozenConfig):
    """How gradients are clipped, and what follows a non-finite value or a divergence."""

    clip_norm: float | Literal["auto", "off"] = Field(
        default="auto",
        description="Largest gradient norm; larger gradients are scaled down to it. auto: a limit that "
        "follows the recent norms, as `zclip` has it.",
    )
    clip_by: Literal["global", "part"] = Field(
        default="global", description="What is limited: the whole gradient, or that of each part."
    )
    zclip: ZClipConfig | Literal["off"] = Field(
        default="off",
        description="Settings of the limit that follows the recent norms (ZClip), which then holds beside a "
        "clip_norm that is a number, too; off: the defaults where clip_norm is auto, else no such limit.",
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop", description="On a NaN or infinity: stop the run, or skip the update."
    )
    max_skips: int = Field(default=3, ge=1, description="Skipped updates in a row; one more ends the run.")
    rollback: RollbackConfig | Literal["off"] = Field(
        default="off", description="Roll back to an older checkpoint when the total loss stays high."
    )

    @model_validator(mode="after")
    def _norm_is_positive(self) -> Self:
        if not isinstance(self.clip_norm, str) and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; give a positive norm, 'auto' or 'off'.")
        return self

    def check_rollback(self, checkpoint_every: int, keep: int) -> None:
        """Raises: ValueError if the kept checkpoints do not reach back as far as a rollback goes."""
        if self.rollback == "off":
            return
        rewind = self.rollback.rewind_steps
        if not checkpoint_every or (keep - 1) * checkpoint_every < rewind:
            raise ValueError(
                f"gradients.rollback goes back {rewind} updates, but checkpoints.every {checkpoint_every} "
                f"and checkpoints.keep {keep} may leave no checkpoint that old: (keep - 1) * every must be "
                "at least as much. Raise one of them, or lower gradients.rollback.rewind_steps."
            )

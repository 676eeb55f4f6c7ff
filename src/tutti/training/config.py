"""TrainingConfig: everything about how the parameters are moved."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tutti.training.diagnostics import DiagnosticsConfig
from tutti.training.optimizer import AdamWConfig, OptimizerConfig
from tutti.training.schedule import ScheduleConfig, WsdConfig


class TrainingConfig(BaseModel):
    """How long, how fast and how carefully to train. `auto` is resolved at the start and logged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=2000, ge=1, description="Optimiser steps in all.")
    optimizer: OptimizerConfig = Field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = Field(default_factory=WsdConfig)
    clip_norm: float | Literal["off"] = Field(
        default=1.0, description="Largest global gradient norm; larger ones are scaled down to it."
    )
    accumulation: int = Field(default=1, ge=1, description="Batches per optimiser step; their mean counts.")
    ema: float | Literal["off"] = Field(default=0.999, description="Decay of the average of the weights.")
    seed: int = Field(default=0, ge=0, description="Seed of everything random in training.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = Field(default="auto", description="CPU threads of torch.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="bf16 autocasts the forward pass; auto means bf16 on CUDA, else fp32."
    )
    compile: bool = Field(default=False, description="Run the model through torch.compile.")
    log_every: int = Field(default=10, ge=1, description="Steps between records; values are their mean.")
    validate_every: int = Field(default=200, ge=0, description="Steps between validations; 0: never.")
    validate_raw: bool = Field(default=False, description="Validate the raw weights too, not only the EMA.")
    checkpoint_every: int = Field(default=200, ge=0, description="Steps between checkpoints; 0: at the end.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints to keep.")
    diagnostics: DiagnosticsConfig = Field(
        default_factory=DiagnosticsConfig, description="Which term moves which part, health, loss spikes."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule.warmup >= self.steps:
            raise ValueError(
                f"schedule.warmup is {self.schedule.warmup} but steps is {self.steps}: the learning rate "
                "would never reach its peak. Lower schedule.warmup or raise steps."
            )
        if self.clip_norm != "off" and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; give a positive norm, or 'off'.")
        if self.ema != "off" and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give a decay in [0, 1), or 'off'.")
        if self.threads != "auto" and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; give at least 1, or 'auto'.")
        return self

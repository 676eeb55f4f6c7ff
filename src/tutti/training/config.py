"""TrainingConfig: how the parameters are trained. Each part's section lies beside that part."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from tutti.frozen_config import FrozenConfig
from tutti.training.checkpointing.config import CheckpointsConfig, ForkConfig, InitFromConfig
from tutti.training.device import Machine, resolve_machine
from tutti.training.diagnostics.observer import DiagnosticsConfig
from tutti.training.faults.config import GradientsConfig
from tutti.training.optim.optimizers import AdamWConfig, OptimizerConfig
from tutti.training.optim.schedules import BatchRampConfig, ScheduleConfig, WsdConfig
from tutti.training.parallel.config import AutoParallelConfig, ParallelConfig
from tutti.training.parallel.ddp import CompileMode
from tutti.training.validation import ValidationConfig
from tutti.types import UserError

Off = Literal["off"]


class TrainingConfig(FrozenConfig):
    """How long, how fast and how carefully to train. `auto` is resolved at the start and logged."""

    steps: int = Field(default=2000, ge=1, description="Optimiser steps in all.")
    seed: int = Field(default=0, ge=0, description="Seed of everything random in training.")
    optimizer: OptimizerConfig = Field(default_factory=AdamWConfig, description="Optimiser and its rates.")
    schedule: ScheduleConfig = Field(default_factory=WsdConfig, description="Factor on `lr` over the steps.")
    gradients: GradientsConfig = Field(
        default_factory=GradientsConfig, description="Gradient clipping, non-finite values and rollbacks."
    )
    accumulation: int = Field(default=1, ge=1, description="Batches per optimiser step; they count as one.")
    batch_ramp: BatchRampConfig | Off = Field(
        default="off", description="Stages of fewer batches per step before `accumulation`; off: none."
    )
    ema: float | Off = Field(
        default=0.999,
        description="Decay of the moving average of the weights, which is validated and served; off: none.",
    )
    fork: ForkConfig | Off = Field(default="off", description="Checkpoint of another run to start from.")
    init_from: InitFromConfig | Off = Field(
        default="off", description="Weights of another run or an exported policy to start from."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: the GPU (CUDA) where there is one, else the CPU."
    )
    threads: int | Literal["auto"] = Field(
        default="auto", description="CPU threads of torch; auto: one per core."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="bf16 autocasts the forward pass; auto means bf16 on CUDA, else fp32."
    )
    residual: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Precision of the sum that runs through a transformer's blocks. bf16, with precision "
        "bf16: fewer bytes to move, other results.",
    )
    deterministic: bool = Field(
        default=True,
        description="On CUDA: the same bits each time, also where other algorithms are faster, as cuDNN's "
        "attention is.",
    )
    parallel: ParallelConfig = Field(
        default_factory=AutoParallelConfig,
        description="On several processes: auto, single, ddp (replicas) or fsdp (sharded weights).",
    )
    compile: CompileMode = Field(
        default="off",
        description="What torch.compile compiles: off (nothing), each block, or the whole model.",
    )
    activation_checkpointing: Literal["off", "block"] = Field(
        default="off", description="block: a block's activations are computed again in the backward pass."
    )
    log_every: int = Field(default=10, ge=1, description="Steps between records; values are their mean.")
    validation: ValidationConfig = Field(
        default_factory=ValidationConfig, description="Loss terms on held-out episodes."
    )
    evaluate_every: int = Field(
        default=0,
        ge=0,
        description="Steps between evaluations in the suite of `evaluation`: the averaged weights play some "
        "starts, and the best checkpoint by success is kept; 0: never.",
    )
    evaluate_episodes: int = Field(
        default=5, ge=1, le=100_000, description="Rollouts of each task in such an evaluation."
    )
    evaluate_first_seed: int = Field(
        default=600_000, ge=0, description="Seed of their first start; they may not be those of the score."
    )
    checkpoints: CheckpointsConfig = Field(
        default_factory=CheckpointsConfig, description="When checkpoints are written, and which are kept."
    )
    diagnostics: DiagnosticsConfig = Field(
        default_factory=DiagnosticsConfig,
        description="Which term moves which part, health of the features, loss spikes.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule.warmup >= self.steps:
            raise ValueError(
                f"schedule.warmup is {self.schedule.warmup} but steps is {self.steps}: the learning rate "
                "would never reach its peak. Lower schedule.warmup or raise steps."
            )
        if self.ema != "off" and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give a decay in [0, 1), or 'off'.")
        if self.threads != "auto" and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; give at least 1, or 'auto'.")
        if self.batch_ramp != "off":
            self.batch_ramp.check(self.accumulation, self.steps)
        self.gradients.check_rollback(self.checkpoints.every, self.checkpoints.keep)
        if self.optimizer.kind == "schedule_free" and (self.ema != "off" or self.schedule.kind != "constant"):
            raise ValueError(
                f"optimizer.kind schedule_free with ema {self.ema} and schedule.kind {self.schedule.kind}: "
                "it averages the weights by itself, at a rate that stays the same after the warm-up. Set "
                "training.ema=off and training.schedule.kind=constant."
            )
        if self.fork != "off" and self.fork.step != "latest" and self.fork.step >= self.steps:
            raise ValueError(
                f"fork.step is {self.fork.step} and steps is {self.steps}, which include those of the other "
                "run. Raise training.steps."
            )
        if self.fork != "off" and self.init_from != "off":
            raise ValueError(
                "fork goes on from the whole state of another run, init_from begins anew with its weights. "
                "Set one of them to off."
            )
        self.checkpoints.check_keeping(self.validation.every, self.evaluate_every)
        return self

    def machine(self) -> Machine:
        """Device, threads and precision, decided.

        Raises: UserError if CUDA is asked for and there is none.
        """
        return resolve_machine(self.device, self.threads, self.precision)

    def of_blocks(self, machine: Machine) -> dict[str, Any]:
        """What `LossModule` is told of compiling, recomputing and the residual sum.

        Raises: UserError if it asks for bf16 and the products are in float32.
        """
        if self.residual == "bf16" and machine.precision == "fp32":
            raise UserError(
                "training.residual is bf16, but training.precision is fp32 here, and a sum has no fewer bits "
                "than its parts. Set training.precision=bf16 or training.residual=fp32."
            )
        again = self.activation_checkpointing == "block"
        return {"mode": self.compile, "recompute": again, "residual": self.residual_dtype}

    @property
    def residual_dtype(self) -> torch.dtype | None:
        """The dtype of the residual sum where products are in bf16, if it is not that of what comes in."""
        return torch.bfloat16 if self.residual == "bf16" else None

    def accumulation_at(self, step: int) -> int:
        """The micro-batches of update `step` (0-based)."""
        if self.batch_ramp == "off":
            return self.accumulation
        return self.batch_ramp.accumulation_at(step, self.accumulation, self.steps)

    @property
    def num_batches(self) -> int:
        """The batches of the whole training."""
        if self.batch_ramp == "off":
            return self.steps * self.accumulation
        return sum(map(self.accumulation_at, range(self.steps)))

    def batch_factor(self, step: int) -> float:
        """What the batch of update `step` (0-based) multiplies the learning rates with."""
        if self.batch_ramp == "off":
            return 1.0
        return self.batch_ramp.rate_factor(self.accumulation_at(step), self.accumulation)

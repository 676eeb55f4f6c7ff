"""Configuration of checkpoints: how often, in which format, which are kept, and what a run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from tutti.frozen_config import FrozenConfig
from tutti.models.pretrained.config import WEIGHTS_FILE
from tutti.models.pretrained.hub import HUB
from tutti.storage.files import LocalFolder
from tutti.storage.manifest import CONFIG, Weights
from tutti.training.metric_names import describe_metric

SUCCESS = "success/"
"""How the metrics of `training.evaluate_every` begin."""


class KeepBestConfig(FrozenConfig):
    """Mark the checkpoint with the best value of a validation metric or of success, and never delete it."""

    metric: str = Field(
        default="valid/total",
        description="Name of a validation metric, such as valid/action, or success/mean.",
    )
    mode: Literal["min", "max"] = Field(
        default="min", description="min: smaller is better; max: larger is better."
    )

    @field_validator("metric")
    @classmethod
    def _is_a_validation_metric(cls, metric: str) -> str:
        if not metric.startswith(("valid/", "valid_raw/", SUCCESS)) or describe_metric(metric) is None:
            raise ValueError(
                f"'{metric}' is recorded by no validation; give a name that begins with valid/ (or valid_raw/"
                "), such as valid/total or valid/action, or success/mean (docs/reference/metrics.md)"
            )
        return metric


class CheckpointsConfig(FrozenConfig):
    """How often checkpoints are written, in which format, and which of them stay on the disk."""

    every: int = Field(default=200, ge=0, description="Steps between checkpoints; 0: only at the end.")
    format: Literal["whole", "sharded"] = Field(
        default="whole",
        description="whole: rank 0 writes everything; sharded: every rank writes the tensors it holds.",
    )
    background: bool = Field(
        default=True, description="Go on training while a checkpoint is written, from a copy in memory."
    )
    keep: int = Field(default=2, ge=1, description="Number of newest checkpoints to keep.")
    keep_every: int = Field(
        default=0, ge=0, description="Never delete checkpoints at multiples of so many steps; 0: none."
    )
    keep_best: KeepBestConfig | Literal["auto", "off"] = Field(
        default="auto",
        description="Never delete the checkpoint that is best by a metric; auto: by success, where the "
        "training is evaluated (training.evaluate_every), else off.",
    )
    mirror: Annotated[str, Field(pattern=r"^(off|[a-z][a-z0-9+.-]*://.+)$")] = Field(
        default="off",
        description="Where checkpoints are copied to in the background, as fsspec names it, such as "
        "s3://bucket/runs (pip install s3fs): URL/RUN-ID/step-N, read back and compared; off: nowhere.",
    )

    def best(self, evaluate_every: int) -> KeepBestConfig | None:
        """What the best checkpoint is marked by, if it is."""
        if self.keep_best == "auto":
            return KeepBestConfig(metric=f"{SUCCESS}mean", mode="max") if evaluate_every else None
        return None if self.keep_best == "off" else self.keep_best

    def check_keeping(self, validate_every: int, evaluate_every: int = 0) -> None:
        """Refuses to keep checkpoints that are never made, or never validated or evaluated.

        Raises: ValueError that names the keys and the cure.
        """
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise ValueError(
                f"checkpoints.keep_every is {self.keep_every}, but checkpoints.every is {self.every} "
                "(0: only at the end). Make keep_every a multiple of every."
            )
        best = self.best(evaluate_every)
        if best is not None and best.metric.startswith(SUCCESS):
            if not evaluate_every:
                raise ValueError(
                    f"checkpoints.keep_best compares checkpoints by '{best.metric}', but evaluate_every is "
                    "0: nothing is played. Set evaluate_every, or another metric."
                )
        elif best is not None and (not validate_every or self.every % validate_every):
            raise ValueError(
                f"checkpoints.keep_best compares checkpoints by '{best.metric}' of a validation at "
                f"the same step, but checkpoints.every is {self.every} and validation.every is "
                f"{validate_every}. Make checkpoints.every a multiple of validation.every."
            )


class ForkConfig(FrozenConfig):
    """The checkpoint that a run starts from: weights, average, optimiser, data position and random states.

    Steps, samples and seconds count on from it, so `training.steps` includes those of the other run, which
    is only read. Schedule, steps, learning rates, lambdas, clipping and batch ramp are the new run's own.
    With the same settings it ends with the same bits as the other run without a break.
    """

    run: LocalFolder = Field(min_length=1, description="Folder of the other run, such as runs/a.")
    step: Annotated[int, Field(ge=1)] | Literal["latest"] = Field(
        default="latest", description="Step of the checkpoint; latest: the newest one when the fork begins."
    )


def of_others(folder: str) -> bool:
    """Whether it is a folder of weights that others have saved, as transformers or lerobot do, or a model of
    the hub; not one of Tutti's."""
    files = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json")
    here = Path(folder)
    return folder.startswith(HUB) or (
        any((here / n).is_file() for n in files) and not (here / CONFIG).exists()
    )


class InitFromConfig(FrozenConfig):
    """The weights that a new training starts from: of another run or an exported policy, every tensor whose
    name and shape fit, while the others are listed; or of a tower, a vision-language model or a checkpoint in
    pi0's format, all of them, but for those that `allow` names.

    The data, the robot and the sizes may be others. Steps, optimiser, lambdas and random states begin anew.
    """

    run: LocalFolder = Field(
        min_length=1,
        description="Folder of a run, a checkpoint or an exported policy; or, for the pre-trained parts of "
        "the model with weights: random, of a tower, a VLM or a checkpoint in pi0's format.",
    )
    allow: tuple[str, ...] = Field(
        default=(),
        description="Tensors of a tower, VLM or pi0 that may be of another shape, or only here or there: "
        "names with * for any text. Of runs and exports all that does not fit is allowed, and listed.",
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | Literal["auto"] = Field(
        default="auto",
        description="What the SHA-256 must be, of a folder's weights or of the state.json or export.json of "
        "Tutti's, which list the checksums of all files; auto: any. Checkpoints hold it.",
    )

    @model_validator(mode="after")
    def _others_are_no_runs(self) -> Self:
        if self.statistics == "kept" and of_others(self.run):
            raise ValueError(f"statistics is kept, but {self.run} is a tower, which has none. Set it to new")
        return self

    checkpoint: Annotated[int, Field(ge=1)] | Literal["latest", "best"] = Field(
        default="latest",
        description="Of a run: the newest one when the training begins, the best, or a step.",
    )
    weights: Weights = Field(
        default="ema", description="ema: the moving average, where one was kept; raw: those in training."
    )
    statistics: Literal["new", "kept"] = Field(
        default="new",
        description="Normalisation and tokens: fitted to the new data, or those of the other run.",
    )

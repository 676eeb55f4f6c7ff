"""What is done about bad gradients: clip, skip updates that are not finite, roll back what diverges."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from torch.nn.parameter import Parameter

from tutti.training.backward.one import Backward
from tutti.training.diagnostics.loss_spikes import Level, keep_newest
from tutti.training.faults.non_finite import NonFiniteError
from tutti.training.optim.clipping import Clipper, ZClipConfig

log = logging.getLogger("tutti.training")

KEPT = 3
"""Skipped updates whose batches and weights are kept in failures/, the newest ones."""


class RollBackConfig(BaseModel):
    """`kind: roll_back`: where the total loss stays high, go back to an older checkpoint and past the data.

    The total of an update is high if (total - mean) / deviation > `deviations`, with the exponential mean and
    deviation of the totals that were not high themselves. After `steps` high ones in a row the run takes
    weights and optimiser from its newest checkpoint that is at least `back` updates old, and goes on with
    the data that come next: what was read since is not read again (PaLM, 2204.02311, section 5.1). After
    `most` roll-backs the next divergence stops the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["roll_back"] = "roll_back"
    deviations: float = Field(default=6.0, gt=0, description="Deviations above its mean that are high.")
    steps: int = Field(default=50, ge=1, description="High updates in a row that are a divergence.")
    back: int = Field(default=200, ge=1, description="Updates to go back, at least.")
    most: int = Field(default=2, ge=1, description="Roll-backs in a run; the next divergence stops it.")
    warmup: int = Field(default=100, ge=1, description="Totals to see, in each phase, before judging one.")
    decay: float = Field(default=0.99, gt=0, lt=1, description="Decay of mean and variance, each update.")

    @model_validator(mode="after")
    def _goes_back_far_enough(self) -> Self:
        if self.back < self.steps:
            raise ValueError(
                f"back is {self.back}, but a divergence lasts steps = {self.steps} updates before it is one: "
                "the checkpoint would lie within it. Raise back."
            )
        return self


class GradientsConfig(BaseModel):
    """How gradients are clipped besides `training.clip_norm`, and what a bad one leads to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_by: Literal["global", "part"] = Field(
        default="global", description="What clip_norm limits: the whole gradient, or that of each part."
    )
    adaptive: ZClipConfig | Literal["off"] = Field(
        default="off", description="Clip also what lies far above the norm's recent values."
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop", description="What a NaN or infinity leads to: the end, or an update left out."
    )
    most_skips: int = Field(default=3, ge=1, description="Updates left out in a row; one more ends the run.")
    divergence: RollBackConfig | Literal["off"] = Field(
        default="off", description="What a loss that stays high leads to."
    )

    def check(self, checkpoint_every: int, keep_checkpoints: int) -> None:
        """Raises: ValueError if the checkpoints that are kept do not reach back to where a roll-back goes."""
        if self.divergence == "off":
            return
        back = self.divergence.back
        if not checkpoint_every or (keep_checkpoints - 1) * checkpoint_every < back:
            raise ValueError(
                f"gradients.divergence goes back {back} updates, but checkpoint_every {checkpoint_every} and "
                f"keep_checkpoints {keep_checkpoints} may leave no checkpoint that old: "
                "(keep_checkpoints - 1) * checkpoint_every must be at least as much. Raise one of them, or "
                "lower back."
            )


class GradientPolicy:
    """The policy at work, with its counts: one object serves a whole run.

    `skipped`: updates left out so far. `rollbacks`: of each roll-back the update that it left and the one
    that it went back to. `diverged`: True if the run must be rolled back now.
    """

    def __init__(
        self, config: GradientsConfig, clip_norm: float | Literal["off"], parameters: Mapping[str, Parameter]
    ) -> None:
        self.config = config
        self.clipper = Clipper(parameters, norm=clip_norm, by=config.clip_by, adaptive=config.adaptive)
        self.skipped = 0
        self.in_a_row = 0
        self.rollbacks: list[tuple[int, int]] = []
        self.diverged = False
        self.level = Level()
        self.high = 0
        self.last = 0.0
        self._phase = 0

    @property
    def may_skip(self) -> bool:
        """True if an update that is not finite would be left out now."""
        return self.config.non_finite == "skip" and self.in_a_row < self.config.most_skips

    def skip(self, error: NonFiniteError) -> None:
        """Leaves out the update in which `error` arose, or raises it again where the policy is to stop."""
        if self.config.non_finite == "stop":
            raise error
        if not self.may_skip:
            log.warning("%d updates in a row were skipped, the most that is allowed", self.in_a_row)
            if self.config.divergence == "off":
                raise error
            self.diverged, self.last = True, math.inf
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        keep_newest(error.folder.parent, KEPT)
        log.warning(
            "step %d: %s is not finite, update skipped (%d in a row, %d in all); saved in %s",
            error.step,
            error.term,
            self.in_a_row,
            self.skipped,
            error.folder,
        )

    def see(self, total: float, phase: int) -> None:
        """Takes in the total loss of a finite update, before it moves, and the number of its phase."""
        self.in_a_row = 0
        divergence = self.config.divergence
        if divergence == "off":
            return
        if phase != self._phase:  # other terms, another total
            self._phase, self.level, self.high = phase, Level(), 0
        self.last = total
        if self.level.count >= divergence.warmup and self.level.z(total) > divergence.deviations:
            self.high += 1
        else:
            self.high = 0
            self.level.add(total, divergence.decay)
        self.diverged = self.high >= divergence.steps

    def rolled_back(self, left: int, to: int) -> None:
        """Notes a roll-back from update `left` to update `to`, whose state was loaded just now."""
        self.rollbacks.append((left, to))
        self.diverged, self.high, self.in_a_row = False, 0, 0

    def metrics(self) -> dict[str, float]:
        """The counts, where the policy may act at all."""
        values = {"optim/skipped": float(self.skipped)} if self.config.non_finite == "skip" else {}
        if self.config.divergence != "off":
            values["optim/rollbacks"] = float(len(self.rollbacks))
        return values

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, plain values."""
        return {
            "clipping": self.clipper.state_dict(),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "rollbacks": [list(one) for one in self.rollbacks],
            "level": asdict(self.level),
            "high": self.high,
            "phase": self._phase,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`; an empty one, of an older checkpoint, leaves everything new."""
        if not state:
            return
        self.clipper.load_state_dict(state["clipping"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.rollbacks = [(left, to) for left, to in state["rollbacks"]]
        self.level, self.high, self._phase = Level(**state["level"]), state["high"], state["phase"]
        self.diverged = False


class KeptState:
    """What an update moves before it is known whether it is left out: every buffer (a batch norm's moves in
    the forward pass), and what the backward keeps of the updates so far. Nothing without modules."""

    def __init__(self, backward: Backward, *roots: nn.Module) -> None:
        self._backward = backward
        self._state = copy.deepcopy(backward.state_dict()) if roots else None
        self._kept = [
            (module, name, buffer, buffer.detach().clone())
            for root in roots
            for module in root.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """All of it is as it was, and the backward has no part of the update left."""
        self._backward.drop()
        if self._state is not None:
            self._backward.load_state_dict(self._state)
        for module, name, buffer, saved in self._kept:
            buffer.copy_(saved)
            setattr(module, name, buffer)

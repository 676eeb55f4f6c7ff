"""What is done about bad gradients: clip, skip updates that are not finite, roll back what diverges."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import Parameter

from tutti.training.backward.one import Backward
from tutti.training.diagnostics.loss_spikes import Level, keep_newest
from tutti.training.faults.config import GradientsConfig
from tutti.training.faults.non_finite import NonFiniteError
from tutti.training.optim.clipping import Clipper

log = logging.getLogger("tutti.training")

KEPT = 3
"""Skipped updates whose batches and weights are kept in failures/, the newest ones."""


class FaultPolicy:
    """The policy at work, with its counts: one object serves a whole run.

    `skipped`: updates left out so far. `rollbacks`: of each roll-back the update that it left and the one
    that it went back to. `diverged`: True if the run must be rolled back now.
    """

    def __init__(self, config: GradientsConfig, parameters: Mapping[str, Parameter]) -> None:
        self.config = config
        self.clipper = Clipper(parameters, norm=config.clip_norm, by=config.clip_by, zclip=config.zclip)
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
        return self.config.non_finite == "skip" and self.in_a_row < self.config.max_skips

    def skip(self, error: NonFiniteError) -> None:
        """Leaves out the update in which `error` arose, or raises it again where the policy is to stop."""
        if self.config.non_finite == "stop":
            raise error
        if not self.may_skip:
            log.warning("%d updates in a row were skipped, the most that is allowed", self.in_a_row)
            if self.config.rollback == "off":
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
        rollback = self.config.rollback
        if rollback == "off":
            return
        if phase != self._phase:  # other terms, another total
            self._phase, self.level, self.high = phase, Level(), 0
        self.last = total
        if self.level.count >= rollback.warmup and self.level.z(total) > rollback.z_threshold:
            self.high += 1
        else:
            self.high = 0
            self.level.add(total, rollback.decay)
        self.diverged = self.high >= rollback.patience

    def rolled_back(self, left: int, to: int) -> None:
        """Notes a roll-back from update `left` to update `to`, whose state was loaded just now."""
        self.rollbacks.append((left, to))
        self.diverged, self.high, self.in_a_row = False, 0, 0

    def metrics(self) -> dict[str, float]:
        """The counts, where the policy may act at all."""
        values = {"optim/skipped": float(self.skipped)} if self.config.non_finite == "skip" else {}
        if self.config.rollback != "off":
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

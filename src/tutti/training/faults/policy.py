"""The policy for bad gradients: clip them, skip non-finite updates, roll back a run that diverges."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.nn.parameter import Parameter

from tutti.training.faults.config import GradientsConfig
from tutti.training.faults.saved_steps import keep_newest
from tutti.training.optim.clipping import Clipper, RunningMoments

log = logging.getLogger("tutti.training")

MAX_KEPT = 3
"""The number of newest skipped updates whose batches and weights stay in failures/."""


class FaultPolicy:
    """Decides on each update, and counts what it has decided: one object serves a whole run.

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
        self.level = RunningMoments()
        self.high = 0
        self.last = 0.0
        self._phase = 0

    @property
    def may_skip(self) -> bool:
        """True if an update that is not finite would be left out now."""
        return self.config.non_finite == "skip" and self.in_a_row < self.config.max_skips

    def skip(self, step: int, term: str, saved: Path) -> bool:
        """Whether update `step` is left out, or ends in a roll-back, since `term` is not finite; else it must
        end the run. It lies in the folder `saved`."""
        if self.config.non_finite == "stop":
            return False
        if not self.may_skip:
            log.warning("%d updates in a row were skipped, the most that is allowed", self.in_a_row)
            self.diverged, self.last = self.config.rollback != "off", math.inf
            return self.diverged
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        keep_newest(saved.parent, MAX_KEPT)
        log.warning(
            "step %d: %s is not finite, update skipped (%d in a row, %d in all); saved in %s",
            step,
            term,
            self.in_a_row,
            self.skipped,
            saved,
        )
        return True

    def observe(self, total: float, phase: int) -> None:
        """Takes in the total loss of a finite update, before it moves, and the number of its phase."""
        self.in_a_row = 0
        rollback = self.config.rollback
        if rollback == "off":
            return
        if phase != self._phase:  # other terms, another total
            self._phase, self.level, self.high = phase, RunningMoments(), 0
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
        self.level, self.high, self._phase = RunningMoments(**state["level"]), state["high"], state["phase"]
        self.diverged = False

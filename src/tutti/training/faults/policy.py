"""The policy for bad gradients: clip them, skip non-finite updates, roll back a run that diverges."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.nn.parameter import Parameter

from tutti.distributed.world import World
from tutti.storage.checkpoint import checkpoints, load, step_of
from tutti.storage.files import remove_folder
from tutti.training.checkpointing.resume import RunSettings, check_settings
from tutti.training.faults.config import GradientsConfig, RollbackConfig
from tutti.training.faults.saved_steps import keep_newest
from tutti.training.optim.clipping import Clipper, RunningMoments
from tutti.training.records import MetricsWriter
from tutti.training.state import TrainState
from tutti.types import UserError

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
        """Continues from `state`."""
        self.clipper.load_state_dict(state["clipping"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.rollbacks = [(left, to) for left, to in state["rollbacks"]]
        self.level, self.high, self._phase = RunningMoments(**state["level"]), state["high"], state["phase"]
        self.diverged = False


def roll_back(
    state: TrainState,
    settings: RunSettings,
    policy: FaultPolicy,
    writer: MetricsWriter,
    world: World,
) -> None:
    """Goes back to the newest checkpoint that is old enough; the data go on from where they are.

    Checkpoints and records after it are removed: the updates they tell of are no longer part of the run,
    whose step counts on from the checkpoint's. An event in the records, the policy's counts and the log say
    what happened. A run that is killed later and resumed from a checkpoint before the roll-back diverges
    and rolls back in the same way, to the same bits. No checkpoint may be being written (`Saver.wait`).

    Raises: UserError if it has rolled back too often already, or no checkpoint is old enough.
    """
    config, counters, step = policy.config.rollback, state.counters, state.counters.step
    assert isinstance(config, RollbackConfig), "a divergence without a policy for it"
    divergence = f"Step {step}: more updates in a row were not finite than may be skipped."
    if policy.high >= config.patience:
        divergence = (
            f"Step {step}: the total loss, now {policy.last:.4g}, has been more than {config.z_threshold:g} "
            f"standard deviations above its mean of {policy.level.mean:.4g} for {policy.high} updates: the "
            "run diverges."
        )
    if len(policy.rollbacks) >= config.max_rollbacks:
        before = ", ".join(f"from {left} to {to}" for left, to in policy.rollbacks)
        raise UserError(
            f"{divergence} The run has rolled back {len(policy.rollbacks)} times already ({before}), the "
            "most that training.gradients.rollback.max_rollbacks allows, and stops here; its last checkpoint "
            f"is in {settings.run / 'checkpoints'}. Lower training.optimizer.lr, lengthen "
            "training.schedule.warmup, clip more tightly (training.gradients), or look at the batches in "
            "spikes/."
        )
    folders = {step_of(folder): folder for folder in checkpoints(settings.run)}
    old = [number for number in folders if number <= step - config.rewind_steps]
    if not old:
        raise UserError(
            f"{divergence} There is no checkpoint from step {step - config.rewind_steps} or before to go "
            f"back to (training.gradients.rollback.rewind_steps is {config.rewind_steps}; there are "
            f"{sorted(folders) or 'none'}). Lower training.optimizer.lr or lengthen "
            "training.schedule.warmup, and train anew."
        )
    saved = load(folders[max(old)], state.layouts())
    check_settings(saved, settings)

    def forget() -> None:
        for number in sorted(folders, reverse=True):  # a kill among them leads to the same roll-back
            if number > saved.step:
                remove_folder(folders[number])

    world.on_rank_zero(forget)
    # What the run has consumed stays consumed: the data that led to the divergence are not read again.
    loader = state.parts["loader"]
    position, samples, seconds = loader.state_dict(), counters.samples, counters.seconds
    skipped, rollbacks = policy.skipped, [*policy.rollbacks, (step, saved.step)]
    state.load(saved)
    loader.load_state_dict(position)
    counters.samples = counters.samples_recorded = samples
    counters.seconds = seconds
    policy.skipped, policy.rollbacks = skipped, rollbacks
    policy.diverged, policy.high, policy.in_a_row = False, 0, 0
    writer.rewind(saved.step, rollbacks=len(rollbacks))
    count = float(len(rollbacks))
    writer.write(saved.step, "event", {"optim/rollbacks": count, "optim/rollback_from": float(step)})
    log.warning(
        "%s Rolled back to step %d (%d of %d)",
        divergence,
        saved.step,
        len(rollbacks),
        config.max_rollbacks,
    )

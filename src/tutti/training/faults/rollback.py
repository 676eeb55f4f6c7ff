"""Rolls a diverged run back: an older checkpoint's weights, the data that come next, no later records."""

from __future__ import annotations

import logging

from tutti.distributed.world import World
from tutti.storage.checkpoint import checkpoints, load, step_of
from tutti.storage.files import remove_folder
from tutti.training.checkpointing.resume import RunSettings, check_settings
from tutti.training.faults.config import RollbackConfig
from tutti.training.faults.policy import FaultPolicy
from tutti.training.records import Recorder
from tutti.training.state import TrainState
from tutti.types import UserError

log = logging.getLogger("tutti.training")


def roll_back(
    state: TrainState,
    settings: RunSettings,
    policy: FaultPolicy,
    recorder: Recorder,
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
    divergence = f"Step {step}: {_what(policy.last, policy.level.mean, config, policy.high)}"
    if len(policy.rollbacks) >= config.max_rollbacks:
        before = ", ".join(f"from {left} to {to}" for left, to in policy.rollbacks)
        raise UserError(
            f"{divergence} The run has rolled back {len(policy.rollbacks)} times already ({before}), the "
            "most that training.gradients.rollback.max_rollbacks allows, and stops here; its last checkpoint "
            f"is in {settings.run / 'checkpoints'}. Lower training.optimizer.lr, lengthen "
            "training.schedule.warmup, lower training.gradients.clip_norm, or look at the batches in spikes/."
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
    later = sorted((number for number in folders if number > saved.step), reverse=True)

    def forget() -> None:
        for number in later:  # the newest first: what is left after a kill leads to the same roll-back
            remove_folder(folders[number])

    world.on_rank_zero(forget)
    # What the run has consumed stays consumed: the data that led to the divergence are not read again.
    loader = state.parts["loader"]
    position, samples, seconds = loader.state_dict(), counters.samples, counters.seconds
    skipped, rollbacks = policy.skipped, policy.rollbacks
    state.load(saved)
    loader.load_state_dict(position)
    counters.samples = counters.samples_recorded = samples
    counters.seconds = seconds
    policy.skipped, policy.rollbacks = skipped, rollbacks
    policy.rolled_back(step, saved.step)
    recorder.rewind(saved.step, rollbacks=len(rollbacks))
    count = float(len(rollbacks))
    recorder.write(saved.step, "event", {"optim/rollbacks": count, "optim/rollback_from": float(step)})
    log.warning(
        "%s Rolled back to step %d (%d of %d)",
        divergence,
        saved.step,
        len(rollbacks),
        config.max_rollbacks,
    )


def _what(last: float, mean: float, config: RollbackConfig, high: int) -> str:
    if high < config.patience:
        return "more updates in a row were not finite than may be skipped."
    return (
        f"the total loss, now {last:.4g}, has been more than {config.z_threshold:g} standard deviations "
        f"above its mean of {mean:.4g} for {high} updates: the run diverges."
    )

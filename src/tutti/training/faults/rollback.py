"""The roll-back: an older checkpoint's weights, the data that come next, and records without the detour."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tutti.storage.checkpoint import checkpoints, step_of
from tutti.storage.files import remove_folder
from tutti.training.checkpointing.snapshot import put_back, read
from tutti.training.data_feed import TrainingData
from tutti.training.faults.policy import RollBackConfig
from tutti.training.records import Recorder
from tutti.types import UserError

if TYPE_CHECKING:
    from tutti.training.trainer import Trainer

log = logging.getLogger("tutti.training")


def roll_back(trainer: Trainer, data: TrainingData, recorder: Recorder) -> None:
    """Goes back to the newest checkpoint that is old enough; the data go on from where they are.

    Checkpoints and records after it are removed: the updates they tell of are no longer part of the run,
    whose step counts on from the checkpoint's. An event in the records, the policy's counts and the log say
    what happened. A run that is killed later and resumed from a checkpoint before the roll-back diverges
    and rolls back in the same way, to the same bits.

    Raises: UserError if it has rolled back too often already, or no checkpoint is old enough.
    """
    trainer.saver.wait()
    policy, step = trainer.policy, trainer.step
    config = policy.config.divergence
    assert isinstance(config, RollBackConfig), "a divergence without a policy for it"
    found = f"Step {step}: {_what(policy.last, policy.level.mean, config, policy.high)}"
    if len(policy.rollbacks) >= config.most:
        before = ", ".join(f"from {left} to {to}" for left, to in policy.rollbacks)
        raise UserError(
            f"{found} The run has rolled back {len(policy.rollbacks)} times already ({before}), the most "
            "that training.gradients.divergence.most allows, and stops here; its last checkpoint is in "
            f"{trainer.run / 'checkpoints'}. Lower training.optimizer.lr, lengthen training.schedule.warmup, "
            "lower training.clip_norm, or look at the batches in spikes/."
        )
    folders = {step_of(folder): folder for folder in checkpoints(trainer.run)}
    old = [number for number in folders if number <= step - config.back]
    if not old:
        raise UserError(
            f"{found} There is no checkpoint from step {step - config.back} or before to go back to "
            f"(training.gradients.divergence.back is {config.back}; there are {sorted(folders) or 'none'}). "
            "Lower training.optimizer.lr or lengthen training.schedule.warmup, and train anew."
        )
    saved = read(trainer, folders[max(old)])
    position, samples, seconds = data.train.state_dict(), trainer.samples, trainer.clock.seconds
    skipped, rollbacks = policy.skipped, policy.rollbacks
    later = sorted((number for number in folders if number > saved.step), reverse=True)

    def forget() -> None:
        for number in later:  # the newest first: what is left after a kill leads to the same roll-back
            remove_folder(folders[number])

    trainer.parallel.world.on_first(forget)
    put_back(trainer, data, saved)
    data.train.load_state_dict(position)
    trainer.samples = trainer.recorded = samples
    trainer.clock.seconds = seconds
    policy.skipped, policy.rollbacks = skipped, rollbacks
    policy.rolled_back(step, saved.step)
    recorder.rewind(saved.step, rollbacks=len(rollbacks))
    count = float(len(rollbacks))
    recorder.write(saved.step, "event", {"optim/rollbacks": count, "optim/rollback_from": float(step)})
    log.warning("%s Rolled back to step %d (%d of %d)", found, saved.step, len(rollbacks), config.most)


def _what(last: float, mean: float, config: RollBackConfig, high: int) -> str:
    if high < config.steps:
        return "more updates in a row were not finite than may be skipped."
    return (
        f"the total loss, now {last:.4g}, has been more than {config.deviations:g} deviations above its mean "
        f"of {mean:.4g} for {high} updates: the run diverges."
    )

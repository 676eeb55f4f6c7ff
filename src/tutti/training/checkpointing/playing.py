"""Success while a policy is trained: the checkpoint of a step plays, and the best by it is marked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from tutti.distributed.world import World
from tutti.training.checkpointing.saver import Saver
from tutti.training.records import MetricsWriter, read_records
from tutti.training.rng import own_randomness
from tutti.training.signals import Interruptible

Judge = Callable[[Path, Callable[[], bool]], dict[str, float] | None]
"""Plays the policy of a checkpoint and gives success/TASK and success/mean; None where the function that it
is given, which it asks between rollouts, says that the training is to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Playing:
    """Has a training judged every so many `steps` of `last`, and at its end; `judge` None: never.

    What plays is a checkpoint, by a judge that knows nothing of the training, so that the losses are those of
    a training that is not judged, to the last bit.
    """

    judge: Judge | None
    every: int
    last: int
    world: World
    saver: Saver

    def due(self, step: int) -> bool:
        """Whether the policy is judged after this step."""
        at = step == self.last or (self.every > 0 and step % self.every == 0)
        return self.judge is not None and self.every > 0 and step > 0 and at

    def missing(self, step: int) -> bool:
        """Whether an earlier call ended after this step before it was judged. All ranks must call it."""
        return self.due(step) and self.world.on_rank_zero(lambda: not self._recorded(step))

    def _recorded(self, step: int) -> bool:
        kinds = [record["kind"] for record in read_records(self.saver.run) if record["step"] == step]
        return "evaluation" in kinds

    def __call__(
        self, checkpoint: Path, step: int, writer: MetricsWriter, interrupt: Interruptible
    ) -> dict[str, float]:
        """Records what rank 0 found, while the others wait for hours; nothing where it was interrupted."""
        judge, started = self.judge, monotonic()
        assert judge is not None
        with own_randomness(step):
            found = self.world.patient.on_rank_zero(lambda: judge(checkpoint, lambda: interrupt.received > 0))
        if found is None:
            return {}
        writer.write(step, "evaluation", found | {"time/evaluation_seconds": monotonic() - started})
        self.world.on_rank_zero(self.saver.retain)  # it may be the best
        return found

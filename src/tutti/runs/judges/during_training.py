"""The judge of a training that goes on: its checkpoints play some starts of the evaluation's suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tutti.config.run_config import RunConfig
from tutti.data.bundle import DataBundle
from tutti.evaluation.closed_loop.evaluate import evaluate
from tutti.evaluation.closed_loop.starts import TrainingStarts, check_seeds
from tutti.runs.build import suite_of
from tutti.runs.evaluations import played_as
from tutti.serving.factory import CheckpointPolicyFactory
from tutti.suites.environment import Suite
from tutti.suites.registry import fit_suite, robot_of

FOLDER = "training_evaluations"
"""In a run's folder: step-N/policy/TASK/SEED.json, the rollouts of the checkpoint of step N."""


class _EndsError(Exception):
    """The training is to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJudge:
    """A `Judge`: the policy alone, without controls, told what the evaluation tells it. Its rollouts are kept
    in the run's folder one by one, so one that is interrupted goes on."""

    config: RunConfig
    run: Path
    suite: Suite
    embodiment: str | None
    starts: TrainingStarts

    @classmethod
    def of(
        cls, config: RunConfig, run: Path, data: DataBundle, starts: TrainingStarts
    ) -> TrainingJudge | None:
        """None where the config evaluates nothing.

        Raises: UserError if the suite does not fit the data, no picture can be drawn here, or the starts are
        those of the demonstrations.
        """
        if not config.training.evaluate_every:
            return None
        check_seeds(config.during_training, starts, "training.evaluate_first_seed")
        suite = suite_of(config)
        suite = fit_suite(suite, played_as(data.spec, data.served, suite))
        suite.check_rendering()
        return cls(config=config, run=run, suite=suite, embodiment=robot_of(data.spec, suite), starts=starts)

    def __call__(self, checkpoint: Path, ends: Callable[[], bool]) -> dict[str, float] | None:
        settings = self.config.during_training
        settings = settings.model_copy(update={"max_decisions": settings.limit(self.suite)})
        factory = CheckpointPolicyFactory(checkpoint, settings.weights, trust_code=self.config.classes)

        def progress(done: int, total: int) -> None:
            if done < total and ends():
                raise _EndsError

        try:
            result = evaluate(
                replace(factory, embodiment=self.embodiment),
                settings,
                self.suite,
                folder=self.run / FOLDER / checkpoint.name,
                trained=self.starts,
                progress=progress,
            )
        except _EndsError:
            return None
        rates = {f"success/{task.task}": task.rate for task in result.policy.tasks}
        return {"success/mean": result.policy.mean, **rates}

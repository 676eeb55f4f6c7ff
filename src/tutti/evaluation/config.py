"""Settings of an evaluation: tasks, starts, how chunks are executed, and the controls."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tutti.chunks import QUEUE, ChunksConfig
from tutti.durations import Steps
from tutti.errors import UserError, near_miss
from tutti.frozen_config import FrozenConfig
from tutti.suites.environment import Split, Suite
from tutti.suites.registry import CustomSuite

Count = Annotated[int, Field(ge=1)]
Rollouts = Annotated[int, Field(ge=0)]


class ControlsConfig(FrozenConfig):
    """Rollouts per task of each control; 0 leaves it out. A count above `episodes` is cut to it.

    Controls use the first starts of the policy's rollouts, so they compare pair by pair. The no-op runs at
    least as often as the wrong instruction on the latter's tasks, because it is the chance level that the
    latter is compared with.
    """

    expert: Rollouts = Field(default=20, description="rollouts per task of the scripted expert, the ceiling")
    noop: Rollouts = Field(
        default=10, description="rollouts per task of a robot that stays where it is, the chance level"
    )
    no_image: Rollouts = Field(
        default=10, description="rollouts per task of the policy without its vision tokens"
    )
    wrong_instruction: Rollouts = Field(
        default=20, description="rollouts per task of the policy with another task's instruction"
    )
    other_wording: Rollouts = Field(
        default=20,
        description="rollouts per task of the policy told evaluation.sentences, if any",
    )
    wrong_instruction_tasks: tuple[str, ...] | Literal["all", "suite"] = Field(
        default="suite",
        description="tasks that run the wrong-instruction control; suite: those of one scene",
    )
    partners: dict[str, str] | Literal["suite"] = Field(
        default="suite",
        description="for each task, the task whose instruction stands for the wrong one",
    )

    @model_validator(mode="after")
    def _partners_differ(self) -> Self:
        for task, partner in self.partners.items() if self.partners != "suite" else ():
            if task == partner:
                raise ValueError(f"partners: {task} must be told another task's text, not its own")
        return self

    def none(self) -> Self:
        """The same without any rollout."""
        return self.model_copy(
            update={"expert": 0, "noop": 0, "no_image": 0, "wrong_instruction": 0, "other_wording": 0}
        )

    def partners_of(self, suite: Suite) -> dict[str, str]:
        """For each task, the one whose text the control of the wrong instruction takes."""
        return suite.partners if self.partners == "suite" else self.partners


Sentences = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
NO_SUITE = "none"
"""The `suite` of an evaluation without a simulator: data of a robot that none of ours can play."""


class EvaluationConfig(FrozenConfig):
    """Closed-loop evaluation of one policy.

    Start i of a task is the simulator's start of seed `first_seed + i`; demonstrations begin at 10000, and an
    overlap with those of any training data is refused. A policy predicts a chunk of actions,
    `actions_per_query` of them are executed, then it is queried again (`chunks` says how in detail). A
    rollout ends at the first success or after `max_decisions` control steps (each lasts the suite's action
    repeat).
    """

    suite: str | CustomSuite = Field(
        default="metaworld-8",
        description="the simulator's tasks, by name or an own class; 'none': the open-loop error alone",
    )
    tasks: tuple[str, ...] | Literal["suite"] = Field(
        default="suite", description="names of tasks to evaluate, or all tasks of the suite"
    )
    episodes: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=20, description="rollouts of the policy per task, one for each start"
    )
    first_seed: Annotated[int, Field(ge=0)] = Field(
        default=1000, description="seed of each task's first start; start i has the seed first_seed + i"
    )
    actions_per_query: Steps = Field(
        default=4,
        description="actions executed of each predicted chunk before the policy is queried again, or how "
        'long: "0.2s"',
    )
    chunks: ChunksConfig = Field(
        default=QUEUE, description="how the predicted chunks become actions (kind), as on the robot"
    )
    max_decisions: Count | Literal["suite"] = Field(
        default=100, description="control steps after which a rollout fails; suite: its own limit"
    )
    split: Split = Field(
        default="held_out",
        description="given instructions: held-out paraphrases, those of the training, or paraphrases with "
        "words that the training does not have",
    )
    sentences: dict[str, Sentences] | Split | Literal["none"] = Field(
        default="none",
        description="other wordings, played beside those of `split` from the same starts: your own for each "
        "task, or those of another split",
    )
    weights: Literal["ema", "raw"] = Field(
        default="ema", description="evaluated weights: their moving average, or the raw ones"
    )
    checkpoint: Literal["latest", "best"] | Count = Field(
        default="latest",
        description="latest; best by training.checkpoints.keep_best; or the number of a step",
    )
    workers: Count | Literal["auto"] = Field(
        default="auto", description="processes that play rollouts; auto: one per core, at most 8"
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=1,
        description="episodes that one call of the policy predicts for, while `workers` simulate; 1: each "
        "worker has a policy of its own. Actions differ in the last bits between sizes",
    )
    controls: ControlsConfig = Field(
        default=ControlsConfig(), description="rollouts per task of each control beside the policy"
    )
    videos_per_task: Annotated[int, Field(ge=0, le=100)] = Field(
        default=2,
        description="recorded rollouts per task: successes and failures in turn, at most half of each",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_size > 1 and self.chunks.kind == "real_time":
            raise ValueError(
                "batch_size above 1 with chunks.kind real_time: what each chunk goes on from is another one. "
                "Set batch_size to 1, or take kind queue."
            )
        if self.sentences == self.split:
            raise ValueError(
                f"sentences is {self.split}, which split is as well: the same would be compared with itself. "
                "Take another split, or your own sentences."
            )
        if isinstance(self.actions_per_query, int):  # not a time that is still to become steps
            self.chunks.build(self.actions_per_query)
        return self

    def limit(self, suite: Suite) -> int:
        """`max_decisions`, or that of the suite."""
        return suite.max_decisions if self.max_decisions == "suite" else self.max_decisions

    def wordings(self, suite: Suite) -> dict[str, tuple[str, ...]]:
        """`sentences` by the tasks of the suite that have some. Raises: UserError for another task."""
        if self.sentences == "none":
            return {}
        if isinstance(self.sentences, str):
            split = self.sentences
            return {task: suite.instructions(task, split) for task in suite.tasks}
        for task in self.sentences:
            if task not in suite.tasks:
                raise UserError(
                    f"evaluation.sentences: {task!r} is no task of {suite.name}. Known: "
                    f"{', '.join(suite.tasks)}.{near_miss(task, suite.tasks)}"
                )
        return self.sentences

    def departures(self, suite: Suite) -> tuple[str, ...]:
        """Where this is not how the suite's published numbers were measured, as "episodes 20, not 10"."""
        own = {"episodes": self.episodes, "first_seed": self.first_seed, "max_decisions": self.limit(suite)}
        own |= {"actions_per_query": self.actions_per_query}
        return tuple(
            f"{key} {own[key]}, not {value}" for key, value in suite.protocol.items() if own[key] != value
        )

    @property
    def seeds(self) -> range:
        """The seeds of the starts, the same for every task."""
        return range(self.first_seed, self.first_seed + self.episodes)

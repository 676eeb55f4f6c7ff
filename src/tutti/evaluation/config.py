"""What an evaluation does: tasks, starts, how a chunk is executed, which controls run beside it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]

# Another task's text over the same start. The faucet pair shares its scene (0.3 % of the first pixels
# differ), so only the text tells the two apart; in the other pairs the scene gives the task away.
PARTNERS: dict[str, str] = {
    "faucet-open": "faucet-close",
    "faucet-close": "faucet-open",
    "reach": "push",
    "push": "pick-place",
    "pick-place": "push",
    "drawer-open": "drawer-close",
    "drawer-close": "drawer-open",
    "window-close": "drawer-close",
}


class ControlsConfig(BaseModel):
    """Rollouts per task of each control; 0 leaves it out. A count above `episodes` is cut to it.

    Controls meet the first starts of the score, so they compare pair by pair. The no-op runs at least as
    often as the wrong instruction on the latter's tasks, because it is the chance level that the latter is
    held against.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    expert: Annotated[int, Field(ge=0)] = 20
    noop: Annotated[int, Field(ge=0)] = 10
    no_image: Annotated[int, Field(ge=0)] = 10
    wrong_instruction: Annotated[int, Field(ge=0)] = 20
    wrong_instruction_tasks: tuple[str, ...] | Literal["all"] = ("faucet-open", "faucet-close")
    partners: dict[str, str] = PARTNERS

    @model_validator(mode="after")
    def _partners_differ(self) -> Self:
        for task, partner in self.partners.items():
            if task == partner:
                raise ValueError(f"partners: {task} must be told another task's text, not its own")
        return self


NO_SUITE = "none"
"""The `suite` of an evaluation without a simulator: data of a robot that none of ours can play."""


class EvaluationConfig(BaseModel):
    """Closed-loop evaluation of one policy.

    Start i of a task is the simulator's start of seed `seed0 + i`; demonstrations begin at 10000, and an
    overlap with those of any data that were trained on is refused (starts.py). A policy predicts a chunk of
    actions, `execute` of them are carried out, then it looks again. A rollout ends at the first success or
    after `max_decisions` actions (each lasts the suite's action repeat).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str = Field(
        default="metaworld-8", description="the simulator's tasks; 'none': the open-loop error alone"
    )
    tasks: tuple[str, ...] | Literal["suite"] = "suite"
    episodes: Annotated[int, Field(ge=1, le=100_000)] = 20
    seed0: Annotated[int, Field(ge=0)] = 1000
    execute: Count = 4
    max_decisions: Count = 100
    split: Literal["held_out", "train"] = "held_out"
    weights: Literal["ema", "raw"] = "ema"
    checkpoint: Literal["latest", "best"] | Count = Field(
        default="latest", description="latest; best by training.keep_best; or the number of a step"
    )
    workers: Count | Literal["auto"] = "auto"
    controls: ControlsConfig = ControlsConfig()
    videos_per_task: Annotated[int, Field(ge=0, le=2)] = 2

    @property
    def seeds(self) -> range:
        """The seeds of the starts, the same for every task."""
        return range(self.seed0, self.seed0 + self.episodes)

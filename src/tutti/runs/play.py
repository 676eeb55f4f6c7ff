"""Plays a trained policy in its simulator: a rollout a task, judged, and a moving picture of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tutti.data.tokenize import normalized_text
from tutti.errors import near_miss
from tutti.evaluation.closed_loop.evaluate import one_torch_thread
from tutti.evaluation.closed_loop.rollouts import PlannedRollout, Rollout, RolloutSpec, RolloutWorker
from tutti.evaluation.closed_loop.videos import (
    IMAGE_SIZE,
    encode,
    encode_gif,
    file_name,
    replay,
    told,
)
from tutti.evaluation.config import NO_SUITE
from tutti.evaluation.open_loop import task_by_text
from tutti.plugin import Trust
from tutti.runs.build import suite_of, with_steps
from tutti.runs.evaluations import Place, place_of, played_as
from tutti.runs.terminal import print_line
from tutti.serving.contents import read_served, read_spec
from tutti.serving.factory import CheckpointPolicyFactory
from tutti.serving.observation import sentence, wordless
from tutti.storage.checkpoint import listed
from tutti.storage.files import explain_disk_errors, write_atomically
from tutti.suites.environment import Suite
from tutti.suites.registry import fit_suite, robot_of
from tutti.types import UserError

ALL = "all"
Form = Literal["gif", "mp4"]


@dataclass(frozen=True, slots=True)
class Player:
    """A policy and the simulator that it was trained for, with the settings of its evaluation."""

    place: Place
    policy: CheckpointPolicyFactory
    spec: RolloutSpec
    first_seed: int

    @classmethod
    def of(cls, policy: Path, trust_code: Trust = False) -> Player:
        """The policy of a run's folder, a checkpoint's or an export's.

        Raises: UserError if there is none, it is damaged, no simulator fits it or plays as long as its config
        says, or nothing can be drawn here.
        """
        place = place_of(policy)
        config = place.config(trust_code)
        settings = config.evaluation
        if settings.suite == NO_SUITE:
            raise UserError(
                f"{place.config_file}: evaluation.suite is none, so no simulator is known that this policy "
                f"could act in. `tutti evaluate {policy}` measures its error on recorded episodes."
            )
        suite = suite_of(config)
        suite.check_rendering()  # before anything slow
        factory = CheckpointPolicyFactory(
            place.policy(settings.checkpoint), settings.weights, trust_code=trust_code
        )
        data = read_spec(files := listed(factory.path))
        factory = replace(factory, embodiment=robot_of(data, suite))
        own = played_as(data, read_served(files, data), suite)
        config = with_steps(config, own.fps, say=False)
        spec = RolloutSpec(
            policy=factory,
            environments=fit_suite(suite, own),
            actions_per_query=config.evaluation.actions_per_query,
            max_decisions=config.evaluation.limit(suite),
            folder=None,
            chunks=config.evaluation.chunks,
        )
        return cls(place, factory, spec, settings.first_seed)

    @property
    def suite(self) -> Suite:
        """The simulator."""
        return self.spec.environments

    def plan(self, tasks: Sequence[str], instruction: str | None, seed: int | None) -> list[PlannedRollout]:
        """A rollout for each of `tasks` ("all": of the suite); of none, for that which `instruction` is a
        wording of, or the first.

        Without an instruction each is told the held-out wording that the evaluation has for this seed.

        Raises: UserError for a task that the suite does not have, or a text that is none.
        """
        known, seed = self.suite.tasks, self.first_seed if seed is None else seed
        own = "" if instruction is None else task_by_text(self.suite)(sentence(instruction))
        own = own if own in known else ""
        chosen = known if ALL in tasks else tuple(dict.fromkeys(tasks)) or (own or known[0],)
        for task in chosen:
            if task not in known:
                raise UserError(
                    f"--task {task}: not a task of the suite {self.suite.name}. Known: "
                    f"{', '.join(known)}, or {ALL}.{near_miss(task, known)}"
                )
        planned: list[PlannedRollout] = []
        for task in chosen:
            texts = self.suite.instructions(task, "held_out")
            text = texts[seed % len(texts)] if instruction is None else instruction
            planned.append(PlannedRollout("policy", task, seed, text, task if instruction is None else own))
        return planned

    def notes(self, planned: Iterable[PlannedRollout]) -> list[str]:
        """What is to be said of the sentence and the start before it acts."""
        notes: list[str] = []
        words = _words(text for task in self.suite.tasks for text in self.suite.instructions(task))
        for text in dict.fromkeys(one.instruction for one in planned):
            notes += wordless(text)
            if new := [word for word in _words([text]) if word not in words]:
                said = ", ".join(map(repr, new))
                notes.append(
                    f"{said}: in no training sentence of the suite {self.suite.name}. The policy reads any "
                    "text, but what a new word means it cannot know."
                )
        trained = self.place.starts(self.place.config(self.policy.trust_code)).seeds
        for seed in dict.fromkeys(one.seed for one in planned):
            if any(seed in seeds for seeds in trained):
                notes.append(f"start {seed} is among those of the training: success there shows little.")
        return notes


def play_policy(
    policy: Path,
    tasks: Sequence[str] = (),
    instruction: str | None = None,
    *,
    seed: int | None = None,
    to: Path = Path("play"),
    forms: Collection[Form] = ("gif",),
    trust_code: Trust = False,
) -> list[tuple[Rollout, list[Path]]]:
    """Plays the tasks one after the other (`Player.plan`), and prints a line for each: whether it succeeded,
    and where its files are. Gives each rollout with them: <task>-success|failure-<seed>-<identity>.gif, .mp4.

    Raises: UserError as `Player` does, or if the disk is full.
    """
    player = Player.of(policy, trust_code)
    planned = player.plan(tasks, instruction, seed)
    print_line(f"policy {player.policy.path}, suite {player.suite.name}")
    for note in player.notes(planned):
        print_line(f"! {note}")
    played: list[tuple[Rollout, list[Path]]] = []
    with one_torch_thread(), closing(RolloutWorker(player.spec)) as worker:
        for one in planned:
            rollout = worker([one])[one]
            files = write_pictures(player.suite, rollout, to, forms)
            print_line(f"{_outcome(rollout, player.spec.max_decisions)} -> {', '.join(map(str, files))}")
            played.append((rollout, files))
    return played


def write_pictures(suite: Suite, rollout: Rollout, folder: Path, forms: Collection[Form]) -> list[Path]:
    """The rollout as moving pictures with its sentence above. Raises: UserError if the disk is full."""
    frames, stride = replay(suite, IMAGE_SIZE, rollout)
    pictures, fps = told(frames, rollout.instruction, rollout.success), suite.fps / stride
    files: list[Path] = []
    for form in forms:
        files.append(folder / Path(file_name(rollout)).with_suffix(f".{form}"))
        with explain_disk_errors(files[-1], "the picture"):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(files[-1], (encode_gif if form == "gif" else encode)(pictures, fps))
    return files


def _outcome(rollout: Rollout, most: int) -> str:
    said = (
        f"success after {rollout.decisions} decisions"
        if rollout.success
        else f"no success in {most} decisions"
    )
    other = f" (its goal is {rollout.task}; the sentence is one of {rollout.told})"
    other = other if rollout.told not in ("", rollout.task) else ""
    return f'{rollout.task}, start {rollout.seed}, told "{rollout.instruction}": {said}{other}'


def _words(texts: Iterable[str]) -> dict[str, None]:
    """The distinct words, in their order."""
    return dict.fromkeys(word for text in texts for word in re.findall(r"\w+", normalized_text(text)))

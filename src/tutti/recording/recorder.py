"""Records episodes of a suite's scripted experts: in parallel, resumable, always the same bytes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from tutti.distributed.cores import usable_cores
from tutti.errors import UserError
from tutti.frozen_config import FrozenConfig
from tutti.recording.episode_files import (
    DONE_FILE,
    SETTINGS_FILE,
    RecordedEpisode,
    failure_path,
    find_tries,
    read_work,
    save_episode,
)
from tutti.recording.seed_queue import Block, SeedQueue
from tutti.storage.files import write_atomically, write_json
from tutti.suites.environment import Environment, Suite
from tutti.suites.kept import KeptEnvironments
from tutti.suites.registry import CustomSuite, find_suite
from tutti.suites.workers import run_jobs

Progress = Callable[[int, int, str], None]
"""Called with the number of episodes recorded, how many there will be, and the task just worked on."""

_BLOCK = 4  # Seeds in one job: about a second of work.


class RecordConfig(FrozenConfig):
    """What to record. A field that is "suite" takes the suite's own value.

    Each task gets `episodes_per_task` episodes: those of the first seeds from `first_seed` on whose expert
    succeeds. The i-th seed's executed movements get Gaussian noise of standard deviation
    noise[i mod len(noise)], fresh at each decision, while the label stays the expert's own action
    (demonstrations of recovery, as in DART, arXiv:1703.09327).

    Before an episode begins, the robot holds one random direction for a random number of decisions, 0 to
    `random_start_decisions`, which are not recorded. Without it every episode starts from one pose, and from
    the second decision on the hand's own place tells where the expert is heading: a policy then reads its
    state and never looks for the object (the copycat problem, 1905.11979; see docs/background/log.md).
    """

    suite: str | CustomSuite = Field(
        default="metaworld-8", description="the tasks, by the name of their suite or a class of your own"
    )
    tasks: tuple[str, ...] | Literal["suite"] = Field(
        default="suite", description="tasks to record; suite: all of the suite's"
    )
    episodes_per_task: Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]] = Field(
        default=100, description="successful episodes per task: one number, or a number for each task"
    )
    noise: (
        Annotated[tuple[Annotated[float, Field(ge=0.0, le=2.0)], ...], Field(min_length=1)] | Literal["suite"]
    ) = Field(default="suite", description="standard deviations of the noise on executed movements, in turn")
    random_start_decisions: Annotated[int, Field(ge=0)] = Field(
        default=0, description="at most so many random decisions before each episode, not recorded"
    )
    views: tuple[str, ...] | Literal["suite"] = Field(default="suite", description="cameras, by name")
    image_size: int | Literal["suite"] = Field(default="suite", description="edge of the square pictures, px")
    action_repeat: int | Literal["suite"] = Field(
        default="suite", description="simulation steps that one decision lasts"
    )
    max_decisions: int | Literal["suite"] = Field(
        default="suite", description="decisions after which an episode without success has failed"
    )
    first_seed: Annotated[int, Field(ge=0)] = Field(
        default=10_000, description="seed of the first start; evaluation must use other seeds"
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="worker processes; 0 records in this process, auto: one per core"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        return self if isinstance(self.suite, CustomSuite) else self.checked()

    def checked(self) -> Self:
        """This config, if it fits its suite; a class of the user's own is imported for that.

        Raises: UserError.
        """
        tasks, spec = set(self.spec.tasks), self.spec
        decisions = spec.max_decisions + self.random_start_decisions
        if decisions > spec.longest:
            raise UserError(
                f"max_decisions + random_start_decisions is {decisions}, but with action_repeat "
                f"{spec.action_repeat} an episode has at most {spec.longest} decisions; lower one of them"
            )
        if isinstance(self.episodes_per_task, dict) and set(self.episodes_per_task) != tasks:
            missing = sorted(tasks - set(self.episodes_per_task))
            unknown = sorted(set(self.episodes_per_task) - tasks)
            raise UserError(
                f"episodes_per_task must give a number for each task and no other: missing {missing}, "
                f"unknown {unknown}"
            )
        return self

    @property
    def spec(self) -> Suite:
        """The suite with this configuration's own tasks, views, picture size and control rate."""
        given = {
            key: getattr(self, key)
            for key in ("tasks", "views", "image_size", "action_repeat", "max_decisions")
        }
        suite = find_suite(self.suite)
        return suite.with_changes(**{key: value for key, value in given.items() if value != "suite"})

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """The standard deviations of the noise, those of the suite where the config has none."""
        return self.spec.noise if isinstance(self.noise, str) else self.noise


@dataclass(frozen=True, slots=True)
class RecordSummary:
    """What a recording holds: tries and successes per task.

    `tries[task]` counts seeds up to the last one that was needed.
    """

    tries: dict[str, int]
    successes: dict[str, int]


def record(config: RecordConfig, work_folder: Path | str, progress: Progress | None = None) -> RecordSummary:
    """Records everything that `config` asks for and `work_folder` does not hold yet.

    The result does not depend on the number of workers, on their speed, or on how often recording was
    killed and begun again. `load_recorded(work_folder)` reads it.

    Raises:
        UserError: the folder holds a recording with other settings; the disk is full; the simulator or
            EGL is missing; the expert fails on most starts.
        WorkerError: a worker failed in a way nobody foresaw; the message holds its traceback.
    """
    folder, suite = Path(work_folder), config.checked().spec
    if not suite.has_expert:
        raise UserError(f"record.suite: {suite.name} has no expert, so there is nothing to record.")
    _claim(folder, config)
    tries = {task: find_tries(folder, task) for task in suite.tasks}
    queue = SeedQueue(config.episodes_per_task, config.first_seed, tries)
    count = usable_cores() if config.workers == "auto" else config.workers
    count = min(count, -(-queue.missing // _BLOCK))
    last: dict[int, str] = {}
    active: dict[int, str] = {}

    def report(task: str) -> None:
        if progress is not None:
            progress(queue.recorded, queue.total, task)

    def next_job(worker: int) -> Block | None:
        # A worker keeps its task while it can: building another simulation takes longer than a seed.
        block = queue.take(_BLOCK, prefer=last.get(worker), avoid=[*active.values()])
        if block is not None:
            last[worker] = active[worker] = block[0]
        return block

    report("")
    with closing(run_jobs(partial(_record_block, config, folder), count, next_job)) as done:
        for worker, results in done:
            task = active.pop(worker)
            queue.report(task, results)
            report(task)
    _simulations.close()  # where this process recorded
    seeds, num_tries = queue.outcome()
    write_json(folder / DONE_FILE, {"seeds": seeds, "tries": num_tries})
    return RecordSummary(num_tries, {task: len(chosen) for task, chosen in seeds.items()})


def _claim(folder: Path, config: RecordConfig) -> None:
    """Writes what decides the content of an episode; refuses a folder where that is different.

    Tasks, the number of episodes and of workers may change: what is there is used.
    """
    sentences = [config.spec.instructions(task) for task in find_suite(config.suite).tasks]
    names = ("image_size", "action_repeat", "max_decisions")
    settings: dict[str, Any] = {"views": list(config.spec.views)}
    settings |= {name: getattr(config.spec, name) for name in names}
    settings["noise"] = list(config.noise_levels)
    settings |= {name: getattr(config, name) for name in ("random_start_decisions", "first_seed")}
    settings["instructions"] = hashlib.sha256(repr(sentences).encode()).hexdigest()[:16]
    for package in (*config.spec.packages, "numpy"):
        try:
            settings[f"{package} version"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            settings[f"{package} version"] = "not installed"
    before = read_work(folder / SETTINGS_FILE)
    if before is None:
        write_json(folder / SETTINGS_FILE, settings)
        return
    for key, value in settings.items():
        if before.get(key) != value:
            raise UserError(
                f"{folder}: holds episodes recorded with {key} = {before.get(key)}, but now {key} = {value}. "
                "Choose another folder, or delete this one to record anew."
            )


_simulations = KeptEnvironments()


def _record_block(config: RecordConfig, folder: Path, block: Block) -> dict[int, bool]:
    """Runs in a worker: records some seeds of a task; seed -> did it succeed."""
    (task, seeds), suite, levels = block, config.spec, config.noise_levels
    simulation = _simulations.of(suite, task)
    results: dict[int, bool] = {}
    for seed in seeds:
        episode = record_episode(
            simulation,
            suite,
            task,
            seed=seed,
            noise=levels[(seed - config.first_seed) % len(levels)],
            random_start_decisions=config.random_start_decisions,
        )
        if episode is None:
            write_atomically(failure_path(folder, task, seed), b"")
        else:
            save_episode(folder, episode)
        results[seed] = episode is not None
    return results


def record_episode(
    simulation: Environment,
    suite: Suite,
    task: str,
    *,
    seed: int,
    noise: float,
    random_start_decisions: int = 0,
) -> RecordedEpisode | None:
    """One try of the expert from the start that `seed` draws; None if it fails.

    Rolled out blind; a success is drawn afterwards from the saved physics, so a failure costs no pictures.
    They are bit for bit what live drawing gives, but for a first picture that a suite's rules leave stale.
    """
    # Streams for the noise, the choice of the sentence and the random start: of this task and seed alone.
    disturbance, choice, start = np.random.default_rng([seed, zlib.crc32(task.encode())]).spawn(3)
    sentences = suite.instructions(task, "train")
    simulation.reset(seed)
    direction = simulation.random_start_action(start)
    for _ in range(int(start.integers(random_start_decisions + 1))):
        simulation.step(direction)
    physics, states, privileged, actions, executed = [], [], [], [], []
    while not simulation.success and len(actions) < suite.max_decisions:
        physics.append(simulation.save_physics())
        states.append(simulation.state)
        privileged.append(simulation.privileged)
        actions.append(simulation.expert_action())
        executed.append(simulation.perturb(actions[-1], noise, disturbance))
        simulation.step(executed[-1])
    if not simulation.success or not actions:
        return None
    pictures = np.stack([simulation.render_physics(saved) for saved in physics])
    return RecordedEpisode(
        task=task,
        seed=seed,
        images={view: np.ascontiguousarray(pictures[:, i]) for i, view in enumerate(suite.views)},
        states=np.stack(states),
        actions=np.stack(actions),
        executed=np.stack(executed),
        privileged=np.stack(privileged),
        instruction=sentences[int(choice.integers(len(sentences)))],
        noise=noise,
    )

"""Records demonstrations of scripted experts: in parallel, resumable after a kill, always the same bytes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tutti.recording.episode_files import (
    DONE_FILE,
    SETTINGS_FILE,
    RecordedEpisode,
    failure_path,
    find_tries,
    read_work,
    save_episode,
    write_json,
)
from tutti.recording.seed_queue import Schedule
from tutti.storage.files import write_atomically
from tutti.suites.metaworld.suite import DEMONSTRATION_SEED, SuiteSpec, find_suite
from tutti.suites.metaworld.task import STEP_LIMIT, MetaWorldTask, to_action
from tutti.suites.workers import Workers, available_cpus
from tutti.types import UserError

Progress = Callable[[int, int, str], None]
"""Called with the number of episodes recorded, how many there will be, and the task just worked on."""

_BLOCK = 4  # Seeds in one job: about a second of work.
_KEPT_SIMULATIONS = 2  # In each worker; one holds about 90 MB.


class RecordConfig(BaseModel):
    """What to record. A field that is "suite" takes the suite's own value.

    Each task gets `demonstrations` episodes: those of the first seeds from `seed0` on whose expert
    succeeds. The i-th seed's executed x, y and z get Gaussian noise of standard deviation
    noise[i mod len(noise)], fresh at each decision, while the label stays the expert's own action
    (demonstrations of recovery, as in DART, arXiv:1703.09327). `workers` 0 records in this process.

    Before an episode begins, the hand wanders: it holds one random direction for a random number of
    decisions, 0 to `wander`, which are not recorded. Without it every episode starts from one pose, and from
    the second decision on the hand's own place tells where the expert is heading: a policy then reads its
    state and never looks for the object (the copycat problem, 1905.11979; docs/log.md has the figures).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str = "metaworld-8"
    tasks: tuple[str, ...] | Literal["suite"] = "suite"
    demonstrations: Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]] = Field(
        default=100, description="how many per task: one number, or a number for each task"
    )
    noise: tuple[Annotated[float, Field(ge=0.0, le=2.0)], ...] = Field(
        default=(0.0, 0.1, 0.15, 0.2), min_length=1
    )
    wander: Annotated[int, Field(ge=0)] = 0
    views: tuple[str, ...] | Literal["suite"] = "suite"
    image_size: int | Literal["suite"] = "suite"
    action_repeat: int | Literal["suite"] = "suite"
    max_decisions: int | Literal["suite"] = "suite"
    seed0: Annotated[int, Field(ge=0)] = DEMONSTRATION_SEED
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        tasks, spec = set(self.spec.tasks), self.spec
        steps = spec.action_repeat * (spec.max_decisions + self.wander)
        if steps > STEP_LIMIT:
            raise ValueError(
                f"action_repeat x (max_decisions + wander) is {steps} simulation steps, but an episode has "
                f"at most {STEP_LIMIT}; lower one of them"
            )
        if isinstance(self.demonstrations, dict) and set(self.demonstrations) != tasks:
            missing = sorted(tasks - set(self.demonstrations))
            unknown = sorted(set(self.demonstrations) - tasks)
            raise ValueError(
                f"demonstrations must give a number for each task and no other: missing {missing}, unknown "
                f"{unknown}"
            )
        return self

    @property
    def spec(self) -> SuiteSpec:
        """The suite with this configuration's own tasks, views, picture size and control rate."""
        values = find_suite(self.suite).model_dump()
        for key in ("tasks", "views", "image_size", "action_repeat", "max_decisions"):
            value = getattr(self, key)
            if value != "suite":
                values[key] = value
        return SuiteSpec(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSummary:
    """What a recording holds: tries and successes per task, and the wall seconds this call took.

    `tries[task]` counts seeds up to the last one that was needed.
    """

    folder: Path
    tries: dict[str, int]
    successes: dict[str, int]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A few seeds of one task."""

    folder: Path
    suite: SuiteSpec
    task: str
    seeds: tuple[int, ...]
    noise: tuple[float, ...]
    wander: int
    seed0: int


def record(config: RecordConfig, work_folder: Path | str, progress: Progress | None = None) -> RecordSummary:
    """Records everything that `config` asks for and `work_folder` does not hold yet.

    The result does not depend on the number of workers, on their speed, or on how often recording was
    killed and begun again. `load_recorded(work_folder)` reads it.

    Raises:
        UserError: the folder holds a recording with other settings; the disk is full; the simulator or
            EGL is missing; the expert fails on most starts.
        WorkerError: a worker failed in a way nobody foresaw; the message holds its traceback.
    """
    began = time.monotonic()
    folder, suite = Path(work_folder), config.spec
    _claim(folder, config)
    tries = {task: find_tries(folder, task) for task in suite.tasks}
    schedule = Schedule(config.demonstrations, config.seed0, tries)
    _report(progress, schedule, "")

    def job(task: str, seeds: tuple[int, ...]) -> _Job:
        return _Job(
            folder=folder,
            suite=suite,
            task=task,
            seeds=seeds,
            noise=config.noise,
            wander=config.wander,
            seed0=config.seed0,
        )

    count = _worker_count(config, schedule)
    if count == 0:
        while (block := schedule.take(_BLOCK)) is not None:
            schedule.report(block[0], _record_block(job(*block)))
            _report(progress, schedule, block[0])
        _close_simulations()
    else:
        _record_in_parallel(schedule, count, job, progress)
    seeds, num_tries = schedule.outcome()
    write_json(folder / DONE_FILE, {"seeds": seeds, "tries": num_tries})
    successes = {task: len(chosen) for task, chosen in seeds.items()}
    return RecordSummary(
        folder=folder, tries=num_tries, successes=successes, seconds=time.monotonic() - began
    )


def _record_in_parallel(
    schedule: Schedule, count: int, job: Callable[[str, tuple[int, ...]], _Job], progress: Progress | None
) -> None:
    task_of: dict[int, str] = {}
    with Workers(_record_block, count) as workers:
        while True:
            for worker in workers.idle:
                active = [task_of[other] for other in task_of if other not in workers.idle]
                block = schedule.take(_BLOCK, prefer=task_of.get(worker), avoid=active)
                if block is None:
                    break
                task_of[worker] = block[0]
                workers.start(worker, job(*block))
            if not workers.busy:
                return
            for worker, results in workers.finished():
                schedule.report(task_of[worker], results)
                _report(progress, schedule, task_of[worker])


def _worker_count(config: RecordConfig, schedule: Schedule) -> int:
    if config.workers == 0 or schedule.missing == 0:
        return 0
    wanted = available_cpus() if config.workers == "auto" else config.workers
    return max(1, min(wanted, -(-schedule.missing // _BLOCK)))


def _report(progress: Progress | None, schedule: Schedule, task: str) -> None:
    if progress is not None:
        progress(schedule.recorded, schedule.total, task)


def _claim(folder: Path, config: RecordConfig) -> None:
    """Notes down what decides the content of an episode; refuses a folder where that is different.

    Tasks, the number of demonstrations and of workers may change: what is there is used.
    """
    sentences = [config.spec.instructions(task) for task in find_suite(config.suite).tasks]
    settings: dict[str, Any] = {
        "views": list(config.spec.views),
        "image_size": config.spec.image_size,
        "action_repeat": config.spec.action_repeat,
        "max_decisions": config.spec.max_decisions,
        "noise": list(config.noise),
        "wander": config.wander,
        "seed0": config.seed0,
        "instructions": hashlib.sha256(repr(sentences).encode()).hexdigest()[:16],
    }
    for package in ("metaworld", "mujoco", "numpy"):
        settings[f"{package} version"] = _version(package)
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


_simulations: dict[tuple[SuiteSpec, str], MetaWorldTask] = {}


def _record_block(job: _Job) -> dict[int, bool]:
    """Runs in a worker: records some seeds of a task; seed -> did it succeed."""
    key = (job.suite, job.task)
    simulation = _simulations.pop(key, None) or job.suite.make(job.task)
    _simulations[key] = simulation  # Last in the dict is the one used last.
    while len(_simulations) > _KEPT_SIMULATIONS:
        _simulations.pop(next(iter(_simulations))).close()
    results: dict[int, bool] = {}
    for seed in job.seeds:
        sigma = job.noise[(seed - job.seed0) % len(job.noise)]
        episode = demonstrate(simulation, seed, sigma, job.suite, job.wander)
        if episode is None:
            write_atomically(failure_path(job.folder, job.task, seed), b"")
        else:
            save_episode(job.folder, episode)
        results[seed] = episode is not None
    return results


def _close_simulations() -> None:
    while _simulations:
        _simulations.popitem()[1].close()


def demonstrate(
    simulation: MetaWorldTask, seed: int, sigma: float, suite: SuiteSpec, wander: int = 0
) -> RecordedEpisode | None:
    """One try of the expert from the start that `seed` draws; None if it fails.

    Rolled out blind; a success is drawn afterwards from the saved physics, bit for bit what live
    drawing gives, so a failure costs no pictures.
    """
    # Streams for the noise, the choice of the sentence, the wandering: of this task and seed alone.
    noise, choice, way = np.random.default_rng([seed, zlib.crc32(simulation.task.encode())]).spawn(3)
    sentences = suite.instructions(simulation.task, "train")
    now = simulation.reset(seed)
    direction = way.uniform((-1.0, -1.0, -0.3, -1.0), (1.0, 1.0, 1.0, -1.0))
    for _ in range(int(way.integers(wander + 1))):
        now = simulation.step(to_action(direction))  # mostly sideways and up, the hand open
    physics, states, privileged, actions, executed = [], [], [], [], []
    while not now.success and len(actions) < suite.max_decisions:
        physics.append(simulation.save_physics())
        states.append(now.state)
        privileged.append(now.privileged)
        label = simulation.expert_action()
        shaken = label.copy()
        shaken[:3] += (sigma * noise.standard_normal(3)).astype(np.float32)
        actions.append(label)
        executed.append(to_action(shaken))
        now = simulation.step(executed[-1])
    if not now.success or not actions:
        return None
    pictures = np.stack([simulation.render_physics(saved) for saved in physics])
    return RecordedEpisode(
        task=simulation.task,
        seed=seed,
        images={view: np.ascontiguousarray(pictures[:, i]) for i, view in enumerate(suite.views)},
        states=np.stack(states),
        actions=np.stack(actions),
        executed=np.stack(executed),
        privileged=np.stack(privileged),
        instruction=sentences[int(choice.integers(len(sentences)))],
        noise=sigma,
    )

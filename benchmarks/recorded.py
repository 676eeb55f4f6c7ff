"""The data that a benchmark trains on: a run's own recording, only read, or a small synthetic one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tutti.config.run_config import RunConfig
from tutti.data.formats.lerobot import ENVIRONMENT_STATE
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.data.sources import SourceConfig
from tutti.evaluation.closed_loop.starts import DATASET
from tutti.pipeline import VIEW
from tutti.runs.folder import RunFolder
from tutti.suites.metaworld.task import ACTION_DIM, PRIVILEGED_DIM, STATE_DIM
from tutti.types import UserError

Snapshot = dict[str, tuple[int, int]]


def check_recorded(run: Path, config: RunConfig) -> str:
    """The fingerprint of the run's data set.

    Raises: UserError if the recording is not finished.
    """
    if config.data.sources:
        raise UserError("data.sources: this benchmark reads the data set that the run itself recorded.")
    RunFolder(run, new=False).require("record", "Make it first: tutti record CONFIG.")
    return SourceConfig(path=run / DATASET).open().fingerprint


def snapshot(run: Path) -> Snapshot:
    """Size and time of the last change of every file of the run's data set."""
    files = (path for path in sorted((run / DATASET).rglob("*")) if path.is_file())
    return {str(path.relative_to(run)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def require_unchanged(before: Snapshot, after: Snapshot) -> None:
    """Raises: UserError that names the files that were made, changed or removed in between."""
    touched = sorted(name for name in before | after if before.get(name) != after.get(name))
    if touched:
        raise UserError(
            f"The run's data was written to while it was only to be read: {', '.join(touched[:5])}."
        )


def synthetic_run(folder: Path, config: RunConfig, per_task: int = 4, length: int = 40) -> Path:
    """A folder with a data set of the sizes that `config` would record, full of noise. Gives the folder.

    It has the suite's views, rate and sentences, so batches have the shapes of the real ones; how long a
    step takes does not depend on what the pictures show. The same arguments give the same bytes.
    """
    suite, random = config.record.spec, np.random.default_rng(0)
    coarse, scale = 8, suite.image_size // 8

    def pictures() -> np.ndarray:
        blocks = random.integers(0, 256, (length, coarse, coarse, 3), dtype=np.uint8)
        return blocks.repeat(scale, axis=1).repeat(scale, axis=2)

    def episode(task: str, number: int) -> EpisodeRecord:
        sentences = suite.instructions(task)
        actions = random.normal(size=(length, ACTION_DIM)).astype(np.float32)
        actions[:, -1] = np.sign(actions[:, -1])  # the gripper is open or closed
        return EpisodeRecord(
            images={VIEW + view: pictures() for view in suite.views},
            states=random.normal(size=(length, STATE_DIM)).astype(np.float32),
            actions=actions,
            instruction=sentences[number % len(sentences)],
            extra={ENVIRONMENT_STATE: random.normal(size=(length, PRIVILEGED_DIM)).astype(np.float32)},
        )

    write_lerobot(
        folder / DATASET,
        [episode(task, number) for task in suite.tasks for number in range(per_task)],
        fps=suite.fps,
        views=tuple(VIEW + view for view in suite.views),
        robot_type=suite.robot,
    )
    return folder

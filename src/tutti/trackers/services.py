"""The trackers that are packages of others: Weights & Biases, MLflow and Trackio."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutti.nested_dicts import content_hash
from tutti.trackers.logger import FOLDER, Logger, Start

MLFLOW_PARAMS, MLFLOW_TEXT = 100, 500
"""What MLflow takes of params in one call, and of characters in one."""


class WandbLogger(Logger):
    """Weights & Biases; offline it writes RUN/tracking/wandb, which `wandb sync` sends later."""

    def __init__(self, start: Start, *, project: str, entity: str, mode: str, tags: tuple[str, ...]) -> None:
        self._package: Any = importlib.import_module("wandb")
        folder = start.run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._run = self._package.init(
            project=project,
            entity=entity or None,
            name=start.name,
            id=start.identity("wandb"),
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=dict(start.config),
            tags=list(tags),
        )
        # Its own step may not go back, as that of a run that is resumed or rolled back does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, kind: str, values: Mapping[str, float], seconds: float) -> None:
        self._run.log({"step": step, **values})

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({"step": step, name: self._package.Image(str(path))})

    def video(self, name: str, path: Path, step: int) -> None:
        self._run.log({"step": step, name: self._package.Video(str(path), format="mp4")})

    def close(self) -> None:
        self._run.finish()


class MlflowLogger(Logger):
    """MLflow, on a server or in a folder; a resumed run goes on under its id there."""

    def __init__(self, start: Start, *, uri: str, experiment: str) -> None:
        package: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client = package.MlflowClient(tracking_uri=uri or None)
        found = self._client.get_experiment_by_name(experiment)
        self._number = found.experiment_id if found else self._client.create_experiment(experiment)
        place = content_hash([uri or package.get_tracking_uri(), experiment], 8)
        self._run = start.identity(f"mlflow-{place}", lambda: self._create(start), self._is_there)

    def _create(self, start: Start) -> str:
        run: str = self._client.create_run(self._number, run_name=start.name).info.run_id
        params = [self._entities.Param(key, text) for key, text in _flat(start.config)]
        for first in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(run, params=params[first : first + MLFLOW_PARAMS])
        return run

    def _is_there(self, run: str) -> bool:
        """Whether the experiment has this run, and nobody has deleted it."""
        return bool(run and self._client.search_runs([self._number], f"run_id = '{run}'"))

    def scalars(self, step: int, kind: str, values: Mapping[str, float], seconds: float) -> None:
        when = int(1000 * seconds)
        metrics = [self._entities.Metric(_allowed(name), one, when, step) for name, one in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def text(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._run, text, f"{_allowed(name)}.txt")

    def picture(self, name: str, path: Path, step: int) -> None:
        self._client.log_artifact(self._run, str(path), _allowed(name))

    video = picture

    def close(self) -> None:
        self._client.set_terminated(self._run)


class TrackioLogger(Logger):
    """Trackio: a database on this machine, which `trackio show` draws, or a Space."""

    def __init__(self, start: Start, *, project: str, space: str) -> None:
        self._package: Any = importlib.import_module("trackio")
        options = {"space_id": space} if space else {}
        name = f"{start.name}-{start.identity('trackio')}"
        self._run = self._package.init(
            project=project, name=name, config=dict(start.config), resume="allow", **options
        )

    def scalars(self, step: int, kind: str, values: Mapping[str, float], seconds: float) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._package.Image(str(path))}, step=step)

    def video(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._package.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        self._run.finish()


def _allowed(name: str) -> str:
    """A name of ours with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def _flat(values: Mapping[str, Any], place: str = "") -> list[tuple[str, str]]:
    """A nested config as pairs of a key and a text."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        path = f"{place}{key}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{path}.")
        else:
            found.append((_allowed(path), str(value)[:MLFLOW_TEXT]))
    return found

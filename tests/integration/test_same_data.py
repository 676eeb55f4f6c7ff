"""A run belongs to what its data say: moved, they are taken; changed, refused; gone, rollouts go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fixtures import squares_data
from fixtures.squares_data import MODEL, TRAINING
from tutti import pipeline
from tutti.config.run_config import RunConfig
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.evaluation.config import NO_SUITE
from tutti.types import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    squares_data.write(home / "data", squares_data.episodes(6))
    pipeline.train(config_of(home / "data"), home / "run")
    return home


def config_of(data: Path, **training: object) -> RunConfig:
    section = {"batch_size": 2, "image_size": 16, "validation_fraction": 0.3}
    config = squares_data.config(data, data=section, model=MODEL, training=TRAINING | training)
    evaluation = config.evaluation.model_copy(update={"suite": NO_SUITE})
    return config.model_copy(update={"evaluation": evaluation})


def scale_actions(folder: Path, episode: int) -> None:
    """Metres to millimetres in one episode; the file keeps its size."""
    path = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    actions = np.array(table["action"].to_pylist(), dtype=np.float32)
    actions[table["episode_index"].to_numpy() == episode] *= 1000
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), actions.shape[1])
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)


@pytest.mark.parametrize("finished", [True, False])
def test_changed_data_are_refused_with_their_episodes_and_redo_trains_on_them(
    trained: Path, tmp_path: Path, finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    shutil.copytree(trained, home)
    config = config_of(home / "data")
    if not finished:
        book = json.loads((home / "run" / "stages.json").read_text())
        book["train"]["finished"] = False
        (home / "run" / "stages.json").write_text(json.dumps(book))
    pipeline.train(config, home / "run")  # moved, and the same
    before = (home / "run/checkpoints/step-000004/normalizer.json").read_text()
    scale_actions(home / "data", 3)
    for work in (lambda: pipeline.train(config, home / "run"), lambda: pipeline.evaluate(home / "run")):
        with pytest.raises(UserError, match=r"no longer the data set.*actions differ in episode 3"):
            work()
    pipeline.train(config, home / "run", redo=True)
    assert (home / "run/checkpoints/step-000004/normalizer.json").read_text() != before
    split = "4 episodes to train on, 2 held out (data.validation_fraction 0.3; 2 of 2 instructions)"
    assert split in capsys.readouterr().out


def test_a_finished_run_is_evaluated_without_its_data(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    shutil.copytree(trained, home)
    pipeline.train(config_of(home / "data"), home / "run")  # now the run names the copy
    shutil.rmtree(home / "data")
    pipeline.evaluate(home / "run", config_of(home / "data").evaluation)
    assert "open-loop errors are left out" in capsys.readouterr().out


def test_a_training_opens_its_data_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def count(self: LeRobotStore, folder: Path, *given: Any, **named: Any) -> None:
        opened.append(folder)
        whole(self, folder, *given, **named)

    whole = LeRobotStore.__init__
    monkeypatch.setattr(LeRobotStore, "__init__", count)
    pipeline.train(config_of(trained / "data"), tmp_path / "run")
    assert opened == [trained / "data"]

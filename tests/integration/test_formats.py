"""Every format trains: the config that an inspection prints, the same bits after a resume, open loop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fixtures import squares_data
from fixtures.format_sets import RLDS, write_openpi, write_robomimic, write_zarr
from fixtures.run_equality import differing
from fixtures.squares_data import MODEL, TRAINING
from tutti import pipeline
from tutti.config.run_config import RunConfig, build_config
from tutti.data.checks.inspection import contact_sheet, inspect_path
from tutti.data.formats.detect import FORMATS
from tutti.nested_dicts import merge
from tutti.runs.build import build_data
from tutti.runs.data_check import check_path
from tutti.types import UserError


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home, records = tmp_path_factory.mktemp("sets"), squares_data.episodes(6)
    return {
        "lerobot": squares_data.write(home / "lerobot", records),
        "openpi": write_openpi(home / "openpi", records),
        "hdf5": write_robomimic(home / "hdf5" / "squares.hdf5", records),
        "rlds": RLDS,
        "zarr": write_zarr(home / "squares.zarr", records),
    }


def config_of(path: Path, **values: Any) -> RunConfig:
    data = {"sources": [{"path": str(path), **values}], "batch_size": 2, "image_size": 16}
    section = {"data": data | {"validation_fraction": 0.3}}
    return squares_data.config(path, **section, model=MODEL, training=TRAINING)


def test_the_formats_are_those_that_are_tried_here(sets: dict[str, Path]) -> None:
    robots = {one.name for one in FORMATS if not one.is_pairs}  # test_picture_text.py has the others
    assert robots == sets.keys() - {"openpi"}


@pytest.mark.parametrize("name", ["lerobot", "openpi", "hdf5", "rlds", "zarr"])
def test_the_config_of_an_inspection_builds_its_data_and_is_checked(
    sets: dict[str, Path], tmp_path: Path, name: str
) -> None:
    inspected = inspect_path(sets[name])
    assert inspected.format.name == name.replace("openpi", "lerobot") and inspected.problem == ""
    small = {"data": {"image_size": 16, "horizon": 4, "prefetch": 0}}
    config = build_config(merge(yaml.safe_load(inspected.config()), small), "the inspection")
    data = build_data(config, tmp_path)
    assert data.spec.fps == (20 if name == "rlds" else 10)
    assert len(data.parts[0].store.episodes) == len(inspected.found.lengths)
    described = data.describe()["sources"][0]
    assert described["format"] == inspected.format.name and described["read_as"]["lag"] == "0"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert check_path(str(tmp_path / "mine.yaml")).code < 2
    assert contact_sheet(inspected.rows).width > 100  # type: ignore[arg-type]


def test_formats_of_the_same_episodes_give_the_same_arrays(sets: dict[str, Path]) -> None:
    said = {"zarr": {"fps": 10, "labels": {"text": False}}}
    names = ("lerobot", "openpi", "hdf5", "zarr")
    stores = [config_of(sets[name], **said.get(name, {})).data.sources[0].open() for name in names]
    for store in stores[1:]:
        assert np.array_equal(store.actions, stores[0].actions)
        assert np.array_equal(store.states[:, :2], stores[0].states)
        told = [e.instruction for e in store.episodes]
        assert told == [e.instruction * (store.format != "zarr") for e in stores[0].episodes]
        for mine, its in zip(stores[0].spec.views, store.spec.views, strict=True):
            rows = np.array([0, 13, 40, 71])
            assert np.array_equal(store.frames(its, rows), stores[0].frames(mine, rows))
    guesses = [line.partition("sources.")[2].partition(":")[0] for line in stores[1].remarks]
    assert guesses == ["state is auto", "action is auto"]


def test_a_training_on_hdf5_resumes_to_the_same_bits_and_is_measured(
    sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(sets["hdf5"], flip="vertical", lag=1)
    pipeline.train(config, tmp_path / "whole")
    broken = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(broken / "checkpoints" / "step-000004")
    book = json.loads((broken / "stages.json").read_text())
    book["train"]["finished"] = False
    (broken / "stages.json").write_text(json.dumps(book))
    pipeline.train(config, broken)
    assert differing(tmp_path / "whole", broken) == []
    spec = json.loads((broken / "checkpoints" / "step-000004" / "spec.json").read_text())
    assert spec["views"] == ["obs.agentview_image", "obs.robot0_eye_in_hand_image"]
    assert spec["state_names"][:2] == ["x", "y"]
    (source,) = json.loads((broken / "data.json").read_text())["sources"]
    assert source["read_as"]["flip"] == "vertical" and source["shortest"] == squares_data.LENGTH - 1
    pipeline.evaluate(broken)
    errors = json.loads((broken / "evaluation" / "open_loop.json").read_text())
    assert errors["overall"]["normalised"]["executed"] > 0
    with pytest.raises(UserError, match='flip: "vertical" -> "none"'):
        pipeline.train(config_of(sets["hdf5"], flip="none", lag=1), broken)

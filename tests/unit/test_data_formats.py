"""Which format a path is in, what is said of everything else, and `tutti data inspect`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from fixtures import squares_data
from fixtures.format_sets import RLDS, write_openpi, write_robomimic
from fixtures.lerobot_sets import FPS, write_v21
from fixtures.toy_reader import ROLES, ToyReader
from tutti.cli.app import app
from tutti.config.run_config import build_config
from tutti.data.checks.inspection import inspect_path
from tutti.data.formats import detect
from tutti.data.formats.detect import FORMATS, find_format, mapped
from tutti.data.formats.interface import Roles
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.data.sources import SourceConfig
from tutti.data.sources.config import FormatName
from tutti.types import UserError


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_the_config_names_every_format() -> None:
    assert get_args(FormatName) == tuple(one.name for one in FORMATS)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("meta/info.json", "data/x.parquet"), "lerobot"),
        (("meta/info.json", "demo.hdf5"), "lerobot"),
        (("demo.hdf5",), "hdf5"),
        (("1.0.0/features.json", "1.0.0/dataset_info.json"), "rlds"),
        (("features.json", "dataset_info.json"), "rlds"),
        (("metadata.jsonl", "a.jpg"), "picture_text"),
        (("data/train-00000-of-00002.parquet",), "picture_text"),
        (("00000.tar", "00001.tar"), "picture_text"),
        ((".zgroup", "data/.zgroup", "meta/.zgroup"), "zarr"),
    ],
)
def test_a_path_is_recognised_by_the_names_of_its_files(
    tmp_path: Path, names: tuple[str, ...], found: str
) -> None:
    kind = find_format(made(tmp_path, *names))
    assert kind.name == found and kind.recognises(tmp_path)


OTHERS: dict[str, tuple[tuple[str, ...], str]] = {
    "raw bridge": (
        ("traj0/policy_out.pkl", "traj0/im_0.jpg"), r"raw BridgeData.*never unpickles[\s\S]*RLDS copy"),
    "pickles": (("a/data.pickle",), "Python pickles, which can run code"),
    "mcap": (("run.mcap",), "a recording of ROS"),
    "zarr": (("d.zarr/.zgroup",), "holds 1[\\s\\S]*name one of them: d.zarr"),
    "a zip beside others": (("d.zarr.zip", "readme.md"), "a folder with Zarr stores[\\s\\S]*name the store"),
    "webdataset": (("train/0001.tar",), "holds 1[\\s\\S]*name one of them: train"),
    "half a lerobot set": (("meta/tasks.jsonl", "data/chunk-000/a.parquet"), "in no format that Tutti reads"),
    "packed": (("0001.tar.gz",), "a packed tar[\\s\\S]*gunzip"),
    "riegeli": (("x-train.riegeli-00000-of-00001",), "in Riegeli files[\\s\\S]*file_format=tfrecord"),
    "tfrecord": (
        ("x-train.tfrecord-00000-of-00001",), "without features.json[\\s\\S]*copy the whole version folder"),
    "videos": (("a.mp4",), "videos without a table"),
    "a parent": (("one/meta/info.json", "two/meta/info.json"), "holds 2[\\s\\S]*name one of them: one, two"),
    "nothing known": (("a.txt",), "in no format that Tutti reads"),
    "an empty folder": ((), "found: +nothing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_format_is_called_what_it_is_beside_what_was_looked_for(tmp_path: Path, kind: str) -> None:
    names, said = OTHERS[kind]
    (folder := tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=said) as caught:
        SourceConfig(path=made(folder, *names)).open()
    assert str(caught.value).count("\n") == 3 + len(FORMATS)
    assert all(f"\n    {one.name}: {one.what}\n" in str(caught.value) for one in FORMATS)


def test_a_path_that_is_not_there_is_called_missing_and_an_address_one(tmp_path: Path) -> None:
    made(tmp_path, "drawer/meta/info.json")
    with pytest.raises(UserError, match=r"no such file or folder. Did you mean 'drawer'"):
        SourceConfig(path=tmp_path / "drawr").open()
    with pytest.raises(UserError, match=r"it is an address[\s\S]*download"):
        SourceConfig(path=Path("s3://sets/drawer")).open()


def test_a_named_format_is_not_looked_for(tmp_path: Path) -> None:
    made(tmp_path, "meta/info.json", "demo.hdf5")
    assert find_format(tmp_path, "hdf5").name == "hdf5"


def test_lerobot_guesses_only_openpis_names_and_says_so(tmp_path: Path) -> None:
    usual = squares_data.write(tmp_path / "usual", squares_data.episodes(2))
    plain, store = LeRobotStore(usual), SourceConfig(path=usual).open()
    assert store.remarks == () and store.fingerprint == plain.fingerprint and store.format == "lerobot"
    assert (store.roles.state, store.roles.action) == (("observation.state",), ("action",))
    openpi = SourceConfig(path=write_openpi(tmp_path / "openpi", squares_data.episodes(2)))
    first, second = openpi.open().remarks
    assert "sources.state is auto: state (there is no observation.state; openpi's data sets" in first
    assert "sources.action is auto: actions" in second and np.array_equal(
        openpi.open().actions, plain.actions
    )
    assert openpi.model_copy(update={"state": "state", "action": "actions"}).open().remarks == ()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lag": 1}, "flip and sources.lag are not for"),
        ({"flip": "turned"}, "flip and sources.lag are not for"),
        ({"fps": 12}, "sources.fps is 12;.*says 10"),
        ({"text": {"say": "go"}}, "sources.text is 'go'"),
    ],
)
def test_lerobot_refuses_what_its_format_tells_by_itself(
    tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    folder = squares_data.write(tmp_path / "set", squares_data.episodes(2))
    with pytest.raises(UserError, match=said):
        SourceConfig.model_validate({"path": folder, **keys}).open()


def test_sources_that_read_the_same_share_a_store_and_others_do_not(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "squares.hdf5", squares_data.episodes(4))
    one, two, three = (
        SourceConfig.model_validate({"path": path, **keys}).reads
        for keys in ({"episodes": [0]}, {"episodes": [1], "weight": 2}, {"lag": 1})
    )
    assert one == two != three


def test_the_rate_is_known_whatever_is_wrong_with_episodes_that_are_left_out(tmp_path: Path) -> None:
    folder = write_v21(tmp_path / "set")
    (folder / "data/chunk-000/episode_000001.parquet").unlink()
    source = SourceConfig(path=folder, exclude=(1,))
    assert len(source.open().episodes) == 2 and source.rate() == FPS
    rlds = Path(shutil.copytree(RLDS, tmp_path / "rlds"))
    for shard in rlds.glob("1.0.0/*train*"):
        shard.unlink()
    known = SourceConfig(path=rlds, split="val", fps=5)
    assert known.open().spec.fps == known.rate() == 5
    info = rlds / "1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"name": "tiny_rlds"', '"name": "droid"'))
    assert SourceConfig(path=rlds, split="val").rate() == 15


@pytest.mark.parametrize(
    "keys", [{"text": {"say": " "}}, {"lag": -1}, {"fps": 0}, {"flip": "up"}, {"format": "lance"}]
)
def test_keys_of_a_source_are_checked(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))):
        SourceConfig.model_validate({"path": "set", **keys})


def inspect(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "inspect", *arguments])
    return result.exit_code, result.output


def test_inspect_prints_what_is_there_and_a_config_and_draws_a_sheet(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "squares.hdf5", squares_data.episodes(4))
    code, said = inspect(str(path), "--sheet", str(tmp_path / "sheet.png"))
    assert code == 0, said
    for line in (
        "4 episodes of 12 to 12 steps, 48 in all, 4.8 s at 10 a second",
        "picture  obs/agentview_image   32 x 32",
        "    action   actions",
        'instructions: 2: "go to the red square", "move to the blue square"',
    ):
        assert line in said, line
    printed = said[said.index("name: mine") : said.index("Written:")]
    config = build_config(yaml.safe_load(printed), "the inspection")
    assert config.data.sources[0].path == path and config.data.horizon == 3
    assert config.objective.terms()["state"].needs("state").grippers == (2,)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * (3 * 32 + 2 * 2) + 3 * 6, 4 * 32 + 5 * 20)


def test_inspect_of_what_cannot_be_trained_on_as_it_is_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Roles(views=ROLES.views, action=("act",), lag=1, reasons={"fps": "such sets run at 50 Hz"})
    toys = {
        "silent": ToyReader(fps=None, roles=silent),
        "broken": ToyReader(damaged=(0,), numbers={("act", 1): np.array([[0, np.inf]] * 5, np.float32)}),
        "lost": ToyReader(roles=Roles()),
    }
    kinds = [
        mapped(name, name, lambda p, n=name: n * (p.name == n), lambda p, _: toys[p.name]) for name in toys
    ]
    monkeypatch.setattr(detect, "FORMATS", tuple(kinds))
    for name in toys:
        (tmp_path / name).mkdir()
    values = yaml.safe_load(text := inspect_path(tmp_path / "silent").config())
    assert "# fps: 50 is a guess" in text and "# no instruction is stored" in text
    assert values["data"]["sources"] == [
        {"path": str(tmp_path / "silent"), "state": "none", "fps": 50, "labels": {"text": False}}
    ]
    assert values["data"]["horizon"] == 1 and values["objective"] == {"align": None, "state": None}
    code, said = inspect(str(tmp_path / "broken"))
    assert code == 0 and "! It cannot be opened as it is" in said and "sources.exclude=[1]" in said
    code, said = inspect(str(tmp_path / "lost"))
    assert code == 0 and "which picture is a view" in said and "name: mine" not in said
    assert inspect(str(tmp_path / "nowhere"))[0] == 2


def test_a_stored_rlds_set_is_inspected() -> None:
    code, said = inspect(str(RLDS))
    assert code == 0 and "rlds, by 1.0.0/features.json" in said
    assert (
        json.loads(json.dumps(yaml.safe_load(said[said.index("name: mine") :])))["data"]["sources"][0]["fps"]
        == 20
    )

"""Zarr replay buffers: what diffusion policy and UMI store is read as it was written, episode by episode."""

from __future__ import annotations

import json
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from fixtures import squares_data
from fixtures import zarr_sets as sets
from tutti.cli.app import app
from tutti.config.run_config import build_config
from tutti.data.config import DataConfig
from tutti.data.formats.detect import find_format
from tutti.data.formats.zarr.reader import ZarrReader
from tutti.data.sources import SourceConfig
from tutti.errors import UserError
from tutti.nested_dicts import merge
from tutti.runs.build import build_training
from tutti.types import DataNeeds

SAID = {"text": {"say": "push the block"}, "fps": 10}


def opened(path: Path, **more: Any) -> Any:
    return SourceConfig.model_validate({"path": str(path)} | SAID | more).open()


def check(path: Path, arrays: dict[str, np.ndarray], picture: str) -> None:
    """All that a reader gives of a store is what it was made of."""
    reader = ZarrReader(path)
    assert reader.lengths.tolist() == [5, 3, 7]
    for episode, (first, end) in enumerate(zip((0, *sets.ENDS), sets.ENDS, strict=False)):
        for key, values in arrays.items():
            if key != picture:
                whole = values[first:end].reshape(end - first, -1)
                np.testing.assert_array_equal(reader.numbers(key, episode), whole.astype(np.float32))
        steps = np.array([end - first - 1, 0, 1, 0])
        shown = reader.pictures(picture, episode, steps)
        np.testing.assert_array_equal(shown, arrays[picture][first:end][steps].astype(np.uint8))


@pytest.mark.parametrize("described", [{}, {"order": "F"}, {"dimension_separator": "/"}])
def test_a_folder_and_a_zip_of_it_hold_the_same(tmp_path: Path, described: dict[str, Any]) -> None:
    arrays = sets.diffusion()
    folder = sets.write(tmp_path / "pusht.zarr", arrays, **described)
    check(folder, arrays, "img")
    for number, kind in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)):
        packed = sets.zipped(folder, tmp_path / f"set{number}.zarr.zip", kind)
        assert find_format(packed).name == find_format(folder).name == "zarr"
        check(packed, arrays, "img")


def test_diffusion_policy_s_names_are_known(tmp_path: Path) -> None:
    arrays = sets.diffusion()
    store = opened(sets.write(tmp_path / "pusht.zarr", arrays))
    assert (store.roles.views, store.roles.state, store.roles.action) == (("img",), ("state",), ("action",))
    assert (store.roles.lag, store.spec.fps, store.spec.image_shapes) == (0, 10, (sets.SIZE,))
    np.testing.assert_array_equal(store.actions, arrays["action"])
    np.testing.assert_array_equal(
        store.frames("img", np.array([9, 2])), arrays["img"][[9, 2]].astype(np.uint8)
    )
    with pytest.raises(UserError, match=r"does not say how many steps[\s\S]*sources.fps"):
        opened(tmp_path / "pusht.zarr", fps="auto")
    with pytest.raises(UserError, match=r"nothing tells which text[\s\S]*say: open the drawer"):
        opened(tmp_path / "pusht.zarr", text="auto")


def test_umi_s_actions_are_the_poses_that_come_of_them(tmp_path: Path) -> None:
    arrays = sets.umi()
    store = opened(sets.write(tmp_path / "umi.zarr", arrays))
    keys = ("robot0_eef_pos", "robot0_eef_rot_axis_angle", "robot0_gripper_width")
    assert store.roles.state == store.roles.action == keys and store.roles.lag == 1
    assert store.spec.state_names == ("x", "y", "z", "rx", "ry", "rz", "width")
    assert store.spec.state_units == (*("m",) * 3, *("rad",) * 3, "m")
    poses = np.concatenate([arrays[key] for key in keys], axis=1).astype(np.float32)
    assert [episode.length for episode in store.episodes] == [4, 2, 6]
    np.testing.assert_array_equal(store.states[:4], poses[:4])
    np.testing.assert_array_equal(store.actions[:4], poses[1:5])


def test_the_conventions_of_the_page_fit_umi(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/zarr.md").read_text()
    values = yaml.safe_load(textwrap.dedent(page.split("```yaml\n")[2].split("```")[0]))["data"]
    values["sources"][0]["path"] = str(sets.write(tmp_path / "umi.zarr", sets.umi()))
    small = {"horizon": 2, "image_size": 16, "cache": {"folder": str(tmp_path)}, "validation_fraction": 0.0}
    data = DataConfig.model_validate(values | small).build(DataNeeds())
    # A pose of position and two columns of a matrix, and the width, which stays as it is.
    assert (data.spec.state_dim, data.spec.action_dim) == (10, 10)


def test_it_is_inspected_and_converted(tmp_path: Path) -> None:
    arrays = {key: values for key, values in sets.diffusion().items() if key != "keypoint"}
    arrays["img"] = np.repeat(np.repeat(arrays["img"], 4, axis=1), 4, axis=2)
    folder = sets.write(tmp_path / "pusht.zarr", arrays)
    done = CliRunner().invoke(app, ["data", "inspect", str(folder), "--sheet", str(tmp_path / "sheet.png")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert (
        "zarr, by .zgroup" in said and "3 episodes of 3 to 7 steps, 15 in all" in said and "fps: 10" in said
    )
    target = tmp_path / "converted"
    words = ["text={say: push}", "fps=10", "--pictures", "png", "--workers", "0"]
    done = CliRunner().invoke(app, ["data", "convert", str(folder), str(target), *words])
    assert done.exit_code == 0, done.output
    after = SourceConfig(path=target).open()
    np.testing.assert_array_equal(after.actions, arrays["action"])


def test_the_extra_is_named_where_its_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sets.write(tmp_path / "set.zarr", sets.diffusion())
    path = folder / "data/action/.zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"compressor": {"id": "blosc"}}))
    for chunk in (folder / "data/action").glob("[0-9]*"):
        chunk.write_bytes(b"\2\1\1\4" + (16).to_bytes(4, "little") * 2 + (16).to_bytes(4, "little"))
    monkeypatch.setitem(__import__("sys").modules, "numcodecs", None)
    monkeypatch.setitem(__import__("sys").modules, "numcodecs.blosc", None)
    with pytest.raises(UserError, match=r"numcodecs is not installed[\s\S]*pip install 'tutti-vla\[zarr\]'"):
        opened(folder)


def test_the_config_of_the_page_trains(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/zarr.md").read_text()
    values = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    values["data"]["sources"][0]["path"] = str(sets.write(tmp_path / "pusht.zarr", sets.diffusion()))
    values["model"] = squares_data.MODEL
    smaller: dict[str, Any] = {
        "data": {"image_size": 16, "horizon": 4, "batch_size": 4, "cache": {"folder": str(tmp_path)}},
        "objective": {"state": {"offsets": [2]}, "recon": {"offsets": [2]}},
        "training": squares_data.TRAINING | {"steps": 2, "checkpoints": {"every": 0}},
    }
    made = build_config(merge(values, smaller), "the page")
    assert build_training(made, tmp_path / "run").fit().is_dir()


@pytest.mark.parametrize("codec", ["blosc", "zstd", "zlib", "default"])
def test_what_zarr_s_own_writer_packs_is_read(tmp_path: Path, codec: str) -> None:
    pytest.importorskip("zarr", reason="needs zarr, which Tutti does not")
    numcodecs = pytest.importorskip("numcodecs", reason="needs numcodecs, of the extra zarr")
    made = {
        "blosc": lambda: numcodecs.Blosc("zstd", 5, numcodecs.Blosc.BITSHUFFLE),
        "zstd": lambda: numcodecs.Zstd(3),
        "zlib": numcodecs.Zlib,
    }
    options = {"compressors": made[codec]()} if codec in made else {}
    for arrays, picture in ((sets.diffusion(), "img"), (sets.umi(), "camera0_rgb")):
        folder = sets.write_by_zarr(tmp_path / f"{picture}.zarr", arrays, **options)
        check(folder, arrays, picture)
        check(sets.zipped(folder, tmp_path / f"{picture}.zarr.zip"), arrays, picture)


def test_umi_s_pictures_in_jpeg_xl_are_read(tmp_path: Path) -> None:
    codecs = pytest.importorskip("imagecodecs", reason="needs imagecodecs, of the extra zarr")
    arrays = sets.umi()
    folder = sets.write(tmp_path / "umi.zarr", arrays, rows=1)
    place = folder / "data/camera0_rgb"
    told = json.loads((place / ".zarray").read_text())
    for kind, options in (("jpegxl", {"lossless": True}), ("jpeg2k", {"level": 0, "reversible": True})):
        (place / ".zarray").write_text(json.dumps(told | {"compressor": {"id": f"imagecodecs_{kind}"}}))
        for number, picture in enumerate(arrays["camera0_rgb"]):
            packed = getattr(codecs, f"{kind}_encode")(picture, **options)
            (place / f"{number}.0.0.0").write_bytes(packed)
        check(folder, arrays, "camera0_rgb")
    (place / "3.0.0.0").write_bytes(codecs.jpegxl_encode(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(UserError, match=r"the chunk data/camera0_rgb/3.0.0.0 is damaged"):
        ZarrReader(folder).pictures("camera0_rgb", 0, np.arange(5))

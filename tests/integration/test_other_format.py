"""Labelled and unlabelled data in one run: of which format the unlabelled part is does not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py

from fixtures import squares_data as world
from tutti import pipeline
from tutti.data.formats.lerobot.pieces import EpisodeRecord

NAMES = ("front", "mirror")


def write_hdf5(folder: Path, episodes: list[EpisodeRecord]) -> Path:
    """As robomimic and RoboCasa lay it out, pictures as they are."""
    folder.mkdir()
    with h5py.File(folder / "demo.hdf5", "w") as file:
        for number, episode in enumerate(episodes):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["ep_meta"] = json.dumps({"lang": episode.instruction})
            demo["actions"] = episode.actions.astype("float64")
            demo["obs/robot0_eef_pos"] = episode.states.astype("float64")
            for name, view in zip(NAMES, world.VIEWS, strict=True):
                demo[f"obs/{name}_image"] = episode.images[view]
    return folder


def losses(home: Path, unlabelled: dict[str, Any]) -> list[dict[str, float]]:
    """Every loss of every update of a run on labelled episodes and these."""
    views = dict(zip(NAMES, world.VIEWS, strict=True))
    labelled = {"path": str(home / "labelled"), "views": views, "name": "labelled", "embodiment": "squares"}
    beside = {"name": "videos", "embodiment": "squares", "labels": {"actions": False}, **unlabelled}
    data = {"sources": [labelled, beside], "batch_size": 8, "horizon": 4, "mixture": {"labelled": 0.5}}
    config = world.config(
        home / "labelled", data=data | {"validation_fraction": 0}, model=world.MODEL, training=world.TRAINING
    )
    folder = home / beside["path"].rpartition("/")[2].replace("unlabelled", "run")
    pipeline.train(config, folder)
    records = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in record.items() if key.startswith("loss/")}
        for record in records
        if record["kind"] == "train"
    ]


def test_unlabelled_episodes_of_another_format_give_the_same_losses_to_the_last_bit(tmp_path: Path) -> None:
    world.write(tmp_path / "labelled", world.episodes(6))
    others = world.episodes(8, 1)
    world.write(tmp_path / "unlabelled_lerobot", others)
    write_hdf5(tmp_path / "unlabelled_hdf5", others)
    info = json.loads((tmp_path / "labelled/meta/info.json").read_text())
    same = {"path": str(tmp_path / "unlabelled_lerobot"), "views": dict(zip(NAMES, world.VIEWS, strict=True))}
    other = {
        **{"path": str(tmp_path / "unlabelled_hdf5"), "state": "obs/robot0_eef_pos", "fps": info["fps"]},
        **{"views": {name: f"obs/{name}_image" for name in NAMES}, "flip": "none", "lag": 0},
        "conventions": "none",
    }
    first, second = losses(tmp_path, same), losses(tmp_path, other)
    assert len(first) == world.TRAINING["steps"] and first[0].keys() > {"loss/total", "loss/recon/raw"}
    assert first == second
    assert "loss/recon/raw@videos" in first[0], "the unlabelled part is in every batch"

"""Trackers: what they are told, and that none of them can stop, slow or change a training."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import av
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import equal

from fixtures.toy_training import Data, make_trainer
from tutti.config.run_config import RunConfig, load_config
from tutti.plugin import Origin
from tutti.trackers import sending
from tutti.trackers.config import MlflowConfig, TrackioConfig, WandbConfig
from tutti.trackers.logger import Logger, Start
from tutti.trackers.process import CONFIG, call, serve
from tutti.trackers.sending import Here, Trackers
from tutti.training.records import MetricsWriter, read_records

OWN = "fixtures.loggers:Written"


def configs(*loggers: dict[str, Any]) -> tuple[Any, ...]:
    return RunConfig.model_validate({"logging": list(loggers)}).logging


def calls(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trackers_that_fail_hang_or_cannot_start_change_no_bit_of_a_training_and_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sending, "GRACE", 20.0)
    caplog.set_level(logging.WARNING, "tutti.trackers")
    good, flaky, slow = (tmp_path / f"{name}.jsonl" for name in ("good", "flaky", "slow"))
    loggers = configs(
        {"kind": "tensorboard"},
        {"kind": OWN, "options": {"file": str(good)}},
        {"kind": OWN, "options": {"file": str(flaky), "fail": 2}},
        {"kind": OWN, "options": {"file": str(slow), "fail": 1}},
        {"kind": "fixtures.loggers:Broken"},
        {"kind": "nowhere.loggers:Gone"},
    )
    text = {"config.yaml": "name: toy\nseed: 3\n"}
    tracked = make_trainer(tmp_path / "tracked", loggers=loggers, files=text).fit(Data())
    plain = make_trainer(tmp_path / "plain", loggers=(), files=text).fit(Data())
    assert not (tmp_path / "plain" / "tensorboard").exists()
    files = sorted(path.name for path in plain.glob("*.safetensors"))
    assert "model.safetensors" in files
    for name in files:
        one, other = load_file(tracked / name), load_file(plain / name)
        assert one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)

    told, records = calls(good), read_records(tmp_path / "tracked")
    assert told[0]["name"] == "toy" and told[0]["config"] == {"name": "toy", "seed": 3}
    assert [one["call"] for one in told[:3]] == ["start", "text", "scalars"] and told[-1] == {"call": "close"}
    assert next(one for one in told if one["call"] == "picture")["step"] == 3
    scalars = [{k: v for k, v in one.items() if k != "call"} for one in told if one["call"] == "scalars"]
    assert scalars == records
    assert len([one for one in calls(flaky) if one["call"] == "scalars"]) == (len(records) + 1) // 2
    assert [one["call"] for one in calls(slow)] == ["start", "text", "picture"]
    said = [record.getMessage() for record in caplog.records]
    for kind, words in {
        "fixtures-loggers-Written failed, and is tried again": "ConnectionError: no route to the server",
        "fixtures-loggers-Written failed 3 times in a row, and is switched off": "ConnectionError",
        "fixtures-loggers-Broken cannot be started, and is switched off": "SystemExit: no licence",
        "nowhere-loggers-Gone cannot be started, and is switched off": "cannot be imported",
    }.items():
        assert [kind in line and words in line for line in said].count(True) == (2 if "tried" in kind else 1)
    log = (tmp_path / "tracked" / "tracking" / "fixtures-loggers-Written.log").read_text()
    assert "a package prints what it likes" in log


def test_those_that_hang_are_left_behind_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sending, "GRACE", 1.0)
    hanging = {"kind": OWN, "options": {"file": str(tmp_path / "calls"), "hang": 9.0}}
    with MetricsWriter(tmp_path, loggers=configs(hanging, hanging, hanging)) as writer:
        writer.write(1, "train", {"loss/total": 1.0})
        writer.rewind(0, rollbacks=0)
        began = time.monotonic()
    assert time.monotonic() - began < 2.5, "a second for all of them, not for each"
    assert caplog.text.count("is still sending; it goes on without this training") == 3


def test_tensorboard_shows_config_pictures_and_videos_and_fails_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers(configs({"kind": "tensorboard"}), Start(run=tmp_path, name="a"))
    pixels = np.zeros((6, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first_batch.png")
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream: Any = file.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for shade in range(0, 240, 2):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), shade, np.uint8), "rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    trackers.text("config", "name: a\n", 0)
    trackers.scalars(4, "train", {"loss/total": 2.0}, 1e9)
    trackers.video("success", tmp_path / "a.mp4", 4)
    trackers.scalars(9, "train", {"loss/total": 7.0}, 1e9)
    trackers.rewind(4)
    trackers.scalars(5, "train", {"loss/total": 1.0}, 2e9)
    trackers.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/total")] == [(4, 2.0), (5, 1.0)]
    evaluated = Start(run=tmp_path, name="a", step=4, trains=False)  # the best checkpoint, not the last
    with closing(Trackers(configs({"kind": "tensorboard"}), evaluated)) as judged:
        judged.scalars(4, "evaluation", {"success/mean": 0.5}, 3e9)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/total")] == [4, 5], "the curves stay whole"
    assert [event.step for event in board.Scalars("success/mean")] == [4]
    assert board.Images("first_batch")[0].encoded_image_string == (tmp_path / "first_batch.png").read_bytes()
    with Image.open(io.BytesIO(board.Images("success")[0].encoded_image_string)) as moving:
        assert (moving.format, moving.size, getattr(moving, "n_frames", 0)) == ("GIF", (16, 16), 40)
    assert board.Tensors("config/text_summary")[0].tensor_proto.string_val == [b"    name: a\n"]

    failing = Mock(spec=Logger, scalars=Mock(side_effect=OSError("disk full")))
    here = Here("tensorboard", failing)
    for step in range(5):
        here.tell({"call": "scalars", "step": step, "kind": "train", "values": {}, "seconds": 0.0})
    assert failing.scalars.call_count == 3
    assert caplog.text.count("tracker tensorboard failed, and is") == 2


class Fake(ModuleType):
    """A package that writes down all that is called of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.said: list[tuple[Any, ...]] = []

    def take(self, *name: Any) -> Any:
        return lambda *a, **k: self.said.append((*name, *a, *([k] if k else [])))


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(run=tmp_path, name="mine", step=7, config={"training": {"steps": 9}, "seed": 1})


def test_weights_and_biases_is_told_offline_under_an_id_that_stays(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake("wandb")
    vars(fake).update(
        init=lambda **k: (
            fake.said.append(("init", k)),
            SimpleNamespace(**{n: fake.take(n) for n in ("log", "define_metric", "finish")}),
        )[1],
        Image=lambda path: ("image", path),
        Video=lambda path, format: ("video", path, format),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (start.run / "tracking").mkdir()
    (start.run / "tracking" / "wandb.id").write_text("")  # as a full disk leaves it
    for _ in range(2):
        logger = WandbConfig(project="p", tags=("a",)).build(start)
        logger.scalars(8, "train", {"loss/total": 0.5}, 1.0)
        logger.picture("first_batch", Path("f.png"), 8)
        logger.video("success", Path("v.mp4"), 9)
        logger.rewind(3)
        logger.close()
    one = [entry for entry in fake.said if entry[0] == "init"]
    assert (
        one[0] == one[1]
        and one[0][1]["id"]
        and one[0][1]["id"] == (start.run / "tracking" / "wandb.id").read_text()
    )
    assert {k: one[0][1][k] for k in ("mode", "resume", "project", "name", "entity", "tags", "config")} == {
        **{
            "mode": "offline",
            "resume": "allow",
            "project": "p",
            "name": "mine",
            "entity": None,
            "tags": ["a"],
        },
        "config": dict(start.config),
    }
    assert fake.said[3:7] == [
        ("log", {"step": 8, "loss/total": 0.5}),
        ("log", {"step": 8, "first_batch": ("image", "f.png")}),
        ("log", {"step": 9, "success": ("video", "v.mp4", "mp4")}),
        ("finish",),
    ]


def test_mlflow_gets_params_once_and_names_that_it_takes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, entities = Fake("mlflow"), Fake("mlflow.entities")
    vars(entities).update(Metric=lambda *a: ("metric", *a), Param=lambda *a: ("param", *a))
    names = ("log_batch", "log_text", "log_artifact", "set_terminated")
    client = SimpleNamespace(
        **{name: fake.take(name) for name in names},
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name: f"number of {name}",
        create_run=lambda number, run_name: SimpleNamespace(
            info=SimpleNamespace(run_id=f"{number}/{run_name}")
        ),
        search_runs=lambda numbers, which: [which] if which == f"run_id = '{numbers[0]}/mine'" else [],
    )
    vars(fake).update(
        MlflowClient=lambda tracking_uri: client, get_tracking_uri=lambda: "sqlite:///mlflow.db"
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for _ in range(2):
        logger = MlflowConfig(experiment="e").build(start)
        logger.scalars(8, "validation", {"valid/action@drawer": 0.5}, 2.5)
        logger.text("config", "name: mine", 8)
        logger.video("success/a~b", Path("v.mp4"), 9)
        logger.close()
    run = "number of e/mine"
    params = [("param", "training.steps", "9"), ("param", "seed", "1")]
    calls = [
        ("log_batch", run, {"metrics": [("metric", "valid/action_drawer", 0.5, 2500, 8)]}),
        ("log_text", run, "name: mine", "config.txt"),
        ("log_artifact", run, "v.mp4", "success/a_b"),
        ("set_terminated", run),
    ]
    assert fake.said == [("log_batch", run, {"params": params}), *calls, *calls]


def test_mlflow_has_a_run_in_each_place_and_a_new_one_where_it_is_gone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[str, list[str]] = {"http://a": [], "http://b": []}

    def client(tracking_uri: str) -> SimpleNamespace:
        runs = places[tracking_uri]

        def create_run(number: str, run_name: str) -> SimpleNamespace:
            runs.append(f"{tracking_uri}/{number}/{len(runs)}")
            return SimpleNamespace(info=SimpleNamespace(run_id=runs[-1]))

        return SimpleNamespace(
            get_experiment_by_name=lambda name: SimpleNamespace(experiment_id=name),
            search_runs=lambda numbers, which: [one for one in runs if which == f"run_id = '{one}'"],
            create_run=create_run,
            log_batch=lambda run, params: None,
        )

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=client))  # pyright: ignore
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Param=lambda *a: a))  # pyright: ignore

    def run(uri: str, experiment: str = "e") -> str:
        return MlflowConfig(uri=uri, experiment=experiment).build(start)._run  # pyright: ignore

    assert [run("http://a"), run("http://b"), run("http://a", "f")] == [
        "http://a/e/0",
        "http://b/e/0",
        "http://a/f/1",
    ]
    assert [run("http://a"), run("http://b")] == ["http://a/e/0", "http://b/e/0"]
    places["http://a"][0] = "another"  # it was deleted there
    assert [run("http://a"), run("http://a")] == ["http://a/e/2"] * 2
    for file in (start.run / "tracking").glob("mlflow-*.id"):
        file.write_text("")
    assert [run("http://b"), run("http://b")] == ["http://b/e/1"] * 2


def test_trackio_is_told_by_steps(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("trackio")
    run = SimpleNamespace(log=fake.take("log"), finish=fake.take("finish"))
    vars(fake).update(
        init=lambda **k: (fake.said.append(("init", k)), run)[1], Image=str, Video=lambda path, format: path
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    logger = TrackioConfig(project="p", space="me/runs").build(start)
    for told in (
        {"call": "scalars", "step": 8, "kind": "train", "values": {"loss/total": 0.5}, "seconds": 1.0},
        {"call": "picture", "name": "first_batch", "path": "f.png", "step": 8},
        {"call": "video", "name": "success", "path": "v.mp4", "step": 9},
    ):
        call(logger, told)
    logger.close()
    name = f"mine-{(start.run / 'tracking' / 'trackio.id').read_text()}"
    begun = {
        "project": "p",
        "name": name,
        "config": dict(start.config),
        "resume": "allow",
        "space_id": "me/runs",
    }
    assert fake.said == [
        ("init", begun),
        ("log", {"loss/total": 0.5}, {"step": 8}),
        ("log", {"first_batch": "f.png"}, {"step": 8}),
        ("log", {"success": "v.mp4"}, {"step": 9}),
        ("finish",),
    ]


def test_a_missing_package_and_a_stranger_s_class_are_said_in_one_line(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    serve(sending.first_lines(WandbConfig(), start), said.append)
    assert said[0].startswith("cannot be started, and is switched off: ModuleNotFoundError: ")
    values = {"logging": [{"kind": OWN, "options": {"file": str(tmp_path / "calls")}}]}
    foreign = RunConfig.model_validate(values, context=Origin(Path("runs/theirs/config.yaml")))
    trackers = Trackers(foreign.logging, start)
    trackers.scalars(1, "train", {}, 0.0)
    trackers.close()
    assert "is switched off: runs/theirs/config.yaml: logging.kind is" in caplog.text
    assert not (tmp_path / "calls").exists()


def test_several_stand_in_a_config_and_jsonl_is_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"logging": [{"kind": "jsonl"}, {"kind": "wandb"}]}))
    told = [one.model_dump_json() for one in load_config(tmp_path / "c.yaml").logging]
    jsonl, wandb = map(CONFIG.validate_json, told)  # as its process gets it
    assert (jsonl.kind, wandb.kind) == ("jsonl", "wandb")
    logger = jsonl.build(Start(run=tmp_path, name="a"))
    logger.scalars(3, "train", {"loss/total": float("nan")}, 1.5)
    logger.video("v", Path("v.mp4"), 3)
    logger.close()
    first, second = calls(tmp_path / "tracking" / "log.jsonl")
    assert first | {"loss/total": 0} == {"run": "a", "step": 3, "kind": "train", "time": 1.5, "loss/total": 0}
    assert second == {"run": "a", "step": 3, "kind": "video", "name": "v", "path": "v.mp4"}


def test_a_tracker_is_not_told_where_others_send_to(tmp_path: Path) -> None:
    """Their addresses and options may hold passwords."""
    secret = {"kind": "mlflow", "uri": "http://me:s3cret@127.0.0.1:9"}
    config = {"name": "a", "logging": [secret], "training": {"checkpoints": {"mirror": "s3://me:s3cret@b"}}}
    texts = {"config.yaml": yaml.safe_dump(config)}
    file = {"kind": OWN, "options": {"file": str(tmp_path / "calls")}}
    with MetricsWriter(tmp_path, loggers=configs(file, {"kind": "jsonl"}), texts=texts) as writer:
        writer.write(1, "train", {"loss/total": 1.0})
    told = calls(tmp_path / "calls")
    assert told[0]["config"]["training"] == {"checkpoints": {"mirror": "off"}} and told[1]["call"] == "text"
    for path in (tmp_path / "calls", tmp_path / "tracking" / "log.jsonl"):
        assert "name: a" in path.read_text() and "s3cret" not in path.read_text()

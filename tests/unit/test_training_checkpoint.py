"""Checkpoints and records: whole or absent, checked when read, each step recorded once."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fixtures.checkpoints import load_latest
from tutti.storage.checkpoint import Checkpoint, checkpoints, load, save, verify
from tutti.storage.files import remove_folder
from tutti.training.checkpointing.resume import check_resumable
from tutti.training.metric_names import METRICS, describe_metric
from tutti.training.records import Meter, MetricsWriter, read_records
from tutti.training.rng import load_rng_state, own_randomness, rng_state, seed_everything
from tutti.types import UserError


def make(step: int, size: int = 3) -> Checkpoint:
    return Checkpoint(
        step=step,
        tensors={"model": {"w": torch.full((size,), float(step))}, "objective": {}},
        optimizer={"muon": {"lr": 0.1}},
        rng=rng_state(),
        state={"loader": {"position": step}},
        extra={"spec.json": '{"views": ["right"]}'},
    )


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes past `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path, make(7))
    assert folder == tmp_path / "checkpoints" / "step-000007"
    assert not (folder / "objective.safetensors").exists()  # no state, no file
    found = load(folder)
    assert found.step == 7 and torch.equal(found.tensors["model"]["w"], torch.full((3,), 7.0))
    assert found.optimizer == {"muon": {"lr": 0.1}} and found.state["loader"] == {"position": 7}
    assert json.loads(found.extra["spec.json"]) == {"views": ["right"]}


def test_half_written_ones_are_ignored_and_order_is_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, make(step))
    (tmp_path / "checkpoints" / ".partial-step-2000000").mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    latest = load_latest(tmp_path)
    assert latest is not None and latest.step == 1_000_000
    assert load_latest(tmp_path / "nothing") is None


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    save(tmp_path, make(1))
    with (
        file_size_limit(50_000),
        pytest.raises(UserError, match=r"step-000002: cannot write, the disk .* full"),
    ):
        save(tmp_path, make(2, size=100_000))
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert load(tmp_path / "checkpoints" / "step-000001").step == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng.pt", "spec.json", "state.json"])
def test_damage_to_any_file_is_found(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, make(1)) / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{name}: .* Delete the folder"):
        load_latest(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        load_latest(tmp_path)
    if name != "state.json":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(UserError, match=rf"{name}: damaged"):
            load_latest(tmp_path)


def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_not_called_damaged(tmp_path: Path) -> None:
    folder = save(tmp_path, make(1))
    remove_folder(folder)
    for read in (load, verify):
        with pytest.raises(UserError, match=r"has removed it meanwhile .*checkpoints\.keep"):
            read(folder)


def test_resuming_refuses_a_changed_model_and_names_the_key() -> None:
    saved = {"model": {"vision": {"depth": 4, "channels": [1, 2]}}, "training": {"lr": 1}}
    same = {"model": {"vision": {"depth": 4, "channels": (1, 2)}}, "training": {"lr": 2}}
    check_resumable(saved, same, "model", "data")
    changed = {"model": {"vision": {"depth": 6, "channels": [1, 2], "new": 1}}}
    with pytest.raises(UserError) as error:
        check_resumable(saved, changed, "model", "data")
    assert "model.vision.depth: 4 -> 6" in str(error.value)
    assert "model.vision.new: (absent) -> 1" in str(error.value)
    assert "channels" not in str(error.value)


def test_random_states_come_back(tmp_path: Path) -> None:
    seed_everything(3)
    saved = load(save(tmp_path, make(1))).rng
    expected = torch.rand(3)
    load_rng_state(saved)
    with own_randomness(9):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


def test_records_after_the_checkpoint_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss/total": 1.0 / step})
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')
    with MetricsWriter(tmp_path, after_step=2) as writer:
        writer.write(3, "train", {"loss/total": 9.0})
    assert [(r["step"], r["kind"], r["loss/total"]) for r in read_records(tmp_path)] == [
        (1, "train", 1.0),
        (2, "train", 0.5),
        (3, "train", 9.0),
    ]
    assert list((tmp_path / "tensorboard").iterdir())


# TensorBoard's own thread may meet the full disk too, and ends with a traceback.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_while_recording_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"records\.jsonl: cannot write, the disk .* full"),
        MetricsWriter(tmp_path) as log,
    ):
        log.write(1, "train", {"loss/total": 1.0})
        with file_size_limit(60):
            log.write(2, "train", {"loss/total": 1.0})


def test_a_broken_record_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(
        '{"step": 1, "kind": "train"}\nrubbish\n{"step": 2, "kind": "train"}\n'
    )
    with pytest.raises(UserError, match=r"records\.jsonl, line 2"):
        read_records(tmp_path)


def test_a_metric_without_description_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="mystery/number"):
        writer.write(1, "train", {"mystery/number": 1.0})


def test_the_most_specific_description_wins() -> None:
    assert describe_metric("loss/action/raw") == METRICS["loss/*/raw"]
    assert describe_metric("valid/metric/align/accuracy") == METRICS["valid/metric/*"]
    assert describe_metric("valid/action") == METRICS["valid/*"]
    assert describe_metric("metric/align/accuracy") == METRICS["metric/*/accuracy"]


def test_meter_gives_means_and_maxima_and_survives_a_checkpoint() -> None:
    meter, resumed = Meter(), Meter()
    meter.add({"a": 1.0, "n_max": 5.0})
    resumed.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    resumed.add({"a": 4.0, "b": 2.0, "n_max": 3.0})
    assert resumed.take() == {"a": 2.5, "b": 2.0, "n_max": 5.0}
    assert resumed.take() == {}

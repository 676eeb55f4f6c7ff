"""What a training asks of CUDA, and what a file or a group saved or made on CUDA must not depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from fixtures.term_batches import make_batch as full_batch
from fixtures.toy_training import Data, make_batch, make_trainer
from tutti.distributed import world as distributed
from tutti.storage.checkpoint import deserialize, load, serialize
from tutti.training import data_feed as feed
from tutti.training.device import Machine, resolve_machine
from tutti.training.faults.saved_steps import load_step, save_step
from tutti.types import Batch


@pytest.fixture
def settings() -> Iterator[None]:
    """Puts back what is set for the whole process."""
    fill, rounds = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.allow_tf32 = rounds


def test_without_determinism_cudnns_attention_comes_first(settings: None) -> None:
    orders = []
    for deterministic in (True, False, True):
        settled("cuda", deterministic=deterministic)
        orders.append(torch._C._get_sdp_priority_order())
    first = [SDPBackend(order[0]) for order in orders]
    assert first[0] == first[2] != first[1] == SDPBackend.CUDNN_ATTENTION


def settled(device: str, *, deterministic: bool) -> tuple[bool, bool]:
    machine = Machine(device=torch.device(device), threads=1, precision="fp32", reasons=())
    machine.set_determinism(deterministic=deterministic)
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32


def test_cuda_is_settled_and_a_cpu_left_alone(settings: None) -> None:
    assert settled("cpu", deterministic=True) == (False, torch.backends.cudnn.allow_tf32)
    assert settled("cuda", deterministic=True) == (True, False)
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert settled("cuda", deterministic=False) == (False, False)
    with torch.backends.cudnn.flags(enabled=False):  # asks how all of it is set
        pass


def saved_on_cuda(patch: pytest.MonkeyPatch) -> None:
    """From now on what is written says that it comes from a second GPU."""
    patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")


def test_what_was_saved_on_a_gpu_is_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Module()
    model.register_buffer("weight", torch.arange(3.0))
    saved_on_cuda(monkeypatch)
    save_step(tmp_path / "step-1" / "failure.json", {"step": 1}, [make_batch(1)], {"model": model})
    (tmp_path / "file.pt").write_bytes(serialize({"model": model.state_dict()}))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "file.pt", weights_only=True)
    assert torch.equal(deserialize(tmp_path / "file.pt")["model"]["weight"], torch.arange(3.0))
    (batch,), found = load_step(tmp_path / "step-1")
    assert torch.equal(batch.actions, make_batch(1).actions)
    assert torch.equal(found["model"]["weight"], torch.arange(3.0))


def test_a_saved_step_keeps_tasks_and_the_last_observation(tmp_path: Path) -> None:
    given = replace(full_batch(), task_id=torch.arange(6) // 2)
    save_step(tmp_path / "step-1" / "failure.json", {"step": 1}, [given], {})
    (batch,), _ = load_step(tmp_path / "step-1")
    assert list(batch.futures) == [1, 2, 3, 4, 5, "last"] and torch.equal(batch.tasks, given.tasks)
    last = (one.futures["last"].observation.images for one in (batch, given))
    assert torch.equal(*last)


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_on_cuda(monkeypatch)
    folder = make_trainer(tmp_path, steps=4, checkpoints={"background": False}).fit(Data())
    moments = load(folder).optimizer["adamw"]["state"][0]
    assert {value.device.type for value in moments.values()} == {"cpu"}


def test_a_run_that_goes_on_on_another_device_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With `precision: auto` the section `training` is the same, and so may not be what is computed."""
    make_trainer(tmp_path, steps=4).fit(Data())
    make_trainer(tmp_path, steps=6).fit(Data())
    assert "last bits" not in caplog.text
    trainer = make_trainer(tmp_path, steps=8)
    machine = replace(trainer.machine, precision="bf16")
    trainer.settings = replace(trainer.settings, machine=machine)
    trainer.fit(Data())
    assert '"cpu in fp32" -> "cpu in bf16"' in caplog.text


def test_every_group_that_waits_for_a_step_has_the_time_out_of_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(distributed, "_connect", lambda *_: None)
    for name, value in (("get_rank", 0), ("get_world_size", 2), ("is_initialized", True)):
        monkeypatch.setattr(distributed.dist, name, lambda value=value: value)
    monkeypatch.setattr(distributed.dist, "new_group", lambda **options: given.append(options))
    with distributed.process_group(2, torch.device("cpu"), 12.0):
        pass
    assert [options["timeout"] for options in given[:2]] == [timedelta(seconds=12)] * 2
    assert {options["timeout"] for options in given[2:]} == {distributed.LONGEST_WAIT}


def test_a_cpu_with_bfloat16_units_is_not_said_to_be_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for units, said in (
        ({"amx_bf16": True}, "has bfloat16 units"),
        ({"amx_bf16": False}, "without bfloat16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units, raising=False)
        machine = resolve_machine("cpu", 1, "auto")
        assert machine.precision == "fp32" and said in machine.reasons[2]  # the bits never depend on it


def test_the_feeds_thread_is_put_on_the_device_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Stream:
        device = torch.device("cuda", 3)

        def record_event(self) -> str:
            return "arrived"

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        done.append("stream")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(Batch, "apply", lambda batch, function: batch)
    monkeypatch.setattr(Batch, "to", lambda batch, device, non_blocking: batch)
    feed.CudaMove(torch.device("cuda"))(make_batch(1))
    assert done == ["cuda:3", "stream"]

"""On a real GPU: the numbers of the CPU, the same bits each time, one wait in an update, resumes, compiling.

tests/unit/test_training_syncs.py tries the same settings where there is no GPU.
"""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fixtures import squares_data
from fixtures.gpu_trainings import (
    EVERY_TERM,
    NARROW,
    OFTEN,
    ONCE,
    Data,
    make_trainer,
    snapshot,
    updated,
    weights,
)
from fixtures.term_batches import make_batch
from tutti.config.run_config import RunConfig
from tutti.data.augmentation import PictureJitter, raw_batch
from tutti.data.bundle import DataBundle
from tutti.data.mixture import Stream
from tutti.evaluation.open_loop import measure_open_loop
from tutti.evaluation.probes.run import run_probes
from tutti.evaluation.probes.setup import ProbeSetup
from tutti.models.describe import describe
from tutti.nested_dicts import merge
from tutti.runs.build import build_data
from tutti.serving.policy import Policy
from tutti.storage.checkpoint import load
from tutti.training.data_feed import CudaMove
from tutti.training.diagnostics.reach import reach
from tutti.training.records import read_records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TESTS = Path(__file__).resolve().parents[1]
RANDOM = ("flow", "diffusion", "every term", "bf16", "bf16 residual", "muon")
"""Settings whose numbers are not those of a CPU: other random draws, or products in bfloat16."""
BITS = {
    "fp32": {"objective": EVERY_TERM},
    "bf16": {"objective": EVERY_TERM, "precision": "bf16"},
    "bf16 residual": ONCE["bf16 residual"],
    "flow, muon": {"action": {"kind": "flow", "cross_attention": True, **NARROW}, **ONCE["muon"]},
    "fast": ONCE["fast"],
    "recomputed, bf16": {**ONCE["recomputed"], "precision": "bf16"},
}


@pytest.mark.parametrize("name", [name for name in ONCE if name not in RANDOM])
def test_losses_equal_the_cpu(name: str, tmp_path: Path) -> None:
    means: list[dict[str, float]] = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(tmp_path / device, device, **ONCE[name])
        updated(trainer, 0, 1)
        means.append(trainer.meter.take())
    losses = [{key: value for key, value in one.items() if key.startswith("loss/")} for one in means]
    assert losses[0].keys() == losses[1].keys()
    assert losses[1] == pytest.approx(losses[0], rel=2e-3, abs=1e-5)
    assert means[1]["optim/grad_norm"] == pytest.approx(means[0]["optim/grad_norm"], rel=1e-2)


def test_bf16_stays_close(tmp_path: Path) -> None:
    totals: list[float] = []
    for precision in ("fp32", "bf16"):
        trainer = make_trainer(tmp_path / precision, precision=precision)
        updated(trainer, 0, 1)
        totals.append(trainer.meter.take()["loss/total"])
    assert totals[1] == pytest.approx(totals[0], rel=0.05)


@pytest.mark.parametrize("sections", ONCE.values(), ids=ONCE.keys())
def test_the_host_waits_once_in_an_update(sections: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **sections)
    updated(trainer, 0, 1)
    arrived = [make_batch(number).to("cuda") for number in range(trainer.config.accumulation)]
    waits: list[str] = []
    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        waits.append("tolist")
        torch.cuda.set_sync_debug_mode("default")
        numbers = plain(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", tolist)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.update(iter(arrived))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert waits == ["tolist"], waits


@pytest.mark.parametrize("sections", OFTEN.values(), ids=OFTEN.keys())
def test_what_looks_twice_trains(sections: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **sections)
    updated(trainer, 0, 2)
    assert math.isfinite(trainer.meter.take()["loss/total"])


@pytest.mark.parametrize("sections", BITS.values(), ids=BITS.keys())
def test_the_same_training_gives_the_same_bits_and_resumes_to_them(
    sections: dict[str, Any], tmp_path: Path
) -> None:
    data = Data()
    straight, again, resumed = (make_trainer(tmp_path / str(n), **sections) for n in range(3))
    assert straight.optimizer.ahead
    again.optimizer.ahead = False  # Muon's directions behind the wait
    for trainer in (again, straight):
        torch.manual_seed(5)
        updated(trainer, 0, 1)
    assert different(weights(straight), weights(again)) == []
    saved = snapshot(straight, data)
    updated(straight, 2, 3)
    resumed.state.parts["loader"] = data.train
    resumed.state.load(saved)
    updated(resumed, 2, 3)
    assert different(weights(straight), weights(resumed)) == []


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def test_a_whole_training_and_its_checkpoint_without_a_gpu(tmp_path: Path) -> None:
    training = {
        "validation": {"every": 2},
        "checkpoints": {"every": 2},
        "diagnostics": {"every": 2},
        "log_every": 1,
    }
    for background in (True, False):
        run = tmp_path / str(background)
        folder = make_trainer(run, training=merge(training, {"checkpoints": {"background": background}})).fit(
            Data()
        )
        saved = load(folder)
        moments = [v for state in saved.optimizer["adamw"]["state"].values() for v in state.values()]
        assert {value.device.type for value in moments} == {"cpu"}
        assert {record["kind"] for record in read_records(run)} == {"train", "validation", "diagnostics"}
    more = make_trainer(run, training={**training, "steps": 6}).fit(Data())
    assert more.name == "step-000006"


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, DataBundle]:
    folder = tmp_path_factory.mktemp("judged")
    squares_data.write(folder / "set")
    config = squares_data.config(folder / "set")
    return config, build_data(config, folder)


def test_probes_open_loop_and_policy(squares: tuple[RunConfig, DataBundle]) -> None:
    """Data come from the host, and what is found goes back to it."""
    config, data = squares
    texts, spec = data.windows.instructions, data.spec
    torch.manual_seed(0)
    model, fresh = (config.model.build(spec).to("cuda") for _ in range(2))
    judged: dict[str, Any] = {"groups": texts, "actions_per_query": 2}
    held_out = [data.validation[0]]
    limits: dict[str, Any] = {"max_held_out": 6, "max_training": 8}
    found, _ = run_probes(
        ProbeSetup(model=model, untrained=fresh, data=data, partners={}, **judged, **limits)
    )
    opened = measure_open_loop(model, held_out, data.normalizer, data.tokenizer, texts, **judged)
    policy = Policy(model, data.normalizer, data.tokenizer, device="cuda")
    pictures = dict.fromkeys(spec.views, np.zeros((spec.image_size, spec.image_size, 3), np.uint8))
    chunk = policy.predict(pictures, np.zeros(spec.state_dim, np.float32), texts[0])
    assert describe(model).parameters > 0
    assert found.windows == 6 and opened.overall.windows == len(held_out[0].window)
    assert chunk.shape == (spec.horizon, spec.action_dim)


@pytest.mark.parametrize("kind", ["regression", "flow", "diffusion", "bins", "fast"])
def test_every_decoder_predicts_is_judged_and_reached(kind: str, tmp_path: Path) -> None:
    action = {"kind": kind, **({"hidden": 16} if kind == "regression" else NARROW)}
    trainer = make_trainer(tmp_path, action=action, objective=EVERY_TERM)
    batch = make_batch(1).to("cuda")
    model: Any = trainer.model
    assert model.predict(batch.observation).is_cuda
    assert describe(model).flops > 0
    objective: Any = trainer.objective
    assert "action" in reach(model, objective, batch).reached("action")


def test_a_moved_batch_arrives_with_its_bytes() -> None:
    given = make_batch(1)
    arrived = CudaMove(torch.device("cuda"))(given)()
    assert arrived.actions.device.type == "cuda"
    assert torch.equal(arrived.actions.cpu(), given.actions)
    assert torch.equal(arrived.futures[4].observation.images.cpu(), given.futures[4].observation.images)


def test_pictures_are_changed_on_the_gpu_as_on_a_cpu_and_each_time_alike() -> None:
    config = PictureJitter.model_validate(
        {name: {"probability": 0.7} for name in ("hue", "blur", "crop", "rotation", "shift", "view_drop")}
    )
    batch = make_batch(1)
    raw = raw_batch(batch, config, 0, 1, [Stream((), slice(None), 0, len(batch.window))])
    here, there, again = raw.augmented(), *(CudaMove(torch.device("cuda"))(raw)() for _ in range(2))
    for one in (lambda batch: batch.observation, lambda batch: batch.futures[4].observation):
        images = one(there).images
        assert images.device.type == "cuda" and torch.equal(images, one(again).images)
        difference = images.cpu().int() - one(here).images.int()
        assert difference.abs().max() <= 1 and difference.ne(0).double().mean() < 1e-2
        assert torch.equal(one(there).image_mask.cpu(), one(here).image_mask)


def run_alone(*command: str) -> str:
    """A process of its own: torch.compile cannot follow shape checks, and ranks are processes."""
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_compiled_blocks_and_model_have_the_eager_losses() -> None:
    found = json.loads(run_alone(sys.executable, str(TESTS / "fixtures" / "compiled_losses.py")))
    for mode in ("blocks", "model"):
        assert found[mode]["totals"] == pytest.approx(found["off"]["totals"], rel=1e-3)
        assert found[mode]["norm"] == pytest.approx(found["off"]["norm"], rel=1e-2)
    assert found["blocks"]["breaks"] == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_train_as_one_process(kind: str, tmp_path: Path) -> None:
    """On two GPUs; where there is one, a rank that is alone."""
    count = str(min(2, torch.cuda.device_count()))
    script = str(TESTS / "fixtures" / "gpu_trainings.py")
    alone = run_alone(sys.executable, script, "single", str(tmp_path / "one"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count)
    both = run_alone(sys.executable, *torchrun, script, kind, str(tmp_path / "two"))
    assert ast.literal_eval(both) == pytest.approx(ast.literal_eval(alone), rel=2e-3)

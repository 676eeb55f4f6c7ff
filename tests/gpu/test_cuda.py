"""One training step on a GPU gives the losses and gradients of the CPU; bf16 stays close."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path

import pytest
import torch

from tutti.config import build_config
from tutti.models.vla import VLA, ModelConfig
from tutti.objectives.unified import ObjectiveConfig
from tutti.training.feed import CudaMove
from tutti.training.trainer import Trainer
from tutti.types import Batch, DataSpec, Future, LaterStates, Observation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPEC = DataSpec(
    views=("right", "left"),
    image_size=64,
    state_dim=4,
    action_dim=4,
    horizon=8,
    vocab_size=64,
    text_length=8,
    embodiments=("sawyer",),
    fps=20.0,
)


def batch(b: int = 8) -> Batch:
    random = torch.Generator().manual_seed(0)

    def look() -> Observation:
        return Observation(
            images=torch.randint(0, 256, (b, 2, 3, 64, 64), dtype=torch.uint8, generator=random),
            image_mask=torch.ones(b, 2, dtype=torch.bool),
            text=torch.randint(0, 64, (b, 8), generator=random),
            text_mask=torch.ones(b, 8, dtype=torch.bool),
            state=torch.randn(b, 4, generator=random),
        )

    ids = torch.arange(b) % 4
    return Batch(
        observation=look(),
        actions=torch.randn(b, 8, 4, generator=random),
        action_mask=torch.ones(b, 8, 4, dtype=torch.bool),
        instruction_id=ids,
        embodiment=torch.zeros_like(ids),
        window=torch.arange(b),
        futures={4: Future(observation=look(), mask=torch.ones(b, dtype=torch.bool))},
        later_states=LaterStates(
            offsets=(2, 4, 6, 8, 12, 16, 24, 0, -1),
            values=torch.randn(b, 9, 4, generator=random),
            mask=torch.ones(b, 9, dtype=torch.bool),
        ),
    )


def losses(device: str, autocast: bool = False) -> tuple[dict[str, float], VLA]:
    torch.manual_seed(0)
    model = ModelConfig().build(SPEC)
    objective = ObjectiveConfig().build(model)
    model, objective = model.to(device), objective.to(device)
    given = batch().to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        terms = objective(model(given.observation), given)
    terms.total.backward()
    return {name: value.item() for name, value in terms.values.items()}, model


def test_losses_and_gradients_equal_the_cpu() -> None:
    on_cpu, cpu_model = losses("cpu")
    on_gpu, gpu_model = losses("cuda")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    for (name, one), two in zip(cpu_model.named_parameters(), gpu_model.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None, name
        torch.testing.assert_close(two.grad.cpu(), one.grad, rtol=2e-2, atol=2e-3, msg=name)


def test_bf16_stays_close() -> None:
    exact, _ = losses("cuda")
    rough, _ = losses("cuda", autocast=True)
    assert rough == pytest.approx(exact, rel=0.1)


def cuda_trainer(run: Path, **training: object) -> Trainer:
    torch.manual_seed(0)
    model = ModelConfig().build(SPEC)
    settings = {"steps": 10, "schedule": {"warmup": 1}, "device": "cuda", "diagnostics": {"every": 0}}
    config = build_config({"training": settings | training}, "a test")
    return Trainer(config.training, model, ObjectiveConfig().build(model), run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_waits_once_in_an_update(precision: str, tmp_path: Path) -> None:
    trainer = cuda_trainer(tmp_path, precision=precision, accumulation=2)
    stream = repeat(batch().to("cuda"))
    trainer._update(stream, report=False)
    trainer._update(stream, report=False)
    waits: list[str] = []
    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> list[float]:
        waits.append("tolist")
        torch.cuda.set_sync_debug_mode("default")
        numbers = plain(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", tolist)
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer._update(stream, report=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert waits == ["tolist"]


def test_a_moved_batch_arrives_with_its_bytes() -> None:
    given = batch()
    arrived = CudaMove(torch.device("cuda"))(given)()
    assert arrived.actions.device.type == "cuda"
    assert torch.equal(arrived.actions.cpu(), given.actions)
    assert torch.equal(arrived.futures[4].observation.images.cpu(), given.futures[4].observation.images)


def test_compiled_blocks_train_on_a_gpu(tmp_path: Path) -> None:
    stream = repeat(batch())
    eager = cuda_trainer(tmp_path / "eager", precision="fp32")
    blocks = cuda_trainer(tmp_path / "blocks", precision="fp32", compile="blocks")
    for trainer in (eager, blocks):
        trainer._update(stream, report=False)
    one, other = (trainer.meter.take()["loss/total"] for trainer in (eager, blocks))
    assert other == pytest.approx(one, rel=1e-4)

"""Decoders that must see the data first: train and serve, without a word about fitting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tutti import pipeline
from tutti.config.run_config import RunConfig, load_config
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.serving.policy import Policy
from tutti.types import UserError

KINDS = ("flow", "diffusion", "bins", "fast", "gripper")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six episodes of 20 frames; the last action dimension opens or closes, the others drift."""
    folder, random = tmp_path_factory.mktemp("data") / "set", np.random.default_rng(0)

    def episode(number: int) -> EpisodeRecord:
        actions = random.normal(scale=0.2, size=(20, 3)).cumsum(0).astype(np.float32)
        actions[:, 2] = np.where(np.arange(20) < 5 + number, -1.0, 1.0)
        return EpisodeRecord(
            images={"observation.images.front": random.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)},
            states=random.normal(size=(20, 4)).astype(np.float32),
            actions=actions,
            instruction=("lift it", "put it down")[number % 2],
        )

    write_lerobot(
        folder,
        map(episode, range(6)),
        fps=20,
        views=("observation.images.front",),
        robot_type="sawyer",
    )
    return folder


def config(kind: str, data: Path, dimension: int = 2) -> RunConfig:
    action = ["model.action.kind=regression", f"model.action.gripper={{dimension: {dimension}}}"]
    return load_config(
        None,
        [
            f"data.sources=[{{path: {data}}}]",
            *("data.horizon=6", "data.batch_size=4", "data.image_size=32", "data.validation_fraction=0.2"),
            *(action if kind == "gripper" else [f"model.action.kind={kind}"]),
            *("training.steps=2", "training.schedule.warmup=1", "training.threads=1"),
            *("training.device=cpu", "training.validation.every=2", "training.checkpoints.every=2"),
        ],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_acts_without_the_data_it_was_fitted_to(
    kind: str, recorded: Path, tmp_path: Path
) -> None:
    checkpoint = pipeline.train(config(kind, recorded), tmp_path)
    seen = (np.zeros((32, 32, 3), np.uint8), np.zeros(4, np.float32), "lift it")
    chunks = [Policy.load(checkpoint, "raw", clip=False).predict(*seen) for _ in range(2)]
    assert chunks[0].shape == (6, 3) and np.array_equal(chunks[0], chunks[1])
    if kind == "gripper":
        assert set(chunks[0][:, 2].round(4).tolist()) <= {-1.0, 1.0}
    saved = load_file(checkpoint / "model.safetensors")
    fitted = [bool(value) for name, value in saved.items() if name.endswith("fitted")]
    assert fitted == ([] if kind == "flow" else [True])


def test_a_gripper_that_is_none_stops_before_the_training(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"action dimension 0 .*is not binary"):
        pipeline.train(config("gripper", recorded, dimension=0), tmp_path)
    assert not (tmp_path / "checkpoints").exists()

"""A model on a pretended GPU is served, probed and described: data come from the host, and go back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkup_world
import numpy as np
import pytest
import torch

from card_world import EVERY_TERM, NARROW, make_trainer
from objectives_world import make_batch
from pretended_card import card
from tutti.config.run_config import RunConfig
from tutti.data.config import DataBundle
from tutti.evaluation.open_loop import measure
from tutti.evaluation.probes.run import run_probes
from tutti.models.describe import describe
from tutti.runs.build import build_data
from tutti.serving.policy import Policy
from tutti.training.diagnostics.reach import reach


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("judged")
    checkup_world.write(folder / "set")
    return checkup_world.config(folder / "set")


@pytest.fixture(scope="module")
def data(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> DataBundle:
    return build_data(config, tmp_path_factory.mktemp("cache"))


def test_probes_open_loop_and_policy(
    config: RunConfig, data: DataBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, spec = data.windows.instructions, data.spec
    torch.manual_seed(0)
    model, fresh = (config.model.build(spec) for _ in range(2))
    given: dict[str, Any] = {"groups": texts, "partners": {}, "actions_per_query": 2}
    judged: dict[str, Any] = {"groups": texts, "actions_per_query": 2}
    held_out = [data.validation[0]]
    with card(monkeypatch):
        model, fresh = model.to("cuda"), fresh.to("cuda")
        found, _ = run_probes(model, fresh, data, **given, max_held_out=6, max_training=8)
        opened = measure(model, held_out, data.normalizer, data.tokenizer, texts, **judged)
        policy = Policy(model, data.normalizer, data.tokenizer, device="cuda")
        pictures = np.zeros((len(spec.views), spec.image_size, spec.image_size, 3), np.uint8)
        chunk = policy.predict(pictures, np.zeros(spec.state_dim, np.float32), texts[0])
        assert describe(model).parameters > 0
    assert found.windows == 6 and opened.overall.windows == len(held_out[0].window)
    assert chunk.shape == (spec.horizon, spec.action_dim)


@pytest.mark.parametrize("kind", ["regression", "flow", "diffusion", "bins", "fast"])
def test_every_decoder_predicts_and_is_reached(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = {"kind": kind, **({"hidden": 16} if kind == "regression" else NARROW)}
    with card(monkeypatch) as pretended:
        trainer = make_trainer(tmp_path, action=action, objective=EVERY_TERM)
        batch = make_batch(1).to("cuda")
        model: Any = trainer.model
        assert pretended.holds(model.predict(batch.observation))
        assert describe(model).flops > 0
        objective: Any = trainer.objective
        table = reach(model, objective, batch)
    assert "action" in table.reached("action")

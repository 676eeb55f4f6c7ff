"""The recipes after well-known systems: each is a config that builds, with tiny stand-ins for its weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from fixtures import small_model
from fixtures.towers import SIZE
from fixtures.vlms import save_vlm
from tutti.config.run_config import build_config
from tutti.models.config import load_towers
from tutti.nested_dicts import merge

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "recipes.md"
STANDS_FOR = {"SmolVLM2": "smolvlm", "Qwen3-VL": "qwen3_vl"}


def test_each_recipe_builds_and_predicts(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    recipes = [yaml.safe_load(block) for block in blocks]
    assert len(recipes) == 2
    for recipe in recipes:
        name = next(tiny for real, tiny in STANDS_FOR.items() if real in recipe["model"]["vlm"]["path"])
        save_vlm(tmp_path / name, name)
        small = {"width": 8, "depth": 3, "heads": 2}
        tiny = {"vlm": {"path": str(tmp_path / name), "layers": 3}, "action": small}
        config = build_config(merge(recipe, {"data": {"image_size": SIZE}, "model": tiny}), name)
        assert [*config.objective.terms()] == ["action"]
        spec = replace(small_model.SPEC, image_size=SIZE, horizon=config.data.horizon)  # pyright: ignore
        model = config.model.build(spec)
        load_towers(model)
        with torch.no_grad():
            chunk = model.eval().predict(small_model.observation(spec, b=2))
        assert chunk.shape == (2, spec.horizon, spec.action_dim) and bool(chunk.isfinite().all())

"""The examples of a suite and of a data format: recorded, read, trained on and played, as their pages say.

The other examples: test_terms_custom, test_decoders_custom and test_balancing_custom.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fixtures import squares_data
from fixtures.squares_data import MODEL, TRAINING
from tutti import pipeline
from tutti.config.run_config import build_config
from tutti.data.formats import LeRobotStore
from tutti.data.sources import Part
from tutti.suites.environment import Environment, Suite
from tutti.suites.registry import SUITES, find_suite
from tutti.types import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example by its name; what it adds to the suites is taken away again."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = dict(SUITES)

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    yield load
    SUITES.clear()
    SUITES.update(before)


def test_the_suite_records_trains_and_plays(example: Any, tmp_path: Path) -> None:
    example("own_suite")
    suite = find_suite("dots")
    dot = suite.make("red")
    assert isinstance(suite, Suite) and isinstance(dot, Environment)
    dot.reset(3)
    dot.step(dot.expert_action())
    np.testing.assert_array_equal(dot.render(), dot.render_physics(dot.save_physics()))
    config = {
        "record": {"suite": "dots", "episodes_per_task": 3, "workers": 0},
        "data": {"image_size": 32, "batch_size": 2, "horizon": 4, "validation_fraction": 0.3, "prefetch": 0},
        "objective": {"state": {"offsets": [2]}},
        "model": MODEL,
        "training": TRAINING,
        "evaluation": {
            **{"suite": "dots", "episodes": 1, "workers": 1, "max_decisions": 20, "videos_per_task": 0},
            "controls": {"expert": 2, "noop": 1, "no_image": 0, "wrong_instruction": 0},
        },
    }
    pipeline.demo(build_config(config, "the test"), tmp_path / "run")
    info = json.loads((tmp_path / "run" / "dataset" / "meta" / "info.json").read_text())
    assert (info["robot_type"], info["total_episodes"], info["fps"]) == ("dot", 6, 10)
    scores = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["scores"]
    assert (scores["expert"]["mean"], scores["noop"]["mean"]) == (1, 0)


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """A folder of six episodes in the example's format."""
    folder = tmp_path / "npz"
    folder.mkdir()
    for number, one in enumerate(squares_data.episodes(6)):
        (images,) = list(one.images.values())[:1]
        arrays = {"images": images, "states": one.states, "actions": one.actions, "text": one.instruction}
        np.savez(folder / f"{number:03d}.npz", allow_pickle=False, **arrays)
    return folder


def test_the_format_reads_what_its_conversion_writes(example: Any, episodes: Path, tmp_path: Path) -> None:
    own = example("own_format").NpzStore(episodes)
    script = [sys.executable, str(EXAMPLES / "own_format.py"), str(episodes), str(tmp_path / "lerobot")]
    subprocess.run(script, check=True)
    other = LeRobotStore(tmp_path / "lerobot")
    rows = np.array([40, 3, 12, 3])
    unnamed = replace(other.spec, state_names=(), action_names=())
    assert (own.spec, own.episodes, own.instructions) == (unnamed, other.episodes, other.instructions)
    for name in ("states", "actions", "instruction_of"):
        np.testing.assert_array_equal(getattr(own, name), getattr(other, name))
    view = own.spec.views[0]
    np.testing.assert_array_equal(own.frames(view, rows), other.frames(view, rows))
    assert own.identities == other.identities


def test_the_format_trains_where_the_page_says_that_it_is_named(
    example: Any, episodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = example("own_format")
    monkeypatch.setattr(
        "tutti.data.config.open_parts",
        lambda sources, *canonical: [Part(store=own.NpzStore(source.path)) for source in sources],
    )
    data = {"batch_size": 2, "image_size": 16, "validation_fraction": 0.3}
    config = squares_data.config(episodes, data=data, model=MODEL, training=TRAINING)
    assert pipeline.train(config, tmp_path / "run").is_dir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected one \.npz file an episode, found none"):
        own.NpzStore(tmp_path / "empty")

"""The examples of a suite and of a data format: recorded, read, trained on and played, as their pages say.

The other examples: test_terms_custom, test_decoders_custom and test_balancing_custom.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from fixtures import squares_data
from fixtures.rendering import require_rendering
from fixtures.squares_data import MODEL, TRAINING
from tutti import pipeline
from tutti.config.run_config import build_config
from tutti.data.formats import LeRobotStore
from tutti.data.sources import Part
from tutti.nested_dicts import merge
from tutti.recording import RecordConfig, load_recorded, record
from tutti.suites import CustomSuite, Environment, Suite, find_suite
from tutti.types import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def test_a_suite_named_in_a_config_records_trains_and_plays(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In under 60 lines, with whatever has a default left out."""
    assert len((EXAMPLES / "own_suite.py").read_text().splitlines()) <= 60
    given = yaml.safe_load((EXAMPLES / "own_suite.yaml").read_text())
    suite = find_suite(CustomSuite(**given["record"]["suite"]))
    dot = suite.make("red")
    assert isinstance(suite, Suite) and isinstance(dot, Environment)
    small = {
        "record": {"episodes_per_task": 3, "workers": 0},
        "data": {"batch_size": 2, "validation_fraction": 0.3, "prefetch": 0},
        "model": MODEL,
        "training": TRAINING,
        "evaluation": {
            **{"episodes": 1, "workers": 1, "videos_per_task": 0},
            "controls": {"expert": 2, "noop": 1, "no_image": 0, "wrong_instruction": 0},
        },
    }
    config = build_config(merge({**given, "training": {}}, small), "the test")
    pipeline.demo(config, tmp_path / "run")
    info = json.loads((tmp_path / "run" / "dataset" / "meta" / "info.json").read_text())
    assert (info["robot_type"], info["total_episodes"], info["fps"]) == ("dots", 6, 10)
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert (results["scores"]["expert"]["mean"], results["scores"]["noop"]["mean"]) == (1, 0)
    assert (results["protocol"]["suite"], results["protocol"]["max_decisions"]) == ("dots", 40)
    with pytest.raises(UserError, match=r"(?s)evaluation\.json: suite is 'own_suite:Dots'.*--trust-code"):
        pipeline.evaluate(tmp_path / "run")


def test_a_suite_that_does_not_say_what_it_must_is_refused(example: Any) -> None:
    module = example("own_suite")
    module.Bare = type("Bare", (Suite,), {"__module__": "own_suite", "name": "bare"})
    with pytest.raises(UserError, match=r"Bare does not say state_dim, .*fingerprint, make, instructions"):
        find_suite(CustomSuite(kind="own_suite:Bare"))
    with pytest.raises(UserError, match=r"a subclass of .*Suite, found .*Such classes .*: Bare, Dots"):
        find_suite(CustomSuite(kind="own_suite:Dot"))
    with pytest.raises(UserError, match="Did you mean 'metaworld-8'"):
        find_suite("metaworld8")


@pytest.mark.simulation
def test_a_gymnasium_environment_is_recorded(example: Any, tmp_path: Path) -> None:
    require_rendering()
    example("gym_suite")
    given = yaml.safe_load((EXAMPLES / "gym_suite.yaml").read_text())["record"]
    given |= {"episodes_per_task": 1, "first_seed": 10007, "workers": 0}
    config = RecordConfig.model_validate(given)
    tried = record(config, tmp_path)
    (episode,) = load_recorded(tmp_path)
    suite = find_suite(config.suite)
    with closing(suite.make("reach")) as world:
        world.reset(episode.seed)
        for number, action in enumerate(episode.executed):
            assert not world.success
            np.testing.assert_array_equal(world.render()[0], episode.images["camera"][number])
            np.testing.assert_array_equal(world.state, episode.states[number])
            world.step(action)
        assert world.success and np.std(episode.images["camera"][0]) > 10
    assert (
        tried.successes == {"reach": 1} and suite.has_expert and hash(suite) == hash(find_suite(config.suite))
    )
    with pytest.raises(UserError, match="pusht has no expert"):
        record(RecordConfig(suite="pusht"), tmp_path / "other")
    if importlib.util.find_spec("gym_pusht") is None:
        with pytest.raises(UserError, match="pip install gym-pusht"):
            find_suite("pusht").make("pusht")


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
        lambda sources, *_canonical, **_slots: [Part(store=own.NpzStore(source.path)) for source in sources],
    )
    data = {"batch_size": 2, "image_size": 16, "validation_fraction": 0.3}
    config = squares_data.config(episodes, data=data, model=MODEL, training=TRAINING)
    assert pipeline.train(config, tmp_path / "run").is_dir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected one \.npz file an episode, found none"):
        own.NpzStore(tmp_path / "empty")

"""What leaves the house: a card that says what it is, and graphs that compute what the policy does."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_serving_policy import SPEC, TOKENIZER, look, model, normalizer, write
from typer.testing import CliRunner

from tutti.cli.app import app
from tutti.data.cache.decoding import resize_images
from tutti.data.normalize import Normalizer
from tutti.models.config import ModelConfig
from tutti.serving.export import export_policy
from tutti.serving.exports.card import NOT_MEASURED
from tutti.serving.exports.graph import INPUTS, GraphPolicy, example
from tutti.serving.exports.int8 import EXAMPLES, quantised
from tutti.serving.exports.lerobot import export_to_lerobot
from tutti.serving.policy import Policy
from tutti.types import UserError


def inputs(seed: int, text: str) -> tuple[torch.Tensor, ...]:
    """What a program without Tutti gives a graph."""
    images, state = look(seed, size=20)
    pictures = np.concatenate([resize_images(images[view][None], 16) for view in SPEC.views])
    return torch.from_numpy(pictures)[None], torch.from_numpy(state)[None], *TOKENIZER.encode([text])


def test_graphs_are_the_policy_for_any_batch(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    to = tmp_path / "to"
    command = ["export", str(write(tmp_path / "step-000001", model())), "--to", str(to)]
    result = CliRunner().invoke(app, [*command, "--graph", "both", "--int8"])
    assert result.exit_code == 0, result.output
    about = json.loads((to / "export.json").read_text())
    files = about["files"]
    assert {"model.pt2", "model.onnx", "model.int8.onnx"} < set(files) and "README.md" not in files
    policy = Policy.load(to)
    program = torch.export.load(io.BytesIO((to / "model.pt2").read_bytes())).module()
    session = runtime.InferenceSession(to / "model.onnx", providers=["CPUExecutionProvider"])

    def onnx(given: tuple[torch.Tensor, ...]) -> np.ndarray:
        return session.run(None, {n: one.numpy() for n, one in zip(INPUTS, given, strict=True)})[0]

    for seed, text in ((1, "open the tap"), (2, "close it")):
        expected = policy.predict(*look(seed, size=20), text)
        given = inputs(seed, text)
        np.testing.assert_allclose(program(*given)[0].detach(), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(onnx(given)[0], expected, rtol=1e-5, atol=5e-6)
    for batch in (1, 2, 8):  # the example had 3
        given = example(policy, batch)
        with torch.no_grad():
            expected = GraphPolicy(policy)(*given).numpy()
        np.testing.assert_allclose(program(*given).detach(), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(onnx(given), expected, rtol=1e-5, atol=5e-6)
    rounded = runtime.InferenceSession(to / "model.int8.onnx", providers=["CPUExecutionProvider"])
    given = example(policy, EXAMPLES)
    found = rounded.run(None, {n: one.numpy() for n, one in zip(INPUTS, given, strict=True)})[0]
    stats = policy.normalizer.stats["arm"].action
    apart = np.abs(found - onnx(given)) / (stats.max - stats.min)
    assert 0 < apart.mean() < 0.02, "rounded, and not by much"
    assert apart.mean() == pytest.approx(about["int8"]["mean"])
    assert apart.max() == pytest.approx(about["int8"]["largest"])
    assert f"off by {apart.mean():.2%} of their range" in (to / "README.md").read_text()


def test_int8_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(UserError, match=r"--int8 needs onnxruntime.*tutti-vla\[onnx\]"):
        quantised(b"")


def test_what_has_no_graph_says_so_and_nothing_is_left(tmp_path: Path) -> None:
    small = {"width": 8, "depth": 1, "heads": 1}
    vision = {"stem": {"channels": (8, 8, 8)}, **small}
    values = {"vision": vision, "language": small, "fusion": small, "action": {"kind": "fast", **small}}
    policy = Policy(ModelConfig.model_validate(values).build(SPEC), normalizer(), TOKENIZER)
    with pytest.raises(UserError, match=r"kind is fast.*Take `tutti serve`"):
        GraphPolicy(policy)


RESULTS: dict[str, Any] = {
    "scores": {
        "policy": {
            "mean": 0.75,
            "interval": {"low": 0.5, "high": 0.875},
            "tasks": [
                {"task": "tap", "successes": 3, "episodes": 4, "interval": {"low": 0.25, "high": 0.9375}}
            ],
        },
        "noop": {"mean": 0.0, "interval": {"low": 0.0, "high": 0.25}, "tasks": []},
    },
    "protocol": {"policy": "step-000001, raw"},
    "notes": ["1 task of taps, seeds 1000-1003."],
}


def test_the_card_says_what_goes_in_what_it_scores_and_what_it_cannot(tmp_path: Path) -> None:
    folder = write(tmp_path / "step-000001", model())
    text = (export_policy(folder, tmp_path / "to", results=RESULTS) / "README.md").read_text()
    for part in (
        "4 actions a prediction, 20 a second",
        "| image | left | resized to 16 x 16 | 0 | 255 |",
        "| policy | 75.0% | 50.0% to 87.5% |",
        "| noop | 0.0% | 0.0% to 25.0% |",
        "| policy, tap | 3 of 4 | 25.0% to 93.8% |",
        "Of step-000001, raw.",
        "1 task of taps, seeds 1000-1003.",
        "## Limits",
    ):
        assert part in text, part
    assert NOT_MEASURED in (export_policy(folder, tmp_path / "unmeasured") / "README.md").read_text()
    # Scores of another checkpoint are not those of this one.
    other = {**RESULTS, "protocol": {"policy": "step-000002, ema"}}
    text = (export_policy(folder, tmp_path / "other", results=other) / "README.md").read_text()
    assert "75.0%" not in text and NOT_MEASURED in text
    assert "is of another policy, step-000002, ema; this one is step-000001, raw." in text


def test_the_folder_for_lerobot_has_its_files_and_all_that_the_plugin_builds_the_policy_from(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "step-000001", model())
    command = ["export", str(folder), "--for", "lerobot", "--to"]
    assert "--half" in CliRunner().invoke(app, [*command, str(tmp_path / "no"), "--half"]).output
    result = CliRunner().invoke(app, [*command, str(tmp_path / "to")])
    assert result.exit_code == 0, result.output
    to = tmp_path / "to"
    config = json.loads((to / "config.json").read_text())
    assert config["type"] == "tutti" and config["chunk_size"] == 4 and config["n_action_steps"] == 2
    assert config["input_features"] == {
        "observation.images.right": {"type": "VISUAL", "shape": [3, 16, 16]},
        "observation.images.left": {"type": "VISUAL", "shape": [3, 16, 16]},
        "observation.state": {"type": "STATE", "shape": [3]},
    }
    source = Path(__file__).parents[2] / "plugins/lerobot/src/lerobot_policy_tutti/configuration_tutti.py"
    keys = {line.split(":")[0].strip() for line in source.read_text().splitlines() if line.startswith("    ")}
    inherited = {"type", "input_features", "output_features", "device"}
    assert set(config) - inherited <= keys  # an unknown key is an error there
    steps = json.loads((to / "policy_preprocessor.json").read_text())["steps"]
    assert [step["registry_name"] for step in steps] == [
        "rename_observations_processor",
        "to_batch_processor",
        "device_processor",
        "normalizer_processor",
    ]
    built = ModelConfig.model_validate_json(config["model"]).build(SPEC)
    weights = load_file(to / "model.safetensors")
    built.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    rebuilt = Policy(built, Normalizer.from_dict(json.loads(config["normalizer"])), TOKENIZER)
    expected = Policy.load(folder).predict(*look(), "open the tap")
    np.testing.assert_array_equal(rebuilt.predict(*look(), "open the tap"), expected)
    with pytest.raises(UserError, match="exists"):
        export_to_lerobot(folder, to)

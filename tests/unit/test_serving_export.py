"""An export is a policy by itself: the same actions, without the run; whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from test_serving_policy import look, model, write

from fixtures.small_model import relist
from tutti.distributed.world import ONE_PROCESS
from tutti.serving.policy import CheckpointPolicyFactory, Policy, Weights, export_policy, find_checkpoint
from tutti.storage.checkpoint import Checkpoint, save_sharded
from tutti.types import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints with averages; the older one is marked as the best."""
    folder = tmp_path / "run" / "checkpoints"
    write(folder / "step-000010", model(1), model(2))
    write(folder / "step-000020", model(3), model(4))
    (folder / "best.json").write_text(json.dumps({"step": 10}))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("weights", "checkpoint", "seed"),
    [("ema", "latest", 4), ("raw", "latest", 3), ("ema", "best", 2), ("raw", 10, 1)],
)
def test_an_export_acts_like_its_checkpoint_without_the_run(
    run: Path, tmp_path: Path, weights: Weights, checkpoint: int | str, seed: int
) -> None:
    to = export_policy(run, tmp_path / "policy", weights, checkpoint)
    shutil.rmtree(run)
    expected = Policy(model(seed), Policy.load(to).normalizer, Policy.load(to).tokenizer)
    images, state = look()
    for chosen in ("ema", "raw"):  # one file of weights, whatever is asked for
        found = Policy.load(to, chosen).predict(images, state, "open the tap")
        np.testing.assert_array_equal(found, expected.predict(images, state, "open the tap"))
    about = json.loads((to / "export.json").read_text())
    assert about["weights"] == weights
    assert about["parameters"] == sum(p.numel() for p in model().state_dict().values())
    assert {path.name for path in to.iterdir()} == {
        *("model.safetensors", "config.yaml", "spec.json", "normalizer.json", "tokenizer.json", "export.json")
    }


@pytest.mark.parametrize(("weights", "seed"), [("ema", 4), ("raw", 3)])
def test_a_checkpoint_of_shares_is_a_policy_and_exports_one_file(
    run: Path, tmp_path: Path, weights: Weights, seed: int
) -> None:
    old = run / "checkpoints" / "step-000020"
    tensors = {name: load_file(old / f"{name}.safetensors") for name in ("model", "ema")}
    texts = ("spec.json", "normalizer.json", "tokenizer.json", "config.yaml")
    extra = {name: (old / name).read_text() for name in texts if (old / name).is_file()}
    saved = Checkpoint(step=30, tensors=tensors, optimizer={}, rng={}, state={}, extra=extra)
    folder = save_sharded(run, saved, ONE_PROCESS)
    before = CheckpointPolicyFactory(run, weights)
    assert before.path == folder == find_checkpoint(run)
    assert (
        before.fingerprint != CheckpointPolicyFactory(run, "raw" if weights == "ema" else "ema").fingerprint
    )
    images, state = look()
    policy = before()
    expected = Policy(model(seed), policy.normalizer, policy.tokenizer).predict(images, state, "open it")
    np.testing.assert_array_equal(policy.predict(images, state, "open it"), expected)
    to = export_policy(run, tmp_path / "policy", weights)
    np.testing.assert_array_equal(Policy.load(to).predict(images, state, "open it"), expected)
    assert json.loads((to / "export.json").read_text())["weights"] == weights
    index = folder / "shards" / "index.json"
    index.write_bytes(index.read_bytes()[:50])
    with pytest.raises(UserError, match=r"index\.json: truncated"):
        Policy.load(run)


def test_without_an_average_the_raw_weights_are_exported_and_it_is_noted(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints" / "step-000020"
    (folder / "ema.safetensors").unlink()
    relist(folder)  # as training leaves it without an average
    assert json.loads((export_policy(run, tmp_path / "to") / "export.json").read_text())["weights"] == "raw"


@pytest.mark.parametrize("name", ["ema.safetensors", "spec.json", "tokenizer.json", "config.yaml"])
def test_of_a_damaged_checkpoint_nothing_is_exported(run: Path, tmp_path: Path, name: str) -> None:
    path = run / "checkpoints" / "step-000020" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError):
        export_policy(run, tmp_path / "to")
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_an_existing_folder_and_unknown_choices_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exists\. Give --to"):
        export_policy(run, run)
    for which in (15, "newest"):
        with pytest.raises(UserError, match=f"no checkpoint of step {which}; there are 10, 20, .* best"):
            export_policy(run, tmp_path / "to", checkpoint=which)

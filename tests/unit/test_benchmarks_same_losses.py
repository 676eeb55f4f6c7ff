"""The comparison of two commits: what differs, from which step on, and by how much; commits are only read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import same_losses
import torch
from safetensors.torch import save_file

from tutti.training.records import MetricsWriter
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, losses: list[float], weight: float = 1.0, **more: float) -> Path:
    with MetricsWriter(folder) as writer:
        for step, loss in enumerate(losses, start=1):
            writer.write(step, "train", {"loss/total": loss, "time/seconds": loss, **more})
    last = folder / "checkpoints" / "step-000003"
    last.mkdir(parents=True)
    save_file({"w": torch.tensor([1.0, weight])}, last / "model.safetensors")
    return folder


def test_equal_runs_are_the_same_computation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = run(tmp_path / "a", [3.0, 2.0, 1.0]), run(tmp_path / "b", [3.0, 2.0, 1.0])
    result = same_losses.compare(one, other, 3)
    assert result.found.num_differing == 0 and result.found.num_values == 3 * 3 + 2 and result.only == ()
    same_losses.describe(["old", "new"], result)
    assert "same computation: 3 steps, 0 of 11 values differ (old and new)" in capsys.readouterr().out


def test_the_first_step_and_the_size_of_a_difference_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run(tmp_path / "a", [3.0, 2.0, 1.0])
    other = run(tmp_path / "b", [3.0, 2.5, 0.5], weight=2.0, **{"loss/action/raw": 1.0})
    result = same_losses.compare(one, other, 3)
    assert result.only == ("loss/action/raw",)
    assert result.first_step == "step 2 (train)" and result.sizes == {"loss/total": 0.5}
    assert str(result.found.first) == "step 2 train/loss/total: 2.0 and 2.5"
    assert result.found.num_differing == 3  # two losses, one weight
    same_losses.describe(["old", "new"], result)
    said = capsys.readouterr().out
    assert "NOT the same computation" in said and "off by up to 0.5 of its value" in said
    assert "recorded at one of them only: loss/action/raw" in said


def test_renamed_metrics_and_parameters_are_compared_under_their_new_names(tmp_path: Path) -> None:
    one = run(tmp_path / "a", [3.0], **{"loss/align/raw": 2.0})
    other = run(tmp_path / "b", [3.0], **{"loss/state/raw": 2.0})
    assert same_losses.compare(one, other, 1).only == ("loss/align/raw", "loss/state/raw")
    result = same_losses.compare(one, other, 1, {"align": "state"})
    assert result.only == () and result.found.num_differing == 0
    assert same_losses.renamed("vision.stem.0.weight", {"vision.stem": "eye"}) == "eye.0.weight"
    assert same_losses.renamed("loss/aligned", {"align": "state"}) == "loss/aligned"


@pytest.mark.skipif(
    subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, check=False).returncode
    != 0,
    reason="not a git checkout",
)
def test_a_commit_is_unpacked_beside_the_checkout_which_stays_as_it_is(tmp_path: Path) -> None:
    def status() -> bytes:
        return subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "list"], capture_output=True, check=True
        ).stdout

    before = status()
    tree = same_losses.unpack("HEAD", tmp_path / "commit")
    assert (tree / "src" / "tutti" / "types.py").is_file() and tree.is_relative_to(tmp_path)
    assert same_losses.config_at(tree, ROOT / "configs" / "smoke.yaml") == tree / "configs" / "smoke.yaml"
    assert status() == before
    assert same_losses.unpack(".", tmp_path / "none") == ROOT
    with pytest.raises(UserError, match="no-such-commit"):
        same_losses.unpack("no-such-commit", tmp_path / "x")

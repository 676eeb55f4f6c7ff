"""A step made again is the step as it was; a saved failure names where the values first go wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fixtures.squares_data import config, episodes, write
from tutti import pipeline
from tutti.config.run_config import RunConfig, load_config
from tutti.debug.replay import Scope, replay_step
from tutti.debug.replay_command import replay_saved_step, run_replay
from tutti.runs.build import build_parts
from tutti.storage.checkpoint import checkpoints, load
from tutti.training.faults.saved_steps import save_step
from tutti.training.records import read_records
from tutti.types import UserError

STEPS = 9
TINY = {
    "vision": {"stem": {"channels": [8, 16, 16], "strides": [1, 1, 2]}, "width": 16, "heads": 2},
    "language": {"width": 16, "depth": 1, "heads": 2},
    "fusion": {"width": 16, "depth": 1, "heads": 2},
    "action": {"hidden": 16},
}


def tiny(dataset: Path, **training: Any) -> RunConfig:
    own = {
        "steps": STEPS,
        "schedule": {"kind": "wsd", "warmup": 2},
        "log_every": 2,
        "checkpoints": {"every": 3, "keep": 9},
    }
    own |= {"diagnostics": {"every": 4}, "accumulation": 2, "ema": 0.9}
    return config(dataset, data={"batch_size": 4}, model=TINY, training=own | training)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    write(folder / "data", episodes(8))
    pipeline.train(tiny(folder / "data"), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(("step", "start"), [(6, 3), (5, 3), (2, 0)])
def test_a_step_comes_out_as_it_was_and_the_run_stays(trained: Path, step: int, start: int) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    found = replay_step(trained, step)
    assert found.start == start and not found.failure
    assert found.differences.num_differing == 0
    assert found.differences.num_values > 20 if step % 2 == 0 else found.differences.num_values == 0
    assert len(found.batches) == 2 and found.batches[0].window.shape == (4,)
    assert len(found.texts[1]) == 4 and "square" in found.texts[1][0]
    assert set(found.terms) == {"align", "action", "recon", "state"}
    assert found.norms["action"]["align"] == 0.0 < found.norms["action"]["action"]
    assert set(found.norms) >= {"vision", "language", "fusion", "action", "objective"}
    after = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert before == after


def test_the_norms_are_those_of_the_step(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the plain sum the action decoder gets the gradient of the action term alone, clipped."""
    found = replay_step(trained, 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "from the start, as no checkpoint before it is kept: 1 updates" in said
    assert "Steps 4 and later begin at a kept checkpoint (of 3, 6, 9)" in said
    limit = 1.0
    whole = sum(value**2 for value in found.gradient.values()) ** 0.5
    assert whole <= limit * (1 + 1e-5)
    record = next(r for r in read_records(trained) if r["step"] == 2)
    assert record["optim/clip_share"] in (0.0, 0.5, 1.0)
    only_action = found.norms["action"]["action"]
    scale = found.gradient["action"] / only_action
    assert scale <= 1 + 1e-5
    only_objective = found.gradient["objective"] / scale  # heads of different terms do not overlap
    squares = sum(value**2 for value in found.norms["objective"].values())
    assert only_objective == pytest.approx(squares**0.5, rel=1e-4)


def test_a_changed_record_is_found(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    text = (run / "records.jsonl").read_text()
    value = next(r for r in read_records(run) if r["step"] == 8 and r["kind"] == "train")["lambda/align"]
    (run / "records.jsonl").write_text(text.replace(f'"lambda/align": {value}', '"lambda/align": 0.5'))
    found = replay_step(run, 8)
    assert found.differences.num_differing == 1
    assert "lambda/align" in str(found.differences.first)
    assert not run_replay(run, 8, failure=False, pdb=False, shell=False)
    assert (run / "replays" / "step-000008" / "batch-1.png").stat().st_size > 1000


def test_the_debugger_sees_the_step_before_its_backward_pass(trained: Path) -> None:
    seen: list[Scope] = []

    def look(scope: Scope) -> None:
        seen.append(scope)
        scope.terms.total.backward(retain_graph=True)  # the graph is alive
        scope.trainer.optimizer.zero_grad()

    found = replay_step(trained, 4, look)
    (scope,) = seen
    assert scope.step == 4 and scope.batch.window.tolist() == found.batches[1].window.tolist()
    names = scope.names
    assert set(names) == {
        *("step", "batch", "features", "terms", "gradients", "model", "objective", "trainer")
    }
    assert "model.action.head.weight" in names["gradients"]["action"] or names["gradients"]["action"]
    assert not any(name.startswith("model.action") for name in names["gradients"]["align"])


def spoiled(run: Path, folder: str, where: str) -> Path:
    """A failure folder as the trainer writes it, from the run's data and last weights, spoiled."""
    config = load_config(run / "config.yaml")
    data, model, objective = build_parts(config, run)
    batch, saved = data.train.batch_at(0), load(checkpoints(run)[-1]).tensors
    if where == "data":
        batch.actions[1, 2, 0] = float("nan")
    if where == "weights":
        name = next(name for name in saved["model"] if name.startswith("fusion") and "norm" in name)
        saved["model"][name].fill_(float("inf"))
    model.load_state_dict(saved["model"])
    objective.load_state_dict(saved["objective"])
    about = {"step": 4, "term": "action", "message": "Step 4: nan."}
    modules = {"model": model, "objective": objective}
    save_step(run / "failures" / folder / "failure.json", about, [batch], modules)
    return run / "failures" / folder


def test_a_nan_in_the_data_is_named_with_its_window_and_the_module_it_reaches_first(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    folder = spoiled(run, "step-000004", "data")
    found = replay_saved_step(folder)
    window = found.batches[0].window.tolist()[1]
    assert found.non_finite["inputs"] == [f"batch.actions[1, 2, 0] is nan, in window {window}; 1 such"]
    assert found.non_finite["terms"] == ["action"] and not found.succeeded
    assert found.non_finite["module"] == ["model.action (RegressionDecoder), output (4, 4, 3)"]
    assert {"weights", "gradient"}.isdisjoint(found.non_finite)
    assert not run_replay(run, None, failure=True, pdb=False, shell=False)
    assert f"not finite in the data: batch.actions[1, 2, 0] is nan, in window {window}" in (
        capsys.readouterr().out
    )


def test_weights_that_are_not_finite_name_the_module_behind_them(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    found = replay_saved_step(spoiled(run, "step-000005", "weights")).non_finite
    (weight,) = found["weights"]
    assert weight.startswith("model.fusion") and "inputs" not in found
    assert found["module"][0].startswith(weight.rsplit(".", 1)[0])


@pytest.mark.parametrize(("step", "failure"), [(None, False), (3, True)])
def test_which_step_must_be_said_once(trained: Path, step: int | None, failure: bool) -> None:
    with pytest.raises(UserError, match="which step"):
        run_replay(trained, step, failure=failure, pdb=False, shell=False)


def test_what_is_not_there_is_named(trained: Path) -> None:
    with pytest.raises(UserError, match=rf"--step is 10; the run has steps 1 to {STEPS}"):
        replay_step(trained, 10)
    with pytest.raises(UserError, match="nothing is saved in failures"):
        run_replay(trained, None, failure=True, pdb=False, shell=False)
    with pytest.raises(UserError, match=r"step-000077: no saved step here"):
        replay_saved_step(trained / "failures" / "step-000077")

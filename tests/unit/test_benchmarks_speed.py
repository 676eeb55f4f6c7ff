"""The benchmarks of speed and memory: the same updates in both loops, costs and errors by hand."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tutti.config import RunConfig, load_config
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

checkpoint_cost: Any = importlib.import_module("checkpoint_cost")
memory: Any = importlib.import_module("memory")
memory_cell: Any = importlib.import_module("memory_cell")
plain_loop: Any = importlib.import_module("plain_loop")
plan_check: Any = importlib.import_module("plan_check")
recorded: Any = importlib.import_module("recorded")
timing: Any = importlib.import_module("timing")

TINY = (
    *("data.batch_size=4", "data.image_size=16", "training.threads=1", "training.device=cpu"),
    *("model.vision.stem.channels=[8,8,8]", "model.vision.width=16", "model.language.width=16"),
    *("model.fusion.width=16", "model.fusion.depth=1", "model.action.hidden=16"),
)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(ROOT / "configs" / "demo.yaml", TINY)


@pytest.fixture(scope="module")
def data(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded.synthetic_run(tmp_path_factory.mktemp("data"), config, per_task=1, length=30)


@pytest.mark.parametrize(
    "changes", [{}, {"accumulation": 2, "clip_norm": 0.1}, {"ema": "off", "clip_norm": "off"}]
)
def test_the_engine_and_the_plain_loop_make_the_same_updates(
    changes: dict[str, Any], config: RunConfig, data: Path, tmp_path: Path
) -> None:
    own = timing.with_training(config, **changes)
    totals = plain_loop.require_same_updates(own, data, tmp_path, 3)
    assert len(set(totals)) == 3


def test_a_loop_that_does_something_else_is_noticed(
    config: RunConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = plain_loop.PlainLoop.step

    def other(loop: Any) -> None:
        step(loop)
        loop.parameters[0].data.add_(1e-3)

    monkeypatch.setattr(plain_loop.PlainLoop, "step", other)
    with pytest.raises(UserError, match="step 2: the engine's total"):
        plain_loop.require_same_updates(config, data, tmp_path, 2)


def test_costs_are_taken_within_each_round_and_looks_spread_over_the_cadence() -> None:
    times = {
        plain_loop.PLAIN: [10.0, 100.0],
        plain_loop.ENGINE: [11.0, 110.0],
        plain_loop.LOOKING: [31.0, 310.0],
    }
    found = plain_loop.costs(times, every=100)
    assert found["without diagnostics"].median == pytest.approx(0.1)
    assert found["with diagnostics"].median == pytest.approx(0.1 + 2.0 / 100)
    assert plain_loop.costs(times, every=0)["with diagnostics"].median == pytest.approx(0.1)
    assert [row[-1] for row in plain_loop.cost_table(found).rows] == ["FAIL", "FAIL"]


def test_time_is_predicted_from_the_line_through_two_runs_of_the_same_round() -> None:
    work = {"a": 10.0, "b": 30.0, "c": 60.0}
    # 2 FLOPs per ms and 2 ms beside, then half as fast
    times = {"a": [7.0, 14.0], "b": [17.0, 34.0], "c": [40.0, 50.0]}
    assert plan_check.calibrated((10.0, 30.0), (7.0, 17.0)) == (2.0, 2.0)
    assert plan_check.calibrated((10.0, 30.0), (1.0, 4.0)) == (8.0, 0.0)  # no overhead below 0
    assert plan_check.predictions(work, times, ("a", "b")) == {"c": [32.0, 64.0]}


def test_cells_cross_presets_batches_and_options() -> None:
    found = memory.cells(["tiny", "base"], ["fp32", "bf16"])
    assert [key[:2] for key in found] == [("tiny", 8)] * 2 + [("tiny", 32)] * 2 + [("base", 2)] * 2
    assert found["tiny", 8, "bf16"].load().training.precision == "bf16"
    assert found["base", 2, "fp32"].load().model.size == "base"


def test_memory_errors_are_against_live_tensors_and_the_process() -> None:
    measured = memory_cell.Measured(live=100_000_000, process=125_000_000)
    (row,) = memory.memory_table({("tiny", 8, "fp32"): (110_000_000, measured)}).rows
    assert row == ("tiny", "8", "fp32", "110.0", "100.0", "+10.0 %", "125.0", "-12.0 %")


def test_every_mode_of_saving_is_timed_and_its_checkpoint_is_there(
    config: RunConfig, data: Path, tmp_path: Path
) -> None:
    found = checkpoint_cost.measure(config, data, tmp_path, rounds=2, steps=1)
    assert list(found) == list(checkpoint_cost.MODES)
    for mode, one in found.items():
        assert len(one["held"]) == len(one["written"]) == 2 and one["bytes"][0] > 10_000
        assert all(0 < held <= written for held, written in zip(one["held"], one["written"], strict=True))
        folders = sorted((tmp_path / mode.replace(" ", "-") / "checkpoints").glob("step-*"))
        assert len(folders) == 1 and (folders[0] / "shards").is_dir() == mode.startswith("sharded")
    table = checkpoint_cost.table("tiny", {"one": {"held": [1.0, 3.0], "written": [10.0], "bytes": [2e6]}})
    assert table.rows == (("one", "2.0", "2", "2 - 2", "10", "10 - 10"),)

"""The whole pipeline at its smallest: it runs, keeps what is done, and repeats to the bit after kill -9."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.processes import Command
from tutti import pipeline
from tutti.config.run_config import RunConfig, load_config
from tutti.data.formats.lerobot.reader import LeRobotStore
from tutti.runs.build import describe_model
from tutti.runs.folder import RunFolder
from tutti.serving.policy import Policy
from tutti.types import UserError

pytestmark = [pytest.mark.slow, pytest.mark.simulation]

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
LIMIT = 240.0
SHORT = ("evaluation.tasks=[faucet-open]", "evaluation.max_decisions=6")
"""Fewer and shorter rollouts than those of the smoke run, whose time mostly goes into them."""


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(SMOKE, SHORT)


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has interrupted, made in this process, so that every shape is checked."""
    return pipeline.demo(config, tmp_path_factory.mktemp("runs") / "smoke")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses(run: Path) -> list[dict[str, Any]]:
    """The records, without what the clock says."""
    lines = (json.loads(line) for line in (run / "records.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def start(folder: Path, **environment: str) -> Command:
    options = ("--config", str(SMOKE), "--run", str(folder))
    return Command(folder.parent, "demo", *options, *SHORT, **environment)


def stop_at(folder: Path, pattern: str, how: signal.Signals) -> tuple[int, str]:
    """Runs the demo until a file of this pattern appears, then sends the signal."""
    return start(folder).stop_at(folder, pattern, how, LIMIT)


def test_every_stage_leaves_what_it_promises(run: Path, config: RunConfig, tmp_path: Path) -> None:
    for name in (
        *("config.yaml", "stages.json", "dataset/meta/info.json", "recording.json", "records.jsonl"),
        *("first_batch.png", "model.json", "data.json", "data_content.json", "data_findings.json"),
        "checkpoints/step-000020/model.safetensors",
        *("evaluation/results.json", "evaluation/open_loop.json", "evaluation/videos/index.json"),
        *("report.html", "summary.json"),
    ):
        assert (run / name).is_file(), name
    assert not (run / "recording").exists()
    shutil.copytree(run / "checkpoints" / "step-000020", tmp_path / "alone")  # it acts without its run
    assert Policy.load(tmp_path / "alone").spec.horizon == config.data.horizon
    store = LeRobotStore(run / "dataset")
    assert len(store.episodes) == 6
    assert store.spec.fps == config.record.spec.fps
    assert store.spec.views == tuple(f"observation.images.{view}" for view in config.record.spec.views)


def test_summary_holds_what_docs_summary_promises(run: Path, config: RunConfig) -> None:
    summary = read(run / "summary.json")
    documented = (ROOT / "docs" / "reference" / "summary.md").read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in documented for key in summary)
    assert {task: n for task, (_, n) in summary["success"].items()} == {"faucet-open": 2}
    assert set(summary["controls"]) == {"wrong_instruction", "no_image", "noop", "expert"}
    assert list(summary["stage_seconds"]) == ["record", "train", "evaluate", "report"]
    assert summary["seconds"] == pytest.approx(sum(summary["stage_seconds"].values()), abs=0.1)
    assert RunConfig.model_validate(summary["config"]) == config
    assert summary["machine"]["cores"] >= 1
    assert {"python", "torch", "mujoco"} <= set(summary["versions"])


def test_finished_run_is_kept_whole(run: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    made = [path for name in ("dataset", "checkpoints", "evaluation") for path in (run / name).rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in made}
    pipeline.demo(config, run)
    assert {path: path.stat().st_mtime_ns for path in made} == before
    said = capsys.readouterr().out
    assert all(f"{stage}: done before" in said for stage in ("record", "train", "evaluate"))
    with pytest.raises(UserError, match=r"training\.steps: 20 -> 30"):
        pipeline.demo(load_config(SMOKE, ["training.steps=30", *SHORT]), run)


def test_named_data_need_neither_a_recording_nor_a_simulator(run: Path, tmp_path: Path) -> None:
    sources = f"data.sources=[{{path: {run / 'dataset'}}}]"
    short = ("training.steps=3", "training.schedule.warmup=1", "evaluation.suite=none")
    folder = tmp_path / "run"
    assert pipeline.train(load_config(SMOKE, [sources, *short]), folder).name == "step-000003"
    pipeline.evaluate(folder)
    pipeline.report(folder)
    assert read(folder / "evaluation" / "open_loop.json")["overall"]["windows"] > 0
    assert not (folder / "evaluation" / "results.json").exists()
    summary = read(folder / "summary.json")
    assert summary["success"] == {} and summary["open_loop"]["overall"]["windows"] > 0
    page = (folder / "report.html").read_text()
    assert "evaluation.suite is none" in page
    assert not re.search(r"[0-9a-f]{70}", re.sub(r'"data:[^"]*"', "", page))  # no file of digests is printed
    described, trained = describe_model(load_config(SMOKE, [sources])), read(run / "model.json")["modules"]
    assert [module.parameters for module in described.modules] == [one["parameters"] for one in trained]


def test_training_without_data_says_what_to_do(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'record' has not run\. Record first"):
        pipeline.train(config, tmp_path / "run")


@pytest.mark.timeout(900)
def test_kills_in_every_stage_change_nothing(run: Path, tmp_path: Path) -> None:
    """kill -9 while recording, writing the data set and evaluating; Ctrl-C while training, whose kill -9 is
    in test_resume.py."""
    folder = tmp_path / "smoke"
    assert stop_at(folder, "recording/*/*.npz", signal.SIGKILL)[0] == -signal.SIGKILL
    assert stop_at(folder, ".partial-dataset", signal.SIGKILL)[0] == -signal.SIGKILL
    code, said = stop_at(folder, "checkpoints/step-000010", signal.SIGINT)
    assert (code, "run the same command again to continue" in said) == (130, True), said
    assert stop_at(folder, "evaluation/*/*/*.json", signal.SIGKILL)[0] == -signal.SIGKILL
    code, said = start(folder).finish(LIMIT)
    assert code == 0, said
    assert "record: done before" in said
    assert "evaluate: goes on: it was interrupted" in said
    assert hashes(folder / "dataset") == hashes(run / "dataset")
    weights = "checkpoints/step-000020"
    ours, theirs = hashes(folder / weights), hashes(run / weights)
    # state.json holds seconds; in rng.pt Python's own generator has been drawn from by beartype in `run`.
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"state.json", "rng.pt"}
    first, second = (torch.load(there / weights / "rng.pt", weights_only=True) for there in (folder, run))
    assert torch.equal(first["torch"], second["torch"])
    assert first["numpy"] == second["numpy"]
    assert losses(folder) == losses(run)
    assert hashes(folder / "evaluation" / "policy") == hashes(run / "evaluation" / "policy")
    assert hashes(folder / "evaluation" / "videos").keys() == hashes(run / "evaluation" / "videos").keys()
    summary, expected = read(folder / "summary.json"), read(run / "summary.json")
    for key in ("success", "mean", "controls", "verdicts", "open_loop"):
        assert summary[key] == expected[key]
    assert RunFolder(folder).seconds["record"] > 0


def test_no_egl_is_a_one_screen_error_with_the_cure(tmp_path: Path) -> None:
    code, said = start(tmp_path / "run", __EGL_VENDOR_LIBRARY_DIRS=str(tmp_path)).finish(LIMIT)
    assert code == 2, said
    assert "libegl1 libgl1-mesa-dri" in said and "Traceback" not in said
    assert len(said.splitlines()) < 24

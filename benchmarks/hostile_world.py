"""The sound folders that benchmarks/hostile_folders.py spoils: a run, its export and a study, all tiny.

Nothing is invented but the success rates, since no simulator plays here.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from damaged_sets import write_sound
from PIL import Image

from tutti import pipeline
from tutti.config.run_config import RunConfig, build_config, to_yaml
from tutti.debug.probe import probe_checkpoint
from tutti.evaluation.closed_loop.results import EvaluationProtocol, EvaluationResult
from tutti.evaluation.closed_loop.rollouts import Rollout
from tutti.report.inputs import VIDEOS
from tutti.runs.build import build_training
from tutti.serving.export import export_policy
from tutti.storage.files import write_json
from tutti.studies.cells import RESULT, Cell, Trained
from tutti.studies.compare import PLAN, PLANS, Plan
from tutti.studies.config import StudyConfig, study_yaml
from tutti.studies.costs import StepCost
from tutti.training.faults.saved_steps import save_step

CONFIG: dict[str, Any] = {
    "name": "sound",
    "data": {"horizon": 4, "batch_size": 2, "image_size": 16, "prefetch": 0, "validation_fraction": 0.34},
    "model": {
        "vision": {"stem": {"channels": [8, 8], "strides": [2, 2]}, "width": 8, "heads": 1, "depth": 1},
        "language": {"width": 8, "depth": 1, "heads": 1},
        "fusion": {"width": 8, "depth": 1, "heads": 1},
        "action": {"hidden": 8},
    },
    "objective": {"state": {"offsets": [1], "hidden": 8}},
    "training": {
        "steps": 4,
        "threads": 1,
        "device": "cpu",
        "schedule": {"kind": "wsd", "warmup": 1},
        "log_every": 1,
        "checkpoints": {"every": 2, "keep": 9},
        "ema": 0.9,
        "diagnostics": {"every": 0},
    },
    "evaluation": {"suite": "none"},
}
STEP = "step-000002"
"""The only checkpoint that is left, so that a training goes on from it."""
TASKS = ("reach", "push")
SECRET = b'{"my own": "secret"}\n'
"""The content of files outside of the folders, which nobody may read."""


def build(home: Path) -> None:
    """Makes data/, run/, export/, study/ and mine.yaml, the user's own config, in `home`."""
    write_sound(home / "data", "image")
    data = {**CONFIG["data"], "sources": [{"path": str(home / "data")}]}
    config = build_config({**CONFIG, "data": data}, "the sound run")
    (home / "mine.yaml").write_text(to_yaml(config))
    run = home / "run"
    pipeline.train(config, run)
    export_policy(run, home / "export")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    pipeline.evaluate(run)
    probe_checkpoint(run)
    _save_failure(config, run)
    write_json(run / "evaluation" / "results.json", _evaluation().to_dict())
    _write_videos(run)
    write_json(run / "recording.json", {"seeds": [1, 9], "tries": {"reach": 5}, "successes": {"reach": 4}})
    pipeline.report(run)
    _write_study(home / "study", config)


def _save_failure(config: RunConfig, run: Path) -> None:
    """A step saved for replay, as a training that met NaN leaves it."""
    built = build_training(config, run, output=run)
    batches = [built.data.train.batch_at(2)]
    modules = {"model": built.trainer.model, "objective": built.trainer.objective}
    about = {"step": 3, "term": "action", "value": "nan", "message": "Step 3: the loss term 'action' is nan."}
    save_step(run / "failures" / "step-000003" / "failure.json", about, batches, modules)


def _evaluation() -> EvaluationResult:
    def rollout(task: str, seed: int) -> Rollout:
        numbers = {"decisions": 3, "queries": 1, "chunk": 4, "start": "s", "identity": "i"}
        return Rollout(
            task=task,
            condition="policy",
            seed=seed,
            instruction=f"do {task}",
            success=seed % 2 == 0,
            actions=np.zeros((3, 4), np.float32),
            **numbers,
        )

    protocol = EvaluationProtocol(
        suite="metaworld-8",
        split="held_out",
        seed_first=0,
        seed_last=3,
        chunk=4,
        executed=4,
        max_decisions=100,
        distinct_starts=8,
        environment="metaworld-8",
    )
    rollouts = [rollout(task, seed) for task in TASKS for seed in range(4)]
    return EvaluationResult.of(rollouts, protocol, resumed=0, seconds=1.0)


def _write_videos(run: Path) -> None:
    folder = run / VIDEOS
    folder.mkdir()
    (folder / "reach-0.mp4").write_bytes(bytes(100))
    entry = {"task": "reach", "seed": 0, "success": True, "decisions": 3, "instruction": "do reach"}
    write_json(folder / "index.json", {"videos": [{**entry, "condition": "policy", "file": "reach-0.mp4"}]})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(run / "probes" / "occlusion.png")


def _write_study(folder: Path, config: RunConfig) -> None:
    """A study of two arms that has ended."""
    base = config.model_dump(mode="json", exclude={"name", "seed"})
    arms: dict[str, Any] = {"end_to_end": [], "action_only": ["strategy.kind=action_only"]}
    study = StudyConfig.model_validate(
        {"name": "sound", "base": base, "arms": arms, "baseline": "end_to_end", "seeds": 1}
    )
    cells = [
        Cell(arm=arm, level="base", seed=0, steps=4, folder=Path("cells") / arm, identity="i") for arm in arms
    ]
    costs = {arm: StepCost(flops=1e6, samples=2, parameters=1000) for arm in arms}
    plan = Plan(study=study.model_dump(mode="json"), data="d", costs=costs, cells=tuple(cells))
    write_json(folder / PLAN, PLANS.dump_python(plan, mode="json"))
    (folder / "study.yaml").write_text(study_yaml(study))
    write_json(folder / "costs.json", {})
    for cell in cells:
        result = Trained(
            arm=cell.arm,
            level="base",
            seed=0,
            steps=4,
            samples=8,
            seconds=1.0,
            parameters=1000,
            milliseconds=2.0,
            held_out={"action": 0.5},
            open_loop=0.25,
            successes={task: [1, 0, 1, 1] for task in TASKS},
            starts={task: [0, 1, 2, 3] for task in TASKS},
            protocol={"suite": "metaworld-8"},
            commit="c0",
            versions={"python": "3.11"},
            machine={"cores": 2},
            identity="i",
        )
        write_json(folder / cell.folder / RESULT, asdict(result))

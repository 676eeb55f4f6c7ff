"""A run folder as a finished run leaves it, made of invented numbers in the writers' own types."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tutti.evaluation.closed_loop.controls import verdict
from tutti.evaluation.closed_loop.results import EvaluationProtocol, EvaluationResult, score
from tutti.evaluation.closed_loop.rollouts import Condition, Rollout
from tutti.evaluation.open_loop import ActionError, GroupError, OpenLoopResult
from tutti.models.describe import Description, ModuleRow, TokenRow
from tutti.training.metrics import describe_metric

RATES = {
    "reach": 0.7,
    "push": 0.4,
    "pick-place": 0.55,
    "faucet-open": 0.95,
    "faucet-close": 1.0,
    "drawer-open": 0.9,
    "drawer-close": 1.0,
    "window-close": 1.0,
}
HOSTILE = '</script><script>alert(1)</script> "open" the <b>faucet</b> & more'
STEPS, EVERY = 3000, 20
CONFIG = """name: demo
seed: 0
record: {suite: metaworld-8, demonstrations: 50}
training: {steps: 3000, clip_norm: 1.0}
evaluation: {suite: metaworld-8, episodes: 20, weights: ema}
"""


def make_run(folder: Path, *, videos_per_task: int = 2) -> Path:
    """Everything a run leaves, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder)
    result = evaluation()
    (folder / "evaluation").mkdir()
    write_json(folder / "evaluation" / "results.json", result.to_dict())
    write_json(folder / "evaluation" / "open_loop.json", OPEN_LOOP)
    write_json(
        folder / "summary.json",
        SUMMARY
        | {"success": result.policy.counts, "controls": {c: s.counts for c, s in result.controls.items()}},
    )
    stages = {"record": 172.4, "train": 541.9, "evaluate": 138.2}
    write_json(
        folder / "stages.json",
        {n: {"seconds": s, "finished": True, "inputs": {}, "hash": "x"} for n, s in stages.items()},
    )
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    kept, tries = dict.fromkeys(RATES, 50), {task: 50 + len(task) % 4 for task in RATES}
    write_json(folder / "recording.json", {"seeds": [10000, 10052], "tries": tries, "successes": kept})
    write_json(folder / "model.json", asdict(MODEL))
    write_json(folder / "data.json", DATA)
    noise = np.random.default_rng(0).integers(0, 255, (360, 900, 3), dtype=np.uint8)
    Image.fromarray(np.clip(noise // 3 + 120, 0, 255).astype(np.uint8)).save(folder / "first_batch.png")
    write_videos(folder, result, videos_per_task)
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_records(folder: Path) -> None:
    """Training records of 3,000 steps with a validation each 200, and a last line that a kill has torn."""
    random = np.random.default_rng(1)
    lines = []
    for step in range(EVERY, STEPS + 1, EVERY):
        lines.append({"step": step, "kind": "train", **train_values(step, random)})
        if step % 100 == 0:
            lines.append({"step": step, "kind": "diagnostics", **look_values(step)})
        if step % 200 == 0:
            lines.append({"step": step, "kind": "validation", **valid_values(step, random)})
    for line in lines:
        assert all(describe_metric(name) for name in line if name not in ("step", "kind"))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "records.jsonl").write_text(text + '{"step": 3010, "loss/to', encoding="utf-8")


def train_values(step: int, random: np.random.Generator) -> dict[str, float]:
    share = step / STEPS
    raw = {
        "action": 0.05 + 0.5 * math.exp(-step / 400) + 0.012 * random.normal(),
        "align": 1.62 + 2.5 * math.exp(-step / 250) + 0.08 * random.normal(),
        "recon": 0.35 + 0.6 * math.exp(-step / 700) + 0.02 * random.normal(),
    }
    lambdas = {"action": 1.0, "align": 0.1, "recon": 0.05 * (1 + math.cos(math.pi * share))}
    norm = 0.6 + 2 * math.exp(-step / 300) + 0.15 * abs(random.normal())
    return {
        "loss/total": sum(lambdas[n] * raw[n] for n in raw),
        **{f"loss/{n}/raw": v for n, v in raw.items()},
        **{f"loss/{n}/weighted": lambdas[n] * v for n, v in raw.items()},
        **{f"lambda/{n}": v for n, v in lambdas.items()},
        "metric/align/floor": 1.6 + 0.02 * random.normal(),
        "metric/align/chance": math.log(64),
        "metric/align/above_floor": raw["align"] - 1.6,
        "metric/align/accuracy": min(1.0, 0.12 + 0.85 * (1 - math.exp(-step / 300)) + 0.02 * random.normal()),
        "metric/align/temperature": 0.07,
        "metric/recon/copy_baseline": 0.55 + 0.01 * random.normal(),
        "metric/action/first_l1": raw["action"] * 0.8,
        "optim/lr": 1e-3 * min(step / 150, 1) * (0.5 * (1 + math.cos(math.pi * share)) + 0.01),
        "optim/lr_factor": min(step / 150, 1),
        "optim/grad_norm": norm,
        "optim/grad_norm_max": norm * (1.3 + 0.5 * abs(random.normal())),
        "optim/clip_share": min(1.0, max(0.0, norm - 0.6)),
        "optim/ema_decay": min(0.999, (1 + step) / (10 + step)),
        "data/samples": 64.0 * step,
        "time/seconds": 0.18 * step,
        "time/samples_per_second": 355 + 9 * random.normal(),
        "time/data_share": 0.011 + 0.002 * abs(random.normal()),
        "time/forward_share": 0.31 + 0.01 * random.normal(),
        "time/backward_share": 0.61 + 0.01 * random.normal(),
        "time/optimizer_share": 0.06,
        "time/diagnostics_share": 0.02,
    }


def look_values(step: int) -> dict[str, float]:
    """One look of the diagnostics, without a fault."""
    random = np.random.default_rng(step)
    share = step / STEPS
    values: dict[str, float] = {}
    for part in ("vision", "language", "fusion", "action"):
        reach = ("action",) if part == "action" else ("action", "align", "recon")
        reach = tuple(term for term in reach if (term, part) != ("align", "fusion"))
        norms = {"action": 0.5, "align": 0.2 * (1.01 - share), "recon": 0.3 - 0.1 * share}
        norms = {term: norm * (0.8 + 0.4 * random.random()) * (term in reach) for term, norm in norms.items()}
        for term, norm in norms.items():
            values[f"diag/norm/{term}/{part}"] = norm
            values[f"diag/share/{term}/{part}"] = norm / sum(norms.values())
        for a, b in (("action", "align"), ("action", "recon"), ("align", "recon")):
            if a in reach and b in reach:
                values[f"diag/cosine/{a}~{b}/{part}"] = 0.3 * random.normal()
        values[f"diag/update_ratio/{part}"] = 1e-2 * (1.01 - share)
    for name, rank, limit in (("fused", 30.0, 128.0), ("readout", 9.0, 16.0)):
        values |= {f"diag/rank/{name}": rank + random.normal(), f"diag/rank_limit/{name}": limit}
    values |= {f"diag/dead/{name}": 0.02 * share for name in ("vision", "language", "fused", "readout")}
    noise = {"diag/noise_trace": 300.0, "diag/signal": 9.0, "diag/noise_scale": 33.0 + 20 * share}
    return {**values, **noise, "diag/spikes": 0.0}


def valid_values(step: int, random: np.random.Generator) -> dict[str, float]:
    action = 0.075 + 0.5 * math.exp(-step / 380) + 0.004 * random.normal()
    return {
        "valid/action": action,
        "valid/align": 1.75 + 2.4 * math.exp(-step / 260),
        "valid/recon": 0.39 + 0.6 * math.exp(-step / 700),
        "valid/total": action + 0.26,
        "valid/metric/align/accuracy": 0.9 * (1 - math.exp(-step / 300)),
        "time/validation_seconds": 2.1,
    }


@cache
def evaluation() -> EvaluationResult:
    """160 rollouts of the policy and its controls."""
    rollouts: list[Rollout] = []
    counts: dict[Condition, int] = {
        "policy": 20,
        "wrong_instruction": 20,
        "no_image": 10,
        "noop": 20,
        "expert": 20,
    }
    for condition, n in counts.items():
        for task, rate in RATES.items():
            if condition == "wrong_instruction" and not task.startswith("faucet"):
                continue
            share = {"policy": rate, "wrong_instruction": 0.0, "no_image": 0.1, "noop": 0.0, "expert": 1.0}[
                condition
            ]
            rollouts += [
                _rollout(task, condition, seed, seed - 1000 < share * n) for seed in range(1000, 1000 + n)
            ]
    verdicts = [
        found for c in ("wrong_instruction", "no_image") if (found := verdict(c, rollouts)) is not None
    ]
    return EvaluationResult(
        scores={c: score(c, [r for r in rollouts if r.condition == c]) for c in counts},
        verdicts=tuple(verdicts),
        protocol=EvaluationProtocol(
            suite="metaworld-8",
            split="held_out",
            seed_first=1000,
            seed_last=1019,
            chunk=16,
            executed=4,
            max_decisions=100,
            distinct_starts=160,
            environment="metaworld-8 3.1.1 right,left 64 repeat 4",
        ),
        rollouts=tuple(rollouts),
        resumed=0,
        seconds=131.5,
    )


def _rollout(task: str, condition: Condition, seed: int, success: bool) -> Rollout:
    return Rollout(
        task=task,
        condition=condition,
        seed=seed,
        instruction=HOSTILE if task == "faucet-open" else f"please {task.replace('-', ' the ')}",
        success=success,
        decisions=31 if success else 100,
        queries=8,
        chunk=16,
        start=f"{seed:016x}",
        identity="0" * 32,
        actions=np.zeros((1, 4), np.float32),
    )


def write_videos(folder: Path, result: EvaluationResult, per_task: int) -> None:
    """The first success and the first failure of each task, one tiny film copied under every name."""
    videos = folder / "videos"
    videos.mkdir()
    film = tiny_film(videos / "film.mp4")
    index = []
    for task in RATES:
        played = [r for r in result.rollouts if r.condition == "policy" and r.task == task]
        chosen = [next((r for r in played if r.success is wanted), None) for wanted in (True, False)]
        for rollout in [r for r in chosen if r is not None][:per_task]:
            name = f"{task}-{rollout.seed}.mp4"
            shutil.copy(film, videos / name)
            index.append(
                {
                    "task": task,
                    "seed": rollout.seed,
                    "success": rollout.success,
                    "decisions": rollout.decisions,
                    "instruction": rollout.instruction,
                    "file": name,
                    "condition": "policy",
                }
            )
    film.unlink()
    write_json(videos / "index.json", {"videos": index})


def tiny_film(path: Path) -> Path:
    """Twelve frames of a disc that wanders over two views side by side, H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 256, 128, "yuv420p"
        rows, columns = np.mgrid[0:128, 0:256]
        for time in range(12):
            frame = np.full((128, 256, 3), (188, 170, 140), np.uint8)
            for shift in (0, 128):
                disc = (rows - 70) ** 2 + (columns - shift - 20 - 7 * time) ** 2 < 150
                frame[disc] = (190, 40, 40)
            frame[:, 127:129] = 30
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


ERROR = ActionError(first=0.0612, executed=0.0731, chunk=0.1034)
SUMMARY: dict[str, object] = {
    "name": "demo",
    "seconds": 852.5,
    "stage_seconds": {"record": 172.4, "train": 541.9, "evaluate": 138.2},
    "versions": {
        "python": "3.11.9",
        "tutti-vla": "0.1.0",
        "torch": "2.13.0",
        "metaworld": "3.1.1",
        "mujoco": "3.3.0",
    },
    "machine": {"system": "Linux-6.1-x86_64", "processor": "Some CPU @ 2.4 GHz", "cores": 2},
    "commit": "0123456789abcdef0123456789abcdef01234567",
}
OPEN_LOOP: dict[str, object] = OpenLoopResult(
    overall=GroupError(name="all", windows=2260, normalised=ERROR, data=ERROR, swap=2.3),
    groups=tuple(
        GroupError(
            name=task, windows=280, normalised=ERROR, data=ERROR, swap=5.2 if "faucet" in task else 1.1
        )
        for task in sorted(RATES)
    ),
    executed=4,
    chunk=16,
).to_dict()
MODEL = Description(
    modules=(
        ModuleRow(name="model", depth=0, parameters=1_842_311, flops=92_300_000, share=1.0),
        ModuleRow(name="vision", depth=1, parameters=702_000, flops=60_100_000, share=0.651),
        ModuleRow(name="vision.blocks", depth=2, parameters=640_000, flops=52_000_000, share=0.563),
        ModuleRow(name="language", depth=1, parameters=260_000, flops=4_100_000, share=0.044),
        ModuleRow(name="fusion", depth=1, parameters=790_000, flops=27_900_000, share=0.302),
        ModuleRow(name="action", depth=1, parameters=90_311, flops=200_000, share=0.002),
    ),
    tokens=(
        TokenRow(name="readout", tokens=1),
        TokenRow(name="state", tokens=1),
        TokenRow(name="language", tokens=12),
        TokenRow(name="vision: observation.images.right", tokens=64),
        TokenRow(name="vision: observation.images.left", tokens=64),
    ),
)
DATA: dict[str, object] = {
    "episodes": 400,
    "training_episodes": 360,
    "validation_episodes": 40,
    "frames": 22_640,
    "seconds": 1132.0,
    "training_windows": 20_372,
    "validation_windows": 2_260,
    "batches_per_epoch": 318,
    "instructions": 48,
    "vocab_size": 211,
    "text_length": 12,
    "normalization": "quantile",
    "sources": [
        {
            "name": "runs/demo/dataset",
            "fingerprint": "6f2c1a9be0d44d4e",
            "embodiment": "sawyer",
            "weight": 1.0,
            "episodes": 400,
            "frames": 22_640,
            "seconds": 1132.0,
            "shortest": 19,
            "longest": 98,
            "instructions": 48,
            "views": ["observation.images.right", "observation.images.left"],
            "stored_image_shapes": [[64, 64], [64, 64]],
        }
    ],
}

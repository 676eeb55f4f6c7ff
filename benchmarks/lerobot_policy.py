"""LeRobot loads, trains and evaluates Tutti policies: the actions of `Policy`, to the last bit.

    python benchmarks/lerobot_policy.py /path/to/python/of/lerobot [--policy FOLDER] [--task push-v3]

LeRobot's pins differ from Tutti's, so it has an environment of its own, with metaworld 3.0.0 and mujoco
3.14.0 (MUJOCO_GL says how it draws; egl where it is not set). plugins/lerobot is installed beside it, Tutti
is on its path. There

1. its own factory loads an export and processors, and acts on pictures of noise;
2. the expert of one Meta-World task is recorded in LeRobot's environment as a LeRobot data set;
3. `lerobot-train --policy.type=tutti` trains on it for 50 steps;
4. `lerobot-eval` plays the checkpoint in that task, one episode; all that the environment gave and was told
   is kept.

Here, in Tutti's environment, `Policy.actor` then sees the same episode. Writes results/lerobot_policy.json
and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results"
COUNT, TEXT = 20, "open the tap"
EPISODES, MOST, STEPS, SEED = 3, 150, 50, 1000
RAW = ("pixels", "agent_pos", "actions")
"""What an evaluation gave and was told, a file of each."""


def drive(place: Path) -> dict[str, Any]:
    """In the environment of LeRobot. Gives what was found."""
    import importlib.metadata

    import lerobot_policy_tutti
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    torch.set_num_threads(1)
    folder, data = place / "lerobot", np.load(place / "observations.npz")
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    before, after = make_pre_post_processors(config, pretrained_path=str(folder))
    views = [name for name in data.files if name.startswith("observation.images")]

    def seen(number: int) -> dict[str, Any]:
        pictures = {view: torch.from_numpy(data[view][number]).permute(2, 0, 1) / 255 for view in views}
        state = torch.from_numpy(data["state"][number])
        return before({**pictures, "observation.state": state, "task": TEXT})

    equal = sum(
        np.array_equal(
            after(policy.predict_action_chunk(seen(number)).squeeze(0)).numpy(), data["actions"][number]
        )
        for number in range(COUNT)
    )
    policy.reset()
    rows = [after(policy.select_action(seen(number))).numpy()[0] for number in range(6)]
    steps = config.n_action_steps
    expected = [data["actions"][number // steps * steps][number % steps] for number in range(6)]
    policy.save_pretrained(place / "again")
    again = type(policy).from_pretrained(place / "again")
    same = torch.equal(again.predict_action_chunk(seen(3)), policy.predict_action_chunk(seen(3)))
    first, last = train(config.input_features, config.output_features)
    return {
        "lerobot": importlib.metadata.version("lerobot"),
        "torch": torch.__version__,
        "type": policy.name,
        "plugin": lerobot_policy_tutti.__name__,
        "observations": COUNT,
        "chunks equal to the last bit": equal,
        "select_action gives their rows": np.array_equal(rows, expected),
        "saved by LeRobot and loaded again: the same": same,
        "a new policy learns one batch in 30 updates: loss": f"{first:.3f} -> {last:.3f}",
    }


def train(inputs: dict[str, Any], outputs: dict[str, Any]) -> tuple[float, float]:
    """A policy made from what LeRobot knows of a data set, on one batch. Gives its first and last loss."""
    from types import SimpleNamespace

    import pandas as pd
    import torch
    from lerobot_policy_tutti import TuttiConfig, TuttiPolicy

    torch.manual_seed(0)
    config = TuttiConfig(input_features=inputs, output_features=outputs, device="cpu", chunk_size=8)
    ends = {"min": -2.0, "max": 2.0, "mean": 0.0, "std": 1.0}
    stats = {
        key: {name: np.full(4, value) for name, value in ends.items()}
        for key in ("observation.state", "action")
    }
    tasks = pd.DataFrame({"task_index": [0]}, index=[TEXT])
    policy = TuttiPolicy(config, dataset_meta=SimpleNamespace(tasks=tasks, stats=stats, fps=20))
    batch: dict[str, Any] = {
        key: torch.rand(8, *one.shape) for key, one in inputs.items() if key != "observation.state"
    }
    batch |= {"observation.state": torch.randn(8, 4), "task": [TEXT] * 8, "action": torch.randn(8, 8, 4)}
    batch["action_is_pad"] = torch.zeros(8, 8, dtype=torch.bool)
    optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
    losses: list[float] = []
    for _ in range(30):
        loss, _ = policy.train().forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def record_expert(place: Path, task: str) -> None:
    """In the environment of LeRobot: a data set of the task's expert, with the pictures of evaluations."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.envs.metaworld import MetaworldEnv

    env = MetaworldEnv(task=task, obs_type="pixels_agent_pos")
    env.reset(seed=0)
    numbers = {"dtype": "float32", "shape": (4,), "names": None}
    picture = {"dtype": "image", "shape": (480, 480, 3), "names": ["height", "width", "channels"]}
    features = {"observation.image": picture, "observation.state": numbers, "action": numbers}
    made = LeRobotDataset.create("tutti/expert", 80, features, root=place / "data", use_videos=False)
    for number in range(EPISODES):
        assert env._env is not None
        raw, _ = env._env.reset(seed=number)
        for _ in range(MOST):
            seen = env._format_raw_obs(raw)
            action = np.clip(env.expert_policy.get_action(raw), -1, 1).astype(np.float32)
            frame = {"observation.image": seen["pixels"], "action": action, "task": env.task_description}
            made.add_frame(frame | {"observation.state": seen["agent_pos"].astype(np.float32)})
            raw, *_, info = env._env.step(action)
            if info["success"]:
                break
        made.save_episode()
    made.finalize()
    (place / "task.txt").write_text(env.task_description)
    env.close()


def evaluate(place: Path, arguments: list[str]) -> None:
    """In the environment of LeRobot: `lerobot-eval` itself, and what its Meta-World gave and was told."""
    import torch
    from lerobot.envs.metaworld import MetaworldEnv
    from lerobot.scripts import lerobot_eval

    torch.set_num_threads(1)
    kept: dict[str, list[Any]] = {name: [] for name in RAW}
    step, reset, now = MetaworldEnv.step, MetaworldEnv.reset, dict[str, Any]()

    def reset_kept(self: Any, *given: Any, **named: Any) -> Any:
        seen, about = reset(self, *given, **named)
        now.update(seen)
        return seen, about

    def step_kept(self: Any, action: np.ndarray) -> Any:
        for name in ("pixels", "agent_pos"):
            kept[name].append(now[name].copy())
        kept["actions"].append(action.copy())
        found = step(self, action)
        now.update(found[0])
        return found

    MetaworldEnv.reset, MetaworldEnv.step = reset_kept, step_kept
    sys.argv = ["lerobot-eval", *arguments]
    lerobot_eval.main()
    for name, values in kept.items():
        np.save(place / f"{name}.npy", np.stack(values))


def play(python: Path, place: Path, task: str, environment: dict[str, str]) -> dict[str, Any]:
    """Data set, training and evaluation by LeRobot, and the same episode by Tutti."""
    from random_policy import write_policy
    from safetensors.torch import load_file

    from tutti.serving.policy import Policy
    from tutti.storage.manifest import CONFIG, NORMALIZER, SPEC, TOKENIZER

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(one) for one in command], stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
        return done.stdout

    run(python, __file__, "--record", place, "--task", task)
    run(
        python.parent / "lerobot-train",
        *("--policy.type=tutti", "--policy.device=cpu", "--policy.push_to_hub=false"),
        *("--dataset.repo_id=tutti/expert", f"--dataset.root={place / 'data'}"),
        *(f"--steps={STEPS}", "--batch_size=8", "--num_workers=0", "--log_freq=10"),
        *(f"--save_freq={STEPS}", f"--output_dir={place / 'trained'}", "--seed=0"),
    )
    trained = place / f"trained/checkpoints/{STEPS:06d}/pretrained_model"
    arguments = [f"--policy.path={trained}", "--env.type=metaworld", f"--env.task={task}", f"--seed={SEED}"]
    arguments += ["--eval.n_episodes=1", "--eval.batch_size=1", "--eval.use_async_envs=false"]
    arguments += ["--policy.device=cpu", f"--output_dir={place / 'evaluated'}"]
    run(python, __file__, "--evaluate", place, *arguments)
    said = json.loads((place / "evaluated/eval_info.json").read_text())["overall"]
    config = json.loads((trained / "config.json").read_text())
    weights = load_file(trained / "model.safetensors")
    texts = {SPEC: config["spec"], NORMALIZER: config["normalizer"], TOKENIZER: config["tokenizer"]}
    texts[CONFIG] = json.dumps({"model": json.loads(config["model"])})
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    policy = Policy.load(write_policy(place / "ours", weights, texts), "raw", warn=False)
    raw = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in RAW}
    equal, text = 0, (place / "task.txt").read_text()
    with policy.actor(config["n_action_steps"]) as actor:
        for picture, state, told in zip(*(raw[name] for name in RAW), strict=True):
            seen = {"observation.image": picture, "observation.state": state, "task": text}
            equal += int(np.array_equal(actor.act(seen), told))
    return {
        "Meta-World task": task,
        "data set, frames of the expert": json.loads((place / "data/meta/info.json").read_text())[
            "total_frames"
        ],
        "lerobot-train --policy.type=tutti, steps": STEPS,
        "lerobot-eval, episodes": said["n_episodes"],
        "lerobot-eval, success": f"{said['pc_success']:.0f} %",
        "lerobot-eval, control steps": len(raw["actions"]),
        "control steps whose action equals that of Policy.actor to the last bit": equal,
    }


def measure(python: Path, given: Path | None, task: str) -> dict[str, Any]:
    """Exports the policy and lets LeRobot act, train and evaluate."""
    import torch
    from random_policy import observations, random_policy

    from tutti.serving.exports.lerobot import export_to_lerobot
    from tutti.serving.policy import Policy

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = given or random_policy(place / "step-000001")
        export_to_lerobot(folder, place / "lerobot", "raw")
        policy = Policy.load(folder, "raw", warn=False)
        seen = observations(policy.spec, 2 * COUNT)[::2]
        chunks = [policy.predict(one["images"], one["state"], TEXT) for one in seen]
        pictures = {
            f"observation.images.{view}": np.stack([one["images"][view] for one in seen])
            for view in policy.spec.views
        }
        state = np.stack([one["state"] for one in seen])
        np.savez(place / "observations.npz", state=state, actions=np.stack(chunks), **pictures)
        plugin = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(place / "site")]
        subprocess.run([str(python), *plugin, str(HERE.parent / "plugins/lerobot")], check=True)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{HERE.parent / 'src'}:{place / 'site'}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment.setdefault("MUJOCO_GL", "egl")
        command = [str(python), __file__, "--drive", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1]) | play(python, place, task, environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", type=Path, nargs="?")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--task", default="push-v3")
    for step in ("--drive", "--record", "--evaluate"):
        parser.add_argument(step, type=Path, help=argparse.SUPPRESS)
    options, further = parser.parse_known_args()
    if options.drive:
        print(json.dumps(drive(options.drive)))
        return
    if options.record:
        record_expert(options.record, options.task)
        return
    if options.evaluate:
        evaluate(options.evaluate, further)
        return
    found = measure(options.python, options.policy, options.task)
    (RESULTS / "lerobot_policy.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = "".join(f"| {name} | {value} |\n" for name, value in found.items())
    (RESULTS / "lerobot_policy.md").write_text(f"| | |\n|---|---|\n{rows}")
    print(rows)


if __name__ == "__main__":
    main()

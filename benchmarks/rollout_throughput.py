"""What makes rollouts fast, mechanism by mechanism, on the same pixels, flags and actions; and their memory.

python benchmarks/rollout_throughput.py --run runs/demo [--suite NAME]
python benchmarks/rollout_throughput.py --run runs/demo --memory 1000
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tables import RESULTS, Table, prints_user_errors, publish

from tutti.evaluation.closed_loop.controls import plan
from tutti.evaluation.closed_loop.evaluate import evaluate, one_torch_thread
from tutti.evaluation.closed_loop.rollouts import PlannedRollout, RolloutPolicy
from tutti.evaluation.config import EvaluationConfig
from tutti.runs.folder import RunFolder
from tutti.runs.provenance import circumstances, made_with
from tutti.serving.contents import read_spec
from tutti.serving.factory import CheckpointPolicyFactory
from tutti.storage.checkpoint import listed
from tutti.suites.environment import Suite
from tutti.suites.metaworld.rendering import load_mujoco
from tutti.suites.metaworld.task import MetaWorldTask
from tutti.suites.registry import CustomSuite, find_suite, fit_suite, robot_of
from tutti.types import UserError

TOLERANCE = 2e-6
"""By how much actions of a batch may differ from those of one row."""
Draw = Callable[[Any], np.ndarray]
Found = dict[PlannedRollout, tuple[bool, np.ndarray]]


def straightforward(
    policy: RolloutPolicy,
    config: EvaluationConfig,
    suite: Suite,
    planned: Sequence[PlannedRollout],
    draw: Draw,
) -> Found:
    """The usual loop: one episode after the other, every step drawn, one row a call."""
    found: Found = {}
    limit, task, simulation = config.limit(suite), "", None
    for one in planned:
        if task != one.task:
            if simulation is not None:
                simulation.close()
            task, simulation = one.task, suite.make(one.task)
        assert simulation is not None
        simulation.reset(one.seed)
        actions: list[np.ndarray] = []
        queue: list[np.ndarray] = []
        while len(actions) < limit and not simulation.success:
            pictures = dict(zip(suite.views, draw(simulation), strict=True))
            if not queue:
                queue = list(policy.predict(pictures, simulation.state, one.instruction))
                del queue[config.actions_per_query :]
            actions.append(queue.pop(0))
            simulation.step(actions[-1])
        found[one] = (bool(simulation.success), np.array(actions))
    if simulation is not None:
        simulation.close()
    return found


@dataclass(frozen=True)
class UsualPictures:
    """What gymnasium draws: mujoco's Renderer with its default flags, of as many pixels."""

    size: int

    def __call__(self, simulation: MetaWorldTask) -> np.ndarray:
        env: Any = simulation._env
        kept = env.__dict__.setdefault("_usual_renderer", [])
        if not kept:
            kept.append(load_mujoco().Renderer(env.model, self.size, self.size))
        kept[0].update_scene(env.data, camera="corner2")
        picture = kept[0].render()
        return np.stack([picture] * len(simulation.views))


def measured(run: Callable[[], Found]) -> tuple[Found, dict[str, float]]:
    """What it gives, with wall seconds and CPU seconds of this process and those that have ended."""
    own, wall = _cpu(), time.perf_counter()
    found = run()
    return found, {"wall": time.perf_counter() - wall, "cpu": _cpu() - own}


def _cpu() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def megabytes() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def equal(one: Found, other: Found) -> float:
    """The largest difference of an action. Raises: UserError where a rollout ended otherwise."""
    largest = 0.0
    for key, (success, actions) in one.items():
        other_success, others = other[key]
        if success != other_success or actions.shape != others.shape:
            raise UserError(f"{key.task}, seed {key.seed}: this mechanism plays another rollout.")
        largest = max([largest, float(np.abs(actions - others).max(initial=0.0))])
    if largest > TOLERANCE:
        raise UserError(f"actions differ by {largest:.1e}, expected at most {TOLERANCE:.0e}.")
    return largest


def remember(
    policy: CheckpointPolicyFactory, config: EvaluationConfig, suite: Suite, count: int
) -> list[Any]:
    """Memory of this process after each 100 of `count` rollouts, through batches."""
    tasks = len(suite.tasks) if config.tasks == "suite" else len(config.tasks)
    curve: list[Any] = []

    def note(done: int, total: int) -> None:
        if done % 100 == 0 and done and (not curve or curve[-1][0] != done):
            curve.append([done, round(megabytes(), 1)])

    settings = config.model_copy(update={"episodes": -(-count // tasks)})
    evaluate(policy, settings, suite, progress=note)
    return curve


@prints_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Plays, compares, prints and publishes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a trained run")
    parser.add_argument("--suite", help="by default that of the run's evaluation")
    parser.add_argument("--episodes", type=int, default=10, help="rollouts of each task")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batched call")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", type=int, default=0, help="only the memory of so many rollouts")
    parser.add_argument("--usual", action="store_true", help="Meta-World: also mujoco's Renderer by default")
    parser.add_argument("--output", type=Path, help="without suffix")
    given = parser.parse_args(arguments)
    trust = True  # the caller's own run
    policy = CheckpointPolicyFactory(given.run, trust_code=trust)
    config = RunFolder(given.run, new=False, trust_code=trust).config().evaluation
    kind: str | CustomSuite = given.suite or config.suite
    spec = read_spec(listed(policy.path))
    suite = fit_suite(find_suite(kind), spec)
    policy = replace(policy, embodiment=robot_of(spec, suite))
    plain = {"episodes": given.episodes, "controls": config.controls.none(), "workers": 1, "batch_size": 1}
    config = config.model_copy(update={**plain, "max_decisions": config.limit(suite)})
    made = circumstances()
    many = {"batch_size": given.batch, "workers": given.workers}
    if given.memory:
        curve = remember(policy, config.model_copy(update=many), suite, given.memory)
        return _publish_memory(given, suite, curve, made)
    planned = plan(config, suite)

    def ours(**changes: Any) -> Found:
        result = evaluate(policy, config.model_copy(update=changes), suite)
        keys = {(one.task, one.seed): one for one in planned}
        return {keys[r.task, r.seed]: (r.success, r.actions) for r in result.rollouts}

    def usual(draw: Draw) -> Found:
        with one_torch_thread():
            return straightforward(policy(), config, suite, planned, draw)

    arms: dict[str, Callable[[], Found]] = {
        "the straightforward loop": lambda: usual(lambda simulation: simulation.render()),
        "+ pictures where the policy looks": ours,
        f"+ {given.workers} workers": lambda: ours(workers=given.workers),
        f"+ batches of {given.batch}, {given.workers} simulate": lambda: ours(**many),
    }
    reference, results = None, []
    for name, arm in arms.items():
        found, cost = measured(arm)
        reference = reference or found
        difference = equal(reference, found)
        results.append({"mechanism": name, **cost, "largest_difference": difference})
    if given.usual:
        with closing(suite.make(suite.tasks[0])) as simulation:
            if not isinstance(simulation, MetaWorldTask):
                raise UserError("--usual draws Meta-World by mujoco's Renderer; name a suite of Meta-World.")
        _, cost = measured(lambda: usual(UsualPictures(suite.image_size)))
        results.insert(
            0, {"mechanism": "the usual loop, mujoco's Renderer", **cost, "largest_difference": None}
        )
    _publish(given, suite, len(planned), results, made)
    return 0


def _publish(
    given: argparse.Namespace, suite: Suite, count: int, results: list[Any], made: dict[str, Any]
) -> None:
    last, rows = results[-1], []
    for one in results:
        same = "-" if one["largest_difference"] is None else f"{one['largest_difference']:.1e}"
        times = (f"{one[key]:.1f}" for key in ("wall", "cpu"))
        ratios = (f"{one[key] / last[key]:.2f}" for key in ("wall", "cpu"))
        rows.append((one["mechanism"], *times, *ratios, same))
    table = Table(
        title=f"{count} rollouts of {suite.name}",
        heads=("mechanism", "wall s", "CPU s", "wall, last = 1", "CPU, last = 1", "largest difference"),
        rows=tuple(rows),
    )
    notes = [
        "Each line has all that stands above it, the same starts, sentences, pictures and limit; rollouts "
        "are compared one by one: the same end at the same step, and the largest difference of an action. "
        "The usual loop has other pictures, so nothing is compared with it.",
        made_with(made),
    ]
    output = given.output or RESULTS / "rollout_throughput"
    publish(output, "benchmarks/rollout_throughput", [table], notes, {**made, "mechanisms": results})


def _publish_memory(given: argparse.Namespace, suite: Suite, curve: list[Any], made: dict[str, Any]) -> int:
    table = Table(
        title=f"Memory of the process that predicts, {suite.name}, batches of {given.batch}",
        heads=("rollouts", "MB"),
        rows=tuple((str(done), f"{size:.1f}") for done, size in curve),
    )
    growth = curve[-1][1] - curve[len(curve) // 4][1]
    notes = [f"From a quarter of them on it grows by {growth:.1f} MB.", made_with(made)]
    output = given.output or RESULTS / "rollout_memory"
    result = {**made, "suite": suite.name, "curve": curve}
    publish(output, "benchmarks/rollout_throughput --memory", [table], notes, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

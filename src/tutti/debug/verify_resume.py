"""`tutti verify-resume CONFIG`: proves that a killed and resumed run equals an undisturbed one bit for bit.

It ships with its kill harness because users run it: on their own config, data and machine.

The config's own training is run twice for a few steps in a temporary folder: undisturbed, and killed with
SIGKILL at pseudo-random moments and resumed each time. Then every value of the two is compared.
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from tutti.config.run_config import RunConfig
from tutti.debug.compare_runs import Comparison, compare_checkpoints, compare_records, windows_of
from tutti.debug.kill_harness import WINDOWS, Kill
from tutti.debug.kill_harness_ranks import train_through
from tutti.evaluation.closed_loop.starts import DATASET
from tutti.runs.terminal import print_line, print_table, progress_bar
from tutti.storage.checkpoint import checkpoints, load
from tutti.types import UserError

STEPS = 12
KILLS = 3
CHECKPOINT_EVERY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found. `shortened` are the keys of the config that were changed for it, with their values."""

    steps: int
    kills: int
    kill_steps: tuple[int, ...]
    shortened: Mapping[str, Any]
    found: Comparison

    @property
    def exact(self) -> bool:
        """Whether no value differs."""
        return self.found.num_differing == 0


def prove_resume(
    config: RunConfig,
    folder: Path | None = None,
    *,
    steps: int = STEPS,
    kills: int = KILLS,
    seed: int = 0,
    processes: int = 1,
) -> Verification:
    """Trains `steps` updates undisturbed and once more with `kills` kills, and compares everything.

    On several `processes` torchrun starts them, a kill hits one of them, and half of the kills torchrun
    itself recovers from.

    Data are read as `tutti train` would read them: `folder` is the run whose recording and cache they are.
    Nothing else is written there. Compared are all tensors of the last checkpoints (weights, averages, heads,
    balancing), the optimisers, the backward, random states, the loader's position, counters, all records but
    their times, and the windows of every batch.

    Raises: UserError if there are no data, the config does not train for `steps` steps, or a training fails.
    """
    folder = folder or Path("runs") / config.name
    if not config.data.sources and not (folder / DATASET).is_dir():
        raise UserError(
            f"{folder / DATASET}: there are no data to train on yet. Record first (tutti record CONFIG), or "
            "name data sets in data.sources."
        )
    if not 0 < kills < steps:
        raise UserError(f"--kills is {kills} and --steps {steps}: give fewer kills than steps, at least 1.")
    short, changes = shorten(config, steps)
    plan = kill_plan(steps, kills, seed, processes)
    with TemporaryDirectory(prefix="tutti-verify-") as name, progress_bar("training, killing") as bar:
        straight, killed = Path(name) / "undisturbed", Path(name) / "killed"
        train_through(short, folder, straight, processes=processes)
        bar(1, kills + 2)
        done = train_through(
            short,
            folder,
            killed,
            plan,
            processes=processes,
            note=lambda number: bar(1 + number, kills + 2),
        )
        bar(kills + 2, kills + 2)
        found = compare_runs(straight, killed)
    return Verification(
        steps=steps,
        kills=done,
        kill_steps=tuple(kill.step for kill in plan),
        shortened=changes,
        found=found,
    )


def compare_runs(one: Path, other: Path) -> Comparison:
    """Everything that two finished runs of `killable` have left."""
    found = Comparison()
    last = [load(checkpoints(run)[-1]) for run in (one, other)]
    compare_checkpoints(found, *last)
    compare_records(found, one, other)
    batches = int(last[0].state["loader"]["consumed"])
    for rank in range(len(list(one.glob(WINDOWS.format(rank="*"))))):
        which = f", rank {rank}" if rank else ""
        orders = [windows_of(run / WINDOWS.format(rank=rank), batches) for run in (one, other)]
        found.add(f"windows of each batch{which}", orders[0][0], orders[1][0])
        found.add(f"batches made twice that differ{which}", *(changed for _, changed in orders))
    return found


def kill_plan(steps: int, kills: int, seed: int, processes: int = 1) -> list[Kill]:
    """Different steps from 1 to `steps` - 1, each with a share of the step after it, from `seed`.

    Each of the processes is hit equally often, or once more than another, in random order. The last kill
    falls behind the step of the first checkpoint, if there are so many, and waits for one: a training that
    only ever begins anew would show nothing.
    """
    draw = random.Random(seed)
    chosen = sorted(draw.sample(range(1, steps), kills))
    if chosen[-1] < CHECKPOINT_EVERY < steps:
        chosen[-1] = draw.randrange(CHECKPOINT_EVERY, steps)
    shares = [draw.random() for _ in chosen]
    ranks = [number % processes for number in range(kills)]
    draw.shuffle(ranks)
    patient = [step == chosen[-1] and step >= CHECKPOINT_EVERY for step in chosen]
    return [Kill(*each) for each in zip(chosen, shares, ranks, patient, strict=True)]


def shorten(config: RunConfig, steps: int) -> tuple[RunConfig, dict[str, Any]]:
    """The config with `steps` updates, and cadences at which every kind of event comes within them and kills
    fall between checkpoints; and what was changed, by key.

    Raises: UserError if the sections do not fit together at so few steps.
    """
    training, rollback = config.training, config.training.gradients.rollback
    rewind_steps = 0 if rollback == "off" else rollback.rewind_steps
    changes: dict[str, Any] = {
        "training.steps": steps,
        "training.log_every": 2,
        "training.validation.every": 4 if training.validation.every else 0,
        "training.checkpoints.every": CHECKPOINT_EVERY,
        "training.checkpoints.keep": 2 + rewind_steps // CHECKPOINT_EVERY,
        "training.checkpoints.keep_every": 0,
        "training.checkpoints.keep_best": "off",
    }
    if training.schedule.warmup:
        changes["training.schedule.warmup"] = 1
    if training.diagnostics.every:
        changes["training.diagnostics.every"] = 3
    values = config.model_dump(mode="json")
    balancing = values["balancing"]
    if balancing["kind"] == "gradient_share":
        start = min(balancing["start"], steps // 3)
        changes["balancing.start"] = max(start, changes.get("training.schedule.warmup", 0))
        changes["balancing.steps"] = min(balancing["steps"], steps // 3)
    if balancing["kind"] == "dwa":
        changes["balancing.every"] = 2
    shown: dict[str, Any] = {}
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = functools.reduce(operator.getitem, sections, values)
        if section[name] != value:
            section[name] = shown[key] = value
    try:
        return RunConfig.model_validate(values), shown
    except ValidationError as error:
        said = "; ".join(str(problem["msg"]) for problem in error.errors())
        raise UserError(
            f"This config cannot be shortened to {steps} steps: {said}. Give more with --steps, or change "
            "the key that is named."
        ) from None


def print_verification(verification: Verification) -> None:
    """What was changed, a line for each section that was compared, and the verdict."""
    found = verification.found
    changed = ", ".join(f"{key}={value}" for key, value in verification.shortened.items())
    print_line(f"Shortened for this check: {changed or 'nothing'}.")
    rows = [(name, f"{count:,}", f"{found.differing[name]:,}") for name, count in found.values.items()]
    print_table("", ("compared", "values", "differ"), rows)
    at = ", ".join(str(step) for step in verification.kill_steps)
    print_line(
        f"{verification.steps} steps undisturbed, and with {verification.kills} x SIGKILL soon after step "
        f"{at}. Exempt: the records' time/*, and seconds."
    )
    verdict = f"{found.num_differing:,} of {found.num_values:,} values differ"
    if found.first is None:
        print_line(f"{verdict}: this configuration resumes exactly.")
    else:
        print_line(f"{verdict}. The first (undisturbed, killed and resumed): {found.first}")

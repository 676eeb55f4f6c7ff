"""`tutti verify-resume CONFIG`: proves that a killed and resumed run equals an undisturbed one bit for bit.

It ships with its kill harness because users run it: on their own config, data and machine.

The config's own training is run twice for a few steps in a temporary folder: undisturbed, and killed with
SIGKILL at pseudo-random moments and resumed each time. Then every value of the two is compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from tutti.config.run_config import RunConfig
from tutti.debug.compare_runs import Comparison, compare_checkpoints, compare_records, windows_of
from tutti.debug.kill_harness import WINDOWS, Kill, train_through
from tutti.nested_dicts import changed_keys, merge
from tutti.runs.build import require_data
from tutti.runs.terminal import print_line, print_table, progress_bar
from tutti.storage.checkpoint import checkpoints, load
from tutti.types import UserError

STEPS = 12
KILLS = 3
CHECKPOINT_EVERY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found. `shortened` are the changes of the config for it, a line each."""

    steps: int
    kills: int
    kill_steps: tuple[int, ...]
    shortened: Sequence[str]
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

    Data are read as `tutti train` would read them: `folder` is the run whose recording they are. Nothing is
    written there. Compared are all tensors of the last checkpoints (weights, averages, heads,
    balancing), the optimisers, the backward, random states, the loader's position, counters, all records but
    their times, and the windows of every batch.

    Raises: UserError if there are no data, the config does not train for `steps` steps, or a training fails.
    """
    folder = folder or Path("runs") / config.name
    require_data(config, folder)
    if not 0 < kills < steps:
        raise UserError(f"--kills is {kills} and --steps {steps}: give fewer kills than steps, at least 1.")
    short, changes = shorten(config, steps)
    plan = kill_plan(steps, kills, seed, processes)
    with TemporaryDirectory(prefix="tutti-verify-") as name, progress_bar("training, killing") as bar:
        straight, killed = Path(name) / "undisturbed", Path(name) / "killed"
        train_through(short, folder, straight, processes=processes)
        bar(1, kills + 2)

        def note(number: int) -> None:
            bar(1 + number, kills + 2)

        done = train_through(short, folder, killed, plan, processes=processes, note=note)
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


def shorten(config: RunConfig, steps: int) -> tuple[RunConfig, list[str]]:
    """The config with `steps` updates, and cadences at which every kind of event comes within them and kills
    fall between checkpoints; and a line for each key that was changed.

    Raises: UserError if the sections do not fit together at so few steps.
    """
    given, rollback = config.training, config.training.gradients.rollback
    rewind_steps = 0 if rollback == "off" else rollback.rewind_steps
    training: dict[str, Any] = {
        "steps": steps,
        "log_every": 2,
        "validation": {"every": 4 if given.validation.every else 0},
        "checkpoints": {
            "every": CHECKPOINT_EVERY,
            "keep": 2 + rewind_steps // CHECKPOINT_EVERY,
            "keep_every": 0,
            "keep_best": "off",
            "mirror": "off",  # nobody is to find these among the copies of a run
        },
        "schedule": {"warmup": min(given.schedule.warmup, 1)},
        "diagnostics": {"every": 3 if given.diagnostics.every else 0},
    }
    values = config.model_dump(mode="json")
    before = values["balancing"]
    balancing: dict[str, Any] = {}
    if before["kind"] == "shares":
        balancing = {"start": "warmup"}
    if before["kind"] == "dwa":
        balancing = {"every": 2}
    short = merge(values, {"training": training, "balancing": balancing})
    try:
        return RunConfig.model_validate(short), changed_keys(values, short)
    except ValidationError as error:
        said = "; ".join(str(problem["msg"]) for problem in error.errors())
        raise UserError(
            f"This config cannot be shortened to {steps} steps: {said}. Give more with --steps, or change "
            "the key that is named."
        ) from None


def print_verification(verification: Verification) -> None:
    """What was changed, a line for each section that was compared, and the verdict."""
    found = verification.found
    print_line(f"Shortened for this check: {'; '.join(verification.shortened) or 'nothing'}.")
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

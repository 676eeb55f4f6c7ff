"""Recipes of the demo, each trained for its first steps from several seeds and judged on held-out episodes.

python benchmarks/screen_recipes.py --run RUN [NAME ...] trains what has no result yet, one thread a training,
one training a core, nothing is played; RUN has the demo's recorded data. Killed, it goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from tables import RESULTS, Table, prints_user_errors, publish

from tutti.config.run_config import RunConfig, build_config, load_config
from tutti.runs.build import build_data
from tutti.runs.provenance import circumstances, made_with
from tutti.runs.screened_rates import JUDGED_BY
from tutti.runs.terminal import progress_bar
from tutti.storage.files import exclusive_lock
from tutti.studies.cells import training_hash
from tutti.studies.pool import Work, number_of_jobs, own_command, run_cells
from tutti.studies.tune.cell import RateCell
from tutti.studies.tune.screen import Screening, cell_config
from tutti.training.records import read_records
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[1]
ALIGN = "{kind: contrastive, positives: task, pictures: change, share: 0.15}"
RECON = "{kind: future_patches, share: 0.2}"
AGAIN = "balancing={kind: shares, steps: 20, again: 200}"


def shares(
    *more: str, state: tuple[float, float] = (1.2, 0.3), align: str = ALIGN, recon: str = RECON
) -> tuple[str, ...]:
    """The overrides of a recipe by shares, in which that of `state` falls from its first to its second."""
    start, end = state
    falls = f"share: {{start: {start:g}, end: {end:g}, schedule: cosine}}"
    return (
        f"objective.align={align}",
        f"objective.recon={recon}",
        f"objective.state={{kind: future_states, {falls}, gripper: {{dimension: 3}}}}",
        "training.gradients.clip_norm=auto",
        *more,
    )


def weights(state: float = 5.0, recon: float = 0.1) -> tuple[str, ...]:
    """The overrides of the demo's recipe when this was measured, by weights."""
    align = "{kind: contrastive, positives: instruction, weight: {start: 0.1, end: 0, end_at: 0.5}}"
    state_falls = f"weight: {{start: {state:g}, end: 0.3}}"
    return (
        f"objective.align={align}",
        f"objective.recon={{kind: future_patches, weight: {{start: {recon:g}, end: 0}}}}",
        f"objective.state={{kind: future_states, {state_falls}, gripper: {{dimension: 3}}}}",
        "training.gradients.clip_norm=1.0",
    )


RECIPES: dict[str, tuple[str, ...]] = {
    "weights": weights(),
    "state 1.2": shares(),
    "state 0.8": shares(state=(0.8, 0.2)),
    "state 0.4": shares(state=(0.4, 0.1)),
    "state 1.2, no align": shares(align="null"),
    "state 1.2, no recon": shares(recon="null"),
    "state 1.2, state dropout 0.5": shares("model.fusion.state_dropout=0.5"),
    "state 1.2, near key frames 3": shares("data.mixture.near_key_frames=3"),
    "state 1.2, align now": shares(align="{kind: contrastive, positives: task, share: 0.15}"),
    "state 1.2, again": shares(AGAIN),
    "state 3, again": shares(AGAIN, state=(3.0, 0.75)),
    "weights, state 1": weights(state=1.0),
    "weights, state 0.3": weights(state=0.3),
    "weights, recon 1": weights(recon=1.0),
    "state 1.2, rate 0.0025": shares("training.optimizer.lr=0.0025"),
}
"""What each recipe changes in configs/demo.yaml and its length."""
STATE_GIVEN = ("model.fusion.withhold_state=false", "model.fusion.state_dropout=0.75")
"""As in the demo when these were measured."""
SEEDS = (11, 12)
SCREENING = Screening(share=0.2)
DIAGNOSTICS = 100
PARTS = ("vision", "fusion")


def recipe_config(name: str, run: Path, seed: int) -> RunConfig:
    """The config of a recipe's first steps from a seed."""
    common = [f"data.sources=[{{path: {run / 'dataset'}}}]", "training.steps=5000", *STATE_GIVEN]
    if AGAIN not in RECIPES[name]:
        common.append("balancing={kind: shares}")
    config = load_config(ROOT / "configs" / "demo.yaml", [*common, *RECIPES[name]])
    made = cell_config(config, run, SCREENING, config.training.optimizer.lr, seed)
    values = made.model_dump(mode="json")
    values["training"]["diagnostics"]["every"] = DIAGNOSTICS
    return build_config(values, f"recipe '{name}'")


def update_shares(folder: Path) -> dict[int, dict[str, float]]:
    """Of each measured step of a training the share of the update of each term in each part."""
    return {
        record["step"]: {
            name.removeprefix("diag/update_share/"): value
            for name, value in record.items()
            if name.startswith("diag/update_share/")
        }
        for record in read_records(folder)
        if any(name.startswith("diag/update_share/") for name in record)
    }


def of_recipe(name: str, cells: list[RateCell]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Its row, and all numbers."""
    results = [cell.result() or {} for cell in cells]
    shares = [update_shares(cell.folder) for cell in cells]
    keys = sorted({key for one in results for key in one if key.endswith("key_l1")})

    def error(key: str) -> str:
        values = [one.get(key, float("nan")) for one in results]
        return f"{fmean(values):.4f} ({', '.join(f'{one:.4f}' for one in values)})"

    def part(where: str) -> str:
        last = [one[max(one)] for one in shares if one]
        terms = sorted({key.partition("/")[0] for one in last for key in one})
        mean = {term: fmean(one.get(f"{term}/{where}", 0.0) for one in last) for term in terms}
        return ", ".join(f"{term} {100 * value:.0f}" for term, value in mean.items() if value > 0)

    seconds = fmean(one.get("seconds", float("nan")) for one in results)
    row = (name, *(error(key) for key in (*keys, JUDGED_BY)), *map(part, PARTS), f"{seconds:.0f}")
    return row, {"changes": RECIPES[name], "seeds": SEEDS, "results": results, "update_shares": shares}


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="NAME", help="; ".join(RECIPES))
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--work", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--out", type=Path, default=RESULTS / "screen_recipes")
    arguments = parser.parse_args(given)
    if unknown := [name for name in arguments.recipes if name not in RECIPES]:
        raise UserError(f"no recipe {', '.join(unknown)}. There are: {'; '.join(RECIPES)}.")
    return arguments


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0, or 1 if a training failed."""
    arguments = parse(given)
    run, work, made = arguments.run.resolve(), arguments.work.resolve(), circumstances()
    work.mkdir(parents=True, exist_ok=True)
    cells: dict[str, list[RateCell]] = {}
    configs: dict[RateCell, RunConfig] = {}
    for name in arguments.recipes or RECIPES:
        for seed in SEEDS:
            config = recipe_config(name, run, seed)
            folder = (
                work
                / f"{name.replace(', ', '_').replace(' ', '-')}-seed{seed}-{training_hash(config, 'demo')}"
            )
            steps = SCREENING.steps(config)
            cell = RateCell(rate=config.training.optimizer.lr, seed=seed, steps=steps, folder=folder)
            cells.setdefault(name, []).append(cell)
            configs[cell] = config
    with exclusive_lock(work, f"{work}: another process is screening recipes. Wait for it."):
        missing = [cell for cell in configs if cell.result() is None]
        if missing:
            build_data(configs[missing[0]], run).train.close()  # decodes once
        for cell in missing:
            cell.describe(configs[cell])
        with progress_bar("screening, steps") as bar:
            todo = {cell: Work(steps=cell.steps, rollouts=0) for cell in missing}
            jobs = number_of_jobs("auto", len(missing))
            failed = run_cells(
                todo, jobs, bar, command=lambda cell: own_command(cell, "tutti.studies.tune.cell")
            )
    if failed:
        raise UserError("\n\n".join(failed))
    found = {name: of_recipe(name, own) for name, own in cells.items()}
    keys = ("held-out key-frame error", "held-out action L1")
    shares = tuple(f"% of the update of {part}" for part in PARTS)
    heads = ("recipe", *keys, *shares, "training s")
    table = Table(title="Recipes of the demo", heads=heads, rows=tuple(row for row, _ in found.values()))
    steps = next(iter(configs.values())).training.steps
    note = (
        f"The first {SCREENING.share * steps:.0f} of {steps} steps, schedules of the whole training; one "
        f"thread each; errors of the averaged weights on held-out episodes, mean over the seeds "
        f"{', '.join(map(str, SEEDS))} (each seed's); shares of the update at the last measurement; nothing "
        f"was played. {made_with(made)}"
    )
    changes = [f"{name}: {'; '.join(RECIPES[name])}." for name in found]
    result = {"recipes": {name: all_numbers for name, (_, all_numbers) in found.items()}, "made": made}
    publish(arguments.out, "benchmarks/screen_recipes", [table], [note, *changes], result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

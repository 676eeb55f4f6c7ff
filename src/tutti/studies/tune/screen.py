"""Screens the peak learning rate: halvings of it, each from several seeds for a training's first steps.

RUN/tune/lr-HASH/
  cells/   a training for each rate and seed      rate.json   every error, the verdict, the cost
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from tutti.config.run_config import RunConfig, build_config
from tutti.nested_dicts import content_hash
from tutti.report.formatting import NOTHING, plain
from tutti.runs.build import build_data, require_data, with_sources
from tutti.runs.provenance import circumstances
from tutti.runs.screened_rates import JUDGED_BY, RECORD, ScreenedRate, TriedRate, record_folder
from tutti.runs.terminal import print_line, print_table, progress_bar
from tutti.storage.files import exclusive_lock, explain_full_disk, write_json
from tutti.studies.cells import CELLS, CHECKPOINT_EVERY, training_hash, tried
from tutti.studies.pool import Work, number_of_jobs, own_command, run_cells
from tutti.studies.tune.cell import RateCell
from tutti.studies.tune.verdict import judge_rates
from tutti.training.strategy import Strategy
from tutti.types import UserError

MAX_MORE = 3
"""Rates that are added, one after the other, while the best one lies at an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """What to screen: the rates `highest`, `highest` / 2, ..., by `halvings`; "auto" is twice the config's.

    Each is trained from `seeds` seeds for the first `share` of the steps, `jobs` trainings at a time, one
    thread each. `rate` is the key of `training.optimizer`.
    """

    rate: str = "lr"
    highest: float | Literal["auto"] = "auto"
    halvings: int = 4
    seeds: int = 2
    share: float = 0.2
    jobs: int | Literal["auto"] = "auto"

    def rates(self, config: RunConfig) -> list[float]:
        """From the highest down."""
        own = getattr(config.training.optimizer, self.rate)
        highest = 2 * own if self.highest == "auto" else self.highest
        return [_rounded(highest / 2**number) for number in range(self.halvings + 1)]

    def steps(self, config: RunConfig) -> int:
        """Steps of each training."""
        return max(1, round(self.share * config.training.steps))


def screen_rate(
    config: RunConfig, folder: Path | None = None, screening: Screening = Screening()
) -> ScreenedRate:
    """Trains the rates that have no result yet, judges them, and writes rate.json.

    While the best rate lies at an end, one more is tried beyond it, at most MAX_MORE times. `folder` is the
    run's. Run again, it keeps finished trainings and continues interrupted ones.

    Raises: UserError for a rate that the optimizer does not have, a config that cannot be screened, or,
    after all others have run, trainings that failed.
    """
    folder, steps, made = folder or Path("runs") / config.name, screening.steps(config), circumstances()
    check_config(config, screening)
    require_data(config, folder)
    data = build_data(config, folder, config.objective.needs())  # decodes once, before the cells each would
    data.train.close()
    if not len(data.validation.rows):
        raise UserError(
            "There are no held-out episodes to judge a rate by: data.validation_fraction is "
            f"{config.data.validation_fraction:g}. Set data.validation_fraction=0.05"
        )
    home = record_folder(config, folder, screening.rate)
    home.mkdir(parents=True, exist_ok=True)
    busy = f"{home}: another process is screening this rate. Wait for it."
    with exclusive_lock(home, busy), explain_full_disk(home, "the screening"):
        rates, more = screening.rates(config), MAX_MORE
        while True:
            tried = _try(config, folder, home, screening, rates)
            verdict = judge_rates({one.rate: one.errors[JUDGED_BY] for one in tried})
            if verdict.edge == 0 or more == 0:
                break
            more -= 1
            rates = sorted([*rates, _rounded(verdict.best * 2.0**verdict.edge)], reverse=True)
            print_line(f"the best rate, {verdict.best:g}, lies at the end: one more is tried beyond it")
        found = ScreenedRate(
            key=f"training.optimizer.{screening.rate}",
            steps=steps,
            whole_steps=config.training.steps,
            seeds=tuple(range(config.seed, config.seed + screening.seeds)),
            tried=tuple(tried),
            verdict=verdict,
            made=made,
        )
        write_json(home / RECORD, asdict(found))
    _show(found)
    print_line(f"Written: {home / RECORD}")
    return found


def check_config(config: RunConfig, screening: Screening) -> None:
    """Raises: UserError, naming the key, if a rate of this config cannot be screened so."""
    training, steps, terms = config.training, screening.steps(config), tuple(config.objective.terms())
    phase = Strategy(config.strategy.phases(), steps=training.steps, terms=terms).at(steps - 1).phase
    wrong = ""
    if screening.rate not in type(training.optimizer).model_fields:
        wrong = f"optimizer.kind {training.optimizer.kind} has no {screening.rate}. Leave --which out."
    elif training.fork != "off":
        wrong = "a fork goes on from weights that were trained at a rate. Screen with training.fork=off"
    elif steps <= training.schedule.warmup:
        wrong = (
            f"--share {screening.share:g} is {steps} of training.steps {training.steps}, within the "
            f"training.schedule.warmup of {training.schedule.warmup}. Raise --share, or shorten the warm-up."
        )
    elif "action" not in phase.active_terms(terms):
        wrong = (
            f"--share {screening.share:g} ends after step {steps}, in the phase '{phase.name}', where the "
            "action does not count. Raise --share, or screen with strategy.kind=end_to_end."
        )
    if wrong:
        raise UserError(f"training.optimizer.{screening.rate} cannot be screened: {wrong}")


def cell_config(config: RunConfig, folder: Path, screening: Screening, rate: float, seed: int) -> RunConfig:
    """The config at this rate from this seed, on one thread, validated where the screening ends."""
    steps, sources = screening.steps(config), with_sources(config, folder).sources
    values = config.model_dump(mode="json")
    values["seed"] = seed
    absolute = [one.model_dump(mode="json") | {"path": str(one.path.resolve())} for one in sources]
    values["data"] |= {"seed": seed, "sources": absolute}
    save = CHECKPOINT_EVERY if steps > CHECKPOINT_EVERY else 0
    training = tried(values["training"], validate=steps, save=save)
    optimizer = training["optimizer"] | {screening.rate: rate}
    values["training"] = training | {"seed": seed, "optimizer": optimizer}
    values["evaluation"]["checkpoint"] = "latest"  # no other is kept
    return build_config(values, f"the config at {screening.rate} {rate:g}")


def _try(
    config: RunConfig, folder: Path, home: Path, screening: Screening, rates: Sequence[float]
) -> list[TriedRate]:
    """Runs what is missing. Gives the results from the highest rate down."""
    steps, cells = screening.steps(config), dict[RateCell, RunConfig]()
    for seed in range(config.seed, config.seed + screening.seeds):
        for rate in rates:
            made = cell_config(config, folder, screening, rate, seed)
            key = content_hash([training_hash(made, home.name), steps], 10)
            own = home.resolve() / CELLS / f"rate-{rate:g}-seed{seed}-{key}"
            cells[RateCell(rate=rate, seed=seed, steps=steps, folder=own)] = made
    missing = [cell for cell in cells if cell.result() is None]
    for cell in missing:
        cell.describe(cells[cell])
    if missing:
        jobs, found = number_of_jobs(screening.jobs, len(missing)), len(cells) - len(missing)
        print_line(
            f"{len(cells)} trainings of {steps:,} steps, {found} found, {len(missing)} to do, {jobs} at a "
            "time, one thread each"
        )
        work = {cell: Work(steps=steps, rollouts=0) for cell in missing}
        with progress_bar("screening, steps") as bar:
            failed = run_cells(
                work, jobs, bar, command=lambda cell: own_command(cell, "tutti.studies.tune.cell")
            )
        if failed:
            again = "Run the same command again: what is finished is kept."
            raise UserError("\n\n".join([f"trainings that failed: {len(failed)}", *failed, again]))
    tried: list[TriedRate] = []
    for rate in rates:
        results = [cell.result() or {} for cell in cells if cell.rate == rate]
        names = sorted({JUDGED_BY}.union(*results) - {"seconds"})
        errors = {name: tuple(one.get(name) for one in results) for name in names}
        tried.append(TriedRate(rate=rate, errors=errors, seconds=sum(one["seconds"] for one in results)))
    return tried


def _show(found: ScreenedRate) -> None:
    """Prints a row for each rate from the highest down: mean error (each seed's), verdict."""
    verdict, names = found.verdict, sorted({name for one in found.tried for name in one.errors})

    def error(values: Sequence[float | None]) -> str:
        each, mean = ", ".join(NOTHING if one is None else plain(one, 4) for one in values), NOTHING
        if None not in values:
            mean = plain(fmean(one or 0.0 for one in values), 4)
        return f"{mean} ({each})" if len(values) > 1 else mean

    def said(one: TriedRate) -> str:
        words = "best" if one.rate == verdict.best else "within noise"
        within = one.rate in verdict.within_noise
        return "not finite" if None in one.errors[JUDGED_BY] else words if within else ""

    rows = [
        [f"{one.rate:g}", *(error(one.errors.get(name, (None,))) for name in names), said(one)]
        for one in found.tried
    ]
    heads = ["rate", *(name.removeprefix("valid/").removeprefix("metric/") for name in names), "verdict"]
    title = f"{found.key}: held-out errors after {found.steps:,} of {found.whole_steps:,} steps"
    print_table(title, heads, rows)
    for line in found.sentences:
        print_line(line)


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")

"""The learning rates that were screened for a config, where the doctor finds them: RUN/tune/*/rate.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter

from tutti.config.run_config import RunConfig
from tutti.data.sources import open_parts
from tutti.findings import Finding
from tutti.key_effects import with_effect
from tutti.nested_dicts import content_hash
from tutti.report.formatting import duration
from tutti.runs.build import with_sources
from tutti.storage.reading import read_valid
from tutti.types import UserError

RECORD = "rate.json"
RATES = ("lr", "adamw_lr")
"""The rates of `training.optimizer`; the second is Muon's for what AdamW moves."""
JUDGED_BY = "valid/action"
LEAST = 0.01
"""Mean errors that differ by no more than this share of the best one count as equal, whatever the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedRate:
    """The held-out errors of each seed's training at a rate, by metric, and the seconds of all of them; None
    where a training was not finite."""

    rate: float
    errors: dict[str, tuple[float | None, ...]]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RateVerdict:
    """`within_noise` are the rates, the best among them, whose mean error is at most the best one plus
    `tolerance`. `edge` is 1 if the best one is the highest, -1 if it is the lowest, else 0."""

    best: float
    within_noise: tuple[float, ...]
    tolerance: float
    noise_known: bool
    edge: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenedRate:
    """A screening of the key `key` after `steps` of `whole_steps` steps, from the highest rate down."""

    key: str
    steps: int
    whole_steps: int
    seeds: tuple[int, ...]
    tried: tuple[TriedRate, ...]
    verdict: RateVerdict
    made: dict[str, Any]

    @property
    def sentences(self) -> list[str]:
        """The verdict, the noise, the cost, and the override to paste."""
        verdict, best = self.verdict, self.verdict.best
        errors = next(one.errors[JUDGED_BY] for one in self.tried if one.rate == best)
        error, least = fmean(one or 0.0 for one in errors), min(verdict.within_noise)
        smaller = "" if least == best else f"; {least:g} is the smallest within the noise"
        edge = ". It lies at the end: a better one may lie beyond it" if verdict.edge else ""
        noise = f"the noise of {len(self.seeds)} seeds" if verdict.noise_known else "one seed knows no noise"
        number, seconds = len(self.tried) * len(self.seeds), sum(one.seconds for one in self.tried)
        times = number * self.steps / self.whole_steps
        return [
            f"Best {self.key.rpartition('.')[2]}: {best:g} ({JUDGED_BY} {error:.4g}){smaller}{edge}.",
            f"Up to {verdict.tolerance:.2g} is no difference ({noise}; at least {100 * LEAST:g} %).",
            f"Cost: {number} trainings of {self.steps:,} steps, {times:.1f} times the training's own "
            f"{self.whole_steps:,}; {duration(seconds)} on one thread each.",
            f"Use it: {self.key}={best:g}",
        ]


SCREENED = TypeAdapter(ScreenedRate)


def record_folder(config: RunConfig, folder: Path, rate: str = "lr", home: Path | None = None) -> Path:
    """The folder, in that of the run (or in `home`), of a screening of `rate` ("lr", "adamw_lr").

    Its name has a hash of what the best rate depends on: optimizer, model, batch size, objective, how its
    terms become updates, and the content of the data. Name, seeds, steps and schedule, clipping, averages,
    validation, evaluation and the rates may differ. Raises: UserError if a data set cannot be opened.
    """
    names = ("data", "model", "objective", "balancing", "backward", "strategy", "training")
    sections = with_effect(config.sections(*names))
    training, data = sections.pop("training"), sections["data"]
    sections |= {name: training[name] for name in ("optimizer", "accumulation", "batch_ramp", "init_from")}
    sources = with_sources(config, folder).sources
    data["sources"] = [
        source.model_dump(mode="json", exclude={"path", "tolerance"}) | {"content": part.store.fingerprint}
        for source, part in zip(sources, open_parts(sources), strict=True)
    ]
    for section in (one for one in sections.values() if isinstance(one, dict)):
        for key in ("seed", "validation_windows", *RATES):
            section.pop(key, None)
    return (home or folder) / "tune" / f"{rate}-{content_hash(sections, 12)}"


def find_screened(config: RunConfig, folder: Path) -> ScreenedRate | None:
    """The screening of `lr` by the run in `folder`, by the one that its data were recorded in, or by any
    other beside it. A record that cannot be read is none."""
    beside = sorted(folder.parent.iterdir()) if folder.parent.is_dir() else []
    name = record_folder(config, folder, home=Path()) / RECORD
    for home in (folder, *(source.path.parent for source in config.data.sources), *beside):
        try:
            if (home / name).is_file():
                return read_valid(home / name, SCREENED.validate_python)
        except (UserError, OSError):
            continue
    return None


def rate_findings(config: RunConfig, folder: Path) -> list[Finding]:
    """A hint if the learning rate was never screened for this config, or is not among the best. A fork goes
    on at the rate of its run."""
    rate = config.training.optimizer.lr
    kind, cure = "rate_not_screened", "Short trainings find it: tutti tune --rate CONFIG"
    sentence = f"training.optimizer.lr {rate:g} was never screened for this model, batch size and data."
    if found := find_screened(config, folder):
        best, kind = found.verdict.best, "rate_not_the_best"
        sentence = f"training.optimizer.lr is {rate:g}; {best:g} was the best of the rates screened."
        cure = f"Set training.optimizer.lr={best:g}"
    good = found is not None and any(abs(one - rate) <= 1e-6 * one for one in found.verdict.within_noise)
    if good or config.training.fork != "off":
        return []
    return [Finding(kind=kind, severity="hint", sentence=sentence, number=rate, cure=cure)]

"""Starts of the simulator that a policy was trained on, so that no evaluation uses them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutti.evaluation.config import EvaluationConfig
from tutti.storage.checkpoint import listed
from tutti.storage.manifest import STARTS
from tutti.storage.reading import parse_json, read_json, shown
from tutti.types import UserError

RECORDING = "recording.json"
"""How a data set was recorded: `suite`, `seeds` [first, last], tries and successes of each task. It lies in
the data set's own folder; older recordings have it in the run's folder alone, beside `dataset/`."""
DATASET = "dataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStarts:
    """Seeds of the demonstrations, recording by recording; `unknown`: data sets without that information.

    A seed identifies a start, whatever its task.
    """

    seeds: tuple[range, ...] = ()
    unknown: tuple[str, ...] = ()

    @classmethod
    def union(cls, parts: Iterable[TrainingStarts]) -> TrainingStarts:
        """All of them, each once."""
        parts = list(parts)
        return cls(
            seeds=tuple(dict.fromkeys(seeds for part in parts for seeds in part.seeds)),
            unknown=tuple(dict.fromkeys(name for part in parts for name in part.unknown)),
        )

    @classmethod
    def of_data(cls, folder: Path) -> TrainingStarts:
        """The starts of the data set in `folder`.

        Raises: UserError, naming the file, if it cannot be read.
        """
        places = [folder / RECORDING]
        places += [f.parent / RECORDING for f in (folder, folder.resolve()) if f.name == DATASET]
        for path in places:
            if path.is_file():
                return cls(seeds=(_seeds(path),))
        return cls(unknown=(str(folder),))

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, ask: bool = True) -> TrainingStarts:
        """What `to_dict` gave; with `ask`, data sets whose starts were unknown then are read again.

        Raises: ValueError, KeyError or TypeError where it is of another form.
        """
        known = cls(seeds=tuple(_range(pair) for pair in values["seeds"]))
        names = [str(name) for name in values["unknown"]]
        return cls.union([known, *(cls.of_data(Path(n)) if ask else cls(unknown=(n,)) for n in names)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the last seed of each recording included."""
        return {"seeds": [[one[0], one[-1]] for one in self.seeds], "unknown": list(self.unknown)}

    @property
    def warning(self) -> str:
        """The warning about data sets without known starts; empty if there are none."""
        return (
            f"starts of the training data are not known: {', '.join(self.unknown)}. Whether the score counts "
            f"starts that were trained on cannot be checked. If you know them, put {RECORDING} with "
            '{"seeds": [first, last]} into the data set.'
            if self.unknown
            else ""
        )


def check_seeds(
    config: EvaluationConfig, trained: TrainingStarts, key: str = "evaluation.first_seed"
) -> None:
    """Raises UserError if the evaluation's starts, of which `key` says the first, overlap those of the
    training data."""
    overlaps = [one for one in trained.seeds if config.seeds[0] <= one[-1] and one[0] <= config.seeds[-1]]
    if not overlaps:
        return
    shared = ", ".join(f"{one[0]} to {one[-1]}" for one in overlaps)
    below = min(one[0] for one in trained.seeds) - config.episodes
    raise UserError(
        f"{key}: the evaluation's starts (seeds {config.seeds[0]} to {config.seeds[-1]}) "
        f"overlap the demonstrations' (seeds {shared}): the score would count starts that were trained on. "
        f"Set {key} to {max(one[-1] for one in trained.seeds) + 1} or more"
        + (f", or to at most {below}." if below >= 0 else ".")
    )


def _seeds(path: Path) -> range:
    cure = "`tutti record` writes this file; put back the one that belongs to the data set, or delete it."
    try:
        return _range(read_json(path, cure=cure, links=True)["seeds"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: `seeds` must be [first, last], two whole numbers from 0 on ({error}). {cure}"
        ) from None


def _range(pair: Any) -> range:
    first, last = pair
    if type(first) is not int or type(last) is not int or not 0 <= first <= last:
        raise ValueError(f"found {shown(pair)}")
    return range(first, last + 1)


def starts_of_policy(folder: Path) -> TrainingStarts:
    """The starts in starts.json of a checkpoint or an export; unknown where it is older than that file.

    Raises: UserError, naming the file, if it cannot be read.
    """
    manifest, path = listed(folder), folder / STARTS
    if STARTS not in manifest.files:
        return TrainingStarts(unknown=(str(path),))
    try:
        return TrainingStarts.from_dict(parse_json(manifest.text(STARTS), path), ask=False)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({shown(str(error), 200, quoted=False)}).") from error

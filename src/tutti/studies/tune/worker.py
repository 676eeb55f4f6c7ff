"""A process that makes trials of a search, one after the other, until there are enough.

python -m tutti.studies.tune.worker FOLDER, where FOLDER is worker-HOST-N of a search that `tutti tune
--space` has described; any number may run, on any machine that sees the folder and the storage.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from pydantic import TypeAdapter

from tutti.config.run_config import load_config, to_yaml
from tutti.nested_dicts import content_hash
from tutti.storage.files import write_atomically, write_json
from tutti.storage.reading import read_json
from tutti.studies.cells import RESULT
from tutti.studies.run_cell import CONFIG, run_process
from tutti.studies.tune.space import SpaceConfig
from tutti.studies.tune.trial import CONTROL, STEPS, Search, run_trial

DESCRIPTION, OWNER, JOURNAL = "search.json", "owner", "journal:"
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_DESCRIBED = TypeAdapter(dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """The process number `number`; its folder has its log, and its result when there are enough trials."""

    folder: Path
    number: int

    @property
    def name(self) -> str:
        """As in "worker 1"."""
        return f"worker {self.number}"

    def result(self) -> dict[str, Any] | None:
        """What it came to; None before its end."""
        path = self.folder / RESULT
        return read_json(path) if path.is_file() else None


def describe(search: Search, storage: str) -> None:
    """Writes what the processes read."""
    search.home.mkdir(parents=True, exist_ok=True)
    write_atomically(search.home / CONFIG, to_yaml(search.config))
    told = {"space": search.space.model_dump(mode="json"), "storage": storage, "data": search.data}
    write_json(search.home / DESCRIPTION, told)


def read_search(home: Path) -> tuple[Search, str]:
    """The search in a folder, and its storage."""
    told = _DESCRIBED.validate_python(read_json(home / DESCRIPTION))
    space = SpaceConfig.model_validate(told["space"])
    made = Search(config=load_config(home / CONFIG), space=space, home=home, data=str(told.get("data", "")))
    return made, str(told["storage"])


def open_study(search: Search, storage: str, worker: str = "") -> optuna.Study:
    """The study in the storage (a URL, or journal:FILE), made where it is not there yet, with its controls
    waiting first. Its name has a hash of what trials depend on, so that a changed config or space is another
    study. Each `worker` draws other random numbers, as does one that begins again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    space = search.space
    kept: Any = storage
    if storage.startswith(JOURNAL):
        kept = JournalStorage(JournalFileBackend(storage.removeprefix(JOURNAL)))
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=space.reduction)
    study = optuna.create_study(
        storage=kept,
        study_name=f"{space.name}-{search.key}",
        pruner=pruner,
        direction="maximize",
        load_if_exists=True,
    )
    trials = len(study.get_trials(deepcopy=False))
    seed = int(content_hash([space.seed, worker, trials], 8), 16)
    study.sampler = (
        optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True, group=True)
        if space.sampler == "tpe"
        else optuna.samplers.RandomSampler(seed=seed)
    )
    told = study.get_trials(deepcopy=False)
    known = {trial.user_attrs.get(CONTROL) for trial in told if trial.state != TrialState.FAIL}
    for name in search.space.all_controls:
        if name not in known:
            study.enqueue_trial({}, user_attrs={CONTROL: name})
    return study


def give_back_dead(study: optuna.Study) -> int:
    """Trials of processes of this machine that were killed wait again, and go on from their checkpoints."""
    dead = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, _, number = str(trial.user_attrs.get(OWNER, "")).partition(":")
        if host == socket.gethostname() and not _lives(int(number)):
            study.tell(trial.number, state=TrialState.FAIL)
            kept = {CONTROL: trial.user_attrs[CONTROL]} if CONTROL in trial.user_attrs else {}
            study.enqueue_trial(trial.params, user_attrs=kept)
            dead += 1
    return dead


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def finished(study: optuna.Study) -> int:
    """Trials that count: complete or pruned."""
    return len(study.get_trials(deepcopy=False, states=DONE))


def work(folder: Path) -> None:
    """Makes trials in this process until the search has enough."""
    torch.set_num_threads(1)
    search, storage = read_search(folder.parent)
    study, steps, made = open_study(search, storage, folder.name), 0, list[int]()

    def owned(trial: optuna.Trial) -> float:
        trial.set_user_attr(OWNER, f"{socket.gethostname()}:{os.getpid()}")
        made.append(trial.number)
        return run_trial(trial, search)

    while finished(study) < search.space.trials:
        study.optimize(owned, n_trials=1)
        steps += int(study.trials[made[-1]].user_attrs.get(STEPS, 0))
        with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": steps}) + "\n")
    write_json(folder / RESULT, {"trials": len(made)})


if __name__ == "__main__":
    sys.exit(run_process(work, Path(sys.argv[1]), attached="--attached" in sys.argv[2:]))

"""A process that makes trials of a search, one after the other, until there are enough.

python -m tutti.studies.tune.worker FOLDER, where FOLDER is worker-HOST-N of a search that `tutti tune
--space` has described; any number may run, on any machine that sees the folder and the storage. Each holds
the lock of its folder, by which others know whether its trial is being made.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from tutti.runs.terminal import print_line
from tutti.storage.files import exclusive_lock, explain_full_disk, write_atomically, write_json
from tutti.storage.reading import read_json
from tutti.studies.cells import RESULT
from tutti.studies.run_cell import CONFIG, run_process
from tutti.studies.tune.space import SpaceConfig
from tutti.studies.tune.trial import CONTROL, STEPS, TRIALS, Search, run_trial
from tutti.types import UserError

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


@contextmanager
def in_turn(home: Path) -> Iterator[None]:
    """Inside the block no other process begins this search, takes a trial of it or writes its results.

    Raises: UserError where there are no locks: living and killed processes would look the same.
    """
    (home / TRIALS).mkdir(parents=True, exist_ok=True)
    with exclusive_lock(home / TRIALS, waiting=lambda: None) as locked:
        if not locked:
            raise UserError(f"{home}: no locks on this file system. Search in another folder: --run FOLDER")
        yield


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


def give_back_dead(study: optuna.Study, home: Path) -> int:
    """Trials of processes that have ended, interrupted or killed, wait again, and go on from their
    checkpoints. To be called in turn: a trial without an owner is one whose process ended as it took it."""
    dead = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if OWNER in trial.user_attrs and lives(home / trial.user_attrs[OWNER]):
            continue
        with suppress(RuntimeError):  # of one that its process has finished a moment ago
            # Another trial of these values would count a second time at the rungs that this one has seen.
            study._storage.set_trial_state_values(trial._trial_id, state=TrialState.WAITING)  # pyright: ignore[reportPrivateUsage]
            dead += 1
    return dead


def begin(search: Search, storage: str) -> tuple[optuna.Study, int]:
    """Writes what the processes read. Gives the study, and how many of its trials wait again."""
    told = {"space": search.space.model_dump(mode="json"), "storage": storage, "data": search.data}
    with in_turn(search.home):
        write_atomically(search.home / CONFIG, to_yaml(search.config))
        write_json(search.home / DESCRIPTION, told)
        study = open_study(search, storage)
        return study, give_back_dead(study, search.home)


def lives(folder: Path) -> bool:
    """Whether a worker's process runs, on whatever machine: then it holds the lock of its folder."""
    try:
        with exclusive_lock(folder):
            return False
    except UserError:
        return folder.is_dir()


def finished(study: optuna.Study) -> int:
    """Trials that count: complete or pruned."""
    return len(study.get_trials(deepcopy=False, states=DONE))


def take_trial(study: optuna.Study, search: Search, folder: Path) -> optuna.Trial | None:
    """The next trial, for the worker of this folder; None where enough are made or being made."""
    with in_turn(search.home):
        if len(study.get_trials(deepcopy=False, states=(*DONE, TrialState.RUNNING))) >= search.space.trials:
            return None
        trial = study.ask()
        trial.set_user_attr(OWNER, folder.name)
        return trial


def work(folder: Path) -> None:
    """Makes trials in this process until the search has enough.

    A trial that Ctrl-C, a kill or a UserError ends, such as a full disk, stays as it is: the next start gives
    it back. Any other exception is a fault of the trial itself, and would end each process that tried again.
    """
    torch.set_num_threads(1)
    search, storage = read_search(folder.parent)
    steps = made = 0
    with exclusive_lock(folder, waiting=lambda: print_line("waits for another process in this folder")):
        with in_turn(search.home):
            study = open_study(search, storage, folder.name)
        while (trial := take_trial(study, search, folder)) is not None:
            try:
                with explain_full_disk(search.home, "a trial"):
                    study.tell(trial, run_trial(trial, search))
            except optuna.TrialPruned:
                study.tell(trial, state=TrialState.PRUNED)
            except Exception as error:
                if not isinstance(error, UserError):
                    study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                raise
            made, steps = made + 1, steps + int(trial.user_attrs.get(STEPS, 0))
            with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": steps}) + "\n")
        write_json(folder / RESULT, {"trials": made})


if __name__ == "__main__":
    sys.exit(run_process(work, Path(sys.argv[1]), attached="--attached" in sys.argv[2:]))

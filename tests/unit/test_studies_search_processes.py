"""`tutti tune --space` in several processes that are interrupted, killed, or meet a fault of the machine."""

from __future__ import annotations

import errno
import fcntl
import json
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import optuna
import pytest
from optuna.trial import TrialState

from fixtures import squares_data
from fixtures.small_searches import in_this_process, space
from fixtures.squares_world import SquaresSuite
from tutti.config.overrides import parse_overrides
from tutti.config.run_config import RunConfig, build_config
from tutti.evaluation.config import EvaluationConfig
from tutti.nested_dicts import merge
from tutti.storage.files import exclusive_lock
from tutti.studies.cells import data_fingerprint, tried
from tutti.studies.tune import search as searching
from tutti.studies.tune import trial as trying
from tutti.studies.tune import worker as working
from tutti.studies.tune.search import check, search_keys
from tutti.studies.tune.space import FIXED
from tutti.studies.tune.trial import CONTROL, OVERRIDES, SUCCESS, Search, run_trial, suggested
from tutti.studies.tune.worker import Worker, begin, open_study, take_trial, work
from tutti.suites import registry
from tutti.suites.environment import Suite
from tutti.types import UserError

STORAGES = {"journal": "journal:{}/log", "sqlite": "sqlite:///{}/optuna.db"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    data = squares_data.write(tmp_path_factory.mktemp("data") / "set", squares_data.episodes(8))
    training = {"steps": 9, "schedule": {"warmup": 1}}
    return squares_data.config(data, training=training, data={"batch_size": 4})


@pytest.fixture
def playing(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setitem(registry.SUITES, "squares", cast(Suite, SquaresSuite()))
    return config.model_copy(update={"evaluation": EvaluationConfig(suite="squares", max_decisions=3)})


def search_in(home: Path, config: RunConfig, **changes: Any) -> Search:
    return Search(config=config, space=space(**changes), home=home)


def at_once(trial: optuna.Trial, search: Search) -> float:
    """In the place of `run_trial`: a trial that is not trained."""
    control = trial.user_attrs.get(CONTROL)
    overrides = search.space.all_controls[control] if control else suggested(trial, search.space)
    trial.set_user_attr(OVERRIDES, list(overrides))
    trial.set_user_attr(SUCCESS, [1, 2])
    for number in range(len(search.rungs)):
        trial.report(-0.5, search.space.reduction**number)
        trial.should_prune()
    return 0.5


def ending_with(error: BaseException) -> Callable[..., float]:
    """In the place of `run_trial`: one that comes to the first rung."""

    def run(trial: optuna.Trial, search: Search) -> float:
        suggested(trial, search.space)
        trial.report(-0.5, 1)
        trial.should_prune()
        raise error

    return run


def worker_in(home: Path, name: str = "worker-here-0") -> Path:
    (home / name).mkdir(exist_ok=True)
    return home / name


# --- ended before its end


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("no whole checkpoint")])
def test_a_trial_that_is_interrupted_goes_on_at_the_next_start(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, error: BaseException
) -> None:
    made, where, folder = search_in(tmp_path, config), STORAGES[storage].format(tmp_path), tmp_path / "w"
    begin(made, where)
    worker_in(tmp_path, "w")
    monkeypatch.setattr(working, "run_trial", ending_with(error))
    with pytest.raises(type(error)):
        work(folder)
    study, back = begin(made, where)
    (waiting,) = [one for one in study.trials if one.params]
    assert back == 1 and begin(made, where)[1] == 0
    assert waiting.state == TrialState.WAITING and waiting.user_attrs[CONTROL] == "default"
    monkeypatch.setattr(working, "run_trial", at_once)
    work(folder)
    assert [one.state for one in study.trials] == 3 * [TrialState.COMPLETE]
    assert study.trials[0].params == waiting.params
    seen = [one for one in study.trials if "completed_rung_0" in one.system_attrs]
    assert len(seen) == 3  # none counts twice among those that came to a rung


def test_a_full_disk_is_no_trials_fault_and_a_crash_is(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, where = search_in(tmp_path, config), f"journal:{tmp_path}/log"
    begin(made, where)
    monkeypatch.setattr(working, "run_trial", ending_with(OSError(errno.ENOSPC, "full")))
    with pytest.raises(UserError, match="the disk is full"):
        work(worker_in(tmp_path))
    study, back = begin(made, where)
    assert back == 1
    monkeypatch.setattr(working, "run_trial", ending_with(RuntimeError("odd values")))
    with pytest.raises(RuntimeError, match="odd values"):
        work(worker_in(tmp_path))
    assert begin(made, where)[1] == 0 and study.trials[0].state == TrialState.FAIL
    controls = [one.user_attrs[CONTROL] for one in study.trials if one.state == TrialState.WAITING]
    assert sorted(controls) == ["default", "no-align"]  # a search has its controls


def test_a_trial_is_refused_for_its_values_alone(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = data_fingerprint(config.data.sources)

    def outcome(error: UserError, data: str) -> optuna.Trial:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(trying, "build_training", fail)
        study = optuna.create_study(direction="maximize")
        study.enqueue_trial({}, user_attrs={CONTROL: "default"})
        made = Search(config=config, space=space(), home=tmp_path, data=data)
        trial = study.ask()
        with pytest.raises((optuna.TrialPruned, UserError)) as raised:
            run_trial(trial, made)
        assert ("refused" in trial.user_attrs) == (raised.type is optuna.TrialPruned)
        return trial

    disk = UserError("cannot write")
    disk.__cause__ = OSError(errno.ENOSPC, "full")
    assert (
        outcome(UserError("4 heads do not divide 6"), fingerprint).user_attrs["refused"].startswith("4 heads")
    )
    assert "refused" not in outcome(disk, fingerprint).user_attrs
    assert "refused" not in outcome(UserError("the data have changed"), "of other data").user_attrs


def test_no_checkpoint_lies_at_a_rung(config: RunConfig, tmp_path: Path) -> None:
    """A trial that is killed while a rung judges it comes there again."""
    for steps, rungs in ((1800, 3), (5400, 4), (9, 2)):
        longer = build_config(merge(config.model_dump(mode="json"), {"training": {"steps": steps}}), "longer")
        made = search_in(tmp_path, longer, rungs=rungs)
        every = made.trial_config([]).training.checkpoints.every
        assert every > 190 and all(rung % every for rung in made.rungs[:-1])


# --- several processes


def test_no_more_trials_are_begun_than_are_wanted(config: RunConfig, tmp_path: Path) -> None:
    made = search_in(tmp_path, config)
    study, _ = begin(made, f"journal:{tmp_path}/log")
    taken = [take_trial(study, made, tmp_path / f"worker-{number}") for number in range(5)]
    assert [one is None for one in taken] == [False, False, False, True, True]
    study.tell(0, state=TrialState.FAIL)
    assert take_trial(study, made, tmp_path / "worker-5") is not None


def test_starts_at_the_same_time_make_each_control_once(config: RunConfig, tmp_path: Path) -> None:
    made, where = search_in(tmp_path, config), f"journal:{tmp_path}/log"
    dead = open_study(made, where).ask()
    with ThreadPoolExecutor(4) as pool:
        back = [number for _, number in pool.map(lambda _: begin(made, where), range(4))]
    told = open_study(made, where).trials
    assert sorted(back) == [0, 0, 0, 1] and told[dead.number].state == TrialState.WAITING
    assert [one.user_attrs[CONTROL] for one in told] == ["default", "no-align"]


def test_two_starts_on_a_machine_have_workers_of_their_own(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "run_cells", in_this_process)
    monkeypatch.setattr(working, "run_trial", at_once)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    home = tmp_path / "tune" / "tiny"
    of_another = home / f"worker-{socket.gethostname()}-0"
    of_another.mkdir(parents=True)
    (of_another / "result.json").write_text("{}")
    with exclusive_lock(of_another):
        search_keys(config, space(), tmp_path)
    assert (of_another / "result.json").read_text() == "{}"
    assert (home / f"worker-{socket.gethostname()}-1" / "result.json").is_file()


def test_a_folder_without_locks_is_refused(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="no locks on this file system"):
        begin(search_in(tmp_path, config), "sqlite://")


def test_the_best_are_confirmed_when_all_trials_have_ended(
    playing: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is found is published before, and nothing is confirmed while another process makes a trial."""
    home, confirmed = tmp_path / "tune" / "tiny", list[int]()
    wanted = space(controls={}, confirm={"evaluation": {"first_seed": 9000}})

    def results() -> dict[str, Any]:
        return json.loads((home / "results.json").read_text())

    def confirm(*_: Any) -> dict[str, Any]:
        confirmed.append(len(results()["trials"]))
        return {"best-1": {"verdict": "better", "text": "better: +9"}}

    def beside_another(workers: Mapping[Worker, Any], *_: Any, **__: Any) -> list[str]:
        made, storage = working.read_search(home)
        if not confirmed and not (home / "results.json").is_file():
            take_trial(open_study(made, storage), made, other)
        return in_this_process(workers)

    monkeypatch.setattr(searching, "_confirm", confirm)
    monkeypatch.setattr(searching, "run_cells", beside_another)
    monkeypatch.setattr(working, "run_trial", at_once)
    other = home / "worker-other-0"
    other.mkdir(parents=True)
    with exclusive_lock(other):
        search_keys(playing, wanted, tmp_path)
    assert len(results()["trials"]) == 2 and not confirmed
    assert "1 trials run elsewhere" in " ".join(capsys.readouterr().out.split())
    found = search_keys(playing, wanted, tmp_path)  # the other one was killed
    assert confirmed == [3] and found.verdicts == results()["verdicts"] and found.verdicts


def test_a_machine_whose_trials_are_all_made_elsewhere_is_no_failure(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "run_cells", lambda *_, **__: [])
    assert search_keys(config, space(), tmp_path).trials == ()
    assert not [*tmp_path.rglob("results.json")]


# --- refused before anything runs


def test_what_the_search_sets_itself_is_no_key_to_search() -> None:
    values = tried({"gradients": {}}, validate=0)
    gradients = {f"gradients.{key}" for key in values.pop("gradients")}
    for key in {*values, *gradients}:
        (one,) = parse_overrides([f"training.{key}=1"])
        assert any(one.touches(fixed.split(".")) for fixed in FIXED), key


def test_starts_of_the_demonstrations_are_refused_first(playing: RunConfig, tmp_path: Path) -> None:
    data = squares_data.write(tmp_path / "set", squares_data.episodes(4))
    values = merge(playing.model_dump(mode="json"), {"data": {"sources": [{"path": str(data)}]}})
    of_these = build_config(values, "the test")
    wanted = space(confirm={"evaluation": {"first_seed": 9000}})
    for seeds, key in ([500_002, 500_009], "evaluation.first_seed"), ([9001, 9002], "confirm.evaluation"):
        (data / "recording.json").write_text(json.dumps({"seeds": seeds}))
        with pytest.raises(UserError, match=rf"^{key}.* overlap the demonstrations'"):
            check(Search(config=of_these, space=wanted, home=tmp_path))


def test_a_machine_that_cannot_draw_says_so_first(
    playing: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: SquaresSuite) -> None:
        raise UserError("no EGL")

    monkeypatch.setattr(SquaresSuite, "check_rendering", fail)
    wanted = space(confirm={"evaluation": {"first_seed": 9000}})
    with pytest.raises(UserError, match="no EGL"):
        search_keys(playing, wanted, tmp_path)
    assert not [*tmp_path.rglob("search.json")]

"""No policy is judged on starts that it was trained on, wherever its data lie and whatever names them."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.studies import base, write_data
from tutti import pipeline
from tutti.config.run_config import RunConfig, build_config
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.evaluation.closed_loop.starts import TrainingStarts, check_seeds
from tutti.evaluation.config import EvaluationConfig
from tutti.recording.recorder import RecordSummary
from tutti.runs.build import starts_of_run
from tutti.runs.folder import RunFolder
from tutti.suites.metaworld.suite import MetaWorldSuite
from tutti.types import UserError

SEEDS = {"seeds": [10000, 10007]}
KNOWN = TrainingStarts(seeds=(range(10000, 10008),))
EPISODE = EpisodeRecord(
    images={"observation.images.right": np.zeros((3, 16, 16, 3), np.uint8)},
    states=np.zeros((3, 4), np.float32),
    actions=np.zeros((3, 4), np.float32),
    instruction="push",
)


def say_seeds(folder: Path, seeds: Any = None) -> Path:
    (folder / "recording.json").write_text(json.dumps(seeds or SEEDS))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that says nothing of its starts."""
    return write_data(tmp_path_factory.mktemp("data") / "noise")


def config(*sources: Path, first_seed: int = 10004, **training: Any) -> RunConfig:
    values = base()
    values["data"]["sources"] = [{"path": str(source)} for source in sources]
    values["training"] |= {"steps": 1, "schedule": {"warmup": 0}, "threads": 1, **training}
    values["evaluation"] |= {"first_seed": first_seed}
    return build_config(values, source="test")


def test_a_data_set_says_its_starts_wherever_it_lies(data: Path, tmp_path: Path) -> None:
    own = say_seeds(shutil.copytree(data, tmp_path / "dataset"))
    copied = shutil.copytree(own, tmp_path / "elsewhere" / "mine")
    (tmp_path / "link").symlink_to(own, target_is_directory=True)
    for folder in (own, copied, tmp_path / "link"):
        assert TrainingStarts.of_data(folder) == KNOWN
    assert TrainingStarts.of_data(data) == TrainingStarts(unknown=(str(data),))


def test_an_older_recording_says_them_beside_its_data_set_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("dataset", "other"):
        (run / name).mkdir(parents=True)
    say_seeds(run)
    (tmp_path / "link").symlink_to(run / "dataset", target_is_directory=True)
    assert TrainingStarts.of_data(run / "dataset") == TrainingStarts.of_data(tmp_path / "link") == KNOWN
    assert TrainingStarts.of_data(run / "other").unknown == (str(run / "other"),)


def test_what_is_recorded_says_its_suite_and_seeds_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage `record` with a recorder and a writer that only note what they are given."""
    made = RecordSummary(tries={"reach": 5, "push": 9}, successes={})
    monkeypatch.setattr(MetaWorldSuite, "check_rendering", lambda _: None)
    monkeypatch.setattr(pipeline.recorder, "record", lambda *_: made)
    monkeypatch.setattr(pipeline, "load_recorded", lambda _: iter(()))
    given: dict[str, Any] = {}
    monkeypatch.setattr(pipeline, "write_lerobot", lambda *_, **keys: given.update(keys))
    pipeline.record(config(), tmp_path / "run")
    told = json.loads(given["beside"]["recording.json"])
    assert told["suite"] == "metaworld-8" and told["seeds"] == [10000, 10008]
    assert told == json.loads((tmp_path / "run" / "recording.json").read_text())


def test_the_writer_puts_it_into_the_folder_that_appears_whole(tmp_path: Path) -> None:
    folder = write_lerobot(
        tmp_path / "set",
        [EPISODE],
        fps=20,
        views=("observation.images.right",),
        robot_type="sawyer",
        beside={"recording.json": json.dumps(SEEDS)},
    )
    assert TrainingStarts.of_data(folder) == KNOWN
    assert not (tmp_path / ".partial-set").exists()


def test_training_on_named_data_is_judged_on_none_of_its_starts(data: Path, tmp_path: Path) -> None:
    own = say_seeds(shutil.copytree(data, tmp_path / "mine"))
    pipeline.train(config(own), tmp_path / "run")
    with pytest.raises(UserError, match=r"seeds 10004 to 10007\) overlap .* 10000 to 10007.* 10008 or more"):
        pipeline.evaluate(tmp_path / "run")
    # The run keeps what it was trained on, also where the data have gone.
    shutil.rmtree(own)
    with pytest.raises(UserError, match="overlap"):
        pipeline.evaluate(tmp_path / "run")


def test_a_fork_was_shown_the_starts_of_both_runs(data: Path, tmp_path: Path) -> None:
    first = say_seeds(shutil.copytree(data, tmp_path / "first"))
    second = say_seeds(shutil.copytree(data, tmp_path / "second"), {"seeds": [500, 600]})
    pipeline.train(config(first), tmp_path / "trunk")
    fork = {"steps": 2, "fork": {"run": str(tmp_path / "trunk")}}
    pipeline.train(config(second, **fork), tmp_path / "fork")
    noted = json.loads((tmp_path / "fork" / "data.json").read_text())["starts"]
    assert noted == {"seeds": [[500, 600], [10000, 10007]], "unknown": []}
    with pytest.raises(UserError, match=r"10000 to 10007"):
        pipeline.evaluate(tmp_path / "fork", config(first_seed=9999).evaluation)


def test_several_sources_count_together_and_unknown_ones_are_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = say_seeds(write_data(tmp_path / "own", per_task=3))
    pipeline.train(config(own, data, first_seed=1000), tmp_path / "run")
    capsys.readouterr()

    def stop(suite: MetaWorldSuite) -> None:
        raise UserError("no simulator here")

    monkeypatch.setattr(MetaWorldSuite, "check_rendering", stop)
    with pytest.raises(UserError, match="no simulator here"):
        pipeline.evaluate(tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("starts of the training data are not known: ") == 1
    assert str(data) in said.replace(" ", "") and str(own) not in said.replace(" ", "")
    with pytest.raises(UserError, match="10000 to 10007"):
        pipeline.evaluate(tmp_path / "run", config(first_seed=10007).evaluation, redo=True)


def test_runs_of_before_are_asked_for_their_data(data: Path, tmp_path: Path) -> None:
    """Without a note in data.json: the run's own recording, its sources, and the run it was forked off."""
    trunk = tmp_path / "trunk"
    (trunk / "dataset").mkdir(parents=True)
    say_seeds(trunk)
    RunFolder(trunk).begin("train", config(), "data", "training")
    assert starts_of_run(trunk, config()) == KNOWN
    fork = {"steps": 2, "fork": {"run": str(trunk)}}
    found = starts_of_run(tmp_path / "fork", config(data, **fork))
    assert found == TrainingStarts(seeds=KNOWN.seeds, unknown=(str(data),))
    gone = config(data, steps=2, fork={"run": str(tmp_path / "gone")})
    assert starts_of_run(tmp_path / "fork", gone).unknown == (str(data), str(tmp_path / "gone"))


def test_what_was_not_known_at_the_training_is_asked_again(data: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(data, tmp_path / "mine")
    noted = TrainingStarts.union([TrainingStarts(seeds=(range(5),)), TrainingStarts.of_data(mine)]).to_dict()
    assert TrainingStarts.from_dict(noted).unknown == (str(mine),)
    say_seeds(mine)
    assert TrainingStarts.from_dict(noted) == TrainingStarts(seeds=(range(5), *KNOWN.seeds))


@pytest.mark.parametrize(
    ("first_seed", "episodes", "refused"),
    [(9990, 10, False), (9990, 11, True), (10008, 5, False), (10007, 1, True), (0, 3, False), (2, 5, True)],
)
def test_one_shared_start_is_enough(first_seed: int, episodes: int, refused: bool) -> None:
    trained = TrainingStarts(seeds=(range(10000, 10008), range(3, 5)))
    settings = EvaluationConfig(first_seed=first_seed, episodes=episodes)
    expected = pytest.raises(UserError, match=r"evaluation\.first_seed.*10008 or more")
    with expected if refused else nullcontext():
        check_seeds(settings, trained)


@pytest.mark.parametrize(
    "wrong", [{}, {"seeds": 3}, {"seeds": [2, 1]}, {"seeds": ["a", 4]}, {"seeds": [0.5, 9]}, []]
)
def test_a_recording_that_cannot_be_read_is_named(tmp_path: Path, wrong: Any) -> None:
    (tmp_path / "recording.json").write_text(json.dumps(wrong))
    with pytest.raises(
        UserError, match=r"recording\.json: (`seeds` must be \[first, last\]|expected an object)"
    ):
        TrainingStarts.of_data(tmp_path)

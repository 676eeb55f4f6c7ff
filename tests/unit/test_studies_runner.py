"""Cells as processes: failures, Ctrl-C, kills, what is found again; the cell's own result; how far it is."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from recorded import synthetic_run
from typer.testing import CliRunner

from fixtures.studies import base, cell, make_study, write_data
from tutti.cli import app as cli
from tutti.config.run_config import RunConfig
from tutti.data.formats.lerobot import ENVIRONMENT_STATE
from tutti.data.sources import SourceConfig
from tutti.recording.recorder import RecordConfig
from tutti.serving.policy import Policy
from tutti.storage.files import exclusive_lock
from tutti.studies import pool as runner
from tutti.studies.cells import Cell, cell_config
from tutti.studies.compare import compare, read_plan
from tutti.studies.pool import ONE_THREAD, Work, number_of_jobs, own_command, run_cells
from tutti.studies.run_cell import control_measures, held_out_values, prediction_time, recorded_places
from tutti.suites.metaworld.suite import MetaWorldSuite
from tutti.suites.registry import find_suite
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "fixtures" / "fake_cell.py"
WORK = Work(steps=20, rollouts=8)


def cells_in(folder: Path, *arms: str) -> list[Cell]:
    made = [cell(arm, seed, folder=folder) for seed, arm in enumerate(arms)]
    for one in made:
        one.folder.mkdir(parents=True)
        known = {"arm": one.arm, "level": one.level, "seed": one.seed, "identity": one.identity}
        (one.folder / "cell.json").write_text(json.dumps(known))
    return made


def fake(one: Cell, mode: str = "well", seconds: float = 0.0) -> list[str]:
    return [sys.executable, str(FAKE), str(one.folder), mode, str(seconds)]


def run(
    cells: list[Cell], jobs: int = 1, bar: Any = lambda *_: None, command: Any = fake, **more: Any
) -> list[str]:
    return run_cells(dict.fromkeys(cells, WORK), jobs, bar, command=command, poll=0.01, **more)


def starts(one: Cell) -> int:
    path = one.folder / "starts.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


# --- the runner


def test_every_cell_is_run_and_a_failed_one_is_reported_with_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = cells_in(tmp_path, "end_to_end", "action_only", "other")

    def command(one: Cell) -> list[str]:
        return fake(one, "fail" if one.arm == "action_only" else "well")

    (failure,) = run(cells, 2, command=command)
    assert failure.startswith("action_only, seed 1 (exit 3)") and failure.endswith("the last words")
    results = [one.result() for one in cells]
    assert [one and one.mean for one in results] == [0.75, None, 0.25]
    said = capsys.readouterr().out
    assert "end_to_end, seed 0: done in" in said and "action_only, seed 1: FAILED after" in said


@pytest.mark.parametrize(
    ("command", "how"), [(["true"], "(exit 0)"), (["sh", "-c", "kill -9 $$"], "killed by signal 9")]
)
def test_a_cell_without_a_result_or_that_is_killed_has_failed(
    tmp_path: Path, command: list[str], how: str
) -> None:
    cells = cells_in(tmp_path, "end_to_end")
    (failure,) = run(cells, command=lambda _: command)
    assert how in failure


def test_no_more_cells_than_jobs_run_at_once_and_a_bar_says_how_far_each_is(tmp_path: Path) -> None:
    cells, said = cells_in(tmp_path, *["other"] * 5), list[tuple[int, int, str]]()
    (cells[0].folder / "records.jsonl").write_text('{"step": 15, "kind": "train"}\n')
    run(cells, 2, lambda *shown: said.append(shown), command=lambda one: fake(one, "well", 0.05))
    assert max(note.count("training") for *_, note in said) == 2
    assert said[0] == (
        0,
        5 * 36 - 15,
        "0 of 5 cells ended; other, seed 0: training 15/20; other, seed 1: training 0/20",
    )
    assert said[-1] == (5 * 36 - 15, 5 * 36 - 15, "5 of 5 cells ended")


def interrupt_when_asleep(*cells: Cell) -> threading.Thread:
    """Sends Ctrl-C to this process once the processes of these cells are at work."""

    def send() -> None:
        for one in cells:
            wait_for(one.folder / "asleep.txt")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_ctrl_c_lets_running_cells_save_and_starts_no_other(tmp_path: Path) -> None:
    cells = cells_in(tmp_path, "end_to_end", "action_only", "other")
    thread = interrupt_when_asleep(*cells[:2])
    with pytest.raises(KeyboardInterrupt):
        run(cells, 2, command=lambda one: fake(one, "well", 30))
    thread.join()
    assert [(one.folder / "saved.txt").exists() for one in cells] == [True, True, False]
    assert [starts(one) for one in cells] == [1, 1, 0]


def test_ctrl_c_while_a_cell_is_being_started_stops_that_cell_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_in(tmp_path, "end_to_end", "action_only")
    start = runner._start

    def interrupted(one: Cell, command: list[str]) -> Any:
        process = start(one, command)
        wait_for(one.folder / "asleep.txt")
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(runner, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cells, 2, command=lambda one: fake(one, "well", 30))
    assert [(one.folder / "saved.txt").exists() for one in cells] == [True, False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_cell_that_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    cells = cells_in(tmp_path, "end_to_end")
    thread = interrupt_when_asleep(*cells)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(cells, command=lambda one: fake(one, "stubborn", 30), grace=0.5)
    thread.join()
    assert time.monotonic() - began < 15 and cells[0].result() is None


def run_orphan(one: Cell) -> None:
    run([one], command=lambda c: fake(c, "orphan"))


def test_cells_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    (one,) = cells_in(tmp_path, "end_to_end")
    study = multiprocessing.get_context("fork").Process(target=run_orphan, args=(one,))
    study.start()
    wait_for(one.folder / "starts.txt")
    study.kill()
    study.join(20)
    wait_for(one.folder / "alone.txt")


def test_a_cell_has_one_thread_hangs_on_its_study_and_auto_is_one_for_each_core() -> None:
    assert ONE_THREAD["OMP_NUM_THREADS"] == "1" and ONE_THREAD["OMP_WAIT_POLICY"] == "PASSIVE"
    assert own_command(cell("a"))[1:] == ["-m", "tutti.studies.run_cell", "cells/a-base-0", "--attached"]
    assert [number_of_jobs(3, 10), number_of_jobs(8, 2), number_of_jobs("auto", 0)] == [3, 2, 1]
    assert 1 <= number_of_jobs("auto", 1000) <= (os.cpu_count() or 1)


# --- how far a cell is


def test_work_is_that_of_the_config_and_done_by_records_and_rollouts(tmp_path: Path) -> None:
    def work(**evaluation: Any) -> Work:
        study = make_study(evaluation=evaluation)
        return Work.of(cell_config(study, "end_to_end", level="base", seed=0, steps=20, sources=()))

    assert work(episodes=3) == Work(steps=20, rollouts=6)
    assert work(episodes=3, tasks="suite") == Work(steps=20, rollouts=24)
    assert WORK.text(WORK.done_in(tmp_path / "nothing")) == "training 0/20"
    (tmp_path / "records.jsonl").write_text('{"step": 10, "kind": "train"}\n{"step": 15, "kind": "tr')
    assert WORK.text(WORK.done_in(tmp_path)) == "training 10/20"
    rollouts = tmp_path / "evaluation" / "policy" / "reach"
    rollouts.mkdir(parents=True)
    (rollouts / "1000.json").write_text("{}")
    now = WORK.done_in(tmp_path)
    assert (WORK.text(now), now.units) == ("evaluating 1/8", 22.0)


def test_last_held_out_value_of_each_term_is_kept_when_it_stops_counting() -> None:
    records = [
        {"kind": "validation", "step": 10, "valid/align": 2.0, "valid/action": 1.0, "valid/total": 3.0},
        {"kind": "train", "step": 15, "loss/total": 1.0},
        {"kind": "validation", "step": 20, "valid/action": 0.5, "valid/metric/action/chunk_l1": 0.4},
    ]
    assert held_out_values(records) == {"align": 2.0, "action": 0.5}


def test_controls_and_the_first_goal_are_kept_beside_success() -> None:
    def score(mean: float, *goals: dict[str, int]) -> dict[str, Any]:
        return {"mean": mean, "tasks": [{"goals": one} for one in goals]}

    plain = {"policy": score(0.5, {}, {}), "no_image": score(0.25, {}, {})}
    assert control_measures(plain) == {"success/no_image": 0.25}
    goals = {
        "policy": score(0.75, {"told": 3, "none": 1}),
        "wrong_instruction": score(0.25, {"told": 1, "own": 1, "another": 2}),
    }
    assert control_measures(goals) == {
        "success/wrong_instruction": 0.25,
        "told_goal_first/policy": 0.75,
        "no_goal/policy": 0.25,
        "told_goal_first/wrong_instruction": 0.25,
        "no_goal/wrong_instruction": 0.0,
    }


def test_places_are_those_that_the_simulator_knew_whatever_labels_are_used(tmp_path: Path) -> None:
    suite = find_suite("metaworld-8")
    run = synthetic_run(tmp_path, RunConfig(record=RecordConfig(tasks=("reach", "push"))), 2, length=5)
    labels = {"actions": False, "state": False}
    parts = [{"per_task": "0-0"}, {"per_task": "1-", "labels": labels}]
    sources = [{"path": str(run / "dataset"), **part} for part in parts]
    found = recorded_places(RunConfig.model_validate({"data": {"sources": sources}}), suite)
    assert {name: place.shape for name, place in found.items()} == {"object": (20, 3), "goal": (20, 3)}
    known = SourceConfig(path=run / "dataset", state=ENVIRONMENT_STATE).open().states
    assert np.array_equal(found["object"], known[:, 4:7]) and np.array_equal(found["goal"], known[:, 36:39])
    other = RunConfig.model_validate({"data": {"sources": [{"path": str(write_data(tmp_path / "other"))}]}})
    assert recorded_places(other, suite) == {}


# --- the whole study, with stand-ins for its cells


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(MetaWorldSuite, "check_rendering", lambda _: None)
    return make_study(write_data(tmp_path / "set"), jobs=1)


def test_study_is_run_once_and_found_again_also_where_it_was_moved(study: Any, tmp_path: Path) -> None:
    home, moved = tmp_path / "study", tmp_path / "moved"
    page = compare(study, home, command=fake)
    assert page == home / "report.html" and page.is_file()
    cells = read_plan(home).cells
    assert [starts(one) for one in cells] == [1, 1]
    assert {name for name in ("study.yaml", "costs.json", "results.md")} <= {p.name for p in home.iterdir()}
    first = json.loads((home / "results.json").read_text())
    with exclusive_lock(home, ""), pytest.raises(UserError, match="another process is running"):
        compare(study, home, command=fake)
    home.rename(moved)
    compare(study, moved, command=fake)
    assert [starts(one) for one in read_plan(moved).cells] == [1, 1]
    second = json.loads((moved / "results.json").read_text())
    assert first["cells"] == second["cells"] and first["scores"] == second["scores"]


def test_failed_cells_end_the_command_are_reported_missing_and_only_they_are_run_again(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "study"
    with pytest.raises(UserError, match="this study was never started"):
        compare(study, home, report_only=True)

    def broken(one: Cell) -> list[str]:
        return fake(one, "fail" if one.arm == "action_only" else "well")

    with pytest.raises(UserError, match=r"1 of 2 cells failed:\n\naction_only(.|\n)*the last words"):
        compare(study, home, command=broken)
    assert json.loads((home / "results.json").read_text())["missing"] == ["action_only, seed 0"]
    capsys.readouterr()
    compare(study.model_copy(update={"seeds": 2}), home, report_only=True)
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "1 of 2 cells are missing: action_only, seed 0." in said and "file has changed since" in said
    assert starts(read_plan(home).cells[1]) == 1
    compare(study, home, command=fake)
    assert [starts(one) for one in read_plan(home).cells] == [1, 2]
    assert json.loads((home / "results.json").read_text())["missing"] == []


def test_mistake_in_any_arm_is_told_before_anything_is_made(tmp_path: Path) -> None:
    broken = make_study(arms={"end_to_end": [], "typo": ["strategy.kind=two_stages"]})
    with pytest.raises(UserError, match="arm 'typo'"):
        compare(broken, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_command_line_teaches_its_mistakes(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        json.dumps({"name": "s", "base": base(), "arms": {"a": [], "b": ["seed=1"]}, "baseline": "c"})
    )
    result = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "s.yaml")])
    assert result.exit_code == 2
    assert "baseline is 'c', but the arms are a, b" in result.output and "Traceback" not in result.output
    result = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "s.yaml"), "baseline=a"])
    assert result.exit_code == 2 and "seed is not an arm's to change" in result.output


def test_a_prediction_is_timed_with_pictures_that_nothing_can_have_kept() -> None:
    seen: list[bytes] = []

    class Watched(Policy):
        def __init__(self) -> None:
            self.spec: Any = SimpleNamespace(views=("front", "hand"), image_size=8, state_dim=3)

        def predict(self, images: Any, *given: Any, **keys: Any) -> Any:
            assert {one.shape for one in images.values()} == {(8, 8, 3)}
            seen.extend(one.tobytes() for one in images.values())

    assert prediction_time(Watched(), repeats=5) >= 0
    assert len({*seen}) == len(seen) == 16

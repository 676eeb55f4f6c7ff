"""Cells as processes: failures, Ctrl-C, kills, what is found again; the cell's own result; the board."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fixtures.studies import base, cell, make_study, write_data
from tutti.cli import main as cli
from tutti.storage.files import exclusive_lock
from tutti.studies import pool as runner
from tutti.studies.cells import Cell, cell_config
from tutti.studies.compare import compare, read_plan
from tutti.studies.pool import ONE_THREAD, StudyProgress, Work, number_of_jobs, own_command, run_cells
from tutti.studies.run_cell import held_out_values
from tutti.suites.metaworld.suite import MetaWorldSuite
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


def board(cells: list[Cell]) -> StudyProgress:
    return StudyProgress(dict.fromkeys(cells, WORK), 0)


def starts(one: Cell) -> int:
    path = one.folder / "starts.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


# --- the runner


def test_every_cell_is_run_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = cells_in(tmp_path, "end_to_end", "action_only", "other")
    assert run_cells(cells, 2, board(cells), command=fake, poll=0.01) == []
    results = [one.result() for one in cells]
    assert [one.mean for one in results if one] == [0.75, 0.5, 0.25]
    said = capsys.readouterr().out
    assert "end_to_end, seed 0: done in" in said and "3 of 3 done" in said


def test_a_failed_cell_is_reported_with_its_last_words_and_the_others_go_on(tmp_path: Path) -> None:
    cells = cells_in(tmp_path, "end_to_end", "action_only", "other")

    def command(one: Cell) -> list[str]:
        return fake(one, "fail" if one.arm == "action_only" else "well")

    (failure,) = run_cells(cells, 1, board(cells), command=command, poll=0.01)
    assert failure.startswith("action_only, seed 1 (exit 3)") and failure.endswith("the last words")
    assert [one.result() is not None for one in cells] == [True, False, True]


def test_a_cell_that_ends_well_without_a_result_has_failed(tmp_path: Path) -> None:
    cells = cells_in(tmp_path, "end_to_end")
    (failure,) = run_cells(cells, 1, board(cells), command=lambda _: ["true"], poll=0.01)
    assert "(exit 0)" in failure


def test_a_killed_cell_names_the_signal(tmp_path: Path) -> None:
    cells = cells_in(tmp_path, "end_to_end")
    (failure,) = run_cells(cells, 1, board(cells), command=lambda _: ["sh", "-c", "kill -9 $$"], poll=0.01)
    assert "killed by signal 9" in failure


def test_no_more_cells_than_jobs_run_at_once(tmp_path: Path) -> None:
    cells = cells_in(tmp_path, *["other"] * 5)
    seen: list[int] = []

    class Watching(StudyProgress):
        def show(self, running: Any) -> None:
            seen.append(len(running))

    watching = Watching(dict.fromkeys(cells, WORK), 0)
    run_cells(cells, 2, watching, command=lambda one: fake(one, "well", 0.05), poll=0.01)
    assert max(seen) == 2


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
        run_cells(cells, 2, board(cells), command=lambda one: fake(one, "well", 30), poll=0.01)
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
        run_cells(cells, 2, board(cells), command=lambda one: fake(one, "well", 30), poll=0.01)
    assert [(one.folder / "saved.txt").exists() for one in cells] == [True, False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_cell_that_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    cells = cells_in(tmp_path, "end_to_end")
    thread = interrupt_when_asleep(*cells)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, 1, board(cells), command=lambda one: fake(one, "stubborn", 30), poll=0.01, grace=0.5)
    thread.join()
    assert time.monotonic() - began < 15 and cells[0].result() is None


def run_orphan(one: Cell) -> None:
    run_cells([one], 1, board([one]), command=lambda c: fake(c, "orphan"))


def test_cells_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    (one,) = cells_in(tmp_path, "end_to_end")
    study = multiprocessing.get_context("fork").Process(target=run_orphan, args=(one,))
    study.start()
    wait_for(one.folder / "starts.txt")
    study.kill()
    study.join(20)
    wait_for(one.folder / "alone.txt")


def test_auto_is_a_job_for_each_core_but_no_more_than_cells() -> None:
    assert number_of_jobs(3, 10) == 3
    assert number_of_jobs(8, 2) == 2
    assert number_of_jobs("auto", 0) == 1
    assert 1 <= number_of_jobs("auto", 1000) <= (os.cpu_count() or 1)


def test_a_cells_process_has_one_thread_and_hangs_on_its_study() -> None:
    assert ONE_THREAD["OMP_NUM_THREADS"] == "1" and ONE_THREAD["OMP_WAIT_POLICY"] == "PASSIVE"
    assert own_command(cell("a"))[1:] == ["-m", "tutti.studies.run_cell", "cells/a-base-0", "--attached"]


# --- how far a cell is


def test_standing_is_read_from_records_and_rollouts(tmp_path: Path) -> None:
    assert WORK.text(WORK.done_in(tmp_path / "nothing")) == "training 0/20"
    (tmp_path / "records.jsonl").write_text('{"step": 10, "kind": "train"}\n{"step": 15, "kind": "tr')
    assert WORK.text(WORK.done_in(tmp_path)) == "training 10/20"
    rollouts = tmp_path / "evaluation" / "policy" / "reach"
    rollouts.mkdir(parents=True)
    (rollouts / "1000.json").write_text("{}")
    now = WORK.done_in(tmp_path)
    assert (WORK.text(now), now.units) == ("evaluating 1/8", 22.0)


def test_work_counts_steps_and_the_rollouts_of_every_task() -> None:
    def work(**evaluation: Any) -> Work:
        study = make_study(evaluation=evaluation)
        return Work.of(cell_config(study, "end_to_end", level="base", seed=0, steps=20, sources=()))

    assert work(episodes=3) == Work(steps=20, rollouts=6)
    assert work(episodes=3, tasks="suite") == Work(steps=20, rollouts=24)


def test_board_estimates_the_rest_from_the_pace_of_this_session(tmp_path: Path) -> None:
    moment = [0.0]
    cells = cells_in(tmp_path, "end_to_end", "action_only", "other")
    shown = StudyProgress(dict.fromkeys(cells, WORK), 1, clock=lambda: moment[0])
    assert shown.seconds_left({}) is None
    shown.start(cells[0])
    shown.start(cells[1])
    moment[0] = 36.0
    shown.end(cells[0], failed=False)
    assert shown.seconds_left({cells[1]: Work(steps=0, rollouts=0)}) == pytest.approx(72.0)
    half = Work(steps=18, rollouts=0)
    assert shown.seconds_left({cells[1]: half}) == pytest.approx((18 + 36) * 36 / 54)
    assert shown.totals({cells[1]: half}) == "2 of 4 done, 1 running, 36 s left"
    shown.end(cells[1], failed=True)
    assert shown.totals({}) == "2 of 4 done, 1 failed, 36 s left"


def test_terminal_shows_a_bar_for_each_running_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = StringIO()
    console = Console(file=written, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(runner, "console", console)
    cells = cells_in(tmp_path, "end_to_end", "action_only")
    moment = [0.0]
    with StudyProgress(dict.fromkeys(cells, WORK), 3, clock=lambda: moment[0]) as shown:
        shown.start(cells[0])
        (cells[0].folder / "records.jsonl").write_text('{"step": 18, "kind": "train"}\n')
        moment[0] = 60.0
        shown.show([cells[0]])
    said = written.getvalue()
    assert "end_to_end, seed 0" in said and "training 18/20" in said and "1 min 00 s left" in said
    assert "3 of 5 done, 1 running, 3 min 00 s left" in said


def test_without_a_terminal_a_line_a_minute_says_where_each_cell_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = cells_in(tmp_path, "end_to_end")
    moment = [0.0]
    shown = StudyProgress(dict.fromkeys(cells, WORK), 0, clock=lambda: moment[0])
    shown.start(cells[0])
    for now in (30.0, 61.0, 90.0):
        moment[0] = now
        shown.show(cells)
    assert capsys.readouterr().out.count("end_to_end, seed 0: training 0/20") == 1


def test_last_held_out_value_of_each_term_is_kept_when_it_stops_counting() -> None:
    records = [
        {"kind": "validation", "step": 10, "valid/align": 2.0, "valid/action": 1.0, "valid/total": 3.0},
        {"kind": "train", "step": 15, "loss/total": 1.0},
        {"kind": "validation", "step": 20, "valid/action": 0.5, "valid/metric/action/chunk_l1": 0.4},
    ]
    assert held_out_values(records) == {"align": 2.0, "action": 0.5}


# --- the whole study, with stand-ins for its cells


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(MetaWorldSuite, "check_rendering", lambda _: None)
    return make_study(write_data(tmp_path / "set"), jobs=1)


def test_study_is_run_once_and_found_again(study: Any, tmp_path: Path) -> None:
    home = tmp_path / "study"
    page = compare(study, home, command=fake)
    assert page == home / "report.html" and page.is_file()
    cells = read_plan(home).cells
    assert [starts(one) for one in cells] == [1, 1]
    assert all((one.folder / "cache").is_symlink() for one in cells)
    before = (home / "results.json").read_text()
    compare(study, home, command=fake)
    assert [starts(one) for one in read_plan(home).cells] == [1, 1]
    first, second = json.loads(before), json.loads((home / "results.json").read_text())
    assert first["cells"] == second["cells"] and first["scores"] == second["scores"]
    assert {name for name in ("study.yaml", "costs.json", "results.md")} <= {p.name for p in home.iterdir()}


def test_failed_cells_end_the_command_and_only_they_are_run_again(study: Any, tmp_path: Path) -> None:
    home = tmp_path / "study"

    def broken(one: Cell) -> list[str]:
        return fake(one, "fail" if one.arm == "action_only" else "well")

    with pytest.raises(UserError, match=r"1 of 2 cells failed:\n\naction_only(.|\n)*the last words"):
        compare(study, home, command=broken)
    assert json.loads((home / "results.json").read_text())["missing"] == ["action_only, seed 0"]
    compare(study, home, command=fake)
    assert [starts(one) for one in read_plan(home).cells] == [1, 2]
    assert json.loads((home / "results.json").read_text())["missing"] == []


def test_report_only_runs_nothing_and_says_what_is_missing(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "study"
    with pytest.raises(UserError, match="this study was never started"):
        compare(study, home, report_only=True)
    with pytest.raises(UserError):
        compare(study, home, command=lambda one: fake(one, "fail"))
    kept = read_plan(home).cells[0]
    run_cells([kept], 1, board([kept]), command=fake, poll=0.01)
    capsys.readouterr()
    compare(study, home, report_only=True)
    said = capsys.readouterr().out
    assert "1 of 2 cells are missing: action_only, seed 0." in re.sub(r"\s+", " ", said)
    assert starts(read_plan(home).cells[1]) == 1
    compare(study.model_copy(update={"seeds": 2}), home, report_only=True)
    assert "file has changed since" in capsys.readouterr().out


def test_study_that_was_moved_is_found_whole(study: Any, tmp_path: Path) -> None:
    compare(study, tmp_path / "study", command=fake)
    (tmp_path / "study").rename(tmp_path / "moved")
    compare(study, tmp_path / "moved", report_only=True)
    assert len(json.loads((tmp_path / "moved" / "results.json").read_text())["cells"]) == 2


def test_a_study_is_run_by_one_process_at_a_time(study: Any, tmp_path: Path) -> None:
    home = tmp_path / "study"
    with exclusive_lock(_made(home), ""), pytest.raises(UserError, match="another process is running"):
        compare(study, home, command=fake)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


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

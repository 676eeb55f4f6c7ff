"""The live report: it follows the files of runs, overlays them, answers this machine alone."""

from __future__ import annotations

import json
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from typer.testing import CliRunner

from fixtures.report_runs import HOSTILE, make_run
from tutti.cli.app import app
from tutti.report import inputs
from tutti.report.inputs import read_inputs
from tutti.report.live import LiveReport, serve_report
from tutti.types import UserError


def record(run: Path, step: int, **values: float) -> None:
    run.mkdir(exist_ok=True)
    line = {"step": step, "kind": "train", "loss/total": 1 / step, "loss/action/raw": 2 / step, **values}
    with (run / "records.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "a", tmp_path / HOSTILE.replace("/", "")]
    for number, run in enumerate(made):
        for step in (10, 20):
            record(run, step + number)
    record(made[0], 30, **{"diag/cosine/action~align/fusion": -0.5, "diag/update_share/align/fusion": 0.2})
    return made


@pytest.fixture
def address(runs: list[Path]) -> Iterator[str]:
    server = serve_report(runs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def get(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
        return answer.read().decode("utf-8")


def status(address: str, **headers: str) -> int:
    with pytest.raises(HTTPError) as error:
        get(address, **headers)
    return error.value.code


def lines_of(page: str) -> dict[str, list[list[float]]]:
    """The values of the lines of each chart, by its spoken name."""
    charts = re.findall(r'aria-label="([^"]*)"[^>]* data-chart="([^"]*)"', page)
    unescaped = [
        (name, json.loads(data.replace("&quot;", '"').replace("&amp;", "&"))) for name, data in charts
    ]
    return {name.partition(":")[0]: [one["xs"] for one in chart["series"]] for name, chart in unescaped}


def test_every_file_that_a_report_shows_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    (run / "evaluations" / "raw").mkdir(parents=True)
    (run / "evaluations" / "raw" / "results.json").write_bytes((run / "evaluation/results.json").read_bytes())
    read: list[Path] = []
    attempt = inputs._attempt

    def noted(path: Path, *rest: Any) -> Any:
        read.append(path)
        return attempt(path, *rest)

    monkeypatch.setattr(inputs, "_attempt", noted)
    read_inputs(run)
    there = [path for path in dict.fromkeys(read) if path.is_file()]
    assert len(there) >= 12 and run / "evaluations/raw/results.json" in there
    live = LiveReport([run])
    for path in there:
        before = live.state
        path.write_bytes(path.read_bytes() + b" ")
        assert live.state != before, path
    link = run / "evaluation" / "gone.json"
    link.symlink_to("nowhere")
    assert live.state, "a file that goes while it is looked at"
    for address in ("/", "/?1", "/?2", "/0/", "/00/", "/000/?x"):
        assert live.answer(address)[0] == 200
    assert len(live._kept) == 2, "as many pages as there are, whatever is asked for"


def test_the_page_follows_the_files_of_both_runs(address: str, runs: list[Path]) -> None:
    page, before = get(f"{address}/"), get(f"{address}/state")
    assert f'let seen = "{before}"' in page
    lines = lines_of(page)
    assert lines["loss/total"] == [[10, 20, 30], [11, 21]]
    assert lines["diag/cosine/action~align/fusion"] == [[30]]
    assert lines["diag/update_share/align/fusion"] == [[30]]
    assert "Not recorded yet." in page and "<script>alert(1)" not in page
    record(runs[1], 31)
    assert (after := get(f"{address}/state")) != before
    page = get(f"{address}/")
    assert lines_of(page)["loss/total"] == [[10, 20, 30], [11, 21, 31]] and f'let seen = "{after}"' in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy and "connect-src 'self'" in policy[1] and "default-src 'none'" in policy[1]
    assert page.count("<header") == page.count("<main") == 1  # what the script replaces


def test_each_run_has_its_whole_report_and_success_when_it_comes(address: str, runs: list[Path]) -> None:
    assert "report of a run" in get(f"{address}/0/") and not (runs[0] / "report.html").exists()
    before = get(f"{address}/0/state")
    for path in sorted(make_run(runs[0].parent / "whole").iterdir()):
        target = runs[0] / path.name
        os.replace(path, target) if not target.exists() or path.is_file() else None
    assert get(f"{address}/0/state") != before
    assert re.search(r"\d+\.\d %", get(f"{address}/")) and "Success per task" in get(f"{address}/0/")


def test_it_answers_this_machine_alone_and_knows_no_other_files(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    for place in ("/2/", "/records.jsonl", "/../../etc/passwd", "/0/../a", "/0"):
        assert status(f"{address}{place}") == 404
    assert status(f"{address}/", Host="evil.example:80") == 403
    assert status(f"{address}/state", Host="evil.example") == 403


def test_a_port_that_is_taken_is_said_with_the_way_out(address: str, runs: list[Path]) -> None:
    port = int(address.rpartition(":")[2])
    with pytest.raises(UserError, match=rf"port {port}: Address already in use. .*--port 0"):
        serve_report(runs, port)


def test_runs_of_one_name_are_told_apart_and_an_empty_one_is_waited_for(tmp_path: Path) -> None:
    for name in ("x/run", "y/run"):
        (tmp_path / name).mkdir(parents=True)
    live = LiveReport([tmp_path / "x/run", tmp_path / "y/run"])
    assert live.names == ["x/run", "y/run"]
    code, _, page = live.answer("/")
    assert code == 200 and page.count("Not recorded yet.") == 5
    said = CliRunner().invoke(app, ["report", str(tmp_path / "x/run"), str(tmp_path / "y/run")])
    assert said.exit_code == 2 and "add --serve" in " ".join(said.output.split())


def test_a_cosine_has_no_log_scale_where_all_are_positive(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, value in ((10, 0.001), (20, 0.9)):
        record(run, step, **{"diag/cosine/action~align/fusion": value, "loss/align/raw": value})
    page = LiveReport([run]).answer("/")[2]
    conflicts = page[page.index('id="conflicts"') :]
    assert "cosine/action~align" in conflicts and "log scale" not in conflicts
    assert "log scale" in page, "a loss over factors has one"

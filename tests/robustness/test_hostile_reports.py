"""A report is made of whatever a run's folder holds, and the system's refusals are messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fixtures import hostile
from fixtures.hostile import TEXTS, Stranger, bounded, call, one_screen, put
from tutti import pipeline
from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.types import UserError

REPORTED = (
    *("evaluation/results.json", "evaluation/open_loop.json", "summary.json", "evaluation/videos/index.json"),
    *("probes/probes.json", "model.json", "data.json", "recording.json", "records.jsonl", "first_batch.png"),
    *("first_batch.json", "probes/occlusion.png", "failures/step-000001/failure.json"),
)


def report(run: Path) -> str:
    """The page that `tutti report` makes of the run."""
    done = call("report", run)
    assert done.exit_code == 0, (done.output[-2000:], repr(done.exception))
    assert "Traceback" not in done.output
    return (run / "report.html").read_text()


@pytest.mark.parametrize("form", [*hostile.JSON, *hostile.SPECIAL])
def test_no_torn_or_foreign_file_stops_the_report(stranger: Stranger, form: str) -> None:
    make = hostile.SPECIAL.get(form, lambda path: path.write_bytes(hostile.JSON[form]))
    for name in REPORTED:
        path = stranger.run / name
        if (name, form) != ("summary.json", "folder"):  # it is written too
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            make(path)
    page = report(stranger.run)
    if form not in ("list", "null", "nan"):  # which are whole, only not what is expected
        assert "results.json" in page


FOREIGN: dict[str, Any] = {
    "evaluation/results.json": {"scores": {"policy": {"tasks": {"a": [1]}, "mean": "x"}}, "verdicts": [1]},
    "evaluation/open_loop.json": {"overall": {"normalised": {"executed": "x"}}, "tasks": 7},
    "evaluation/videos/index.json": {"videos": [{"task": [], "file": "../../etc/passwd", "seed": {}}, 3]},
    "probes/probes.json": {"findings": [{"sentence": {}, "severity": [], "cure": []}], "ablations": 3},
    "model.json": {"modules": [{"depth": "x", "parameters": 10**400}], "tokens": [[[[]]]]},
    "data.json": [[[[[[]]]]]],
    "recording.json": {"seeds": "x", "tries": 1e308},
    "summary.json": {"name": {}, "seconds": "x", "success": {"a": [10**400, 1]}},
    "failures/step-000001/failure.json": [{"step": []}],
}


@pytest.mark.parametrize("name", [*FOREIGN, "config.yaml", "records.jsonl"])
def test_values_of_another_form_do_not_stop_the_report(stranger: Stranger, name: str) -> None:
    path = stranger.run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "config.yaml":
        path.write_text(hostile.YAML["laughs"])
    elif name == "records.jsonl":
        lines = [b'{"step": 1, "a": 1' + b"0" * 400 + b"}", b'{"step": 1e999}', b"\xff\xfe", b"[" * 10**5]
        lines += [
            b'{"step": -5, "loss/total": "x", "b": ' + b'{"c": ' * 800 + b"1" + b"}" * 801,
            b"x" * 2**21,
        ]
        path.write_bytes(path.read_bytes() + b"\n".join(lines) + b"\n")
    else:
        path.write_text(json.dumps(FOREIGN[name]))
    report(stranger.run)


def test_records_that_are_none_are_refused_by_a_resume(unfinished: Stranger) -> None:
    path = unfinished.run / "records.jsonl"
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    assert "records.jsonl" in unfinished.resumed()


def test_what_a_link_leads_to_is_neither_shown_nor_overwritten(stranger: Stranger, tmp_path: Path) -> None:
    """Links to files of the user's in the places where a command reads or writes."""
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"my own secret")
    run = stranger.run
    (run / "evaluation" / "videos").mkdir(parents=True)
    (run / "evaluation" / "videos" / "index.json").write_text(
        json.dumps({"videos": [{"task": "a", "file": "a.mp4"}]})
    )
    (run / "probes").mkdir(exist_ok=True)
    links = [f".partial-{name}" for name in ("report.html", "summary.json", "stages.json")]
    for name in (
        "evaluation/videos/a.mp4",
        "first_batch.png",
        "probes/occlusion.png",
        ".lock",
        "report.html",
        *links,
    ):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret)
    refused = stranger.refused("report", run)
    assert ".lock" in refused
    (run / ".lock").unlink()
    page = report(run)
    assert "my own secret" not in page and "bXkgb3duIHNlY3JldA" not in page
    assert secret.read_bytes() == b"my own secret"


@pytest.mark.parametrize("name", [*TEXTS, "ema.safetensors"])
def test_the_content_behind_a_link_is_not_told(stranger: Stranger, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("my own secret: [unfinished\n")
    for folder in (stranger.checkpoint, stranger.run):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
    assert "my own secret" not in stranger.load()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileNotFoundError(2, "No such file or directory", "runs/a/records.jsonl"), "runs/a/records.jsonl"),
        (PermissionError(13, "Permission denied", "runs/a/.lock"), "runs/a/.lock: Permission denied"),
        (UnicodeDecodeError("utf-8", b"\xff" * 10_000, 0, 1, "invalid start byte"), "UTF-8"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError("Unable to allocate 1.00 TiB"), "not enough memory (Unable to allocate 1.00 TiB)"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_the_system_refuses_is_a_message(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "report", fail)
    assert says in stranger.refused("report", stranger.run)


def test_a_recording_that_names_no_seeds_is_refused(stranger: Stranger) -> None:
    for content in (*hostile.JSON.values(), b'{"seeds": [1, 2, 3]}', b'{"seeds": ["a", "b"]}'):
        (stranger.run / "recording.json").write_bytes(content)
        with bounded(), pytest.raises(UserError, match=r"recording\.json") as caught:
            TrainingStarts.of_data(stranger.run / "dataset")
        one_screen(str(caught.value))


def test_texts_of_another_form_do_not_stop_a_fork_with_a_traceback(stranger: Stranger) -> None:
    """A fork compares the texts of the other run with its own."""
    whole = {name: (stranger.checkpoint / name).read_bytes() for name in TEXTS}
    for name in TEXTS:
        put(stranger.checkpoint, name, hostile.YAML["laughs"].encode() if "yaml" in name else b"[1]")
        stranger.forked()
        put(stranger.checkpoint, name, whole[name])


@pytest.mark.parametrize("name", ["records.jsonl", "config.yaml", "failures/step-000001/failure.json"])
def test_no_command_follows_a_link_out_of_the_run(stranger: Stranger, tmp_path: Path, name: str) -> None:
    """A file of the user's that would be shown in a page, or written on."""
    path, secret = stranger.run / name, tmp_path / "secret"
    secret.write_text('{"step": 77777, "message": "my own secret", "kind": "train"}\n')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    page = report(stranger.run)
    assert "my own secret" not in page and "77777" not in page
    assert "leads out" in page or "a link to" in page
    if name != "records.jsonl":
        command = ("replay", stranger.run, "--failure") if "failure" in name else ("probe", stranger.run)
        assert "my own secret" not in stranger.refused(*command)

"""The command line: it teaches, answers fast, and turns mistakes and Ctrl-C into one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tutti
from tutti import pipeline
from tutti.cli import app
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def raising(error: BaseException) -> object:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_help_shows_the_order_and_every_command() -> None:
    code, text = run("--help")
    assert code == 0
    order = [text.index(f"tutti {name}") for name in ("demo", "record", "train", "evaluate", "report")]
    assert order == sorted(order)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "command",
    [
        *("demo", "record", "train", "evaluate", "report", "doctor", "probe", "compare"),
        *("verify-resume", "replay", "export"),
        *("schema", "model", "version"),
    ],
)
def test_every_command_has_help(command: str) -> None:
    code, text = run(command, "--help")
    assert code == 0
    assert "Usage:" in text


def test_no_arguments_is_help() -> None:
    assert "Start here" in run()[1]


def test_version_is_the_packages() -> None:
    assert run("version") == (0, tutti.__version__ + "\n")


def test_mistyped_command_names_the_near_miss() -> None:
    code, text = run("trian")
    assert code == 2
    assert "train" in text


def test_schema_is_valid_json() -> None:
    code, text = run("schema")
    assert code == 0
    assert "training" in json.loads(text)["properties"]


def test_mistake_is_a_message_without_traceback() -> None:
    code, text = run("train", DEMO, "training.stepz=3")
    assert code == 2
    assert text.startswith("error: ")
    assert "Did you mean 'training.steps'?" in text
    assert "Traceback" not in text


def test_brackets_in_a_message_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "train", raising(UserError("found [bold] and [/] here")))
    assert "found [bold] and [/] here" in run("train", DEMO)[1]


def test_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "train", raising(KeyboardInterrupt()))
    code, text = run("train", DEMO)
    assert code == 130
    assert "interrupted; run the same command again to continue" in text


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "train", raising(ValueError("a bug")))
    result = CliRunner().invoke(app, ["train", DEMO])
    assert isinstance(result.exception, ValueError)


def test_report_of_no_run_names_the_folder(tmp_path: Path) -> None:
    code, text = run("report", str(tmp_path / "nothing"))
    assert code == 2
    assert "nothing" in text


def test_evaluate_refuses_to_change_what_a_run_was_trained_with(tmp_path: Path) -> None:
    code, text = run("evaluate", str(tmp_path), "training.steps=3")
    assert code == 2
    assert "only keys of evaluation" in text


def test_model_prints_modules_parameters_and_tokens() -> None:
    code, text = run("model", DEMO)
    assert code == 0
    for word in ("vision", "language", "fusion", "action", "parameters", "tokens"):
        assert word in text

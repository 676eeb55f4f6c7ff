"""The command line: it teaches, answers fast, and turns mistakes and Ctrl-C into one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.text import Text
from typer.testing import CliRunner

import tutti
from tutti import pipeline
from tutti.cli.app import COMMANDS, app
from tutti.config.files import config_file
from tutti.runs.data_check import is_config
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
    assert "Start here" in run()[1]
    for command in COMMANDS:
        code, text = run(command.__name__.replace("_", "-"), "--help")
        assert code == 0 and "Usage:" in text


def test_version_is_the_packages() -> None:
    assert run("version") == (0, tutti.__version__ + "\n")
    assert run("--version") == (0, f"tutti {tutti.__version__}\n")
    code, text = run("version", "--all")
    assert code == 0 and all(f"\n{name}: " in text for name in ("python", "torch", "cores", "commit"))


MISTAKES = {
    "train configs/dmo.yaml": "configs/dmo.yaml: no such config file. Did you mean 'configs/demo.yaml'?",
    "record nowhere/demo.yml": "nowhere/demo.yml: no such config file.",
    "compare .": ".: expected a plain file, found a folder.",
    "demo --config configs/smok.yaml": "Did you mean 'configs/smoke.yaml'?",
    "doctor configs/smok": "Did you mean 'configs/smoke.yaml'?",
    "plan plan/3b.yaml": "Did you mean 'configs/plans/3b.yaml'?",
    "compare configs/studies/strategie.yaml": "Did you mean 'configs/studies/strategies.yaml'?",
    "model smok": "Did you mean 'configs/smoke.yaml'? `tutti configs` lists what is shipped.",
    "tune --rate qqqqqqq": "configs/smoke.yaml, configs/three-goals.yaml, configs/plans/3b.yaml",
    "train e1": "e1.yaml is a study of several trainings.\n  cure: tutti compare ",
    "compare demo": "demo.yaml is the config of one run, not a study",
    "evaluate runs/nowhere": "runs/nowhere: no such run.",
    "evaluate runs/nowhere evaluation.episodes=3": "runs/nowhere: no such run.",
    "report runs/nowhere": "runs/nowhere: no such run.",
    "probe runs/nowhere": "runs/nowhere: no such run.",
    "replay runs/nowhere --step 3": "runs/nowhere: no such run.",
    "export runs/nowhere --to policy": "runs/nowhere: no such run.",
    "train configs/demo.yaml training.stepz=5": "training.stepz is not a key. Did you mean 'training.steps'?",
    "verify-resume configs/demo.yaml modle.size=small": "modle is not a key. Did you mean 'model'?",
    "model configs/demo.yaml training.steps": "'training.steps' is not an override",
    "record configs/smoke.yaml --run training.steps=5e": "looks like an override",
    "compare configs/studies/smoke.yaml --folder a\x1b[31mred": "unprintable characters",
    "export runs --to data.sources[0].path=x": "looks like an override",
    "train configs/demo.yaml configs/smoke.yaml": "other commands take one file, before all overrides",
    "demo configs/smoke.yaml": "A config file comes as --config configs/smoke.yaml.",
    "evaluate configs training.steps=3": "only keys of evaluation",
}


def test_paths_and_keys_are_checked_before_torch_is_imported() -> None:
    """Every command that takes one, in one fresh process: what is misspelt is answered at once."""
    script = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from tutti.cli.app import app\n"
        "said = [CliRunner().invoke(app, line.split()) for line in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[one.exit_code, one.output] for one in said]))\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(list(MISTAKES))],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
    )
    answers, torch_is_there = done.stdout.splitlines()
    assert torch_is_there == "False"
    for (command, expected), (code, text) in zip(MISTAKES.items(), json.loads(answers), strict=True):
        assert code == 2 and text.startswith("error: ") and expected in text, (command, text)
        assert "Traceback" not in text


def test_a_shipped_config_is_found_by_its_name_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in {
        **{"configs/demo.yaml": "demo.yaml", "demo.yaml": "demo.yaml", "configs/demo": "demo.yaml"},
        **{"plans/3b.yaml": "plans/3b.yaml", "3b": "plans/3b.yaml", "e1": "studies/e1.yaml"},
        **{"configs/studies/smoke.yaml": "studies/smoke.yaml", "smoke": "smoke.yaml"},
    }.items():
        assert config_file(Path(name)) == ROOT / "configs" / file
    assert config_file(Path("smoke"), study=True) == ROOT / "configs" / "studies" / "smoke.yaml"
    assert is_config("demo") and not is_config("README")
    (tmp_path / "demo").mkdir()
    assert config_file(Path("demo")) == ROOT / "configs" / "demo.yaml"  # a folder is no config
    assert not is_config("demo")  # but it may be a data set
    (tmp_path / "demo.yaml").write_text("name: mine\n")
    for name in ("demo.yaml", "demo"):
        assert config_file(Path(name)) == Path("demo.yaml")  # one's own file comes first
    with pytest.raises(UserError, match="no such config file"):
        config_file(Path("../configs/demo.yaml"))


def test_mistyped_command_names_the_near_miss() -> None:
    code, text = run("trian")
    assert code == 2
    assert "train" in text


def test_schema_is_valid_json() -> None:
    code, text = run("schema")
    assert code == 0
    assert "training" in json.loads(text)["properties"]


def test_brackets_in_a_message_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "train", raising(UserError("found [bold] and [/] here")))
    assert "found [bold] and [/] here" in run("train", DEMO)[1]


def test_brackets_in_a_help_are_printed_as_they_are() -> None:
    """Rich takes `[front]` for a style and leaves it out; help of an option has no style."""
    helps: list[str] = []

    def collect(command: Any) -> None:
        helps.extend(getattr(one, "help", None) or "" for one in command.params)
        for one in getattr(command, "commands", {}).values():
            collect(one)

    collect(typer.main.get_command(app))
    assert len(helps) > 50 and [text for text in helps if Text.from_markup(text).spans] == []
    shown = re.sub("[\\s\u2502]+", " ", run("data", "convert", "--help")[1])
    assert "views=[front] state=[arm,hand] exclude=[3]" in shown


def test_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "train", raising(KeyboardInterrupt()))
    code, text = run("train", DEMO)
    assert code == 130
    assert "interrupted; run the same command again to continue" in text


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "train", raising(ValueError("a bug")))
    result = CliRunner().invoke(app, ["train", DEMO])
    assert isinstance(result.exception, ValueError)


def test_model_prints_modules_parameters_and_tokens() -> None:
    code, text = run("model", DEMO)
    assert code == 0
    for word in ("vision", "language", "fusion", "action", "parameters", "tokens"):
        assert word in text

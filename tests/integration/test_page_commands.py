"""What README and tutorials tell to type is typed: every command that is cheap, on a training of six updates.

`benchmarks/readme_commands.py` runs all of them as printed, in an hour. Here the same lines are run in this
process, in a folder of their own, with what `SMALLER` says in place of the demo's sizes; `NOT_HERE` has all
others, each with the reason. A command of a page that is in neither, or no longer in a page, fails.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import readme_commands
import torch
from readme_commands import bare
from typer.testing import CliRunner

from tutti.cli.app import COMMANDS, app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(f"docs/start/{name}.md" for name in ("own-data", "own-term", "in-pieces", "install-to-policy")),
    *("docs/start/one-step.ipynb", "docs/start/index.md", "README.md", "README.zh-CN.md", "docs/zh/index.md"),
]
"""In the order in which they are run: the first one makes the data and the run that stands for the demo's."""
SMALLER = {
    "doctor configs/demo.yaml": "doctor squares.yaml --updates 1",
    "check runs/demo/dataset": "check squares.yaml",  # whose offsets fit its short episodes
    "configs/demo.yaml": "squares.yaml",
    "runs/demo/dataset": "data/squares",
    "runs/demo": "runs/squares",
    "--step 2600": "--step 5",
    "--updates 20": "--updates 1",
    "training.steps=300": "",
    "training.steps=150": "",
    "training.schedule.warmup=15": "",
}
SHORT = "training.steps=6 training.schedule.warmup=1 training.validation.every=3 training.checkpoints.every=3"
SIMULATOR = "the simulator, and a policy trained for it: tests/unit/test_play.py"
NOT_HERE = {
    "make smoke": "installs from a package index: tests/integration/test_pipeline.py runs its pipeline",
    "make demo": "twenty minutes: tests/integration/test_pipeline.py runs its stages",
    "make test": "these tests",
    ". .venv/bin/activate": "the environment of the tests stands for it",
    "pip install -c constraints.txt -e '.[serve]'": "needs a package index",
    "tutti record configs/demo.yaml": "the simulator: tests/integration/test_pipeline.py",
    'tutti play runs/demo --instruction "close the tap"': SIMULATOR,
    "tutti play runs/demo --task faucet-open --task faucet-close": SIMULATOR,
    'tutti play runs/demo --task faucet-open --instruction "close the tap"': SIMULATOR,
    "tutti play my-policy --task reach": SIMULATOR,
    "tutti plan configs/plans/3b.yaml --gpus 1000 --episodes 1e7": "3 B: tests/unit/test_planning.py",
    "tutti verify-resume configs/demo.yaml": "five trainings: tests/integration/test_verify_resume.py",
    "torchrun --nproc-per-node 2 -m -- tutti train configs/smoke.yaml name=two "
    "'data.sources=[{path: runs/demo/dataset}]'": "processes: tests/integration/test_ranks_torchrun.py",
    "tutti tune --rate configs/demo.yaml --from 0.02 --halvings 2 --seeds 1 --share 0.04": "trainings in "
    "processes of their own: tests/unit/test_studies_tune.py",
    "tutti compare configs/studies/strategies.yaml": "hours: tests/integration/test_study.py",
    "tutti serve squares-policy --page": "a server and its client: tests/unit/test_serving_server.py",
    "python benchmarks/notebook.py docs/start/one-step.ipynb --check": "tests/unit/test_notebook.py",
}


def commands() -> dict[str, readme_commands.Step]:
    """Each command of the pages once, without its comment; what no block asks to run is not among them, nor
    is a config alone, which tests/unit/test_readme_commands.py loads."""
    return {
        bare(step.line): step
        for step in readme_commands.steps_of(ROOT, PAGES)
        if not step.reason and not step.line.startswith("python -c ")
    }


def smaller(command: str) -> str:
    """The command on the small data and for six updates."""
    for words, others in SMALLER.items():
        command = command.replace(words, others)
    return f"{command} {SHORT}" if "tutti train " in command else command


def run(command: str) -> tuple[int, str]:
    """Runs a program or a command of `tutti` in this process and folder: exit code, and what it said."""
    command, _, target = command.partition(" > ")
    word, *arguments = shlex.split(command.removeprefix("PYTHONPATH=. "))
    if word == "tutti":
        result = CliRunner().invoke(app, arguments)
        if target:
            Path(target).write_text(result.stdout, encoding="utf-8")
        return result.exit_code, f"{result.output[-600:]}{result.exception or ''}"
    assert word in ("python", "cat"), command
    if word == "python":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    return 0, ""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a clone has beside the code, in which this process works for a while."""
    for name in ("configs", "examples", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_command_of_the_pages_is_run_or_says_why_not() -> None:
    found = set(commands())
    assert NOT_HERE.keys() - found == set()
    assert {word for word in (one.split()[0] for one in found - NOT_HERE.keys())} <= {
        *("tutti", "python", "cat", "test", "PYTHONPATH=."),
    }
    for reason in NOT_HERE.values():
        for file in re.findall(r"tests/\S+\.py", reason):
            assert (ROOT / file).is_file(), file


def test_the_page_of_every_command_has_every_command() -> None:
    page = (ROOT / "docs" / "start" / "in-pieces.md").read_text(encoding="utf-8")
    names = [command.__name__.replace("_", "-") for command in COMMANDS]
    assert [name for name in names if not re.search(rf"\btutti {name}\b", page)] == []


def test_the_cheap_commands_of_the_pages_run_as_printed(place: Path) -> None:
    done, failed = set[str](), list[str]()
    for printed, step in commands().items():
        if step.file:
            (place / step.file).write_text(step.text, encoding="utf-8")
        command = smaller(printed)
        if printed in NOT_HERE or command in done or command.startswith("test "):
            continue
        done.add(command)
        code, said = run(command)
        if code:
            failed.append(f"{step.page}$ {command}\n{said}\n[exit {code}]")
    assert failed == [], "\n\n".join(failed)
    assert len(done) > 30 and torch.get_num_threads() == 1
    for made in (
        "check.html",
        "runs/squares/report.html",
        "runs/term/summary.json",
        "policy/model.safetensors",
    ):
        assert (place / made).stat().st_size > 1000, made
    schema: dict[str, Any] = json.loads((place / "tutti.schema.json").read_text(encoding="utf-8"))
    assert "training" in schema["properties"]

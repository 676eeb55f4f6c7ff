"""SLURM scripts against a fake srun, the Dockerfile against the repository, and `tutti env`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tutti.cli.app import app
from tutti.runs.provenance import circumstances

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "cluster" / "slurm"
FAKES = {
    # As from Slurm 22.05 on: the cores of a step are those that srun is told.
    "srun": 'printf "%s\\n" "$@" > srun.txt; unset SLURM_CPUS_PER_TASK; '
    'while [[ "$1" == -* ]]; do shift; done; exec "$@"',
    "scontrol": '[ "$1 $2 $3" = "show hostnames node[1-2]" ] && echo node1 && seq 99999',
    "torchrun": 'printf "%s\\n" "$@" > torchrun.txt',
    "tutti": 'printf "%s\\n" "$@" > tutti.txt',
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment whose srun, scontrol, torchrun and tutti write down what they are called with."""
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **job, "SLURM_CPUS_PER_TASK": "5"}


def submit(script: str, *arguments: str, at: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SLURM / script), *arguments]
    return subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, check=False)


def told(name: str, at: Path) -> list[str]:
    return (at / f"{name}.txt").read_text().splitlines()


def test_a_training_starts_one_torchrun_a_machine_that_meet_at_the_first(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    done = submit("train.sh", "a b.yaml", "training.steps=3", at=tmp_path, **cluster, SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 0, done.stderr
    given = told("torchrun", tmp_path)
    pairs = dict(pairwise(given))
    assert (pairs["--nnodes"], pairs["--nproc-per-node"], pairs["--rdzv-id"]) == ("2", "8", "77")
    assert pairs["--rdzv-endpoint"] == "node1:29500"
    assert given[-6:] == ["-m", "--", "tutti", "train", "a b.yaml", "training.steps=3"]


def test_studies_and_searches_get_the_cores_and_array_tasks_share_a_storage(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    assert submit("compare.sh", "e1", "seeds=2", at=tmp_path, **cluster).returncode == 0
    assert told("tutti", tmp_path) == ["compare", "e1", "seeds=2", "jobs=5"]
    assert "--cpus-per-task=5" in told("srun", tmp_path)
    storage = f"journal:{tmp_path}/search-space.log"
    for task in ("0", "1"):
        environment = {**cluster, "SLURM_ARRAY_TASK_ID": task}
        done = submit("tune.sh", "demo", "my/space.yaml", "training.steps=9", at=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        wanted = ["tune", "demo", "training.steps=9", "--space", "my/space.yaml", "--storage", storage]
        assert told("tutti", tmp_path) == [*wanted, "--jobs", "5"]


def test_scripts_say_what_is_missing_and_ask_for_a_signal_before_the_end(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    for script in sorted(SLURM.glob("*.sh")):
        done = submit(script.name, at=tmp_path, **cluster)
        assert done.returncode != 0 and f"sbatch cluster/slurm/{script.name} " in done.stderr
        text = script.read_text()
        assert re.search(r"^#SBATCH --signal=(TERM|INT)@\d+$", text, re.MULTILINE) and "--requeue" in text
        assert "--open-mode=append" in text  # else a requeue empties the log
        assert 'srun --cpus-per-task="$cores"' in text
        assert os.access(script, os.X_OK)
    assert not (tmp_path / "srun.txt").exists()


def test_the_dockerfile_copies_what_is_there_and_installs_what_pyproject_names(tmp_path: Path) -> None:
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE) == [
        ("python:3.11-slim", "base"),
        ("base", "cpu"),
        ("base", "cuda"),
    ]
    copied = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    for name in filter(lambda name: (ROOT / name).is_file(), (*copied, "src/tutti/__init__.py")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    built = pytest.importorskip("hatchling.metadata.core"), pytest.importorskip("hatchling.plugin.manager")
    metadata = built[0].ProjectMetadata(str(tmp_path), built[1].PluginManager())
    assert metadata.core.name == "tutti-vla"  # pip reads it before it builds, hooks and all
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for listed in re.findall(r'"\.\[([\w,]+)\]"', text):
        assert set(listed.split(",")) <= set(extras)
    rendering = re.search(r"^RENDERING := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rendering and set(rendering[1].split()) <= set(text.split())
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_a_command_is_kept_without_the_password_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tutti", "tune", "demo", "--storage", "postgresql://me:pa%3Ass@db/x"])
    assert circumstances()["command"] == "tutti tune demo --storage postgresql://...@db/x"


def test_the_environment_is_told_without_paths_and_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = CliRunner().invoke(app, ["env", "--json"])
    values = json.loads(found.output)
    assert {"python", "torch", "optuna", "cores", "GPUs", "free disk here", "commit"} <= set(values)
    assert "OMP_NUM_THREADS=1" in values["settings"] and "very-secret" not in found.output
    assert str(Path.home()) not in found.output and os.getcwd() not in found.output
    lines = CliRunner().invoke(app, ["env"]).output
    assert all(f"{name}: " in lines for name in values)
    assert CliRunner().invoke(app, ["version", "--all"]).output.partition("\n")[2] == lines

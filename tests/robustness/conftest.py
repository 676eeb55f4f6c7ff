"""The template of a run, made once, and a copy of it for each stranger."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fixtures import squares_data
from fixtures.hostile import STEP, Stranger, put
from fixtures.squares_data import MODEL, TRAINING
from tutti import pipeline
from tutti.serving.export import export_policy


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template")
    squares_data.write(home / "data", squares_data.episodes(6))
    config = squares_data.config(
        home / "data",
        data={"batch_size": 2, "image_size": 16},
        model=MODEL,
        training=TRAINING,
    )
    run = home / "run"
    pipeline.train(config, run)
    export_policy(run, home / "export")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    shutil.rmtree(run / "tensorboard")
    last = run / "checkpoints" / STEP
    values = yaml.safe_load((last / "config.yaml").read_text())
    short = {name: values[name] for name in ("model", "data")}  # all that is read of it, and soon parsed
    put(last, "config.yaml", yaml.safe_dump(short).encode())
    return home


@pytest.fixture
def stranger(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    run = shutil.copytree(template / "run", tmp_path / "run")
    shutil.copytree(template / "export", tmp_path / "export")
    book = json.loads((run / "stages.json").read_text())
    canary = tmp_path / "canary"
    found = Stranger(run=run, export=tmp_path / "export", canary=canary, out=tmp_path / "out")
    found.out.mkdir()
    found.mine.write_text((run / "config.yaml").read_text())
    traps = tmp_path / "traps"
    (traps / "canary_module").mkdir(parents=True)
    for name in ("__init__", "inner"):
        (traps / "canary_module" / f"{name}.py").write_text(f"import os\nos.makedirs({str(canary)!r})\n")
    monkeypatch.syspath_prepend(str(traps))
    assert book["train"]["finished"]
    yield found
    assert not canary.exists(), "foreign code was run"
    assert not any(name.startswith("canary_module") for name in sys.modules)


@pytest.fixture
def unfinished(stranger: Stranger) -> Stranger:
    """The run whose training goes on when it is started again."""
    book = json.loads((stranger.run / "stages.json").read_text())
    book["train"]["finished"] = False
    (stranger.run / "stages.json").write_text(json.dumps(book))
    return stranger

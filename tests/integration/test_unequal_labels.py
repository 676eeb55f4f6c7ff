"""Sources that lack actions, instructions or states train in one run, from the config to the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fixtures import squares_data as world
from fixtures.unlabelled import without_feature, without_texts
from tutti import pipeline
from tutti.cli.app import app
from tutti.config.run_config import RunConfig, to_yaml
from tutti.debug.doctor import print_diagnosis, run_doctor
from tutti.debug.probe import probe_checkpoint
from tutti.nested_dicts import merge
from tutti.runs.build import build_parts
from tutti.types import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sets")
    sets = {name: world.write(home / name, world.episodes(12, seed)) for seed, name in enumerate(NAMES)}
    without_feature(sets["videos"], "action", "observation.state")
    without_texts(sets["play"], 0, 1)
    return sets


NAMES = ("full", "videos", "play")
TERMS = ("align", "action", "recon", "state")


def config(folders: dict[str, Path], *sources: dict[str, Any], **changes: Any) -> RunConfig:
    training = {"steps": 6, "checkpoints": {"every": 3}, "diagnostics": {"every": 3}, "log_every": 1}
    values: dict[str, Any] = {
        "data": {"sources": list(sources), "batch_size": 8, "horizon": 4, "validation_fraction": 0.2},
        "objective": {"state": {"offsets": [2, 4]}},
        "training": training | {"schedule": {"kind": "wsd", "warmup": 2}, "validation": {"every": 3}},
    }
    return world.config(folders["full"], **merge(values, changes))


def three(folders: dict[str, Path]) -> list[dict[str, Any]]:
    return [
        {"path": str(folders["full"])},
        {"path": str(folders["videos"]), "labels": {"actions": False, "state": False}},
        {"path": str(folders["play"]), "labels": {"text": False}, "name": "games"},
    ]


@pytest.fixture(scope="module")
def run(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A run by the command line, and what it printed."""
    home = tmp_path_factory.mktemp("runs")
    mixed = config(folders, *three(folders), data={"mixture": {"labelled": 0.75}}, name="mixed")
    (home / "mixed.yaml").write_text(to_yaml(mixed))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        done = CliRunner().invoke(app, ["train", "mixed.yaml"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        yield home / "runs" / "mixed", done.output


def test_three_sources_train_evaluate_probe_and_are_reported(run: tuple[Path, str]) -> None:
    folder, said = run
    steps = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    losses = [step for step in steps if "loss/total" in step]
    assert len(losses) == 6
    assert all(step[f"loss/{term}/raw"] > 0 for step in losses for term in TERMS)
    words = " ".join(said.split())
    assert "term needs 0: full 1: videos 2: games" in words
    assert "source 1, videos: 96 windows to train on, weight 1, 25 % of a batch" in words, said
    for row in ("align text 100 % 100 % 0 %", "action actions 100 % 0 % 100 %"):
        assert row in words, said
    pipeline.evaluate(folder)
    probe_checkpoint(folder)
    page = pipeline.report(folder).read_text()
    assert "action by source" in page and "Epochs by source" in page and ">games<" in page
    assert "nan" not in page.lower().split("<style")[0]


def test_the_records_tell_epochs_and_losses_of_each_source(run: tuple[Path, str]) -> None:
    folder, _ = run
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    records, held = ([line for line in lines if line["kind"] == kind] for kind in ("train", "validation"))
    for record in records:
        losses = {name for name in record if name.startswith("loss/") and "@" in name}
        # Of a batch of 8 six have actions, of two sources, and two are videos.
        assert "loss/recon/raw@full" in losses and not any("align" in name for name in losses)
        assert not losses & {"loss/action/raw@videos", "loss/state/raw@videos"}
        shares = {name: record[f"data/epochs@{name}"] for name in ("full", "videos", "games")}
        assert shares["videos"] == pytest.approx(2 * record["step"] / 96)
        assert 132 * shares["full"] + 120 * shares["games"] == pytest.approx(6 * record["step"])
    assert any("loss/recon/raw@videos" in record for record in records)
    for term in ("action", "recon", "state"):
        assert {f"valid/{term}@full", f"valid/{term}@games"} <= held[-1].keys()
    assert "valid/action@videos" not in held[-1]


def test_doctor_shows_the_shares_and_the_masked_targets(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diagnosis = run_doctor(config(folders, *three(folders)), tmp_path / "run", updates=2)
    # Episodes of 12: the last 4 of 12 windows have no state 4 actions later.
    assert diagnosis.labels.masked["state"]["+4"] == pytest.approx(1 / 3)
    assert diagnosis.labels.shares["state"] == [1.0, 0.0, 1.0]
    print_diagnosis(diagnosis)
    assert "state: masked targets" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("labels", "objective", "words"),
    [
        (
            {"text": False},
            {},
            r"align learns from nothing: it needs text[\s\S]*labels\.text=true.*align=null",
        ),
        ({"state": "where_present"}, {"state": {"offsets": [40], "last": False}}, r"reaches \+40 inside of"),
    ],
)
def test_a_term_that_no_source_feeds_is_refused(
    folders: dict[str, Path], tmp_path: Path, labels: dict[str, bool], objective: dict[str, Any], words: str
) -> None:
    wrong = config(folders, {"path": str(folders["full"]), "labels": labels}, objective=objective)
    with pytest.raises(UserError, match=words):
        build_parts(wrong, tmp_path / "run")

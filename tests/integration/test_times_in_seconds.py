"""One config in seconds on data of 10 and of 30 fps: run, checkpoint, evaluation and export agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures import squares_data as world
from tutti import pipeline
from tutti.config.run_config import RunConfig
from tutti.data.formats.lerobot.writer import write_lerobot
from tutti.runs.build import expected_spec, with_steps
from tutti.runs.data_check import check_path, print_checked
from tutti.serving.export import export_policy
from tutti.serving.policy import Policy, find_checkpoint
from tutti.types import UserError

STEPS = {10: 2, 30: 6}
"""Of 0.2 s."""


def timed(folder: Path, fps: int, **sections: Any) -> RunConfig:
    data = folder / "set"
    if not data.exists():
        records = world.episodes(8)
        write_lerobot(data, records, fps=fps, views=world.VIEWS, robot_type="dot")
    objective = {
        "align": None,
        "recon": {"kind": "changed_patches", "offsets": ["0.1s", "200ms"], "width": 16, "heads": 2},
        "state": {"offsets": ["0.1s", "0.2s"], "hidden": 16},
    }
    given: dict[str, Any] = {
        "objective": objective,
        "data": {"horizon": "0.2s", "batch_size": 4},
        "evaluation": {"suite": "none", "actions_per_query": "0.1s"},
        "training": {"steps": 2, "schedule": {"kind": "wsd", "warmup": 1}, "diagnostics": {"every": 0}},
    }
    return world.config(data, **{key: {**value, **sections.get(key, {})} for key, value in given.items()})


@pytest.mark.parametrize("fps", [10, 30])
def test_steps_are_said_once_and_kept_by_run_checkpoint_evaluation_and_export(
    tmp_path: Path, fps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run, most = tmp_path / "run", STEPS[fps]
    pipeline.train(timed(tmp_path, fps), run)
    said = capsys.readouterr().out
    assert said.count(f"data.horizon 0.2s = {most} steps at {fps} fps") == 1
    assert said.count(f"objective.recon.offsets 200ms = {most} steps at {fps} fps") == 1
    for file in (run / "config.yaml", find_checkpoint(run) / "config.yaml"):
        kept = yaml.safe_load(file.read_text())
        assert kept["data"]["horizon"] == most and kept["objective"]["recon"]["offsets"] == [most // 2, most]
        assert kept["evaluation"]["actions_per_query"] == most // 2
    pipeline.train(timed(tmp_path, fps), run)  # the same times are the same config
    assert "kept" in capsys.readouterr().out
    pipeline.evaluate(run, overrides=["evaluation.actions_per_query=200ms"])
    assert f"evaluation.actions_per_query 200ms = {most} steps at {fps} fps" in capsys.readouterr().out
    assert yaml.safe_load((run / "config.yaml").read_text())["evaluation"]["actions_per_query"] == most
    export = export_policy(run, tmp_path / "export")
    assert Policy.load(export).spec.horizon == most


def test_what_reads_a_config_without_training_knows_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = timed(tmp_path, 30)
    assert expected_spec(with_steps(config, say=False)).horizon == 6
    assert capsys.readouterr().out == ""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    print_checked(check_path(str(file)))
    assert "data.horizon 6, offsets 3, 6" in " ".join(capsys.readouterr().out.split())
    # Without data of its own a config means what it would record, at the suite's rate.
    recorded = config.model_copy(update={"data": config.data.model_copy(update={"sources": ()})})
    assert with_steps(recorded, say=False).data.horizon == round(0.2 * config.record.spec.fps)


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    config = timed(tmp_path, 10)
    away = config.data.model_copy(
        update={"sources": (config.data.sources[0].model_copy(update={"path": tmp_path / "away"}),)}
    )
    with pytest.raises(UserError, match="away"):
        with_steps(config.model_copy(update={"data": away}))

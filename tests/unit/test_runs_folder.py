"""The book of a run: stages are kept, continued or refused, and seconds add up."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutti.config.run_config import RunConfig, load_config
from tutti.runs import folder as stages
from tutti.runs.folder import STAGES, RunFolder
from tutti.types import UserError

CONFIG = load_config(None, ["training.steps=210"])
CHANGED = load_config(None, ["training.steps=220"])
SECTIONS = {"record": ("record",), "train": ("data", "training"), "evaluate": ("evaluation",), "report": ()}


def begin(folder: Path, stage: str, config: RunConfig = CONFIG, redo: bool = False) -> bool:
    return RunFolder(folder, redo=redo).begin(stage, config, *SECTIONS[stage])


def finish(folder: Path, stage: str) -> RunFolder:
    run = RunFolder(folder)
    run.begin(stage, CONFIG, *SECTIONS[stage])
    with run.stage(stage):
        (folder / STAGES[stage][0]).mkdir(exist_ok=True)
    return run


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what the book says of the training."""
    book = json.loads((folder / "stages.json").read_text())
    change(book["train"])
    (folder / "stages.json").write_text(json.dumps(book))


def test_finished_stage_is_kept_by_the_next_process(tmp_path: Path) -> None:
    assert begin(tmp_path, "train")
    finish(tmp_path, "train")
    assert not begin(tmp_path, "train")


def test_failed_stage_is_not_finished_and_what_it_made_is_there_to_continue(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.begin("train", CONFIG, "training")
    with pytest.raises(ZeroDivisionError), run.stage("train"):
        (tmp_path / "checkpoints").mkdir()
        raise ZeroDivisionError
    with pytest.raises(UserError, match="'train' was interrupted"):
        RunFolder(tmp_path).require("train", "Run it again.")
    assert RunFolder(tmp_path).begin("train", CONFIG, "training")
    assert (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_changed_config_is_refused_and_named(tmp_path: Path, interrupted: bool) -> None:
    if interrupted:
        begin(tmp_path, "train")
    else:
        finish(tmp_path, "train")
    with pytest.raises(UserError, match=r"training.steps: 210 -> 220(.|\n)*--redo"):
        begin(tmp_path, "train", CHANGED)
    assert RunFolder(tmp_path).config() == CONFIG


def test_a_fork_is_offered_where_the_weights_would_still_fit(tmp_path: Path) -> None:
    begin(tmp_path, "train")
    with pytest.raises(UserError, match=rf"go on from .*training\.fork\.run={tmp_path}$"):
        begin(tmp_path, "train", CHANGED)
    other_data = load_config(None, ["training.steps=220", "data.horizon=3"])
    with pytest.raises(UserError, match=r"data\.horizon") as refused:
        begin(tmp_path, "train", other_data)
    assert "fork.run" not in str(refused.value)


def test_a_run_that_is_older_than_a_key_goes_on_with_its_default(tmp_path: Path) -> None:
    begin(tmp_path, "train")
    edit(tmp_path, lambda train: train["inputs"]["training"].pop("deterministic"))
    assert begin(tmp_path, "train")
    with pytest.raises(UserError, match=r"training\.deterministic: true -> false"):
        begin(tmp_path, "train", load_config(None, ["training.steps=210", "training.deterministic=false"]))
    edit(tmp_path, lambda train: train["inputs"]["training"].update(gone=1))
    with pytest.raises(UserError, match=r"training\.gone"):
        begin(tmp_path, "train")


@pytest.mark.parametrize("written", [{}, {"state": "observation.state", "action": "action"}])
def test_a_run_of_before_there_were_formats_goes_on_with_what_was_the_default(
    tmp_path: Path, written: dict[str, str]
) -> None:
    def config(**keys: str) -> RunConfig:
        return RunConfig.model_validate({"data": {"sources": [{"path": "a", **keys}]}})

    def source_of(train: dict[str, Any]) -> dict[str, Any]:
        return train["inputs"]["data"]["sources"][0]

    finish_with(tmp_path, config(state="observation.state", action="action"))
    edit(tmp_path, lambda train: [source_of(train).pop(key) for key in ("format", "flip", "text")])
    assert not begin(tmp_path, "train", config(**written))
    with pytest.raises(UserError, match=r"state: .observation\.state. -> .none."):
        begin(tmp_path, "train", config(state="none"))
    edit(tmp_path, lambda train: source_of(train).update(state="other"))
    with pytest.raises(UserError, match=r"state: .other. -> .auto."):
        begin(tmp_path, "train", config())
    edit(tmp_path, lambda train: source_of(train).update(state="observation.state", format="auto"))
    with pytest.raises(UserError, match=r"state: .observation\.state. -> .auto."):
        begin(tmp_path, "train", config())


def test_an_older_run_whose_checkpoints_must_reach_far_back_goes_on_too(tmp_path: Path) -> None:
    """The book lacks `checkpoints.keep`, of which a roll-back demands more than the default."""
    far = "training.gradients.rollback.rewind_steps=500"
    config = load_config(None, ["training.steps=900", "training.checkpoints.keep=4", far])
    begin(tmp_path, "train", config)
    edit(tmp_path, lambda train: train["inputs"]["training"].pop("deterministic"))
    assert begin(tmp_path, "train", config)


def test_key_without_effect_may_change(tmp_path: Path) -> None:
    finish(tmp_path, "record")
    assert not begin(tmp_path, "record", load_config(None, ["record.workers=3"]))


def test_how_a_training_is_saved_may_change_and_how_it_is_spread_too_if_one_says_so(tmp_path: Path) -> None:
    """docs/how-to/checkpoints.md says so."""
    begin(tmp_path, "train")
    changes = ["training.checkpoints={format: sharded, background: false, every: 7, keep: 9}"]
    changes += ["training.steps=210", "training.parallel={kind: auto, timeout: 60}"]
    assert begin(tmp_path, "train", load_config(None, changes))
    changes[-1] = "training.parallel={kind: ddp}"
    with pytest.raises(UserError, match="--allow-inexact"):
        begin(tmp_path, "train", load_config(None, changes))
    spread = RunFolder(tmp_path, allow_inexact=True)
    assert spread.begin("train", load_config(None, changes), *SECTIONS["train"])
    assert RunFolder(tmp_path).inexact[0] == 'training.parallel.kind: "auto" -> "ddp"'


def test_a_book_of_an_older_version_may_name_keys_that_have_no_effect_now(tmp_path: Path) -> None:
    begin(tmp_path, "train")
    edit(tmp_path, lambda train: train["inputs"]["training"].update(checkpoints={"format": "sharded"}))
    assert begin(tmp_path, "train")


def test_redo_throws_away_the_stage_and_all_later_ones_but_no_earlier_one(tmp_path: Path) -> None:
    for stage in ("record", "train", "evaluate"):
        finish(tmp_path, stage)
    assert begin(tmp_path, "train", CHANGED, redo=True)
    assert RunFolder(tmp_path).config().training.steps == 220
    with pytest.raises(UserError, match="has not run"):
        RunFolder(tmp_path).require("evaluate", "")
    RunFolder(tmp_path).require("record", "")
    made = [(tmp_path / STAGES[name][0]).exists() for name in ("record", "train", "evaluate")]
    assert made == [True, False, False]


def test_leftovers_of_another_run_are_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000100").mkdir(parents=True)
    begin(tmp_path, "train")
    assert not (tmp_path / "checkpoints").exists()


def test_config_keeps_the_sections_that_earlier_stages_were_made_with(tmp_path: Path) -> None:
    finish(tmp_path, "record")
    finish(tmp_path, "train")
    begin(tmp_path, "evaluate", load_config(None, ["training.steps=999", "evaluation.episodes=3"]))
    config = RunFolder(tmp_path).config()
    assert (config.training.steps, config.evaluation.episodes) == (210, 3)


def test_seconds_add_up_over_interruptions_but_not_over_repetitions(tmp_path: Path) -> None:
    begin(tmp_path, "train")
    edit(tmp_path, lambda train: train.update(seconds=100.0))
    assert 100.0 <= finish(tmp_path, "train").seconds["train"] < 110.0
    assert 100.0 <= RunFolder(tmp_path).seconds["train"] < 110.0
    assert finish(tmp_path, "train").seconds["train"] < 10.0


def test_seconds_are_saved_while_a_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SAVE_SECONDS", 0.01)
    run = RunFolder(tmp_path)
    run.begin("train", CONFIG, "training")
    with run.stage("train"):
        time.sleep(0.1)
        assert RunFolder(tmp_path)._manifest["train"]["seconds"] > 0.0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_a_one_screen_error(tmp_path: Path, number: int) -> None:
    run = RunFolder(tmp_path)
    run.begin("train", CONFIG, "training")
    with pytest.raises(UserError, match="disk is full") as caught, run.stage("train"):
        raise OSError(number, os.strerror(number))
    assert len(str(caught.value).splitlines()) < 10


def test_second_process_is_refused_while_a_stage_runs(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.begin("train", CONFIG, "training")
    with (
        first.stage("train"),
        pytest.raises(UserError, match="another process"),
        RunFolder(tmp_path).stage("train"),
    ):
        pass
    with RunFolder(tmp_path).stage("train"):
        pass


@pytest.mark.parametrize("made", ["model.json", "records.jsonl"])
def test_a_stage_that_fails_before_its_work_is_forgotten_and_else_kept(tmp_path: Path, made: str) -> None:
    """A mended config is accepted while nothing that cost work is there."""
    run = RunFolder(tmp_path)
    assert run.begin("train", CONFIG, "training")
    with pytest.raises(UserError, match="a typo"), run.stage("train"):
        run.write_json(made, {})
        raise UserError("a typo")
    if made == "model.json":
        assert RunFolder(tmp_path).begin("train", CHANGED, "training")
    else:
        with pytest.raises(UserError, match="made with another config"):
            RunFolder(tmp_path).begin("train", CHANGED, "training")


def test_a_folder_that_is_no_run_is_named_with_those_that_are(tmp_path: Path) -> None:
    finish(tmp_path / "demo", "train")
    with pytest.raises(UserError, match=r"dmeo: no such run. There are: .*demo"):
        RunFolder(tmp_path / "dmeo", new=False)
    assert not (tmp_path / "dmeo").exists()
    (tmp_path / "demo" / "stages.json").write_text('{"train":')
    with pytest.raises(UserError, match=r"stages\.json: not valid JSON"):
        RunFolder(tmp_path / "demo")
    with pytest.raises(UserError, match=r"stages\.json/run"):
        RunFolder(tmp_path / "demo" / "stages.json" / "run")


def test_what_changes_no_result_is_taken_over_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = "data.sources=[{path: a}]", "data.sources=[{path: b}]"
    finish_with(tmp_path, load_config(None, ["training.steps=210", sources[0]]))
    now = load_config(None, ["training.steps=210", "training.log_every=3", sources[1]])
    assert not begin(tmp_path, "train", now)
    said = capsys.readouterr().out
    assert "taken over" in said and "log_every" in said and "data.sources.0.path" in said
    assert RunFolder(tmp_path).config().training.log_every == 3
    other = load_config(None, ["training.steps=210", "data.sources=[{path: b, weight: 2}]"])
    with pytest.raises(UserError, match="weight"):
        begin(tmp_path, "train", other)


def test_keys_of_the_last_bits_are_asked_for_then_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (load_config(None, [f"training.threads={count}", "training.log_every=5"]) for count in (1, 2))
    three = load_config(None, ["training.threads=2", "training.deterministic=false", "training.ema=0.9"])
    RunFolder(tmp_path).begin("train", one, "training")
    asked = r"training\.threads: 1 -> 2\n[\s\S]*--redo[\s\S]*rounded, no more: --allow-inexact goes on"
    with pytest.raises(UserError, match=asked):
        RunFolder(tmp_path).begin("train", two, "training")
    assert RunFolder(tmp_path).inexact == []
    assert RunFolder(tmp_path, allow_inexact=True).begin("train", two, "training")
    run = RunFolder(tmp_path)
    assert (
        "taken over and noted, the last bits may differ: training.threads: 1 -> 2" in capsys.readouterr().out
    )
    assert run.inexact == ["training.threads: 1 -> 2"] and run.config().training.threads == 2
    # Another result is another result, and says nothing of the way out that would not help.
    with pytest.raises(UserError, match=r"training\.ema") as caught:
        RunFolder(tmp_path, allow_inexact=True).begin("train", three, "training")
    assert "--allow-inexact" not in str(caught.value)
    with run.stage("train"):
        pass
    assert not RunFolder(tmp_path, allow_inexact=True).begin("train", one, "training")
    kept = RunFolder(tmp_path)
    assert kept.config().training.threads == 2 and kept.inexact == ["training.threads: 1 -> 2"]
    assert "train: stays as it was made" in capsys.readouterr().out
    assert RunFolder(tmp_path, redo=True).begin("train", one, "training")
    assert RunFolder(tmp_path).inexact == [], "what is made anew has nothing of it"


def finish_with(folder: Path, config: RunConfig) -> None:
    run = RunFolder(folder)
    run.begin("train", config, *SECTIONS["train"])
    with run.stage("train"):
        pass


def test_redo_does_a_finished_stage_again_where_nothing_has_changed(tmp_path: Path) -> None:
    finish(tmp_path, "train")
    assert not RunFolder(tmp_path, redo="if changed").begin("train", CONFIG, *SECTIONS["train"])
    assert begin(tmp_path, "train", redo=True)
    assert not (tmp_path / "checkpoints").exists()


def test_options_of_a_users_class_always_count(tmp_path: Path) -> None:
    """Their names may be those of keys that have no effect elsewhere."""
    mine = "objective.mine={{kind: 'a:B', options: {{workers: {}}}}}"
    sections = ("objective",)
    configs = [load_config(None, [mine.format(count)]) for count in (1, 2)]
    RunFolder(tmp_path).begin("train", configs[0], *sections)
    with pytest.raises(UserError, match="workers"):
        RunFolder(tmp_path).begin("train", configs[1], *sections)

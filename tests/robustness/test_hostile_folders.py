"""On a stranger's folder no command runs foreign code, hangs, or reads outside of it."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from fixtures import hostile
from fixtures.hostile import TEXTS, WEIGHT_FILES, Stranger, call, edit_yaml, put
from tutti.config.run_config import load_config
from tutti.runs.build import describe_model
from tutti.serving.policy import Policy
from tutti.types import UserError


def test_the_untouched_run_is_taken_by_every_command(unfinished: Stranger) -> None:
    """What the attacks are refused for is the attack."""
    run, out = unfinished.run, unfinished.out
    fork = f"training.fork={{run: {run}}}"
    for command in (
        ("train", unfinished.mine, "--run", out / "fork", fork),
        ("train", unfinished.mine, "--run", run),
        ("evaluate", run),
        ("probe", run),
        ("report", run),
        ("replay", run, "--step", "3"),
        ("export", run, "--to", out / "export"),
    ):
        done = call(*command)
        assert done.exit_code == 0, (command, done.output[-2000:], repr(done.exception))
    Policy.load(run)
    Policy.load(unfinished.export)


@pytest.mark.parametrize("form", ["pickle", "archive"])
@pytest.mark.parametrize("name", [*WEIGHT_FILES, *TEXTS, "optimizer.pt", "rng.pt"])
def test_a_pickle_in_a_checkpoint_is_not_loaded(unfinished: Stranger, name: str, form: str) -> None:
    make = hostile.evil_pickle if form == "pickle" else hostile.evil_archive
    put(unfinished.checkpoint, name, make(unfinished.canary))
    if name in ("ema.safetensors", *TEXTS):
        assert name in unfinished.load()
    if name not in TEXTS and form == "pickle":  # a resume makes the texts itself, and reads no config
        unfinished.resumed()
    if form == "archive":
        unfinished.forked()


SAVED = {
    **{f"{name} of a pickle": (name, None) for name in ("batches.pt", "weights.pt", "failure.json")},
    **{
        about[:12]: ("failure.json", about.encode())
        for about in ("", "[]", "{}", '{"step": "x"}', '{"step": NaN}', '{"step": {"a": 1}}', "[" * 10**5)
    },
}


@pytest.mark.parametrize("how", SAVED)
def test_a_saved_step_of_a_stranger_is_refused(stranger: Stranger, how: str) -> None:
    for kind in ("failures", "spikes"):
        folder = stranger.run / kind / "step-000003"
        folder.mkdir(parents=True)
        (folder / "failure.json").write_text(json.dumps({"step": 3, "message": "x"}))
        for file in ("batches.pt", "weights.pt"):
            shutil.copy(stranger.checkpoint / "rng.pt", folder / file)
        name, content = SAVED[how]
        (folder / name).write_bytes(hostile.evil_archive(stranger.canary) if content is None else content)
        stranger.refused("replay", stranger.run, "--failure")
        shutil.rmtree(folder)


KINDS = (
    *("canary_module:Evil", "canary_module.inner:Evil", "..canary_module:Evil", ".:Evil", "sys:Evil"),
    *("builtins:object", "os:system", ":", "canary_module:", "a b:c", "canary_module:Evil\n"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_a_checkpoint_names_is_not_imported(stranger: Stranger, kind: str) -> None:
    stranger.configure("model.action", {"kind": kind})
    said = stranger.load()
    assert "config.yaml" in said and "action" in said
    if kind.startswith("canary_module:E") and kind.isprintable():
        assert kind in said and "trust_code=True" in said and "--trust-code" in said


@pytest.mark.parametrize("command", ["evaluate", "probe", "export"])
def test_a_class_that_a_checkpoint_names_is_refused_by_every_command(
    stranger: Stranger, command: str
) -> None:
    stranger.configure("model.action", {"kind": "canary_module:Evil"})
    to = ("--to", stranger.out / "export") if command == "export" else ()
    assert "canary_module:Evil" in stranger.refused(command, stranger.run, *to)


CLASSES = ("model.action", "objective.align", "objective.action", "objective.recon", "objective.state")
CLASSES += ("objective.another", "balancing", "backward")


@pytest.mark.parametrize("key", CLASSES)
def test_a_class_that_a_run_names_is_refused_by_replay(stranger: Stranger, key: str) -> None:
    edit_yaml(stranger.run / "config.yaml", key, {"kind": "canary_module.inner:Evil"})
    said = stranger.refused("replay", stranger.run, "--step", "3")
    assert f"{key}.kind" in said and "canary_module.inner:Evil" in said and "config.yaml" in said


def test_the_user_may_trust_the_code(stranger: Stranger) -> None:
    """The trap works, and the option opens it; a class named by the user's own config needs no option."""
    stranger.configure("model.action", {"kind": "canary_module:Evil"})
    try:
        with pytest.raises(UserError, match="expected a subclass of"):
            Policy.load(stranger.run, trust_code=True)
        assert stranger.canary.is_dir()
        stranger.canary.rmdir()
        hostile.forget_canary_modules()
        with pytest.raises(UserError, match="expected a subclass of"):
            Policy.load(stranger.run, trust_code={"canary_module:Evil"})
        stranger.canary.rmdir()
        hostile.forget_canary_modules()
        with pytest.raises(UserError, match="not part of Tutti"):
            Policy.load(stranger.run, trust_code={"other_module:Class"})
        own = load_config(stranger.run / "config.yaml", ["model.action={kind: 'canary_module:Evil'}"])
        with pytest.raises(UserError, match="expected a subclass of"):
            describe_model(own)
        assert own.classes == {"canary_module:Evil"} and stranger.canary.is_dir()
    finally:
        hostile.forget_canary_modules()
        stranger.canary.rmdir()


@pytest.mark.parametrize("special", list(hostile.SPECIAL))
@pytest.mark.parametrize("name", ["optimizer.pt", "state.json"])
def test_a_file_of_a_resume_that_is_no_plain_file_is_refused(
    unfinished: Stranger, name: str, special: str
) -> None:
    hostile.SPECIAL[special](unfinished.checkpoint / name)
    unfinished.resumed()


STATES = ("step", "files", "training", "loader", "ema_updates", "samples", "seconds", "meter")


@pytest.mark.parametrize("key", STATES)
@pytest.mark.parametrize("value", ["missing", [1]], ids=str)
def test_a_state_of_another_form_is_refused(unfinished: Stranger, key: str, value: Any) -> None:
    path = unfinished.checkpoint / "state.json"
    state = json.loads(path.read_text())
    changed = {**state, key: value} if value != "missing" else {k: v for k, v in state.items() if k != key}
    path.write_text(json.dumps(changed))
    unfinished.resumed()

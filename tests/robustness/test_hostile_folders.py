"""On a stranger's folder no command runs foreign code, hangs, or reads outside of it."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from fixtures import hostile
from fixtures.hostile import (
    TEXTS,
    WEIGHT_FILES,
    Stranger,
    bounded,
    call,
    edit_json,
    edit_yaml,
    fit,
    one_screen,
    put,
)
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


@pytest.mark.parametrize("name", [".metadata", "index.json", "rank-00000.safetensors", "__0_0.distcp"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pickle_among_the_shards_is_not_loaded(unfinished: Stranger, name: str, alone: bool) -> None:
    folder = unfinished.checkpoint
    if alone:
        state = json.loads((folder / "state.json").read_text())
        for file in folder.glob("*.safetensors"):
            file.unlink()
            del state["files"][file.name]
        (folder / "state.json").write_text(json.dumps(state))
    put(folder, f"shards/{name}", hostile.evil_pickle(unfinished.canary))
    if alone:
        unfinished.load()
        unfinished.resumed()
        unfinished.refused("export", unfinished.run, "--to", unfinished.out / "export")
    else:
        with bounded():  # the whole weights are there: the shards are of no interest
            Policy.load(unfinished.run)


@pytest.mark.parametrize("name", ["shards/.metadata", "model.pt", "state.json"])
def test_a_pickle_beside_an_export_is_not_loaded(stranger: Stranger, name: str) -> None:
    path = stranger.export / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(hostile.evil_pickle(stranger.canary))
    with bounded():
        try:
            Policy.load(stranger.export)
        except UserError as error:
            one_screen(str(error))


@pytest.mark.parametrize("kind", ["failures", "spikes"])
@pytest.mark.parametrize("name", ["batches.pt", "weights.pt", "failure.json"])
def test_a_pickle_in_a_saved_step_is_not_loaded(stranger: Stranger, kind: str, name: str) -> None:
    folder = stranger.run / kind / "step-000003"
    folder.mkdir(parents=True)
    (folder / "failure.json").write_text(json.dumps({"step": 3, "message": "x"}))
    for file in ("batches.pt", "weights.pt"):
        shutil.copy(stranger.checkpoint / "rng.pt", folder / file)
    (folder / name).write_bytes(hostile.evil_archive(stranger.canary))
    stranger.refused("replay", stranger.run, "--failure")


@pytest.mark.parametrize(
    "about", [b"", b"[]", b"{}", b'{"step": "x"}', b'{"step": NaN}', b'{"step": {"a": 1}}', b"[" * 10**5]
)
def test_a_saved_step_of_another_form_is_refused(stranger: Stranger, about: bytes) -> None:
    folder = stranger.run / "failures" / "step-000003"
    folder.mkdir(parents=True)
    (folder / "failure.json").write_bytes(about)
    stranger.refused("replay", stranger.run, "--failure")


KINDS = (
    *("canary_module:Evil", "canary_module.inner:Evil", "..canary_module:Evil", ".:Evil", "sys:Evil"),
    *("builtins:object", "os:system", ":", "canary_module:", "a b:c", "canary_module:Evil\n"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_a_checkpoint_names_is_not_imported(stranger: Stranger, kind: str) -> None:
    config = stranger.checkpoint / "config.yaml"
    edit_yaml(config, "model.action", {"kind": kind})
    fit(stranger.checkpoint, "config.yaml")
    said = stranger.load()
    assert "config.yaml" in said and "action" in said
    if kind.startswith("canary_module:E") and kind.isprintable():
        assert kind in said and "trust_code=True" in said and "--trust-code" in said


@pytest.mark.parametrize("command", ["evaluate", "probe", "export"])
def test_a_class_that_a_checkpoint_names_is_refused_by_every_command(
    stranger: Stranger, command: str
) -> None:
    config = stranger.checkpoint / "config.yaml"
    edit_yaml(config, "model.action", {"kind": "canary_module:Evil"})
    fit(stranger.checkpoint, "config.yaml")
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
    edit_yaml(stranger.checkpoint / "config.yaml", "model.action", {"kind": "canary_module:Evil"})
    fit(stranger.checkpoint, "config.yaml")
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
@pytest.mark.parametrize("name", [*WEIGHT_FILES[1:], *TEXTS])
def test_a_file_of_a_checkpoint_that_is_no_plain_file_is_refused(
    stranger: Stranger, name: str, special: str
) -> None:
    hostile.SPECIAL[special](stranger.checkpoint / name)
    if name == "config.yaml" and special != "sparse":
        hostile.SPECIAL[special](stranger.run / name)  # which would stand in for it
    stranger.load()


@pytest.mark.parametrize("special", list(hostile.SPECIAL))
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng.pt", "state.json"])
def test_a_file_of_a_resume_that_is_no_plain_file_is_refused(
    unfinished: Stranger, name: str, special: str
) -> None:
    path = unfinished.checkpoint / name
    if name != "state.json":
        edit_json(unfinished.checkpoint, "state.json", lambda state: None)
        state = json.loads((unfinished.checkpoint / "state.json").read_text())
        state["files"].pop("state.json", None)
        (unfinished.checkpoint / "state.json").write_text(json.dumps(state))
    hostile.SPECIAL[special](path)
    unfinished.resumed()


NAMES = (
    "../secret",
    "/etc/hostname",
    "/dev/zero",
    "shards/../../secret",
    "..",
    "",
    "a/b",
    "\x00",
    "x" * 5000,
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:16])
def test_a_name_that_leads_out_of_a_checkpoint_is_refused(unfinished: Stranger, name: str) -> None:
    (unfinished.run / "checkpoints" / "secret").write_bytes(b"secret")
    state = json.loads((unfinished.checkpoint / "state.json").read_text())
    state["files"][name] = {"bytes": 6, "crc32": 1593279220}
    (unfinished.checkpoint / "state.json").write_text(json.dumps(state))
    unfinished.resumed()


STATES = ("step", "files", "training", "loader", "ema_updates", "samples", "seconds", "meter")


@pytest.mark.parametrize("key", STATES)
@pytest.mark.parametrize("value", ["missing", [1]], ids=str)
def test_a_state_of_another_form_is_refused(unfinished: Stranger, key: str, value: Any) -> None:
    state = json.loads((unfinished.checkpoint / "state.json").read_text())
    if value == "missing":
        del state[key]
    else:
        state[key] = value
    (unfinished.checkpoint / "state.json").write_text(json.dumps(state))
    unfinished.resumed()

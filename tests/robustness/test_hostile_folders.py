"""On a stranger's folder no command runs foreign code, hangs, fills the memory or ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_world as hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hostile_world import STEP, bounded, call, edit_json, edit_yaml, fit, one_screen, put
from PIL import Image

from tutti import pipeline
from tutti.config import load_config
from tutti.data.formats.lerobot import LeRobotStore
from tutti.evaluation.starts import TrainingStarts
from tutti.serving.export import export
from tutti.serving.policy import Policy
from tutti.types import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import checkup_world  # pyright: ignore[reportMissingImports]

MODEL = {
    "vision": {"stem": {"channels": [8, 8], "strides": [2, 2]}, "width": 8, "heads": 1},
    "language": {"width": 8, "depth": 1, "heads": 1},
    "fusion": {"width": 8, "depth": 1, "heads": 1},
    "action": {"hidden": 8},
}
TRAINING = {
    "steps": 4,
    "schedule": {"kind": "wsd", "warmup": 1},
    "log_every": 1,
    "checkpoint_every": 2,
    "keep_checkpoints": 9,
    "ema": 0.9,
    "diagnostics": {"every": 0},
}


@dataclass(frozen=True)
class Stranger:
    """A copy of the run that has ended after its checkpoint of step 2, of an export, and the traps."""

    run: Path
    export: Path
    canary: Path
    out: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / STEP

    @property
    def mine(self) -> Path:
        """The user's own config, with which a training goes on."""
        return self.out / "mine.yaml"

    def load(self) -> str:
        """What Policy.load says."""
        with bounded(), pytest.raises(UserError) as caught:
            Policy.load(self.run)
        one_screen(str(caught.value))
        return str(caught.value)

    def refused(self, *command: str | Path) -> str:
        """What a command says that is refused."""
        done = call(*command)
        assert done.exit_code == 2, (done.exit_code, done.output[-2000:], repr(done.exception))
        said = done.output[done.output.index("error:") :]
        one_screen(said)
        return said

    def resumed(self) -> str:
        return self.refused("train", self.mine, "--run", self.run)

    def forked(self) -> str:
        fork = f"training.fork={{run: {self.run}}}"
        return self.refused("train", self.mine, "--run", self.out / "fork", fork)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template")
    checkup_world.write(home / "data", checkup_world.episodes(6))
    config = checkup_world.config(
        home / "data", data={"batch_size": 2, "image_size": 16}, model=MODEL, training=TRAINING
    )
    run = home / "run"
    pipeline.train(config, run)
    export(run, home / "export")
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


WEIGHT_FILES = ("model.safetensors", "ema.safetensors")
TEXTS = ("spec.json", "normalizer.json", "tokenizer.json", "config.yaml")


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
            pipeline.describe_model(own)
        assert own.classes == {"canary_module:Evil"} and stranger.canary.is_dir()
    finally:
        hostile.forget_canary_modules()
        stranger.canary.rmdir()


@pytest.mark.parametrize("form", list(hostile.YAML))
def test_a_bomb_in_a_config_is_refused(stranger: Stranger, form: str) -> None:
    text = hostile.YAML[form].encode()
    put(stranger.checkpoint, "config.yaml", text)
    assert "config.yaml" in stranger.load()
    if form not in ("laughs", "loop", "deep", "escapes", "controls", "list"):
        return  # the same function reads both files
    (stranger.run / "config.yaml").write_bytes(text)
    said = stranger.refused("probe", stranger.run)
    assert "config.yaml" in said and "\x1b" not in said


@pytest.mark.parametrize("name", ["spec.json", "normalizer.json", "tokenizer.json"])
@pytest.mark.parametrize("form", list(hostile.JSON))
def test_a_bomb_in_a_text_of_a_checkpoint_is_refused(stranger: Stranger, name: str, form: str) -> None:
    put(stranger.checkpoint, name, hostile.JSON[form])
    assert name in stranger.load()


@pytest.mark.parametrize("form", list(hostile.JSON))
def test_a_bomb_in_the_books_is_refused(unfinished: Stranger, form: str) -> None:
    run = unfinished.run
    (run / "checkpoints" / "best.json").write_bytes(hostile.JSON[form])
    said = unfinished.refused("export", run, "--to", unfinished.out / "x", "--checkpoint", "best")
    assert "best.json" in said
    before = (unfinished.checkpoint / "state.json").read_bytes()
    (unfinished.checkpoint / "state.json").write_bytes(hostile.JSON[form])
    assert "state.json" in unfinished.load()
    if form in ("deep", "nan"):
        assert "state.json" in unfinished.resumed()
    (unfinished.checkpoint / "state.json").write_bytes(before)
    (run / "stages.json").write_bytes(hostile.JSON[form])
    assert "stages.json" in unfinished.refused("probe", run)


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


@pytest.mark.parametrize("form", list(hostile.WEIGHTS))
def test_a_bomb_in_a_file_of_weights_is_refused(unfinished: Stranger, form: str) -> None:
    for name in WEIGHT_FILES:
        put(unfinished.checkpoint, name, hostile.WEIGHTS[form])
    assert "safetensors" in unfinished.load() or "weights" in unfinished.load()
    unfinished.resumed()


SPEC = [
    *((key, value) for key in ("image_size", "state_dim", "action_dim") for value in (10**6, -1, 0, "8")),
    *((key, 10**9) for key in ("horizon", "vocab_size", "text_length")),
    *(("views", ["v"] * 10**5), ("views", []), ("views", "front"), ("views", ["x" * 10**6])),
    *(("embodiments", ["e"] * 10**5), ("embodiments", [1]), ("fps", float("inf")), ("fps", "10")),
    *(("image_size", True), ("image_size", 2**63), ("another", 1)),
]


@pytest.mark.parametrize(("key", "value"), SPEC, ids=lambda one: str(one)[:12])
def test_absurd_sizes_of_the_data_are_refused(stranger: Stranger, key: str, value: Any) -> None:
    edit_json(stranger.checkpoint, "spec.json", lambda spec: spec | {key: value})
    assert "spec.json" in stranger.load()


SIZES = {
    "model.vision.width": 2**20,
    "model.vision.depth": 10**9,
    "model.vision.mlp_ratio": 1e300,
    "model.vision.stem.channels": [2**40, 8],
    "model.language.width": 2**33,
    "model.language.num_tokens": 10**12,
    "model.fusion.depth": 10**6,
    "model.fusion.mlp_ratio": float("inf"),
    "model.action.hidden": 2**31,
    "model.action": {"kind": "flow", "steps": 10**9},
    "model.action.depth": 1,
}


@pytest.mark.parametrize("key", list(SIZES))
def test_a_model_of_absurd_size_is_not_built(stranger: Stranger, key: str) -> None:
    edit_yaml(stranger.checkpoint / "config.yaml", key, SIZES[key])
    fit(stranger.checkpoint, "config.yaml")
    stranger.load()


@pytest.mark.parametrize(
    "action",
    [
        {"kind": "diffusion", "training_steps": 10**10},
        {"kind": "fast", "vocabulary_size": 10**10},
        {"kind": "bins", "bins": 10**10},
    ],
    ids=lambda action: action["kind"],
)
def test_another_decoder_of_absurd_size_is_not_built(stranger: Stranger, action: dict[str, Any]) -> None:
    edit_yaml(stranger.checkpoint / "config.yaml", "model.action", action)
    fit(stranger.checkpoint, "config.yaml")
    stranger.load()


def tokenizer(change: str, values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with one change."""
    bpe = values["bpe"]
    match change:
        case "length":
            values["text_length"] = 10**12
        case "padding":
            bpe["padding"] = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
            bpe["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
        case "search":
            pattern = {"Regex": "(a+)+$"}
            bpe["pre_tokenizer"] = {
                "type": "Split",
                "pattern": pattern,
                "behavior": "Isolated",
                "invert": False,
            }
        case "replace":
            bpe["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "x" * 10**6}
        case "precompiled":
            parts = [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}]
            bpe["normalizer"] = {"type": "Sequence", "normalizers": parts}
        case "word_level":
            bpe["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
        case "identity":
            bpe["model"]["vocab"] = {key: 4_000_000_000 + n for n, key in enumerate(bpe["model"]["vocab"])}
        case "merges":
            bpe["model"]["merges"] = [["\u0000", "\u0000"]]
        case "dropout":
            bpe["model"]["dropout"] = 0.5
        case "vocabulary":
            bpe["model"]["vocab"] = {}
        case "bpe":
            values["bpe"] = "x"
    return values


@pytest.mark.parametrize(
    "change",
    [
        *("length", "padding", "search", "replace", "precompiled", "word_level", "identity", "merges"),
        *("dropout", "vocabulary", "bpe"),
    ],
)
def test_another_tokenizer_is_refused(stranger: Stranger, change: str) -> None:
    edit_json(stranger.checkpoint, "tokenizer.json", lambda values: tokenizer(change, values))
    assert "tokenizer.json" in stranger.load()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "x", [1.0], 1e400])
def test_a_number_that_is_none_in_the_normalizer_is_refused(stranger: Stranger, value: Any) -> None:
    def change(values: dict[str, Any]) -> None:
        values["stats"]["dot"]["action"]["mean"][0] = value
        values["stats"]["dot"]["action"]["q99"][0] = value

    edit_json(stranger.checkpoint, "normalizer.json", change)
    assert "normalizer.json" in stranger.load()


@pytest.mark.parametrize("change", ["other_dims", "other_names", "kind"])
def test_a_normalizer_of_other_data_is_refused(stranger: Stranger, change: str) -> None:
    def spoil(values: dict[str, Any]) -> None:
        if change == "other_dims":
            values["stats"]["dot"]["state"] = values["stats"]["dot"]["action"]
        elif change == "other_names":
            values["stats"] = {"another": values["stats"]["dot"]}
        else:
            values["kind"] = "other"

    edit_json(stranger.checkpoint, "normalizer.json", spoil)
    assert "normalizer.json" in stranger.load()


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


REPORTED = (
    *("evaluation/results.json", "evaluation/open_loop.json", "summary.json", "videos/index.json"),
    *("probes/probes.json", "model.json", "data.json", "recording.json", "records.jsonl", "first_batch.png"),
    *("probes/occlusion.png", "failures/step-000001/failure.json"),
)


def spoil_all(run: Path, how: Any, but: str = "") -> None:
    for name in REPORTED:
        if name == but:
            continue
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        how(path)


@pytest.mark.parametrize("form", [*hostile.JSON, *hostile.SPECIAL])
def test_no_torn_or_foreign_file_stops_the_report(stranger: Stranger, form: str) -> None:
    make = hostile.SPECIAL.get(form, lambda path: path.write_bytes(hostile.JSON[form]))
    spoil_all(stranger.run, make, but="summary.json" if form == "folder" else "")  # it is written too
    done = call("report", stranger.run)
    assert done.exit_code == 0, (done.output[-2000:], repr(done.exception))
    page = (stranger.run / "report.html").read_text()
    if form not in ("list", "null", "nan"):  # which are whole, only not what is expected
        assert "results.json" in page


FOREIGN: dict[str, Any] = {
    "evaluation/results.json": {"scores": {"policy": {"tasks": {"a": [1]}, "mean": "x"}}, "verdicts": [1]},
    "evaluation/open_loop.json": {"overall": {"normalised": {"executed": "x"}}, "tasks": 7},
    "videos/index.json": {"videos": [{"task": [], "file": "../../etc/passwd", "seed": {}}, 3]},
    "probes/probes.json": {"findings": [{"sentence": {}, "outcome": []}], "removals": 3, "baselines": [1]},
    "model.json": {"modules": [{"depth": "x", "parameters": 10**400}], "tokens": [[[[]]]]},
    "data.json": [[[[[[]]]]]],
    "recording.json": {"seeds": "x", "tries": 1e308},
    "summary.json": {"name": {}, "seconds": "x", "success": {"a": [10**400, 1]}},
    "failures/step-000001/failure.json": [{"step": []}],
}


@pytest.mark.parametrize("name", [*FOREIGN, "config.yaml", "records.jsonl"])
def test_values_of_another_form_do_not_stop_the_report(stranger: Stranger, name: str) -> None:
    path = stranger.run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "config.yaml":
        path.write_text(hostile.YAML["laughs"])
    elif name == "records.jsonl":
        lines = [b'{"step": 1, "a": 1' + b"0" * 400 + b"}", b'{"step": 1e999}', b"\xff\xfe", b"[" * 10**5]
        lines += [
            b'{"step": -5, "loss/total": "x", "b": ' + b'{"c": ' * 800 + b"1" + b"}" * 801,
            b"x" * 2**21,
        ]
        path.write_bytes(path.read_bytes() + b"\n".join(lines) + b"\n")
    else:
        path.write_text(json.dumps(FOREIGN[name]))
    done = call("report", stranger.run)
    assert done.exit_code == 0, (done.output[-2000:], repr(done.exception))
    assert "Traceback" not in done.output


def test_records_that_are_none_are_refused_by_a_resume(unfinished: Stranger) -> None:
    path = unfinished.run / "records.jsonl"
    path.write_bytes(b"\xff\xfe\n" + path.read_bytes())
    assert "records.jsonl" in unfinished.resumed()


def test_what_a_link_leads_to_is_neither_shown_nor_overwritten(stranger: Stranger, tmp_path: Path) -> None:
    """Links to files of the user's in the places where a command reads or writes."""
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"my own secret")
    run = stranger.run
    (run / "videos").mkdir()
    (run / "videos" / "index.json").write_text(json.dumps({"videos": [{"task": "a", "file": "a.mp4"}]}))
    (run / "probes").mkdir(exist_ok=True)
    links = [f"{name}.partial" for name in ("report.html", "summary.json", "stages.json")]
    for name in ("videos/a.mp4", "first_batch.png", "probes/occlusion.png", ".lock", "report.html", *links):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret)
    refused = stranger.refused("report", run)
    assert ".lock" in refused
    (run / ".lock").unlink()
    done = call("report", run)
    assert done.exit_code == 0, done.output[-2000:]
    page = (run / "report.html").read_text()
    assert "my own secret" not in page and "bXkgb3duIHNlY3JldA" not in page
    assert secret.read_bytes() == b"my own secret"


@pytest.mark.parametrize("name", [*TEXTS, "ema.safetensors"])
def test_the_content_behind_a_link_is_not_told(stranger: Stranger, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("my own secret: [unfinished\n")
    for folder in (stranger.checkpoint, stranger.run):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
    assert "my own secret" not in stranger.load()


def picture(form: str, size: tuple[int, int] = (32, 32)) -> bytes:
    """The bytes of a picture in another form than its data set says."""
    buffer = io.BytesIO()
    if form == "PostScript":
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n"
    if form in ("bomb", "huge"):  # the header alone: more must not be looked at
        edge = 9_000 if form == "bomb" else 2**31 - 1
        data = struct.pack(">IIBBBBB", edge, edge, 1, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + data + struct.pack(">I", zlib.crc32(b"IHDR" + data))
        end = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        return b"\x89PNG\r\n\x1a\n" + chunk + end
    Image.new("RGB", size).save(buffer, form)
    content = buffer.getvalue()
    return content[:60] if form == "JPEG" else content


@pytest.mark.parametrize("form", ["PostScript", "bomb", "huge", "GIF", "TIFF", "BMP", "PPM", "JPEG"])
def test_a_picture_of_another_form_is_refused(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Pillow would start Ghostscript for one, and fill the memory for another."""
    canary, tools = tmp_path / "canary", tmp_path / "bin"
    tools.mkdir()
    for name in ("gs", "gswin64c"):
        (tools / name).write_text(f"#!/bin/sh\nmkdir {canary}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    data = shutil.copytree(template / "data", tmp_path / "data")
    (file,) = (data / "data").glob("*/*.parquet")
    table = pq.read_table(file)
    view = checkup_world.VIEWS[0]
    rows = table[view].to_pylist()
    rows[3]["bytes"] = picture(form)
    place = table.schema.get_field_index(view)
    spoilt = pa.array(rows, table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), spoilt), file)
    store = LeRobotStore(data)
    with bounded(), pytest.raises(UserError, match="frame row 3") as caught:
        store.frames(view, np.arange(6))
    one_screen(str(caught.value))
    assert view in str(caught.value) and not canary.exists()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileNotFoundError(2, "No such file or directory", "runs/a/records.jsonl"), "runs/a/records.jsonl"),
        (PermissionError(13, "Permission denied", "runs/a/.lock"), "runs/a/.lock: Permission denied"),
        (UnicodeDecodeError("utf-8", b"\xff" * 10_000, 0, 1, "invalid start byte"), "UTF-8"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError("Unable to allocate 1.00 TiB"), "not enough memory (Unable to allocate 1.00 TiB)"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_the_system_refuses_is_a_message(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "report", fail)
    assert says in stranger.refused("report", stranger.run)


def test_a_recording_that_names_no_seeds_is_refused(stranger: Stranger) -> None:
    for content in (*hostile.JSON.values(), b'{"seeds": [1, 2, 3]}', b'{"seeds": ["a", "b"]}'):
        (stranger.run / "recording.json").write_bytes(content)
        with bounded(), pytest.raises(UserError, match=r"recording\.json") as caught:
            TrainingStarts.of_data(stranger.run / "dataset")
        one_screen(str(caught.value))


def test_texts_of_another_form_do_not_stop_a_fork_with_a_traceback(stranger: Stranger) -> None:
    """A fork compares the texts of the other run with its own."""
    whole = {name: (stranger.checkpoint / name).read_bytes() for name in TEXTS}
    for name in TEXTS:
        put(stranger.checkpoint, name, hostile.YAML["laughs"].encode() if "yaml" in name else b"[1]")
        stranger.forked()
        put(stranger.checkpoint, name, whole[name])

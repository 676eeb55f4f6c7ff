"""Trainings with pre-trained towers: resumed to the bit, saved without frozen weights, exported with them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fixtures import run_equality, squares_data
from fixtures.ranks import on_ranks
from fixtures.squares_data import MODEL, TRAINING, act
from fixtures.towers import SIZE, save_tokenizer, save_tower
from fixtures.vlms import save_pi0, save_vlm
from tutti import pipeline
from tutti.config.run_config import RunConfig, build_config
from tutti.data.tokenize import Tokenizer
from tutti.debug.tower_checks import check_towers
from tutti.nested_dicts import merge
from tutti.planning.footprint import fake_update
from tutti.runs.build import build_training, expected_spec
from tutti.serving.export import export_policy
from tutti.serving.factory import CheckpointPolicyFactory
from tutti.serving.policy import Policy
from tutti.storage.checkpoint import find_checkpoint
from tutti.training.records import read_records
from tutti.types import UserError


def towers(home: Path, learn: Any = "none") -> dict[str, Any]:
    return {
        "vision": {"kind": "pretrained", "path": str(home / "dinov2"), "learn": learn},
        "language": {
            "kind": "pretrained",
            "path": str(home / "bert"),
            "learn": {"lora": 2},
            "num_tokens": 2,
            "heads": 2,
        },
    }


def config_of(home: Path, learn: Any = "none", **training: Any) -> RunConfig:
    section = {"batch_size": 2, "image_size": SIZE, "validation_fraction": 0.3}
    given = {"data": section, "model": merge(MODEL, towers(home, learn)), "training": TRAINING | training}
    return squares_data.config(home / "data", **given)


def vlm_config(home: Path, learn: Any = "none") -> RunConfig:
    """The same data and training; the other terms that there are by default."""
    action = {"kind": "flow", "width": 8, "depth": 2, "heads": 2, "cross_attention": "layers"}
    model = {"vlm": {"path": str(home / "smolvlm"), "learn": learn, "layers": 3}, "action": action}
    return build_config(config_of(home).model_dump(mode="json") | {"model": model}, "the test")


def pi0_config(home: Path, learn: Any = "none") -> RunConfig:
    """The same with a checkpoint in pi0's format, whose expert learns."""
    model = {"vlm": {"path": str(home / "pi0"), "learn": learn}, "action": {"kind": "pi0", "steps": 2}}
    return build_config(config_of(home).model_dump(mode="json") | {"model": model}, "the test")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, two towers, and a run of 4 steps with both."""
    home = tmp_path_factory.mktemp("home")
    squares_data.write(home / "data", squares_data.episodes(6))
    for name in ("dinov2", "bert"):
        save_tower(home / name, name)
    pipeline.train(config_of(home), home / "run")
    return home


@pytest.fixture(scope="module")
def with_vlm(home: Path) -> Path:
    """The same with a vision-language model, and a run of 4 steps with its LoRA factors."""
    save_vlm(home / "smolvlm", "smolvlm")
    pipeline.train(vlm_config(home, {"lora": 2}), home / "vlm-run")
    save_pi0(home / "pi0")
    pipeline.train(pi0_config(home, {"lora": 2}), home / "pi0-run")
    return home


def test_a_resumed_run_is_the_run_without_a_break(with_vlm: Path, tmp_path: Path) -> None:
    runs = {"run": config_of(with_vlm), "vlm-run": vlm_config(with_vlm, {"lora": 2})}
    runs["pi0-run"] = pi0_config(with_vlm, {"lora": 2})
    for name, config in runs.items():
        shutil.copytree(with_vlm / name, tmp_path / name)
        shutil.rmtree(find_checkpoint(tmp_path / name))
        assert find_checkpoint(tmp_path / name).name == "step-000002"
        build_training(config, tmp_path / name).fit()
        assert run_equality.differing(with_vlm / name, tmp_path / name) == []


def serves_without(folder: Path, run: Path, export: Path) -> None:
    """The export of a run with that folder acts as the run where the folder is gone; the run itself does not
    load. No factor is left in the export."""
    policy = Policy.load(run)
    export_policy(run, export)
    away = folder.with_name("away")
    folder.rename(away)
    try:
        exported = Policy.load(export)
        np.testing.assert_allclose(act(exported), act(policy), atol=1e-5)
        assert not any(name.endswith(".down") for name, _ in exported.model.named_parameters())
        with pytest.raises(UserError, match=rf"{folder.name}/.* is not there"):
            Policy.load(run)
    finally:
        away.rename(folder)


def test_frozen_weights_are_in_no_file_of_a_checkpoint_but_in_an_export(home: Path, tmp_path: Path) -> None:
    saved = find_checkpoint(home / "run")
    for file in ("model.safetensors", "ema.safetensors"):
        names = [name for name in load_file(saved / file) if ".tower." in name]
        assert names and all(name.endswith((".down", ".up")) for name in names)
    section = yaml.safe_load((saved / "config.yaml").read_text())["model"]["vision"]
    assert section["architecture"]["model_type"] == "dinov2" and len(section["sha256"]) == 64
    training = build_training(config_of(home), home / "run", output=tmp_path)
    moved = training.trainer.state.optimizer.parameters
    assert sum(p.numel() for p in moved) < 0.6 * sum(p.numel() for p in training.model.parameters())

    serves_without(home / "dinov2", home / "run", tmp_path / "export")
    assert len(CheckpointPolicyFactory(home / "run").fingerprint) == 64


def test_another_tower_in_the_folder_is_refused_and_another_folder_is_not(home: Path, tmp_path: Path) -> None:
    for name in ("dinov2", "bert", "data", "run"):
        shutil.copytree(home / name, tmp_path / name)
    longer = config_of(tmp_path, steps=5)
    file = tmp_path / "dinov2" / "model.safetensors"
    tensors, before = load_file(file), file.read_bytes()
    tensors["layernorm.bias"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"not the one that this run was trained with.*\n.*vision\.sha256"):
        build_training(longer, tmp_path / "run").fit()
    file.write_bytes(before)
    colours = tmp_path / "dinov2" / "preprocessor_config.json"
    colours.write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    with pytest.raises(UserError, match=r"not the one that this run was trained with.*\n.*vision\.mean"):
        build_training(longer, tmp_path / "run").fit()
    colours.unlink()
    assert build_training(longer, tmp_path / "run").fit().name == "step-000005"


def test_of_a_vlm_a_checkpoint_has_the_hash_and_an_export_the_weights(with_vlm: Path, tmp_path: Path) -> None:
    saved = find_checkpoint(with_vlm / "vlm-run")
    names = [name for name in load_file(saved / "model.safetensors") if ".tower." in name]
    assert names and all(name.endswith((".down", ".up")) for name in names)
    section = yaml.safe_load((saved / "config.yaml").read_text())["model"]["vlm"]
    assert section["architecture"]["model_type"] == "smolvlm" and len(section["sha256"]) == 64
    serves_without(with_vlm / "smolvlm", with_vlm / "vlm-run", tmp_path / "export")
    tensors = load_file(find_checkpoint(with_vlm / "pi0-run") / "model.safetensors")
    own = [name for name in tensors if ".tower." in name and not name.endswith((".down", ".up"))]
    assert len(own) == 47 and all(name.startswith("action.tower.") for name in own)  # the expert learns
    before = load_file(with_vlm / "pi0" / "model.safetensors")["action_out_proj.weight"]
    assert not tensors["action.tower.network.action_out_proj.weight"].equal(before)
    serves_without(with_vlm / "pi0", with_vlm / "pi0-run", tmp_path / "pi0-export")


def losses_of_ranks(home: str, output: str) -> list[float]:
    given = {"parallel": {"kind": "fsdp"}, "activation_checkpointing": "block"}
    checkpoints = {"every": 2, "keep": 9, "format": "sharded"}
    config = config_of(Path(home), **given, checkpoints=checkpoints)
    build_training(config, Path(home) / "run", output=Path(output)).fit()
    return losses(Path(output))


def losses(run: Path) -> list[float]:
    return [record["loss/total"] for record in read_records(run) if record["kind"] == "train"]


def test_two_ranks_that_share_the_towers_weights_learn_as_one_process(home: Path, tmp_path: Path) -> None:
    """Blocks are sharded and recomputed; what is frozen is in no shard of the checkpoint either."""
    both = on_ranks(2, losses_of_ranks, str(home), str(tmp_path))
    assert both[0] == both[1] == pytest.approx(losses(home / "run"), rel=1e-5)
    np.testing.assert_allclose(act(Policy.load(tmp_path)), act(Policy.load(home / "run")), atol=1e-4)
    index = (find_checkpoint(tmp_path) / "shards" / "index.json").read_text()
    assert "model/vision.position" in index and "model/vision.tower" not in index


@pytest.mark.parametrize("made", [config_of, vlm_config])
def test_a_plan_counts_no_gradient_moment_or_average_of_what_is_frozen(
    with_vlm: Path, made: Callable[[Path, Any], RunConfig]
) -> None:
    parts = []
    for learn in ("none", "all"):
        config = made(with_vlm, learn)
        with fake_update(config, expected_spec(config)) as (trial, memory):
            trial.peaks(memory, 1)
            parts.append(trial.parts())
    frozen, full = parts
    assert frozen.parameters == full.parameters and full.weights == frozen.weights
    tower = full.trainable - frozen.trainable
    assert full.gradients - frozen.gradients == full.ema - frozen.ema == 4 * tower > 0
    assert full.optimizer - frozen.optimizer >= 8 * tower


def test_a_start_from_a_towers_folder_takes_what_fits(home: Path, tmp_path: Path) -> None:
    """A tower of fewer blocks and another picture size begins as the other one, but for its positions, once
    what differs is allowed."""
    small = {"kind": "pretrained", "path": str(tmp_path / "small"), "weights": "random"}
    shutil.copytree(home / "dinov2", tmp_path / "small")
    said = json.loads((tmp_path / "small" / "config.json").read_text())
    said = {key: said[key] for key in said if not key.startswith(("out_", "stage_"))}
    said |= {"image_size": 24, "num_hidden_layers": 2}
    (tmp_path / "small" / "config.json").write_text(json.dumps(said))
    allow = ["*.position_embeddings", "*.layer.2.*"]
    config = config_of(home, init_from={"run": str(home / "dinov2"), "allow": allow})
    model = config.model.model_dump(mode="json") | {"vision": small}
    data = config.data.model_dump(mode="json") | {"image_size": 24}
    config = build_config(config.model_dump(mode="json") | {"model": model, "data": data}, "the test")
    built = build_training(config, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "init_from.json").read_text())
    theirs = load_file(home / "dinov2" / "model.safetensors")
    own = built.model.state_dict()
    for name in ("encoder.layer.1.mlp.fc1.weight", "layernorm.bias"):
        assert own[f"vision.tower.network.{name}"].equal(theirs[name])
    position = "model.vision.tower.network.embeddings.position_embeddings"
    assert report["another shape"] == {position: "[1, 37, 16] here, [1, 17, 16] there"}
    assert report["counts"]["taken"] == 41 and any("layer.2." in name for name in report["only there"])
    built.fit()
    with pytest.raises(UserError, match=r"no pre-trained part .*dinov2\.\n  expected: model\.vision, model"):
        data |= {"image_size": SIZE}
        plain = config.model_dump(mode="json") | {"model": MODEL, "data": data}
        build_training(build_config(plain, "the test"), tmp_path / "none")
    with pytest.raises(UserError, match=r"statistics is kept, but .* is a tower"):
        config_of(home, init_from={"run": str(home / "dinov2"), "statistics": "kept"})


def test_the_doctor_says_what_the_towers_are_and_what_will_harm_them(home: Path, tmp_path: Path) -> None:
    training = build_training(config_of(home, "all"), home / "run", output=tmp_path)
    lines, findings = check_towers(training, training.data.train.batch_at(0))
    assert "dinov2 of" in lines[0] and "60 tensors loaded, none missing, 1 not read" in lines[0]
    assert lines[1].startswith(
        "vision: 32 picture tokens found, 2 views x 16; pictures of 16 px (the tower's: 16)"
    )
    assert lines[3].startswith("language: the longest instruction has 7 tokens, 64 are read; 0.0 % of all")
    assert lines[4].startswith("Learning parameters: vision ") and "action" in lines[4]
    assert [(one.kind, one.number, one.part) for one in findings] == [("tower_rate", 1.0, "vision")]
    calm = config_of(home, "all", optimizer={"learning_rates": {"vision": 0.1}})
    slower = build_training(calm, home / "run", output=tmp_path)
    assert check_towers(slower, slower.data.train.batch_at(0))[1] == []
    save_tokenizer(tmp_path, known=5)
    slower.data.windows.instructions = ("go to the red square",)
    slower.data = replace(slower.data, tokenizer=Tokenizer.from_folder(tmp_path, ["go"], text_length=6))
    findings = check_towers(slower, slower.data.train.batch_at(0))[1]
    assert [one.kind for one in findings] == ["unknown_words", "instruction_cut"]
    with torch.no_grad():
        slower.model.vision.tower.network.embeddings.position_embeddings.zero_()  # pyright: ignore
    grey = slower.data.train.batch_at(0)
    grey.observation.images.fill_(128)
    assert "collapsed_tokens" in [one.kind for one in check_towers(slower, grey)[1]]


def test_the_doctor_names_the_parts_of_a_vlm(with_vlm: Path, tmp_path: Path) -> None:
    training = build_training(vlm_config(with_vlm, "all"), with_vlm / "vlm-run", output=tmp_path)
    lines, findings = check_towers(training, training.data.train.batch_at(0))
    assert "54 tensors loaded, none missing, 10 not read (lm_head.weight" in lines[0]
    assert lines[1].startswith(
        "vision: 8 picture tokens found, 2 views x 4; pictures of 16 px (the tower's: 16)"
    )
    assert lines[3].startswith("language: the longest instruction has 7 tokens, 64 are read")
    assert lines[5].startswith("fusion: 3 blocks of width 16 over 8 picture tokens, up to 16 of text, which")
    rate, align = findings
    assert (align.kind, align.term) == ("bag_of_words", "align") and "objective.align=null" in align.cure
    assert rate.kind == "tower_rate" and rate.sentence.startswith("vision, language, fusion are pre-trained")
    assert "learning_rates={vision: 0.1, language: 0.1, fusion: 0.1}" in rate.cure
    said = yaml.safe_load(re.findall(r"strategy=(\{.*?\})", rate.cure)[0]) | {"first_share": 0.5}
    calm = build_config(vlm_config(with_vlm, "all").model_dump(mode="json") | {"strategy": said}, "the test")
    training = build_training(calm, with_vlm / "vlm-run", output=tmp_path)
    assert [one.kind for one in check_towers(training, training.data.train.batch_at(0))[1]] == [
        "bag_of_words"
    ]


def test_the_doctor_tells_of_a_pi0(with_vlm: Path, tmp_path: Path) -> None:
    """No hint at rates: beside the VLM's there are no new weights that matter to it."""
    training = build_training(pi0_config(with_vlm, "all"), with_vlm / "pi0-run", output=tmp_path)
    lines, findings = check_towers(training, training.data.train.batch_at(0))
    assert lines[7].startswith("action: an expert of 4 blocks of width 12 shares keys and values with")
    assert "2 of 6 dimensions of a state and 3 of 7 of an action are in use" in lines[7]
    assert [one.kind for one in findings] == ["bag_of_words"]

"""Trainings that begin as a folder of others: a tower, a VLM or a pi0; all that differs is named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fixtures import squares_data
from fixtures.squares_data import MODEL, TRAINING
from fixtures.towers import SIZE, save_tokenizer, save_tower
from fixtures.vlms import save_pi0, save_vlm
from tutti import pipeline
from tutti.config.run_config import RunConfig
from tutti.debug.tower_checks import check_towers
from tutti.models.vla import VLA
from tutti.nested_dicts import merge
from tutti.runs.build import BuiltTraining, build_training
from tutti.serving.export import export_policy
from tutti.storage.checkpoint import find_checkpoint
from tutti.types import UserError

REGRESSION = {"kind": "regression", "hidden": 8}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a tower, two VLMs and a pi0; and a SmolVLM with a language model of one block less."""
    home = tmp_path_factory.mktemp("home")
    squares_data.write(home / "data", squares_data.episodes(6))
    save_tower(home / "dinov2", "dinov2")
    for name in ("smolvlm", "paligemma"):
        save_vlm(home / name, name)
    save_pi0(home / "pi0")
    shutil.copytree(home / "smolvlm", home / "shallow")
    said = json.loads((home / "shallow" / "config.json").read_text())
    said["text_config"]["num_hidden_layers"] = 3
    (home / "shallow" / "config.json").write_text(json.dumps(said))
    return home


def config_of(home: Path, model: dict[str, Any], begin: Any, **training: Any) -> RunConfig:
    given: dict[str, Any] = {
        "data": {"batch_size": 2, "image_size": SIZE, "validation_fraction": 0.3},
        "training": TRAINING | {"init_from": begin} | training,
        "objective": {"align": None, "recon": None, "state": None},
    }
    made = merge(MODEL, model) if "vlm" not in model else model
    return squares_data.config(home / "data", **given).model_copy(
        update={"model": RunConfig.model_validate({"name": "a", "model": made}).model}
    )


def vlm(path: Path, action: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {"vlm": {"path": str(path), "weights": "random", **keys}, "action": action or REGRESSION}


def begun(config: RunConfig, run: Path) -> BuiltTraining:
    return build_training(config, run)


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "init_from.json").read_text())


def own(model: VLA, part: str) -> dict[str, torch.Tensor]:
    start = f"{part}.tower.network."
    return {n.removeprefix(start): t for n, t in model.state_dict().items() if n.startswith(start)}


def allowed_by(error: pytest.ExceptionInfo[UserError]) -> list[str]:
    """What the message says to set, as it is printed."""
    found = re.search(r"training\.init_from\.allow=\[(.*)\]$", str(error.value))
    assert found is not None
    return found[1].split(", ")


def test_of_a_vlm_all_is_taken_or_named_and_a_checkpoint_has_its_hash(home: Path, tmp_path: Path) -> None:
    """Into one with fewer blocks: refused with the patterns that allow it; then trained, and resumed without
    the folder."""
    folder = shutil.copytree(home / "smolvlm", tmp_path / "smolvlm")
    begin: dict[str, Any] = {"run": str(folder)}
    with pytest.raises(
        UserError, match=r"training\.init_from: 9 tensors of .*smolvlm and model\.vlm "
    ) as error:
        begun(config_of(home, vlm(home / "shallow"), begin), tmp_path / "run")
    assert "only there" in str(error.value) and "another shape" not in str(error.value)
    assert allowed_by(error) == ["model.vlm.network.text_model.layers.3.*"]
    assert not (tmp_path / "run" / "init_from.json").exists()
    config = config_of(home, vlm(home / "shallow"), begin | {"allow": allowed_by(error)})
    built, theirs = begun(config, tmp_path / "run"), load_file(folder / "model.safetensors")
    taken = {
        f"model.{name}": tensor
        for part in ("vision", "language", "fusion")
        for name, tensor in own(built.model, part).items()
    }
    assert len(taken) == report(tmp_path / "run")["counts"]["taken"] == 54 + 1 + 28
    assert all(tensor.equal(theirs[name]) for name, tensor in taken.items())
    told = report(tmp_path / "run")
    assert "lm_head.weight" in " ".join(told["only there"]) and "model.fusion.readout" in told["only here"]
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    lines, findings = check_towers(built, built.data.train.batch_at(0))
    unread = "10 not read (lm_head.weight, text_model.layers); SHA-256"
    assert f"54 tensors loaded, none missing, {unread} {sha256[:16]}" in lines[0]
    assert f"1 tensor loaded, none missing; SHA-256 {sha256[:16]}" in lines[2]
    assert {one.kind for one in findings} == {"tower_rate"}, "it has begun as trained, beside new parts"
    checkpoint = built.fit()
    saved = yaml.safe_load((checkpoint / "config.yaml").read_text())["training"]["init_from"]
    assert saved["sha256"] == told["sha256"] == sha256
    shutil.rmtree(checkpoint)
    shutil.rmtree(folder)
    again = begun(config, tmp_path / "run").fit()
    saved = yaml.safe_load((again / "config.yaml").read_text())["training"]["init_from"]
    assert again == checkpoint and saved["sha256"] == sha256


def test_what_differs_is_named_by_kind_and_blocks_that_a_key_cuts_off_are_not(
    home: Path, tmp_path: Path
) -> None:
    begin = {"run": str(home / "shallow-weights")}
    shutil.copytree(home / "shallow", home / "shallow-weights")
    theirs = load_file(home / "smolvlm" / "model.safetensors")
    less = {name: one for name, one in theirs.items() if "text_model.layers.3." not in name}
    save_file(less, home / "shallow-weights" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"9 tensors of .*\n.*\n  found:\n  only here +9 ") as error:
        begun(config_of(home, vlm(home / "smolvlm"), begin), tmp_path / "deeper")
    assert allowed_by(error) == ["model.fusion.tower.network.text_model.layers.3.*"]
    allowed = begin | {"allow": ["*.layers.3.*"], "sha256": "auto"}
    built = begun(config_of(home, vlm(home / "smolvlm"), allowed), tmp_path / "deeper")
    assert "28 tensors loaded, 9 missing" in check_towers(built, built.data.train.batch_at(0))[0][4]
    pieces = shutil.copytree(home / "smolvlm", tmp_path / "pieces")  # as a hub has a large one
    (pieces / "model.safetensors").unlink()
    table = {name: f"model-{'text' in name}.safetensors" for name in theirs}
    for file in {*table.values()}:
        save_file({n: t for n, t in theirs.items() if table[n] == file}, pieces / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": table}
    (pieces / "model.safetensors.index.json").write_text(json.dumps(index))
    cut = config_of(home, vlm(home / "smolvlm", layers=2), {"run": str(pieces)})
    assert report_of(cut, tmp_path / "cut")["counts"]["taken"] == 54 + 1 + 19
    stretched = config_of(home, vlm(home / "larger"), {"run": str(home / "smolvlm")})
    shutil.copytree(home / "smolvlm", home / "larger")
    said = json.loads((home / "larger" / "config.json").read_text())
    said["text_config"]["intermediate_size"] = 32
    (home / "larger" / "config.json").write_text(json.dumps(said))
    with pytest.raises(
        UserError, match=r"12 tensors .*\n.*\n.*\n  another shape +12 .*\[32, 16\] here, \[24, 16\]"
    ):
        begun(stretched, tmp_path / "stretched")


def test_rows_of_words_that_both_have_are_taken_without_leave(home: Path, tmp_path: Path) -> None:
    """Beside one tokenizer PaliGemma has 257,216 rows, and a pi0 257,152."""
    more = shutil.copytree(home / "paligemma", tmp_path / "more")
    said = json.loads((more / "config.json").read_text())
    said["text_config"]["vocab_size"] = 34
    (more / "config.json").write_text(json.dumps(said))
    action = {"kind": "pi0", "width": 12, "hidden": 20, "steps": 2}
    # As docs/how-to/own-robot.md has it.
    allow = ["*.state_proj.weight", "*.action_in_proj.weight", "*.action_out_proj.*"]
    built = begun(
        config_of(home, vlm(more, action), {"run": str(home / "pi0"), "allow": allow}), tmp_path / "run"
    )
    (word,) = own(built.model, "language")
    name = f"model.language.tower.network.{word}"
    assert report(tmp_path / "run")["taken in part"] == {name: "32 of 34 rows, 32 there"}
    there = begun(config_of(home, vlm(home / "pi0", action, weights="pretrained"), "off"), tmp_path / "there")
    mine, theirs = own(built.model, "language")[word], own(there.model, "language")[word]
    assert mine.shape[0] == 34 and mine[:32].equal(theirs) and bool(mine[32:].any())


def report_of(config: RunConfig, run: Path) -> dict[str, Any]:
    begun(config, run)
    return report(run)


def test_a_pi0_begins_as_a_checkpoint_of_other_dimensions_under_either_names(
    home: Path, tmp_path: Path
) -> None:
    """Beside PaliGemma with an expert for this robot's state and actions; and as it is, to the bit."""
    action = {"kind": "pi0", "width": 12, "hidden": 20, "steps": 2}
    begin: dict[str, Any] = {"run": str(home / "pi0")}
    model = vlm(home / "paligemma", action)
    with pytest.raises(UserError, match=r"4 tensors of .*pi0 and model\.vlm differ") as error:
        begun(config_of(home, model, begin), tmp_path / "run")
    assert "[12, 2] here, [12, 6] there" in str(error.value) and len(allowed_by(error)) == 4
    config = config_of(home, model, begin | {"allow": allowed_by(error)})
    built = begun(config, tmp_path / "run")
    assert report(tmp_path / "run")["counts"]["taken"] == 55 + 1 + 37 + 43
    lines = check_towers(built, built.data.train.batch_at(0))[0]
    assert any(
        line.startswith("action: paligemma of") and "43 tensors loaded, 4 missing" in line for line in lines
    )
    built.fit()

    loaded = begun(
        config_of(home, vlm(home / "pi0", action, weights="pretrained"), "off"), tmp_path / "loaded"
    )
    there = shutil.copytree(home / "pi0", tmp_path / "lerobot")
    tensors = load_file(there / "model.safetensors")
    save_file({f"model.{n}": t for n, t in tensors.items()}, there / "model.safetensors", {"format": "pt"})
    for folder in (home / "pi0", there):
        run = tmp_path / f"whole-{folder.name}"
        whole = begun(config_of(home, vlm(home / "pi0", action), {"run": str(folder)}), run)
        assert report(run)["counts"]["taken"] == 55 + 1 + 37 + 47
        for part in ("vision", "language", "fusion", "action"):
            mine, expected = own(whole.model, part), own(loaded.model, part)
            assert all(mine[name].equal(tensor) for name, tensor in expected.items()), part
    # Its VLM alone, beside another decoder: the expert is named.
    plain = config_of(home, vlm(home / "paligemma"), begin)
    with pytest.raises(UserError, match=r"47 tensors .*\n.*\n.*\n  only there +47 ") as error:
        begun(plain, tmp_path / "plain")
    plain = config_of(home, vlm(home / "paligemma"), begin | {"allow": ["*.model.dit.*", "*_pr*", "*_mlp_*"]})
    assert report_of(plain, tmp_path / "plain")["counts"]["taken"] == 55 + 1 + 37


def test_folders_that_cannot_be_a_start_are_refused(home: Path, tmp_path: Path) -> None:
    smol = {"run": str(home / "smolvlm")}
    with pytest.raises(
        UserError, match=r"no pre-trained(.*\n)+  found: \"paligemma\" there; model\.vlm \(smolvlm\) here"
    ):
        begun(config_of(home, vlm(home / "shallow"), {"run": str(home / "paligemma")}), tmp_path / "run")
    with pytest.raises(UserError, match=r'found: "smolvlm" there; none here'):
        begun(config_of(home, {}, smol), tmp_path / "run")
    frozen = vlm(home / "smolvlm", weights="pretrained", learn="none")
    with pytest.raises(
        UserError, match=r"model\.vlm has weights: pretrained and does not .*\n.*\n  cure: model\.vlm"
    ):
        begun(config_of(home, frozen, smol), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"have SHA-256 [0-9a-f]{64}.\n  expected: a{64}, as training\.init_from"
    ):
        begun(config_of(home, vlm(home / "shallow"), smol | {"sha256": "a" * 64}), tmp_path / "run")
    folder = shutil.copytree(home / "smolvlm", tmp_path / "smolvlm")
    save_tokenizer(folder, known=5)
    with pytest.raises(
        UserError, match=r"not the tokenizer of model\.vlm(.*\n)+  found: token 5 is None there, 'to' here"
    ):
        begun(config_of(home, vlm(home / "smolvlm"), {"run": str(folder)}), tmp_path / "run")
    save_tokenizer(folder)
    for damage, says in ((True, "lacks 1 tensors, such as connector"), (False, "NaN or infinity in 1 of")):
        tensors = load_file(home / "smolvlm" / "model.safetensors")
        name = next(one for one in tensors if "connector" in one)
        tensors = {n: t for n, t in tensors.items() if n != name or not damage}
        if not damage:
            tensors[name][0, 0] = torch.nan
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=says):
            begun(config_of(home, vlm(home / "smolvlm"), {"run": str(folder)}), tmp_path / "run")
    assert not (tmp_path / "run" / "init_from.json").exists()


def test_of_a_run_a_tower_that_has_learned_is_never_lost_unseen(home: Path, tmp_path: Path) -> None:
    """Frozen here it would begin as the folder again; of an export with weights: random it stays frozen."""

    def tower(learn: Any, weights: str = "pretrained") -> dict[str, Any]:
        given = {"kind": "pretrained", "path": str(home / "dinov2"), "learn": learn, "weights": weights}
        return {"vision": given}

    for name, learn in (("all", "all"), ("lora", {"lora": 2}), ("none", "none")):
        config = config_of(home, tower(learn), "off", optimizer={"lr": 0.01}, steps=2)
        pipeline.train(config, tmp_path / name)
        export_policy(tmp_path / name, tmp_path / f"{name}-export")
    wrong = r"the tower in vision of .* has learned, and .*\n.*\n  found: \d+ tensors that would be lost"
    for name in ("all", "lora", "lora-export"):
        with pytest.raises(UserError, match=wrong):
            begun(config_of(home, tower("none"), {"run": str(tmp_path / name)}), tmp_path / "new")
    same = config_of(home, tower("none"), {"run": str(tmp_path / "none-export")})
    assert report_of(same, tmp_path / "same")["counts"]["only there"] == 0
    export_policy(tmp_path / "none", tmp_path / "half", half=True)
    rounded = config_of(home, tower("none"), {"run": str(tmp_path / "half")})
    assert report_of(rounded, tmp_path / "rounded")["counts"]["only there"] == 0
    merged = load_file(tmp_path / "lora-export" / "model.safetensors")
    random = config_of(home, tower("none", "random"), {"run": str(tmp_path / "lora-export")})
    built = begun(random, tmp_path / "random")
    name = "vision.tower.network.encoder.layer.0.mlp.fc1.weight"
    assert built.model.state_dict()[name].equal(merged[name])
    assert not built.model.vision.tower.network.encoder.layer[0].mlp.fc1.weight.requires_grad  # pyright: ignore
    saved = report(tmp_path / "random")["sha256"]
    listing = (tmp_path / "lora-export" / "export.json").read_bytes()
    assert saved == hashlib.sha256(listing).hexdigest()


def test_what_has_learned_beside_another_tower_is_refused(home: Path, tmp_path: Path) -> None:
    """Neither checkpoint holds the tower; features of another one mean nothing to what read the first."""
    other = shutil.copytree(home / "dinov2", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["layernorm.bias"][0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})

    def tower(path: Path, learn: Any) -> dict[str, Any]:
        return {"vision": {"kind": "pretrained", "path": str(path), "learn": learn}}

    for run, learn in (("frozen", "none"), ("lora", {"lora": 2})):
        pipeline.train(config_of(home, tower(home / "dinov2", learn), "off", steps=2), tmp_path / run)
        begin = {"run": str(tmp_path / run)}
        said = r'has learned beside another tower .*\n  model\.vision\.sha256: "\w+" -> "\w+"\n  cure: model'
        with pytest.raises(UserError, match=said):
            begun(config_of(home, tower(other, learn), begin), tmp_path / "new")
        begun(config_of(home, tower(home / "dinov2", learn), begin), tmp_path / f"same-{run}")


def test_a_tower_keeps_its_own_tokens_beside_kept_statistics(home: Path, tmp_path: Path) -> None:
    pipeline.train(config_of(home, {}, "off", steps=2), tmp_path / "run")
    save_tower(tmp_path / "bert", "bert")
    language = {"kind": "pretrained", "path": str(tmp_path / "bert"), "num_tokens": 2, "heads": 2}
    begin = {"run": str(tmp_path / "run"), "statistics": "kept"}
    built = begun(config_of(home, {"language": language}, begin), tmp_path / "new")
    assert built.data.spec.vocab_size == built.data.tokenizer.vocab_size == 12
    there = json.loads((find_checkpoint(tmp_path / "run") / "normalizer.json").read_text())
    assert built.data.normalizer.to_dict() == there


def test_a_resumed_run_refuses_another_vlm_in_its_folder(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "smolvlm", tmp_path / "smolvlm")
    config = config_of(home, vlm(folder, weights="pretrained", learn={"lora": 2}), "off")
    pipeline.train(config, tmp_path / "run")
    shutil.rmtree(find_checkpoint(tmp_path / "run"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.connector.modality_projection.proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"not the one that this run was trained with.*\n.*model\.vlm\.sha256"
    ):
        begun(config, tmp_path / "run").fit()

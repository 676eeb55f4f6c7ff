"""A training from the weights of another run or an exported policy: what fits is taken, the rest listed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fixtures import squares_data
from fixtures.ranks import on_ranks
from fixtures.small_model import relist
from fixtures.squares_data import MODEL, TRAINING
from tutti import pipeline
from tutti.config.run_config import RunConfig
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.debug.replay import replay_step
from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.models.config import ModelConfig
from tutti.nested_dicts import merge
from tutti.runs.build import build_parts, build_training, training_starts
from tutti.serving.export import export_policy
from tutti.storage.checkpoint import load
from tutti.storage.manifest import EXPORT
from tutti.training.checkpointing.init_from import REPORT
from tutti.training.records import read_records
from tutti.types import Batch, Dimensions, UserError


def write(
    folder: Path,
    change: Callable[[EpisodeRecord], EpisodeRecord] = lambda one: one,
    robot: str = "dot",
    names: tuple[str, ...] = (),
) -> Path:
    made = [change(one) for one in squares_data.episodes(6)]
    named = Dimensions(state_names=names)
    return write_lerobot(
        folder, made, fps=10, views=tuple(made[0].images), robot_type=robot, dimensions=named
    )


def more_states(one: EpisodeRecord) -> EpisodeRecord:
    return replace(one, states=np.concatenate([one.states, one.states], axis=1))


def fewer_actions(one: EpisodeRecord) -> EpisodeRecord:
    return replace(one, actions=one.actions[:, :2])


def config_of(data: Path, init_from: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    section: dict[str, Any] = {"batch_size": 2, "image_size": 16, "validation_fraction": 0.3}
    training = TRAINING if init_from is None else TRAINING | {"init_from": init_from}
    given: dict[str, Any] = {"data": section, "model": MODEL, "training": training}
    return squares_data.config(data, **merge(given, sections))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a run of 4 steps on it, and its export."""
    home = tmp_path_factory.mktemp("home")
    write(home / "data")
    pipeline.train(config_of(home / "data"), home / "run")
    export_policy(home / "run", home / "export")
    return home


def from_(home: Path, what: str = "run", **more: Any) -> dict[str, Any]:
    return {"run": str(home / what), **more}


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / REPORT).read_text())


def values(model: Any, objective: Any, batch: Batch) -> dict[str, Tensor]:
    model.eval(), objective.eval()
    with torch.no_grad():
        return objective(model(batch.observation), batch, model).values


def final(home: Path, weights: str, batch_number: int = 0) -> tuple[dict[str, Tensor], Batch]:
    """The terms of the other run's last model on a batch of its data."""
    data, model, objective = build_parts(config_of(home / "data"), home / "run")
    saved = load(home / "run" / "checkpoints" / "step-000004")
    ema = weights == "ema"
    model.load_state_dict(saved.tensors["ema" if ema else "model"])
    objective.load_state_dict(saved.tensors["objective_ema" if ema else "objective"])
    batch = data.train.batch_at(batch_number)
    return values(model, objective, batch), batch


@pytest.mark.parametrize(("weights", "statistics"), [("ema", "new"), ("raw", "kept")])
def test_on_the_same_data_it_begins_where_the_other_run_has_ended(
    home: Path, tmp_path: Path, weights: str, statistics: str
) -> None:
    expected, batch = final(home, weights)
    config = config_of(home / "data", from_(home, weights=weights, statistics=statistics), seed=7)
    _, model, objective = build_parts(config, tmp_path)
    found = values(model, objective, batch)
    assert found.keys() == expected.keys() and len(found) == 4
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    told = report(tmp_path)
    assert told["counts"]["another shape"] == told["counts"]["only here"] == told["counts"]["only there"] == 0
    assert told["step"] == 4 and told["weights"] == weights


def test_a_model_of_another_seed_would_be_another(home: Path, tmp_path: Path) -> None:
    expected, batch = final(home, "ema")
    _, model, objective = build_parts(config_of(home / "data", seed=7), tmp_path)
    assert not any(torch.equal(one, expected[name]) for name, one in values(model, objective, batch).items())
    raw, _ = final(home, "raw")
    assert not torch.equal(raw["action"], expected["action"]), "ema and raw differ"


def test_optimiser_and_average_begin_anew_and_a_resume_does_not_load_again(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(home / "run", source)
    asked = {"run": str(source), "weights": "raw"}
    built = build_training(config_of(home / "data", asked), tmp_path / "trial")
    start = load_file(source / "checkpoints" / "step-000004" / "model.safetensors")
    assert all(torch.equal(one, start[name]) for name, one in built.trainer.model.state_dict().items())
    average = built.trainer.averages["ema"]
    assert average.updates == 0
    assert all(torch.equal(one, start[name]) for name, one in average.shadow.items())
    assert not built.trainer.optimizer.optimizers["adamw"].state
    pipeline.train(config_of(home / "data", asked), run)
    assert [record["step"] for record in read_records(run) if record["kind"] == "train"] == [1, 2, 3, 4]
    told = (run / REPORT).read_bytes()
    shutil.rmtree(source)
    longer = config_of(home / "data", asked, training={"steps": 6})
    with pytest.raises(UserError, match=r"another config"):
        pipeline.train(config_of(home / "data", training={"steps": 6}), run)
    unfinish(run)
    build_training(longer, run).fit()
    assert (run / REPORT).read_bytes() == told
    with pytest.raises(UserError, match=r"training\.init_from: "):
        build_training(config_of(home / "data", asked), tmp_path / "new")
    with pytest.raises(UserError, match=r"training\.init_from"):
        build_training(config_of(home / "data", training={"steps": 8}), run).fit()


def unfinish(run: Path) -> None:
    book = json.loads((run / "stages.json").read_text())
    book["train"]["finished"] = False
    (run / "stages.json").write_text(json.dumps(book))


def test_killed_before_its_first_checkpoint_it_keeps_to_the_one_that_it_found(
    home: Path, tmp_path: Path
) -> None:
    """Meanwhile the other run goes on, so that `latest` would be another."""
    source = tmp_path / "source"
    shutil.copytree(home / "run", source)
    kept = tmp_path / "step-000004"
    (source / "checkpoints" / "step-000004").rename(kept)
    asked = config_of(home / "data", {"run": str(source)})
    _, first, _ = build_parts(asked, tmp_path / "run")
    kept.rename(source / "checkpoints" / "step-000004")
    _, again, _ = build_parts(asked, tmp_path / "run")
    _, later, _ = build_parts(asked, tmp_path / "other")
    assert report(tmp_path / "run")["step"] == 2 and report(tmp_path / "other")["step"] == 4
    same = [
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    ]
    assert all(same)
    assert not torch.equal(later.vision.embed.weight, first.vision.embed.weight)


def test_an_exported_policy_gives_the_model_and_no_heads(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "tutti.training"):
        _, model, _ = build_parts(config_of(home / "data", from_(home, "export")), tmp_path)
    exported = load_file(home / "export" / "model.safetensors")
    assert all(torch.equal(one, exported[name]) for name, one in model.state_dict().items())
    told = report(tmp_path)
    assert told["step"] is None and len(told["taken"]) == len(exported) == told["counts"]["taken"]
    assert told["only here"] and all(name.startswith("objective.terms.") for name in told["only here"])
    (said,) = [record.getMessage() for record in caplog.records if "as the start" in record.getMessage()]
    assert said.splitlines()[1].split()[:2] == ["taken", str(len(exported))]
    assert "only here" in said and "only there" not in said


def test_a_copy_of_the_vision_encoder_in_a_term_is_one_of_the_weights_taken(
    home: Path, tmp_path: Path
) -> None:
    """The target of future_latent begins as the encoder that the model has."""
    objective = {"future": {"kind": "future_latent", "offsets": [2], "hidden": 8}}
    finer = {"vision": {"stem": {"strides": [1, 2]}}}  # several tokens a picture, which this term compares
    config = config_of(home / "data", from_(home, "export"), objective=objective, model=finer)
    _, model, terms = build_parts(config, tmp_path)
    target: Any = terms.terms["future"].target  # pyright: ignore[reportAttributeAccessIssue]
    pairs = zip(model.vision.state_dict().values(), target.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_another_robot_with_more_actions_takes_all_but_what_has_its_size(home: Path, tmp_path: Path) -> None:
    def change(one: EpisodeRecord) -> EpisodeRecord:
        more = np.concatenate([one.actions, one.actions[:, :2] * 0.5], axis=1)
        return replace(one, actions=more, states=np.concatenate([one.states, one.states * 2], axis=1))

    data = write(tmp_path / "data", change, robot="arm")
    _, model, _ = build_parts(config_of(data, from_(home)), tmp_path / "run")
    told = report(tmp_path / "run")
    assert told["counts"]["only there"] == 0
    other = {name: text for name, text in told["another shape"].items() if name.startswith("model.")}
    assert set(other) == {"model.action.out.weight", "model.action.out.bias", "model.fusion.state.weight"}
    assert other["model.action.out.bias"] == "[20] here, [12] there"
    taken = load_file(home / "run" / "checkpoints" / "step-000004" / "ema.safetensors")
    state = model.state_dict()
    same = {f"model.{name}" for name, value in taken.items() if f"model.{name}" in told["taken"]}
    assert len(same) == len(taken) - 3
    assert all(torch.equal(state[name], taken[name]) for name in taken if f"model.{name}" in same)
    pipeline.train(config_of(data, from_(home)), tmp_path / "run")  # and it learns


def test_a_model_of_other_sizes_takes_the_blocks_that_there_are(home: Path, tmp_path: Path) -> None:
    """Deeper in the fusion and wider in the decoder: all else is that of the run, and both are listed."""
    sizes = {"fusion": {"depth": 2}, "action": {"hidden": 12}}
    _, model, _ = build_parts(config_of(home / "data", from_(home), model=sizes), tmp_path)
    told = report(tmp_path)
    assert told["only here"] and all(name.startswith("model.fusion.blocks.1.") for name in told["only here"])
    assert told["another shape"] and all(name.startswith("model.action.") for name in told["another shape"])
    assert told["counts"]["only there"] == 0 and told["sha256"] == manifest_hash(home)
    theirs = load_file(home / "run" / "checkpoints" / "step-000004" / "ema.safetensors")
    taken = {name: value for name, value in model.state_dict().items() if f"model.{name}" in told["taken"]}
    assert len(taken) > 20 and all(value.equal(theirs[name]) for name, value in taken.items())
    for sha256, wrong in (("0" * 64, r"have SHA-256 .*\n  expected: 0{64}"), (told["sha256"], "")):
        config = config_of(home / "data", from_(home, sha256=sha256), model=sizes)
        if wrong:
            with pytest.raises(UserError, match=wrong):
                build_parts(config, tmp_path / "other")
        else:
            build_parts(config, tmp_path / "same")


def manifest_hash(home: Path) -> str:
    listing = (home / "run" / "checkpoints" / "step-000004" / "state.json").read_bytes()
    return hashlib.sha256(listing).hexdigest()


def test_rows_follow_the_names_of_tokens_views_and_dimensions(home: Path, tmp_path: Path) -> None:
    """Other sentences, the views in another order and a new one, a longer text."""
    front, mirror = squares_data.VIEWS

    def change(one: EpisodeRecord) -> EpisodeRecord:
        images = {"observation.images.top": one.images[front], mirror: one.images[mirror]}
        images[front] = one.images[front]
        return replace(one, images=images, instruction=f"please {one.instruction} without touching the other")

    data = write(tmp_path / "data", change)
    bundle, model, objective = build_parts(config_of(data, from_(home)), tmp_path / "run")
    _, fresh, fresh_objective = build_parts(config_of(data), tmp_path / "fresh")
    theirs = load(home / "run" / "checkpoints" / "step-000004")
    other, heads = theirs.tensors["ema"], theirs.tensors["objective_ema"]
    old = build_parts(config_of(home / "data"), home / "run")[0]
    assert bundle.tokenizer.tokens != old.tokenizer.tokens
    place = {token: row for row, token in enumerate(old.tokenizer.tokens)}
    known = [token in place for token in bundle.tokenizer.tokens]
    assert 0 < sum(known) < len(known)
    rows = model.language.token.weight.detach()
    for row, token in enumerate(bundle.tokenizer.tokens):
        source = other["language.token.weight"][place[token]] if token in place else None
        assert torch.equal(rows[row], fresh.language.token.weight[row] if source is None else source), token
    length = old.spec.text_length
    assert bundle.spec.text_length > length
    assert torch.equal(model.language.position[:length], other["language.position"])
    assert torch.equal(model.language.position[length:], fresh.language.position[length:])
    name = "terms.recon.position"
    tables = [
        (model.vision.position, other["vision.position"], fresh.vision.position),
        (objective.state_dict()[name], heads[name], fresh_objective.state_dict()[name]),
    ]
    views = dict(zip(bundle.spec.views, range(3), strict=True))
    for mine, source, new in tables:
        for view, row in views.items():
            expected = new[row] if view.endswith("top") else source[squares_data.VIEWS.index(view)]
            assert torch.equal(mine[row], expected), view
    told = report(tmp_path / "run")["taken in part"]
    assert told["model.language.token.weight"] == f"{sum(known)} of {len(known)} tokens"
    assert told["model.vision.position"] == told[f"objective.{name}"] == "2 of 3 views"
    assert told["model.language.position"] == f"{length} of {bundle.spec.text_length} places"


def test_bounds_that_a_decoder_fits_are_those_of_the_new_data(home: Path, tmp_path: Path) -> None:
    """Bins over the old range would cut the actions of a robot that moves further."""

    def wide(one: EpisodeRecord) -> EpisodeRecord:
        return replace(one, actions=one.actions + np.linspace(0, 9, len(one.actions))[:, None].astype("f4"))

    data = write(tmp_path / "wide", wide)

    def of(data: Path, init_from: dict[str, Any] | None = None) -> RunConfig:
        config = config_of(data, init_from)
        action = {"kind": "bins", "width": 8, "depth": 1, "heads": 1}
        model = {**config.model.model_dump(mode="json"), "action": action}
        return config.model_copy(update={"model": ModelConfig.model_validate(model)})

    pipeline.train(of(home / "data"), tmp_path / "a")
    _, found, _ = build_parts(of(data, {"run": str(tmp_path / "a")}), tmp_path / "b")
    _, fresh, _ = build_parts(of(data), tmp_path / "c")
    fitted = dict(fresh.action.named_buffers())
    assert fitted and all(torch.equal(one, fitted[name]) for name, one in found.action.named_buffers())
    told = report(tmp_path / "b")
    assert {name for name in told["of this run's data"]} == {f"model.action.{name}" for name in fitted}


def test_kept_statistics_are_those_of_the_other_run(home: Path, tmp_path: Path) -> None:
    def change(one: EpisodeRecord) -> EpisodeRecord:
        return replace(one, actions=one.actions * 3, instruction=one.instruction.replace("square", "sea"))

    data, theirs = write(tmp_path / "data", change), home / "run" / "checkpoints" / "step-000004"
    source = tmp_path / "source"
    shutil.copytree(home / "run", source)
    for statistics in ("new", "kept"):
        run = tmp_path / statistics
        checkpoint = pipeline.train(config_of(data, {"run": str(source), "statistics": statistics}), run)
        for name in ("normalizer.json", "tokenizer.json"):
            same = (checkpoint / name).read_bytes() == (theirs / name).read_bytes()
            assert same == (statistics == "kept"), name
        assert report(run)["init_from"]["statistics"] == statistics
    shutil.rmtree(source)  # its own checkpoints hold them too
    pipeline.evaluate(tmp_path / "kept")
    assert (tmp_path / "kept" / "evaluation" / "open_loop.json").is_file()


@pytest.mark.parametrize(
    ("write_other", "says"),
    [
        (lambda to: write(to, robot="arm"), "the robot 'arm'; the statistics are of dot"),
        (lambda to: write(to, more_states), "4 state dimensions, 2 there"),
        (lambda to: write(to, fewer_actions), "2 action dimensions, 3 there"),
        (lambda to: write(to, names=("y", "x")), "the same names of state dimensions in another order"),
    ],
)
def test_kept_statistics_that_do_not_fit_are_refused(
    tmp_path: Path, write_other: Callable[[Path], Path], says: str
) -> None:
    first = write(tmp_path / "first", names=("x", "y"))
    pipeline.train(config_of(first, training={"steps": 2}), tmp_path / "a")
    data, asked = write_other(tmp_path / "data"), {"run": str(tmp_path / "a")}
    with pytest.raises(UserError, match=rf"statistics is kept, .*{says}.*statistics=new"):
        build_parts(config_of(data, asked | {"statistics": "kept"}), tmp_path / "run")
    build_parts(config_of(data, asked), tmp_path / "run")
    config = config_of(first, asked | {"statistics": "kept"})
    standard = config.data.model_copy(update={"normalization": "standard"})
    with pytest.raises(UserError, match=r"data\.normalization is standard, quantile there"):
        build_parts(config.model_copy(update={"data": standard}), tmp_path / "run")


def test_columns_of_the_state_follow_the_names_of_its_dimensions(tmp_path: Path) -> None:
    pipeline.train(
        config_of(write(tmp_path / "first", names=("x", "y")), training={"steps": 2}), tmp_path / "a"
    )
    for names, expected in ((("y", "x"), (1, 0)), (("z", "x"), (None, 0)), (("z", "w"), (0, 1))):
        data, run = write(tmp_path / "".join(names), names=names), tmp_path / f"run {names}"
        _, model, _ = build_parts(config_of(data, {"run": str(tmp_path / "a")}), run)
        _, fresh, _ = build_parts(config_of(data), tmp_path / f"fresh {names}")
        theirs = load(tmp_path / "a/checkpoints/step-000002").tensors["ema"]["fusion.state.weight"]
        mine, new = model.fusion.state.weight, fresh.fusion.state.weight
        for column, source in enumerate(expected):
            assert torch.equal(mine[:, column], new[:, column] if source is None else theirs[:, source])


def test_weights_that_do_not_fit_at_all_and_folders_that_are_none_are_refused(
    home: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="Set one of them to off"):
        config_of(home / "data", from_(home), training={"fork": {"run": str(home / "run")}})
    (tmp_path / "empty").mkdir()
    for name, step in (("none", "latest"), ("empty", "latest"), ("run", 3), ("run", "best")):
        asked = {"run": str((tmp_path if name in ("none", "empty") else home) / name), "checkpoint": step}
        with pytest.raises(UserError, match=r"^training\.init_from: .*(no checkpoint|marked as the best)"):
            build_parts(config_of(home / "data", asked), tmp_path / "run")
    for damage, says in ((torch.nan, "NaN or infinity"), (None, "no tensor of .* fits this model")):
        export = tmp_path / f"export {damage}"
        shutil.copytree(home / "export", export)
        tensors = load_file(export / "model.safetensors")
        if damage is None:
            tensors = {f"other.{name}": value for name, value in tensors.items()}
        else:
            tensors["vision.embed.weight"][0, 0] = damage
        save_file(tensors, export / "model.safetensors")
        with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
            build_parts(config_of(home / "data", {"run": str(export)}), tmp_path / "run")
        relist(export, EXPORT)
        with pytest.raises(UserError, match=says):
            build_parts(config_of(home / "data", {"run": str(export)}), tmp_path / "run")
    assert not (tmp_path / "run" / REPORT).exists()


def test_starts_of_the_other_run_count_as_trained_on(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(home / "run", source)
    told = json.loads((source / "data.json").read_text())
    told["starts"] = TrainingStarts(seeds=(range(5, 9),)).to_dict()
    (source / "data.json").write_text(json.dumps(told))
    for place in (source, source / "checkpoints" / "step-000002"):
        config = config_of(home / "data", {"run": str(place)})
        assert range(5, 9) in training_starts(config, tmp_path / "run").seeds
    config = config_of(home / "data", from_(home, "export"))
    assert training_starts(config, tmp_path / "run").unknown == (str(home / "data"),)


def test_a_step_is_replayed_from_the_weights_or_without_them_from_a_checkpoint(
    home: Path, tmp_path: Path
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(home / "run", source)
    pipeline.train(config_of(home / "data", {"run": str(source)}), run)
    assert replay_step(run, 2).succeeded
    shutil.rmtree(source)
    assert replay_step(run, 4).succeeded, "it goes on from the run's own checkpoint"
    with pytest.raises(UserError, match=r"training\.init_from: "):
        replay_step(run, 2)


def first_losses(data: str, source: str, run: str, kind: str) -> list[dict[str, float]]:
    training: dict[str, Any] = {"steps": 2, "parallel": {"kind": kind}, "device": "cpu"}
    training |= {"precision": "fp32", "checkpoints": {"format": "whole" if kind == "ddp" else "sharded"}}
    pipeline.train(config_of(Path(data), {"run": source}, training=training), Path(run))
    return [record for record in read_records(Path(run)) if record["kind"] == "train"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_rank_begins_with_the_same_weights(home: Path, tmp_path: Path, kind: str) -> None:
    """And the shards that they write are weights to begin with, as are those of one process."""
    alone = first_losses(str(home / "data"), str(home / "run"), str(tmp_path / "single"), "single")
    both = on_ranks(2, first_losses, str(home / "data"), str(home / "run"), str(tmp_path / kind), kind)
    for record, other in zip(alone, both[0], strict=True):
        for name in ("loss/action/raw", "loss/recon/raw", "loss/state/raw"):
            assert other[name] == pytest.approx(record[name], rel=1e-5), name
    assert report(tmp_path / kind)["counts"] == report(tmp_path / "single")["counts"]
    build_parts(config_of(home / "data", {"run": str(tmp_path / kind)}), tmp_path / "next")
    assert report(tmp_path / "next")["counts"] == report(tmp_path / kind)["counts"]

"""RunConfig: precedence, and mistakes that name the key, what was expected and found, and the near miss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tutti.config.run_config import RunConfig, json_schema, load_config, to_yaml
from tutti.nested_dicts import changed_keys
from tutti.types import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistake(path: Path | None = None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert len(str(caught.value).splitlines()) < 24
    return str(caught.value)


def test_override_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    path = written(tmp_path, "training: {steps: 300, log_every: 7}")
    config = load_config(path, ["training.steps=400"])
    assert (config.training.steps, config.training.log_every) == (400, 7)
    assert config.training.gradients.clip_norm == RunConfig().training.gradients.clip_norm


def test_override_values_are_yaml() -> None:
    config = load_config(
        None, ["training.gradients.clip_norm=off", "objective.recon=null", "training.optimizer.lr=2e-4"]
    )
    assert config.training.gradients.clip_norm == "off"
    assert config.objective.recon is None
    assert config.training.optimizer.lr == 2e-4


def test_override_reaches_into_lists() -> None:
    config = load_config(None, ["data.sources=[{path: a}, {path: b}]", "data.sources.1.path=c"])
    assert [str(source.path) for source in config.data.sources] == ["a", "c"]


def test_override_past_the_end_of_a_list_says_its_length() -> None:
    assert "data.sources has 1 entries" in mistake(None, "data.sources=[{path: a}]", "data.sources.3.path=c")


def test_preset_is_under_the_files_own_values(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {size: small, fusion: {depth: 2}}")
    config = load_config(path, ["model.vision.depth=1"])
    small = load_config(None, ["model.size=small"])
    assert (config.model.fusion.depth, config.model.vision.depth) == (2, 1)
    assert config.model.fusion.width == small.model.fusion.width
    assert small.model.fusion.width > RunConfig().model.fusion.width


def test_changed_kind_drops_the_keys_of_the_old_one(tmp_path: Path) -> None:
    path = written(tmp_path, "training: {optimizer: {kind: adamw, lr: 1.0e-3, beta2: 0.99}}")
    changed = load_config(path, ["training.optimizer.kind=muon"])
    assert (
        changed.training.optimizer == load_config(None, ["training.optimizer.kind=muon"]).training.optimizer
    )


def test_seed_of_the_run_is_the_seed_of_its_sections_unless_they_name_one() -> None:
    config = load_config(None, ["seed=7", "training.seed=3"])
    assert (config.seed, config.data.seed, config.training.seed) == (7, 7, 3)


def test_unknown_key_names_its_near_miss() -> None:
    assert "training.stepz is not a key. Did you mean 'training.steps'?" in mistake(None, "training.stepz=5")


def test_unknown_key_in_a_union_names_its_near_miss() -> None:
    text = mistake(
        None, "training.optimizer={kind: adamw, learning_rate: 1}", "training.schedule={kind: wsd, warmpu: 3}"
    )
    assert "training.schedule.warmpu is not a key. Did you mean 'training.schedule.warmup'?" in text
    assert "training.optimizer.learning_rate is not a key." in text


def test_key_of_another_section_is_found() -> None:
    assert "batch_size is not a key. Did you mean 'data.batch_size'?" in mistake(None, "batch_size=5")


def test_impossible_value_names_expected_and_found() -> None:
    assert "training.steps: expected greater than or equal to 1, found -3" in mistake(
        None, "training.steps=-3"
    )
    assert "training.steps: expected a valid integer" in mistake(None, "training.steps=many")


def test_unknown_kind_names_the_kinds() -> None:
    text = mistake(None, "training.optimizer={kind: adamv}")
    kinds = "expected 'adamw' or 'muon' or 'schedule_free', found 'adamv'. Did you mean 'adamw'?"
    assert f"training.optimizer.kind: {kinds}" in text


def test_mapping_without_a_kind_is_of_the_default_kind() -> None:
    schedule = load_config(None, ["training.schedule={warmup: 3}"]).training.schedule
    assert (schedule.kind, schedule.warmup) == (RunConfig().training.schedule.kind, 3)


def test_words_that_yaml_takes_for_booleans_stay_words(tmp_path: Path) -> None:
    path = written(tmp_path, "training: {ema: off, gradients: {clip_norm: off}, compile: true}")
    training = load_config(path).training
    assert (training.ema, training.gradients.clip_norm, training.compile) == ("off", "off", "blocks")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.5E-3", 1.5e-3), ("5", 5.0), (".5", 0.5), ("2.", 2.0)]
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    assert load_config(None, [f"training.gradients.clip_norm={text}"]).training.gradients.clip_norm == value


def test_contradiction_between_keys_is_said_in_a_sentence() -> None:
    text = mistake(None, "training.steps=10", "training.schedule.warmup=50")
    assert "never reach its peak" in text
    assert "Value error" not in text


def test_every_mistake_is_listed_at_once_with_the_file(tmp_path: Path) -> None:
    text = mistake(written(tmp_path, "trainig: {steps: 3}\ntraining: {steps: 0}\nnam: x"))
    assert text.startswith(f"{tmp_path / 'run.yaml'}: 3 mistakes")
    assert "trainig is not a key. Did you mean 'training'?" in text


def test_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    text = mistake(written(tmp_path, "name: a\ntraining: {steps: 3}\nname: b\n"))
    assert "line 3: not valid YAML: 'name' is given twice" in text


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    assert "run.yaml, line 2" in mistake(written(tmp_path, "name: a\n  training: {steps\n"))


def test_file_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    assert "expected keys" in mistake(written(tmp_path, "- a\n- b\n"))


def test_missing_file_names_its_near_miss() -> None:
    text = mistake(CONFIGS / "dmeo.yaml")
    assert "no such config file" in text
    assert "demo.yaml" in text.splitlines()[0].removeprefix(str(CONFIGS / "dmeo.yaml"))


@pytest.mark.parametrize("override", ["training.steps", "=3", "training..steps=3", "a={"])
def test_override_that_is_none_is_refused(override: str) -> None:
    assert override.split("=", maxsplit=1)[0] in mistake(None, override)


def test_override_below_a_value_says_that_it_has_no_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "training: {steps: 3}")
    assert "'training.steps' is 3, which has no keys" in mistake(path, "training.steps.x=3")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_name_must_be_a_folder_name(name: str) -> None:
    assert "name" in mistake(None, f"name='{name}'")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_config_is_valid_and_named_after_its_file(path: Path) -> None:
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_written_config_reads_back_as_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["seed=5"])
    assert load_config(written(tmp_path, to_yaml(config))) == config


def test_schema_is_json_and_describes_every_section() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(RunConfig.model_fields)


def test_changed_keys_names_each_leaf_with_both_values() -> None:
    old = {"training": {"steps": 1, "lr": 2}, "name": "a"}
    assert changed_keys(old, {"training": {"steps": 3, "lr": 2}, "name": "a"}) == ["training.steps: 1 -> 3"]
    assert changed_keys(old, {"training": {"steps": 1}, "name": "a"}) == ["training.lr: 2 -> (absent)"]
    assert changed_keys(old, old) == []


def test_a_misspelt_term_is_told_from_a_further_one() -> None:
    with pytest.raises(UserError, match=r"'algn' is a further term, .* Did you mean 'align'"):
        load_config(None, ["objective.algn.weight=0.2"])


def test_a_key_of_another_kind_is_not_suggested_again() -> None:
    with pytest.raises(UserError, match=r"bins is not a key where model\.action\.kind is 'flow'"):
        load_config(None, ["model.action.kind=flow", "model.action.bins=12"])


def test_a_balancing_that_could_never_act_is_refused() -> None:
    with pytest.raises(UserError, match=r"no lambda would ever change. Lower balancing\.every"):
        load_config(None, ["balancing.kind=dwa", "training.steps=150", "training.schedule.warmup=10"])

"""A study's file: what it means, and what is said of each mistake in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures.studies import base, make_study
from tutti.config.run_config import RunConfig, load_config, to_yaml
from tutti.data.sources import SourceConfig
from tutti.studies.cells import NO_CONTROLS, arm_config, cell_config, cell_name, check_same_starts
from tutti.studies.config import StudyConfig, load_study, study_yaml
from tutti.training.strategy import Strategy
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
SOURCES = (SourceConfig(path=Path("/data/set")),)


def written(folder: Path, text: str = "", **changes: Any) -> Path:
    """A study's file: `text`, or a sound study with `changes`."""
    (folder / "base.yaml").write_text(yaml.safe_dump(base()))
    values = {
        "name": "s",
        "base": "base.yaml",
        "arms": {"joint": [], "alone": ["strategy.kind=action_only"]},
        "baseline": "joint",
    }
    path = folder / "study.yaml"
    path.write_text(text or yaml.safe_dump(values | changes, sort_keys=False))
    return path


def cell_of(study: StudyConfig, arm: str, **changes: Any) -> RunConfig:
    given: dict[str, Any] = {"level": "base", "seed": 2, "steps": 20, "sources": SOURCES} | changes
    return cell_config(study, arm, **given)


# --- what it means


def test_base_is_found_beside_the_study_or_written_inline_and_may_be_overridden(tmp_path: Path) -> None:
    path = written(tmp_path)
    study = load_study(path)
    assert study.base == base()
    assert (study.seed_list, study.levels) == ((0, 1, 2), ("base",))
    study = load_study(path, ["seeds=[3, 5]", "base.training.steps=50", "budget.kind=flops"])
    assert study.seed_list == (3, 5) and study.budget.kind == "flops"
    assert arm_config(study, "joint").training.steps == 50
    (tmp_path / "other.yaml").write_text("training: {steps: 700}")
    study = load_study(path, ["base=other.yaml", "base.data.batch_size=8"])
    assert study.base == {"training": {"steps": 700}, "data": {"batch_size": 8}}
    assert load_study(path, ["base=configs/smoke.yaml"]).base["name"] == "smoke"  # shipped, from anywhere
    assert arm_config(load_study(written(tmp_path, base=base())), "joint").training.steps == 20


def test_resolved_study_reads_back_as_the_same(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, episodes_per_task=[5, "all"], data_from="runs/x", seeds=[1, 4]))
    path = tmp_path / "again.yaml"
    path.write_text(study_yaml(study))
    assert load_study(path) == study


def test_cell_is_one_thread_with_its_seed_everywhere_and_no_controls() -> None:
    own = cell_of(make_study(), "action_only", level=3)
    assert (own.seed, own.data.seed, own.training.seed, own.data.episodes_per_task) == (2, 2, 2, 3)
    assert (own.training.threads, own.training.steps, own.evaluation.workers) == (1, 20, 1)
    assert own.strategy.kind == "action_only" and own.data.sources == SOURCES
    assert own.evaluation.videos_per_task == 0
    assert {getattr(own.evaluation.controls, name) for name in NO_CONTROLS} == {0}
    assert set(NO_CONTROLS) >= {"expert", "noop", "no_image", "wrong_instruction"}


def test_evaluation_of_the_study_wins_and_leaves_other_controls_out() -> None:
    study = make_study(evaluation={"episodes": 7, "controls": {"noop": 3}})
    settings = cell_of(study, "end_to_end").evaluation
    assert (settings.episodes, settings.controls.noop, settings.controls.expert) == (7, 3, 0)
    assert settings.tasks == ("reach", "push")


def test_cell_config_reaches_its_process_unchanged(tmp_path: Path) -> None:
    own = cell_of(make_study(), "action_only", level="all")
    (tmp_path / "cell.yaml").write_text(to_yaml(own))
    assert load_config(tmp_path / "cell.yaml") == own


@pytest.mark.parametrize(
    ("level", "name"), [("base", "a-seed1"), ("all", "a-all-seed1"), (10, "a-10demos-seed1")]
)
def test_cell_name_tells_arm_level_and_seed(level: Any, name: str) -> None:
    assert cell_name("a", level, 1) == name


# --- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "jiont"}, "baseline is 'jiont', but the arms are joint, alone. Did you mean 'joint'?"),
        ({"arms": {"joint": [], "again": []}}, "arms 'joint' and 'again' have the same overrides"),
        ({"text": "name: s\nbase: {}\narms:\n  a: []\n  a: [seed=1]\nbaseline: a\n"}, "'a' is given twice"),
        ({"arms": {}}, "at least 1"),
        ({"arms": {"joint": [], "a b": ["seed=1"]}}, "arms.a b"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "names one twice: 1, 1"),
        ({"episodes_per_task": [5, 5]}, "names one twice: 5, 5"),
        ({"episodes_per_task": [0]}, "greater than or equal to 1"),
        ({"budget": {"kind": "money"}}, "budget.kind: expected 'steps', 'samples', 'flops' or 'time'"),
        ({"budget": {"kind": "steps", "step": 3}}, "budget.step is not a key. Did you mean 'budget.steps'?"),
        ({"basline": "joint"}, "basline is not a key. Did you mean 'baseline'?"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such config file"),
    ],
)
def test_mistake_in_the_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_study(written(tmp_path, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.knid=two_stage", "strategy.knid is not a key"),
        ("training.clipnorm=1", "Did you mean 'training.gradients.clip_norm'?"),
        ("strategy.kind=two_stages", "Did you mean 'two_stage'?"),
        ("clip_norm", "is not an override"),
        ("seed=3", "the study decides it by seeds"),
        ("training.steps=9", "the study decides it by budget.steps"),
        ("data.episodes_per_task=4", "the study decides it by episodes_per_task"),
        ("evaluation.suite=none", "evaluation.suite is 'none'"),
        ("strategy={kind: two_stage, first_share: 0.1}", "'representation' has 2 steps, but "),
    ],
)
def test_bad_override_names_the_arm_and_what_is_wrong(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        cell_of(make_study(arms={"end_to_end": [], "broken": [override]}), "broken")
    assert message in str(caught.value)
    assert "study 'tiny', arm 'broken': " in str(caught.value)


def test_arms_must_be_judged_on_the_same_starts_but_may_carry_out_their_chunks_differently() -> None:
    own = ["evaluation.first_seed=77"], ["evaluation.actions_per_query=2"]
    study = make_study(arms={"end_to_end": [], "easy": own[0], "short": own[1]})
    configs = {arm: cell_of(study, arm) for arm in study.arms}
    with pytest.raises(
        UserError, match=r"arm 'easy': evaluation\.first_seed is 77, but 1000 in 'end_to_end'"
    ):
        check_same_starts(study, configs)
    check_same_starts(study, {arm: configs[arm] for arm in ("end_to_end", "short")})


# --- what is shipped


def documented(page: str) -> str:
    """The YAML that a page of the docs shows."""
    found = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_study_in_the_docs_is_sound(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text((ROOT / "configs" / "demo.yaml").read_text())
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "study.yaml").write_text(documented("how-to/studies.md"))
    study = load_study(tmp_path / "studies" / "study.yaml")
    assert cell_of(study, "action_only", level=10, steps=1300).training.schedule.warmup == 60


def test_phases_in_the_docs_are_sound() -> None:
    values: Any = yaml.safe_load(documented("background/strategies.md"))
    phases = RunConfig.model_validate(values).strategy.phases()
    strategy = Strategy(phases, steps=4000, warmup=100, terms=("align", "action", "recon", "state"))
    assert strategy.ends == (1000, 3000, 4000)


def test_every_preset_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "background" / "strategies.md").read_text(encoding="utf-8")
    kinds = RunConfig.model_json_schema()["properties"]["strategy"]["discriminator"]["mapping"]
    assert len(kinds) >= 7
    assert [kind for kind in kinds if f"| `{kind}`" not in page] == []


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_study_is_sound_in_every_arm_and_level(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    steps = study.budget.steps
    assert isinstance(steps, int)
    configs = {
        (arm, level): cell_of(study, arm, level=level, steps=steps)
        for arm in study.arms
        for level in study.levels
    }
    check_same_starts(study, {arm: configs[arm, study.levels[0]] for arm in study.arms})
    assert len({to_yaml(config) for config in configs.values()}) == len(configs)

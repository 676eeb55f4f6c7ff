"""A robot's data and picture-text pairs train in one run, which resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fixtures import pair_sets
from fixtures import squares_data as world
from fixtures.run_equality import Killed, differing
from tutti.config.run_config import RunConfig, build_config
from tutti.nested_dicts import merge
from tutti.runs.build import BuiltTraining, build_training
from tutti.runs.label_shares import label_shares
from tutti.training.records import read_records
from tutti.types import Batch

ROBOT, PAIRS = 12 * 10, 30
OF_ACTIONS = ("action", "state", "recon")
"""Terms that need actions, states or later pictures, which a pair has not."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    home = tmp_path_factory.mktemp("sets")
    robot = world.write(home / "robot", world.episodes(ROBOT // 12))
    pairs = pair_sets.write(home / "pairs", "tar", PAIRS)
    return world.config(
        robot,
        # In seconds, by the rate of the robot's set, which is not the first.
        data={"sources": [{"path": str(pairs)}, {"path": str(robot)}], "horizon": "0.4s", "batch_size": 8}
        | {"mixture": {"labelled": 0.5}, "augmentation": {"kind": "colour"}, "cache": {"folder": str(home)}},
        model=world.MODEL,
        objective={"state": {"offsets": [2]}, "masked": {"kind": "masked_patches", "weight": 0.1}},
        training=world.TRAINING
        # A record is of two steps, of which a checkpoint may have one.
        | {"steps": 6, "checkpoints": {"every": 3}, "validation": {"every": 3}, "log_every": 2},
    )


def test_a_mixture_trains_and_resumes_to_the_same_bits(config: RunConfig, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def kill(step: int, steps: int, latest: dict[str, float]) -> None:
        if step == 5:
            raise Killed

    build_training(config, straight).fit()
    with pytest.raises(Killed):
        build_training(config, killed).fit(kill)
    build_training(config, killed).fit()
    assert differing(straight, killed) == []
    losses = [record for record in read_records(straight) if "loss/total" in record]
    assert len(losses) == 3
    assert losses[-1]["data/epochs@pairs"] > 0 and losses[-1]["loss/masked/raw@pairs"] > 0
    assert losses[-1]["loss/action/raw@robot"] == pytest.approx(losses[-1]["loss/action/raw"])
    for term in (*OF_ACTIONS, "align", "masked"):
        assert [record["step"] for record in losses if record[f"loss/{term}/raw"] > 0], term


@pytest.fixture(scope="module")
def built(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> BuiltTraining:
    return build_training(config, tmp_path_factory.mktemp("run"))


def test_every_batch_has_both_and_each_term_counts_the_rows_that_can_teach_it(
    config: RunConfig, built: BuiltTraining
) -> None:
    shares = label_shares(config, built.data).shares
    # Episodes of 12: those windows feed `recon` that see a picture 4 steps later.
    assert shares["action"] == [0.0, 1.0] and shares["align"] == [1.0, 1.0] and shares["masked"] == [1.0, 1.0]
    assert (
        shares["recon"][0] == shares["state"][0] == 0.0 and min(shares["recon"][1], shares["state"][1]) > 0.5
    )
    batch = built.data.train.batch_at(0)
    pairs = batch.embodiment < 0
    assert pairs.sum() == 4
    assert torch.equal(batch.action_mask.any(dim=(1, 2)), ~pairs)


def values(built: BuiltTraining, batch: Batch) -> dict[str, Tensor]:
    """The loss of each term on a batch, with the same draws each time."""
    torch.manual_seed(0)
    model, objective = built.model.eval(), built.objective.eval()
    with torch.no_grad():
        return {
            name: term(model(batch.observation), batch, model).value for name, term in objective.terms.items()
        }


def test_the_terms_of_actions_see_the_robot_s_rows_alone(built: BuiltTraining) -> None:
    batch = built.data.train.batch_at(1)
    pairs = batch.embodiment < 0
    random = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randint(0, 256, like.shape, generator=random, dtype=torch.uint8)

    def spoilt(rows: Tensor) -> Batch:
        """The batch with all that these rows hold changed, but for the masks."""
        seen = batch.observation
        images, text, state, actions = (
            one.clone() for one in (seen.images, seen.text, seen.state, batch.actions)
        )
        images[rows], text[rows] = noise(images[rows]), (text[rows] + 1) % built.data.spec.vocab_size
        state[rows], actions[rows] = 7.0, 7.0
        futures: dict[Any, Any] = {}
        for label, future in batch.futures.items():
            later = future.observation.images.clone()
            later[rows] = noise(later[rows])
            futures[label] = replace(future, observation=replace(future.observation, images=later))
        observation = replace(seen, images=images, text=text, state=state)
        return replace(batch, observation=observation, actions=actions, futures=futures)

    before = values(built, batch)
    without, robotless = values(built, spoilt(pairs)), values(built, spoilt(~pairs))
    for name in OF_ACTIONS:
        assert torch.equal(before[name], without[name]), name
        assert not torch.equal(before[name], robotless[name]), name
    for name in ("align", "masked"):
        assert not torch.equal(before[name], without[name]), name


def test_a_masked_view_of_a_pair_changes_no_term(built: BuiltTraining) -> None:
    batch = built.data.train.batch_at(2)
    images = torch.where(batch.observation.image_mask[..., None, None, None], batch.observation.images, 200)
    assert not torch.equal(images, batch.observation.images)
    changed = replace(batch, observation=replace(batch.observation, images=images))
    before, after = values(built, batch), values(built, changed)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_validation_measures_actions_on_the_robot_s_windows(built: BuiltTraining) -> None:
    measured = built.data.measured()
    assert len(measured.rows) and built.data.windows.known("actions", measured.rows).all()
    held = built.data.windows.gather(built.data.held_out_rows)
    assert (held.embodiment < 0).any() and (held.embodiment == 0).any()


def test_the_config_of_the_page_trains(config: RunConfig, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/picture-text.md").read_text()
    values = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    pairs, robot = (str(source.path) for source in config.data.sources)
    values["data"]["sources"][0]["path"], values["data"]["sources"][1]["path"] = robot, pairs
    del values["model"]
    smaller: dict[str, Any] = {
        "data": {"image_size": world.SIZE, "horizon": 4, "batch_size": 8},
        "model": world.MODEL,
        "objective": {"state": {"offsets": [2]}},
        "training": world.TRAINING | {"steps": 2, "checkpoints": {"every": 0}},
    }
    made = build_config(merge(values, smaller), "the page")
    assert build_training(made, tmp_path / "run").fit().is_dir()

"""Fewer demonstrations: seeded, per task, each level a part of the next, and nothing held out changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from test_data_loading import build as build_set
from test_data_loading import write_set

from tutti.data.bundle import DataBundle
from tutti.data.config import DataConfig
from tutti.data.episodes import Episode
from tutti.data.split import episodes_at
from tutti.types import DataNeeds, UserError

PER_TASK = 8
EPISODES = tuple(Episode(i, 10 * i, 10, f"{('open', 'shut')[i % 2]} wording {i // 2}") for i in range(40))


def task_of(text: str) -> str:
    return text.split(maxsplit=1)[0]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set", lengths=(5,) * (2 * PER_TASK))


def build(data_set: Path, episodes_per_task: int | str, seed: int = 0) -> DataBundle:
    changes = {"episodes_per_task": episodes_per_task, "seed": seed}
    return build_set(data_set, data_set.parent / "cache", DataNeeds(), **changes)


def indices(episodes: tuple[Episode, ...]) -> list[int]:
    return [episode.index for episode in episodes]


def test_every_task_gives_the_first_of_its_seeded_order() -> None:
    few, more, other = (
        episodes_at(EPISODES, slice(0, n), seed, task_of) for n, seed in ((4, 0), (9, 0), (4, 1))
    )
    assert sorted(task_of(e.instruction) for e in few) == ["open"] * 4 + ["shut"] * 4
    assert indices(few) == sorted(indices(few))
    assert set(few) < set(more) and few != other == episodes_at(EPISODES, slice(0, 4), 1, task_of)
    # Other tasks do not change which of a task are taken.
    alone = tuple(e for e in EPISODES if task_of(e.instruction) == "open")
    assert episodes_at(alone, slice(0, 4), 0, task_of) == tuple(e for e in few if e in alone)


def test_wordings_are_tasks_where_no_task_is_named() -> None:
    assert len(episodes_at(EPISODES, slice(0, 1), 0)) == 40
    with pytest.raises(UserError, match="of 'open wording 0' only 1 episodes"):
        episodes_at(EPISODES, slice(0, 2), 0)
    with pytest.raises(UserError, match=r"asked, but of 'open' only 20.*Lower it"):
        episodes_at(EPISODES, slice(0, 21), 0, task_of, "asked")


@pytest.mark.parametrize("wrong", [0, -1, "some", 2.5])
def test_what_is_no_number_of_episodes_is_refused(wrong: object) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"episodes_per_task": wrong})


def test_validation_is_the_same_at_every_level(data_set: Path) -> None:
    whole, few = build(data_set, "all"), build(data_set, 2)
    assert whole.parts[0].held_out == few.parts[0].held_out
    assert np.array_equal(whole.validation.rows, few.validation.rows)
    assert len(whole.parts[0].training) == 2 * (PER_TASK - 2) and len(few.parts[0].training) == 4
    assert not set(indices(few.parts[0].training)) & set(indices(few.parts[0].held_out))


def test_only_chosen_episodes_are_trained_on_and_fitted_to(data_set: Path) -> None:
    data = build(data_set, 2)
    rows = np.concatenate([np.arange(e.start, e.end) for e in data.parts[0].training])
    assert set(data.train.mixture.windows[0].tolist()) == set(rows.tolist())
    states = data.windows.sources[0].store.states[rows]
    assert data.normalizer.stats["sawyer"].state.max == pytest.approx(states.max(axis=0))
    assert data.describe()["training_episodes"] == 4


def test_same_level_and_seed_give_the_same_order_of_windows(data_set: Path) -> None:
    one, two, other = build(data_set, 2), build(data_set, 2), build(data_set, 2, seed=1)
    orders = [data.train.mixture.take(0, 7 * data.train.batch_size).tolist() for data in (one, two, other)]
    assert orders[0] == orders[1] != orders[2]


def test_position_of_another_level_is_refused(data_set: Path) -> None:
    state = build(data_set, 2).train.state_dict()
    with pytest.raises(UserError, match="order of batches would differ"):
        build(data_set, 3).train.load_state_dict(state)

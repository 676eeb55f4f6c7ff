"""Unequal labels: what a source lacks is masked and never learned from, fitted to, checked or compared."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from test_data_loading import HORIZON, build, digest, write_set
from test_data_order import Store, unit

from fixtures import squares_data as world
from fixtures.unlabelled import with_vector, without_feature, without_numbers, without_texts
from tutti.data.augmentation import ColourJitter
from tutti.data.bundle import DataBundle, spread
from tutti.data.config import DataConfig
from tutti.data.episodes import Episode
from tutti.data.mixture import ComposedMixture, Mixture
from tutti.data.normalize import EmbodimentStats, Normalizer
from tutti.data.opened import Source
from tutti.data.sources import Part, check_compatible, labelled_rows, open_parts, split_parts
from tutti.data.tokenize import Tokenizer
from tutti.data.windows import WindowIndex
from tutti.distributed.ranks import Ranks
from tutti.runs.data_check import check_path
from tutti.types import LABELS, DataNeeds, Label, UserError

NEEDS = DataNeeds(futures=(2,), states=(1, "last"))


def labels_of(data: DataBundle, rows: np.ndarray) -> dict[Label, list[bool]]:
    """What a batch of these windows says of its labels."""
    batch = data.windows.gather(rows)
    return {
        "actions": batch.action_mask[:, 0, 0].tolist(),
        "text": batch.observation.text_mask.any(dim=1).tolist(),
        "state": batch.observation.state_mask.tolist(),
    }


def lacking(data: DataBundle, part: int) -> set[Label]:
    """The labels that no training window of a part has; the others must be in all."""
    rows = data.windows.rows_of(
        [one.store for one in data.windows.sources].index(data.parts[part].store), data.parts[part].training
    )
    found = labels_of(data, rows)
    assert all(any(found[label]) == all(found[label]) for label in LABELS)
    return {label for label in LABELS if not any(found[label])}


# --- what a source lacks


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("has_it", [True, False])
def test_a_label_that_is_false_is_masked_whether_the_folder_has_it_or_not(
    tmp_path: Path, label: Label, has_it: bool
) -> None:
    full, other = write_set(tmp_path / "full"), write_set(tmp_path / "other", seed=1)
    if not has_it:
        feature = {"actions": "action", "state": "observation.state"}.get(label)
        without_feature(other, feature) if feature else without_texts(other, 0, 1)
        with pytest.raises(UserError, match=f"labels.{label}"):
            build(full, tmp_path, NEEDS, sources=({"path": full}, {"path": other}))
    sources = ({"path": other, "labels": {label: False}}, {"path": full})
    data = build(full, tmp_path, NEEDS, sources=sources)
    assert lacking(data, 0) == {label} and lacking(data, 1) == set()
    assert (data.spec.action_dim, data.spec.state_dim) == (3, 4)
    batch = data.windows.gather(data.windows.rows_of(0, data.parts[0].training))
    if label == "actions":
        assert not batch.action_mask.any() and not batch.actions.any()
    elif label == "text":
        assert data.texts(batch) == [""] * len(batch.window)
        known = data.windows.gather(data.windows.rows_of(1, data.parts[1].training))
        assert not set(batch.instruction_id.tolist()) & set(known.instruction_id.tolist())
    else:
        assert batch.later_states is not None and not batch.later_states.mask.any()
        assert not batch.observation.state.any() and not batch.futures[2].observation.state_mask.any()
    assert data.describe()["instructions"] == 2
    # Nothing that it lacks is learned from: the statistics are those of the full set alone.
    alone = build(full, tmp_path, NEEDS, sources=({"path": full},), validation_fraction=0)
    both = build(full, tmp_path, NEEDS, sources=sources, validation_fraction=0)
    mine, theirs = (one.normalizer.stats["sawyer"] for one in (both, alone))
    if label in ("actions", "state"):
        what = {"actions": "action", "state": "state"}[label]
        assert getattr(mine, what).to_dict() == getattr(theirs, what).to_dict()
    assert both.tokenizer.to_json() == alone.tokenizer.to_json()


def test_rows_that_lack_a_label_may_lie_in_one_folder_with_rows_that_have_it(tmp_path: Path) -> None:
    folder = without_numbers(write_set(tmp_path / "set"), "action", (1, 3))
    without_numbers(without_texts(folder, 1), "observation.state", (2,), slice(0, 3))
    with pytest.raises(UserError, match=r"labels\.text=where_present"):
        build(folder, tmp_path, NEEDS)
    where = dict.fromkeys(LABELS, "where_present")
    with pytest.raises(UserError, match="action is nan in episode 1"):
        build(folder, tmp_path, NEEDS, sources=({"path": folder, "labels": where | {"actions": True}},))
    data = build(folder, tmp_path, NEEDS, sources=({"path": folder, "labels": where},))
    store = data.windows.sources[0].store
    for episode in store.episodes:
        found = labels_of(data, np.arange(episode.start, episode.end))
        assert set(found["actions"]) == {episode.index not in (1, 3)}
        assert set(found["text"]) == {episode.index % 2 == 0}  # texts take turns
        unknown = 3 if episode.index == 2 else 0
        assert found["state"] == [False] * unknown + [True] * (episode.length - unknown)
    assert np.isfinite(data.windows.gather(np.arange(len(data.windows))).actions.numpy()).all()
    assert data.tokenizer.encode(["open it"])[1].any() and data.windows.instructions == ("", "open it")


def test_a_number_missing_among_others_is_damage_also_where_rows_may_be_missing(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")

    def spoil(values: np.ndarray, _: pa.Table) -> None:
        values[4, 1] = np.nan

    with_vector(folder, "action", spoil)
    sources: tuple[dict[str, Any], ...] = ({"path": folder, "labels": {"actions": "where_present"}},)
    with pytest.raises(UserError, match="dimension 1"):
        build(folder, tmp_path, NEEDS, sources=sources)


def test_null_instructions_are_blank_ones(tmp_path: Path) -> None:
    folder = without_texts(write_set(tmp_path / "set"), 1, text=None)
    data = build(folder, tmp_path, sources=({"path": folder, "labels": {"text": "where_present"}},))
    assert data.windows.instructions == ("", "open it")


def test_pictures_alone_can_be_a_source_and_its_episodes_are_told_apart(tmp_path: Path) -> None:
    full = write_set(tmp_path / "full")
    video = without_feature(write_set(tmp_path / "video", seed=1), "action", "observation.state")
    labels = {"actions": False, "state": False}
    data = build(full, tmp_path, NEEDS, sources=({"path": full}, {"path": video, "labels": labels}))
    assert len(set(data.parts[1].store.identities)) == len(data.parts[1].store.episodes)
    assert lacking(data, 1) == {"actions", "state"}


def test_at_least_one_source_has_actions(tmp_path: Path) -> None:
    off = {"path": tmp_path, "labels": {"actions": False}}
    with pytest.raises(ValidationError, match="at least one must have actions"):
        DataConfig.model_validate({"sources": [off, off]})
    folder = without_numbers(write_set(tmp_path / "set", lengths=(5, 6)), "action", (0, 1))
    with pytest.raises(UserError, match="no frame to train on has actions"):
        build(folder, tmp_path, sources=({"path": folder, "labels": {"actions": "where_present"}},))


def test_the_gripper_and_its_key_frames_are_those_of_labelled_rows() -> None:
    store = Store("arm", (5, 4, 4), 0)
    store.actions[5:9, 1] = np.linspace(0, 1, 4)  # no gripper, but of an episode without actions
    labels: dict[Label, Any] = {"actions": False, "text": True, "state": True}
    named = Part(store=store, named=np.array([True, False, True]))
    index = store_index(
        store, [named, Part(store=store, named=np.array([False, True, False]), labels=labels)]
    )
    batch = index.gather(np.arange(len(index)))
    assert batch.later_states is not None
    assert batch.later_states.mask[:, 0].tolist() == [True] * 5 + [False] * 4 + [True] * 4
    near = [True, True, False, False, False, *[False] * 4, True, True, False, False]
    assert index.before_key_frame(np.arange(13)).tolist() == near
    # Nor is the action before a window known where its row has none.
    before, known = spread(index, np.arange(13), 13).previous()
    assert known.tolist() == [False, *[True] * 4, *[False] * 5, *[True] * 3]
    assert not before[~known].any() and before[known, 0].tolist() == [0, 1, 2, 3, 9, 10, 11]


def store_index(store: Store, parts: list[Part]) -> WindowIndex:
    ready = split_parts(parts, 0.0, 0, None, None)
    rows = labelled_rows(store, ready, check_compatible(ready))
    return WindowIndex(
        [Source(store, np.zeros((13, 1, 3, 2, 2), np.uint8), rows)],
        horizon=HORIZON,
        normalizer=Normalizer("standard", {"arm": EmbodimentStats(state=unit(1), action=unit(2))}),
        tokenizer=Tokenizer.fit(store.instructions),
        needs=DataNeeds(states=("next_key",), grippers=(1,)),
    )


# --- one folder, several sources


def test_one_folder_may_be_several_sources_and_is_opened_and_decoded_once(tmp_path: Path) -> None:
    folder = without_numbers(write_set(tmp_path / "set"), "action", (3, 4, 5))
    sources = (
        {"path": folder, "episodes": ["0-2"]},
        {"path": folder, "episodes": ["3-5"], "labels": {"actions": False}},
    )
    data = build(folder, tmp_path / "cache", sources=sources)
    assert len(data.windows.sources) == 1 and len(list((tmp_path / "cache").iterdir())) == 1
    assert lacking(data, 0) == set() and lacking(data, 1) == {"actions"}
    for part, numbers in zip(data.parts, (range(3), range(3, 6)), strict=True):
        assert {e.index for e in (*part.training, *part.held_out)} == set(numbers)
    # What is held out has the labels of its source, since that is all that the folder has.
    found = labels_of(data, data.held_out_rows)["actions"]
    own = data.windows.rows_of(0, data.parts[0].held_out)
    assert found == np.isin(data.held_out_rows, own).tolist()


def test_a_source_whose_episodes_are_all_held_out_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", lengths=(6,) * 6)
    (held, *_) = build(folder, tmp_path / "cache").parts[0].held_out
    others = [number for number in range(6) if number != held.index]
    sources = ({"path": folder, "episodes": others}, {"path": folder, "episodes": [held.index]})
    with pytest.raises(UserError, match=r"sources\.1 has nothing to train on[\s\S]*validation_fraction=0"):
        build(folder, tmp_path / "cache", sources=sources)


def test_two_sources_may_not_train_on_one_episode(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    sources = ({"path": folder, "episodes": ["0-3"]}, {"path": folder, "episodes": ["3-5"]})
    with pytest.raises(UserError, match=r"0 and 1 would both train on episode 3[\s\S]*per_task"):
        build(folder, tmp_path, sources=sources, validation_fraction=0)


LENGTHS = (5,) * 24


def arm(folder: Path, cache: Path, *sources: dict[str, Any], **changes: Any) -> DataBundle:
    named = tuple({"path": folder} | source for source in sources)
    return build(folder, cache, NEEDS, sources=named, validation_fraction=0.2, **changes)


def test_places_of_each_task_are_disjoint_and_the_held_out_episodes_are_those_of_every_arm(
    tmp_path: Path,
) -> None:
    folder = write_set(tmp_path / "set", lengths=LENGTHS)
    off = {"labels": {"actions": False}}
    few = arm(folder, tmp_path, {"per_task": "0-2"})
    both = arm(folder, tmp_path, {"per_task": "0-2"}, {"per_task": "3-", **off})
    swapped = arm(folder, tmp_path, {"per_task": "3-", **off}, {"per_task": "0-2"})
    whole = arm(folder, tmp_path, {})
    same = build(folder, tmp_path, NEEDS, validation_fraction=0.2, episodes_per_task=3)
    assert few.parts[0].training == same.parts[0].training == both.parts[0].training
    assert len(few.parts[0].training) == 6
    first, rest = (set(part.training) for part in both.parts)
    assert not first & rest and first | rest == set(whole.parts[0].training)
    assert lacking(both, 0) == set() and lacking(both, 1) == {"actions"}
    for data in (few, both, swapped, whole, same):
        assert sorted(data.held_out_rows) == sorted(whole.held_out_rows)
        assert np.array_equal(data.validation.rows, whole.validation.rows)
        assert all(labels_of(data, data.held_out_rows)["actions"])  # the folder has them
    with pytest.raises(UserError, match=r"sources\.0\.per_task is 3-30, but of '.*' only "):
        arm(folder, tmp_path, {"per_task": "3-30"})


@pytest.mark.parametrize("wrong", ["9-3", "x", 3, "-4", "3"])
def test_what_is_no_range_of_places_is_refused(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ValidationError, match="per_task"):
        DataConfig.model_validate({"sources": [{"path": tmp_path, "per_task": wrong}]})
    both = {"sources": [{"path": tmp_path, "per_task": "0-3"}], "episodes_per_task": 2}
    with pytest.raises(ValidationError, match="episodes_per_task is for all sources"):
        DataConfig.model_validate(both)


@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=60),
    st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True),
    st.integers(0, 3),
)
def test_any_cuts_of_the_order_share_out_the_training_episodes(
    tasks: list[int], cuts: list[int], seed: int
) -> None:
    store = Store("arm", (3,), 0)
    store.episodes = tuple(Episode(i, 0, 1, f"task {task}") for i, task in enumerate(tasks))
    vars(store)["number_digests"] = {name: np.arange(len(tasks), dtype=np.uint64) for name in "ab"}
    edges = [0, *(cut for cut in sorted(cuts) if cut)]
    places = [slice(a, b) for a, b in zip(edges, [*edges[1:], None], strict=True)]
    parts = [Part(store=store, places=place) for place in places]
    (whole,) = split_parts([Part(store=store)], 0.2, seed, None, None)
    try:
        found = split_parts(parts, 0.2, seed, None, None)
    except UserError:
        counts = Counter(episode.instruction for episode in whole.training)
        fewest = min(counts.values())
        assert fewest <= edges[-1]
        return
    trained = [episode for part in found for episode in part.training]
    assert len(set(trained)) == len(trained) and set(trained) == set(whole.training)
    assert [episode for part in found for episode in part.held_out] == list(whole.held_out)


# --- batches composed by label


SIZES = st.integers(1, 40), st.integers(1, 40)
COUNTS = st.integers(1, 8), st.integers(1, 8)


@given(st.tuples(*SIZES), st.tuples(*COUNTS), st.integers(0, 9), st.data())
def test_each_batch_has_its_share_of_labels_and_each_stream_is_that_of_a_run_alone(
    numbers: tuple[int, int], counts: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    (sizes, others), (with_actions, without) = numbers, counts
    labelled, unlabelled = np.arange(sizes), np.arange(sizes, sizes + others)
    alone = Mixture((labelled,), (1.0,), seed)
    mixture = ComposedMixture(alone, Mixture((unlabelled,), (1.0,), seed, (7,)), (with_actions, without))
    size = with_actions + without
    first = data.draw(st.integers(0, 30))
    batches = mixture.take(first * size, 3 * size).reshape(3, size)
    for number, batch in enumerate(batches, first):
        own = batch[batch < sizes]
        assert own.tolist() == alone.take(number * with_actions, with_actions).tolist()
        assert len(batch) - len(own) == without
    start, count = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 40))
    stream = mixture.take(0, start + count)
    assert mixture.take(start, count).tolist() == stream[start:].tolist()
    ranks = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    for rank in range(ranks):  # the rows of any rank have their share of both kinds
        rows = Ranks(rank, ranks).rows(size)
        count = int((batches[0][rows] < sizes).sum())
        assert abs(count - with_actions / ranks) < 1
        streams = list(mixture.streams(rows, size))
        assert sorted(np.concatenate([one.rows for one in streams])) == list(range(size // ranks))
        assert [len(one.rows) for one in streams] == [count, size // ranks - count]


def composed(tmp_path: Path, **changes: Any) -> DataBundle:
    folder = tmp_path / "set"
    if not folder.exists():
        write_set(folder, lengths=LENGTHS)
    sources = ({"per_task": "0-2"}, {"per_task": "3-", "labels": {"actions": False}})
    return arm(folder, tmp_path, *sources, **({"mixture": {"labelled": 0.25}, "batch_size": 8} | changes))


def test_arms_see_the_same_labelled_windows_at_every_step_in_the_same_colours(tmp_path: Path) -> None:
    colours = {"augmentation": ColourJitter()}
    both = composed(tmp_path, **colours)
    few = arm(tmp_path / "set", tmp_path, {"per_task": "0-2"}, batch_size=2, **colours)
    for number in range(20):
        one, other = both.train.batch_at(number), few.train.batch_at(number)
        own = one.action_mask[:, 0, 0]
        assert own.sum() == 2 and one.window[own].tolist() == other.window.tolist()
        assert one.observation.images[own].equal(other.observation.images)
        assert one.futures[2].observation.images[own].equal(other.futures[2].observation.images)
    assert both.train.batches_per_epoch == few.train.batches_per_epoch == 15
    alone = composed(
        tmp_path, **colours, mixture={"labelled": 1}, batch_size=2
    )  # the same, from these sources
    assert alone.train.batch_at(7).window.equal(few.train.batch_at(7).window)


def test_a_composed_order_is_resumed_exactly_on_any_number_of_ranks(tmp_path: Path) -> None:
    data = composed(tmp_path, augmentation=ColourJitter(), prefetch=2)
    stream = [next(data.train) for _ in range(9)]
    state = data.train.state_dict()
    expected = [digest(next(data.train)) for _ in range(5)]
    again = composed(tmp_path, augmentation=ColourJitter())
    again.train.load_state_dict(state)
    assert [digest(next(again.train)) for _ in range(5)] == expected
    again.train.share(Ranks(1, 2))
    half = again.train.batch_at(3)
    assert half.window.tolist() == stream[3].window[4:].tolist()
    assert half.observation.images.equal(stream[3].observation.images[4:])
    other = arm(tmp_path / "set", tmp_path, {"per_task": "0-2"}, {"per_task": "3-"}, batch_size=8)
    for changed in (other, composed(tmp_path, seed=1)):
        with pytest.raises(UserError, match="order of batches would differ"):
            changed.train.load_state_dict(state)
    data.train.close()


def test_labels_alone_are_another_training(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    full, silent = (
        build(folder, tmp_path, sources=({"path": folder, "labels": {"text": use}},)) for use in (True, False)
    )
    with pytest.raises(UserError, match="identity"):
        silent.train.load_state_dict(full.train.state_dict())


def test_a_share_that_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    with pytest.raises(ValidationError, match=r"0.3 of batch_size 8, 2.4 windows; 0.25 would be 2"):
        DataConfig.model_validate({"batch_size": 8, "mixture": {"labelled": 0.3}})
    for share in (0, 1.5, "all"):
        with pytest.raises(ValidationError):
            DataConfig.model_validate({"mixture": {"labelled": share}})
    with pytest.raises(UserError, match=r"no window to train on lacks actions[\s\S]*labels\.actions=false"):
        build(folder, tmp_path, mixture={"labelled": 0.5})


# --- windows before key frames


def test_windows_before_a_key_frame_are_drawn_as_often_as_the_factor_says(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")

    def grip(values: np.ndarray, table: pa.Table) -> None:
        values[:, 2] = table["frame_index"].to_numpy() >= 6

    with_vector(folder, "action", grip)
    with pytest.raises(UserError, match="near_key_frames is 3, but no term names a gripper"):
        build(folder, tmp_path, mixture={"near_key_frames": 3})
    needs = DataNeeds(grippers=(2,))
    data = build(folder, tmp_path, needs, mixture={"near_key_frames": 3})
    drawn = data.train.mixture.take(0, data.train.mixture.epoch_length)
    rows, times = np.unique(drawn, return_counts=True)
    assert rows.tolist() == sorted(data.training_rows)
    for episode in data.parts[0].training:
        for row in range(episode.start, episode.end):
            to_go = 6 - (row - episode.start)
            # The last frame of an episode is a key frame for its end alone.
            near = 0 < to_go <= HORIZON and episode.length > 7
            assert times[rows == row] == [3 if near else 1], (episode, row)
    plain = build(folder, tmp_path, needs)
    with pytest.raises(UserError, match="order of batches would differ"):
        plain.train.load_state_dict(data.train.state_dict())
    assert data.describe()["training_windows"] == plain.describe()["training_windows"]


# --- `tutti data check`


def test_data_check_does_not_complain_of_what_labels_switch_off(tmp_path: Path) -> None:
    full, other = world.write(tmp_path / "full"), world.write(tmp_path / "other", world.episodes(20, seed=1))
    without_numbers(without_texts(other, 0, 1), "action", (0,))
    config = tmp_path / "run.yaml"

    def found(full: dict[str, Any], **labels: bool) -> list[str]:
        sources = [full, {"path": str(other), "labels": labels}]
        given = {"data": {"sources": sources, "horizon": 3}, "objective": {"state": None}}
        config.write_text(json.dumps({"name": "x"} | given))
        return [f"{one.kind}: {one.sentence}" for one in check_path(str(config)).findings]

    sound = {"path": str(full)}
    (refused,) = found(sound)
    assert refused.startswith("unreadable") and "labels.text=where_present" in refused
    (refused,) = found(sound, text=False)
    assert refused.startswith("unreadable") and "action is nan in episode 0" in refused
    assert found(sound, text=False, actions=False) == []
    # And of the actions of the other, which are not used, nothing is said either.
    silent, both = {"actions": False}, {"actions": False, "text": False}

    def still(values: np.ndarray, _: pa.Table) -> None:
        values[:] = 0

    with_vector(full, "action", still)
    assert any("constant_vector" in one for one in found(sound, **both))
    (only,) = found({**sound, "labels": silent}, **both)
    assert "at least one must have actions" in only


def test_parts_of_a_folder_know_their_own_episodes(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    data = DataConfig.model_validate(
        {"sources": [{"path": folder, "episodes": [0, 2]}, {"path": folder, "exclude": ["0-2"]}]}
    )
    first, second = open_parts(data.sources)
    assert first.store is second.store and first.named is not None and second.named is not None
    assert np.flatnonzero(first.named).tolist() == [0, 2] and not second.named[:3].any()

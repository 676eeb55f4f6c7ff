"""From stored episodes to batches: windows, order, resume, split, cache."""

from __future__ import annotations

import gc
import hashlib
import json
import threading
import time
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tutti.data.bundle import DataBundle
from tutti.data.config import DataConfig
from tutti.data.formats.lerobot.writer import EpisodeRecord, write_lerobot
from tutti.data.normalize import ActionStats
from tutti.data.sources import SourceConfig
from tutti.distributed.ranks import ONE_RANK
from tutti.types import Batch, DataNeeds, UserError

VIEWS = ("observation.images.right", "observation.images.top")
LENGTHS = (7, 5, 9, 3, 6, 8, 12, 4)
HORIZON, FUTURE = 4, 3


def write_set(
    folder: Path,
    lengths: tuple[int, ...] = LENGTHS,
    seed: int = 0,
    size: int = 8,
) -> Path:
    """Actions are (100 * episode + t, -t, 0.5); the first byte of the pictures is the frame row."""
    episodes, row = [], 0
    for number, length in enumerate(lengths):
        random = np.random.default_rng([seed, number])
        images = {v: random.integers(0, 256, (length, size, size, 3), dtype=np.uint8) for v in VIEWS}
        for view in VIEWS:
            images[view][:, 0, 0, 0] = np.arange(row, row + length)
        t = np.arange(length)
        actions = np.stack([100 * number + t, -t, np.full(length, 0.5)], axis=1).astype(np.float32)
        states = random.normal(size=(length, 4)).astype(np.float32)
        text = ("open it", "close it")[number % 2]
        episodes.append(EpisodeRecord(images=images, states=states, actions=actions, instruction=text))
        row += length
    return write_lerobot(folder, episodes, fps=20, views=VIEWS, robot_type="sawyer")


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set")


def build(data_set: Path, cache: Path, needs: DataNeeds | None = None, **changes: object) -> DataBundle:
    settings: dict[str, object] = {"horizon": HORIZON, "batch_size": 6, "image_size": 8}
    settings |= {
        "sources": (SourceConfig(path=data_set),),
        "validation_fraction": 0.25,
        "cache": {"folder": cache},
    }
    config = DataConfig.model_validate(settings | changes)
    return config.build(needs or DataNeeds(futures=(FUTURE,)))


def digest(batch: Batch) -> str:
    parts = hashlib.sha256()
    for tensor in (batch.window, batch.actions, batch.observation.images, batch.observation.state):
        parts.update(tensor.numpy().tobytes())
    return parts.hexdigest()


# --- windows; what each of them holds is compared with a loop in test_data_order


def test_batches_show_the_frames_of_the_data_set(data_set: Path, tmp_path: Path) -> None:
    data = build(data_set, tmp_path)
    store = data.windows.sources[0].store
    batch = data.windows.gather(np.arange(len(data.windows)))
    np.testing.assert_array_equal(batch.observation.images[:, 0, 0, 0, 0], np.arange(54))
    np.testing.assert_array_equal(batch.observation.state, data.normalizer.apply_state(store.states))
    now = data.normalizer.undo_action(batch.actions[:, 0].numpy())
    np.testing.assert_allclose(now, store.actions, rtol=1e-5, atol=1e-4)
    texts = data.texts(batch)
    assert texts == [store.instructions[i] for i in store.instruction_of]
    ids, mask = data.tokenizer.encode(texts)
    assert torch.equal(batch.observation.text, ids) and torch.equal(batch.observation.text_mask, mask)
    plain = next(build(data_set, tmp_path, DataNeeds()).train)
    assert plain.futures == {} and plain.later_states is None  # no term needs one


def test_a_horizon_longer_than_every_episode_is_refused(data_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.horizon is 13, but the longest episode .* 12 frames"):
        build(data_set, tmp_path, horizon=13)
    with pytest.raises(UserError, match=r"future is 12, but the longest"):
        build(data_set, tmp_path, DataNeeds(futures=(2, 12)))


def test_a_gripper_that_is_none_is_refused_with_the_name_of_the_set(data_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gripper\.dimension 0 .* no gripper in .*[\s\S]*\(none would do\)"):
        build(data_set, tmp_path, DataNeeds(states=("next_key",), grippers=(0,)))


def test_wordings_of_a_task_share_its_number(data_set: Path, tmp_path: Path) -> None:
    """By `data.tasks`, else by what the recordings know, else each instruction is a task of its own."""
    plain = build(data_set, tmp_path).windows
    batch = plain.gather(np.arange(len(plain)))
    assert plain.tasks == ("close it", "open it") and batch.task_id is not None
    assert torch.equal(batch.tasks, batch.instruction_id) and len(batch.task_id.unique()) == 2

    config = DataConfig.model_validate(
        {"sources": [{"path": data_set}], "horizon": HORIZON, "image_size": 8, "cache": {"folder": tmp_path}}
    )
    known = config.build(DataNeeds(), group_of=lambda text: "door").windows
    assert known.tasks == ("door",) and not known.gather(np.arange(54)).tasks.any()
    named = config.model_copy(update={"tasks": {"opening": ("OPEN  it",)}})
    mixed = named.build(DataNeeds(), group_of=lambda text: "door")
    assert mixed.windows.tasks == ("door", "opening")
    opened = [text == "open it" for text in mixed.texts(mixed.windows.gather(np.arange(54)))]
    assert mixed.windows.gather(np.arange(54)).tasks.bool().tolist() == opened
    # The demonstrations of a task are counted by the same groups.
    with pytest.raises(UserError, match="of 'opening' only"):
        named.model_copy(update={"episodes_per_task": 5}).build(DataNeeds())


def test_a_task_of_unknown_or_shared_wordings_is_refused(data_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tasks\.door names 'open id'.* Did you mean 'open it'\?"):
        build(data_set, tmp_path, tasks={"door": ["open id"]})
    with pytest.raises(
        ValidationError, match=r"each instruction in one task, found 'Open it' in 'a' and 'b'"
    ):
        DataConfig.model_validate({"tasks": {"a": ["open it"], "b": ["Open it"]}})


def test_chunks_for_a_fit_are_those_of_the_training_windows(data_set: Path, tmp_path: Path) -> None:
    data = build(data_set, tmp_path)
    actions, mask = data.training_chunks(10_000)
    batch = data.windows.gather(data.training_rows)
    assert torch.equal(actions, batch.actions) and torch.equal(mask, batch.action_mask)
    assert len(data.training_chunks(4)[0]) == 4


def test_a_batch_is_replayed_from_its_window_numbers(data_set: Path, tmp_path: Path) -> None:
    data = build(data_set, tmp_path)
    batch = next(data.train)
    assert digest(data.replay(batch.window)) == digest(batch)
    assert digest(data.replay(batch.window.tolist())) == digest(batch)
    with pytest.raises(UserError, match=r"expected numbers in \[0, 54\)"):
        data.replay([54])


# --- order and resume


def test_an_epoch_shows_each_training_window_once(data_set: Path, tmp_path: Path) -> None:
    data = build(data_set, tmp_path, batch_size=1)
    with closing(data.train) as train:
        count = int(train.batches_per_epoch)
        epochs = [[int(next(train).window) for _ in range(count)] for _ in range(2)]
    expected = sorted(train.mixture.windows[0].tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("consumed", [0, 7, 20])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_resumed_loader_goes_on_as_if_uninterrupted(
    data_set: Path, tmp_path: Path, consumed: int, prefetch: int
) -> None:
    jitter = {"kind": "colour"}
    with closing(build(data_set, tmp_path, prefetch=0, augmentation=jitter).train) as train:
        reference = [digest(next(train)) for _ in range(25)]
    with closing(build(data_set, tmp_path, prefetch=prefetch, augmentation=jitter).train) as first:
        for _ in range(consumed):
            next(first)
        time.sleep(0.02)  # let the thread run ahead
        state = json.loads(json.dumps(first.state_dict()))
    with closing(build(data_set, tmp_path, prefetch=prefetch, augmentation=jitter).train) as second:
        next(iter(second))
        second.load_state_dict(state)
        assert [digest(next(second)) for _ in range(25 - consumed)] == reference[consumed:]
        assert second.state_dict()["consumed"] == 25


def test_the_batches_of_an_update_are_made_ahead_at_least(
    data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = threading.Semaphore(0)
    with closing(build(data_set, tmp_path, prefetch=2).train) as train:
        make = train._maker()

        def counting(number: int) -> Batch:
            made.release()
            return make(number)

        monkeypatch.setattr(train, "_maker", lambda: counting)
        train.share(ONE_RANK, 5)
        next(train)
        assert all(made.acquire(timeout=10) for _ in range(1 + 5))  # without another call
    with closing(build(data_set, tmp_path, prefetch=0).train) as train:
        train.share(ONE_RANK, 5)
        next(train)
        assert train._thread is None


def test_a_position_of_another_order_is_refused(data_set: Path, tmp_path: Path) -> None:
    state = build(data_set, tmp_path).train.state_dict()
    with pytest.raises(UserError, match=r"batch_size = 6; this run has 5"):
        build(data_set, tmp_path, batch_size=5).train.load_state_dict(state)
    with pytest.raises(UserError, match=r"seed = 0; this run has 1"):
        build(data_set, tmp_path, seed=1).train.load_state_dict(state)
    whole = build(data_set, tmp_path, validation_fraction=0).train.state_dict()
    other = write_set(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="identity"):
        build(other, tmp_path, validation_fraction=0).train.load_state_dict(whole)


def test_an_error_in_the_thread_reaches_the_trainer(
    data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build(data_set, tmp_path)

    def fail(*_: object) -> Batch:
        raise UserError("the disk went away")

    with monkeypatch.context() as patch:
        patch.setattr(type(data.windows), "gather", fail)
        for _ in range(2):
            with pytest.raises(UserError, match="the disk went away"):
                next(data.train)
    next(data.train)
    data.train.close()


def test_a_forgotten_loader_ends_its_thread(data_set: Path, tmp_path: Path) -> None:
    data = build(data_set, tmp_path)
    next(data.train)
    assert any(t.name.startswith("tutti-loader") for t in threading.enumerate())
    del data
    assert not any(t.name.startswith("tutti-loader") for t in threading.enumerate())


def test_two_data_sets_are_mixed_by_weight(data_set: Path, tmp_path: Path) -> None:
    second = write_set(tmp_path / "second", lengths=(4, 4, 4, 4), seed=3)
    sources = (SourceConfig(path=data_set, weight=1), SourceConfig(path=second, weight=3))
    data = build(data_set, tmp_path, sources=sources, validation_fraction=0, batch_size=70)
    batch = next(data.train)
    assert int((batch.window >= 54).sum()) == 52  # 3/4 of the 70 windows, to the nearest whole
    for window, picture in zip(batch.window.tolist(), batch.observation.images, strict=True):
        assert int(picture[0, 0, 0, 0]) == (window if window < 54 else window - 54)


def test_data_sets_that_differ_are_not_mixed(data_set: Path, tmp_path: Path) -> None:
    one_view = SourceConfig(path=data_set, views=VIEWS[:1])
    with pytest.raises(UserError, match=r"differ in views[\s\S]*cure"):
        build(data_set, tmp_path, sources=(SourceConfig(path=data_set), one_view))
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        build(data_set, tmp_path, sources=())


# --- split


def test_held_out_episodes_share_no_window_with_training(data_set: Path, tmp_path: Path) -> None:
    data = build(data_set, tmp_path)
    trained = set(data.train.mixture.windows[0].tolist())
    held = set(data.held_out_rows.tolist())
    assert held and not (trained & held) and len(trained | held) == 54
    for episode in data.parts[0].held_out:
        assert held >= set(range(episode.start, episode.end))
    seen = torch.cat([batch.window for batch in data.validation])
    assert set(seen.tolist()) == held and len(data.validation) == len(list(data.validation))
    assert [digest(b) for b in data.validation] == [digest(b) for b in build(data_set, tmp_path).validation]


def test_statistics_and_words_come_from_training_episodes_only(data_set: Path, tmp_path: Path) -> None:
    data = build(data_set, tmp_path)
    store = data.windows.sources[0].store
    rows = np.sort(data.train.mixture.windows[0])
    expected = ActionStats.fit(store.actions[rows]).to_dict()
    assert data.normalizer.stats["sawyer"].action.to_dict() == expected
    assert expected != ActionStats.fit(store.actions).to_dict()


def test_description_counts_what_there_is(data_set: Path, tmp_path: Path) -> None:
    data = build(data_set, tmp_path)
    text = json.loads(json.dumps(data.describe()))
    assert (text["episodes"], text["frames"], text["instructions"]) == (8, 54, 2)
    assert text["seconds"] == pytest.approx(54 / 20)
    assert text["sources"][0]["shortest"] == 3 and text["sources"][0]["longest"] == 12
    assert data.spec.views == VIEWS and data.spec.embodiments == ("sawyer",) and data.spec.fps == 20.0
    assert data.spec.vocab_size == data.tokenizer.vocab_size


def test_a_window_is_jittered_anew_in_every_epoch(data_set: Path, tmp_path: Path) -> None:
    data = build(data_set, tmp_path, augmentation={"kind": "colour"}, batch_size=54, validation_fraction=0)
    first, second = (data.train.batch_at(number) for number in (0, 1))
    pictures = [b.observation.images[torch.argsort(b.window)] for b in (first, second)]
    plain = data.replay(list(range(54))).observation.images
    assert (pictures[0] != pictures[1]).any() and (pictures[0] != plain).any()


def test_a_batch_of_64_windows_takes_about_a_millisecond(tmp_path: Path) -> None:
    data_set = write_set(tmp_path / "set", lengths=(60,) * 4, size=64)
    data = build(data_set, tmp_path, batch_size=64, image_size=64)
    data.train.batch_at(0)

    def seconds(number: int) -> float:
        start = time.perf_counter()
        data.windows.gather(data.train.mixture.take(64 * number, 64))
        return time.perf_counter() - start

    assert min(map(seconds, range(20))) < 0.02  # a loose bound for a busy machine; 0.001 on an idle one


def test_a_restarted_thread_leaves_nothing_behind(data_set: Path, tmp_path: Path) -> None:
    loader = build(data_set, tmp_path).train
    for _ in range(5):
        next(loader)
        threads = weakref.ref(loader._thread)
        loader.close()
        gc.collect()
        assert threads() is None

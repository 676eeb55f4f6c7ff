"""HDF5 of LIBERO, robomimic and ALOHA: what was written is what is read, in the roles that it has."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import threading
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fixtures.hdf5_sets import (
    SIZE,
    Written,
    aloha,
    encode,
    env_args,
    libero,
    robomimic,
    smooth,
    vectors,
)
from tutti.data.formats.detect import find_format
from tutti.data.formats.hdf5 import files
from tutti.data.formats.hdf5.attributes import TEXT
from tutti.data.formats.hdf5.files import Array
from tutti.data.formats.hdf5.paths import in_order
from tutti.data.formats.hdf5.reader import HDF5Reader
from tutti.data.formats.mapped import MappedStore
from tutti.data.formats.wanted import Wanted
from tutti.data.sources import SourceConfig

SETS: dict[str, Callable[[Path], list[Written]]] = {
    "libero": libero,
    "regenerated": lambda folder: libero(folder, regenerated=True),
    "robomimic": robomimic,
    "gzip": lambda folder: robomimic(folder, compression="gzip", shuffle=True, fletcher32=True),
    "lzf": lambda folder: robomimic(folder, compression="lzf"),
    "szip": lambda folder: robomimic(folder, compression="szip"),
    "aloha": lambda folder: aloha(folder, jpeg=False),
    "aloha_jpeg": aloha,
}


def check(reader: HDF5Reader, written: list[Written]) -> None:
    assert reader.lengths.tolist() == [len(next(iter(one.arrays.values()))) for one in written]
    for episode, one in enumerate(written):
        assert set(one.arrays) == set(reader.features) - {TEXT}
        for key, array in one.arrays.items():
            if reader.features[key].kind == "vector":
                assert np.array_equal(reader.numbers(key, episode), array.astype(np.float32)), key
                continue
            found = reader.pictures(key, episode, np.arange(len(array)))
            assert found.dtype == np.uint8 and np.array_equal(found, array), key
        assert list(reader.texts(TEXT, episode)) == [one.text]


@pytest.mark.parametrize("kind", SETS)
def test_every_value_text_and_picture_is_what_was_written(kind: str, tmp_path: Path) -> None:
    written = SETS[kind](tmp_path)
    check(HDF5Reader(tmp_path), written)


def test_a_single_file_is_a_data_set_and_a_folder_is_all_of_its_files(tmp_path: Path) -> None:
    written = libero(tmp_path)
    (tmp_path / "._open_it_demo.hdf5").write_bytes(b"of another system")
    (tmp_path / "readme.txt").write_text("not one of them")
    check(HDF5Reader(tmp_path / "open_it_demo.hdf5"), written[3:])
    check(HDF5Reader(tmp_path), written)


def test_the_order_of_files_is_not_that_of_the_file_system() -> None:
    files = [Path("set") / f"episode_{name}.hdf5" for name in ("02", "2", "10", "002")]
    for some in permutations(files):
        assert [one.stem[8:] for one in in_order(some)] == ["002", "02", "2", "10"]


def test_episodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    written = aloha(tmp_path / "aloha", episodes=(1, 2, 3, 10, 21, 100), jpeg=False)
    check(HDF5Reader(tmp_path / "aloha"), written)
    written = robomimic(tmp_path / "robo", demos=(0, 2, 3, 10, 11, 100))
    check(HDF5Reader(tmp_path / "robo"), written)


def test_the_roles_of_libero(tmp_path: Path) -> None:
    libero(tmp_path)
    reader = HDF5Reader(tmp_path)
    roles = reader.roles()
    assert (reader.fps, reader.embodiment) == (20.0, "panda")
    assert roles.views == ("obs/agentview_rgb", "obs/eye_in_hand_rgb")
    assert roles.state == ("obs/ee_states", "obs/gripper_states")
    assert (roles.action, roles.text) == (("actions",), TEXT)
    assert (roles.flip, roles.lag) == ("vertical", 1)
    assert "opengl" in roles.reasons["flip"] and "after each action" in roles.reasons["lag"]
    assert reader.features["obs/ee_states"].units == ("m", "m", "m", "rad", "rad", "rad")
    assert reader.features["actions"].names == ("x", "y", "z", "rx", "ry", "rz", "gripper")


def test_regenerated_libero_has_no_lag_and_says_how_that_was_told(tmp_path: Path) -> None:
    libero(tmp_path, regenerated=True)
    reader = HDF5Reader(tmp_path)
    roles = reader.roles()
    assert (roles.flip, roles.lag, reader.fps, reader.embodiment) == ("vertical", 0, None, "panda")
    assert "without env_args are regenerated" in roles.reasons["lag"] and "20 Hz" in roles.reasons["fps"]


def test_pictures_that_opencv_stored_are_upright(tmp_path: Path) -> None:
    libero(tmp_path)
    for path in tmp_path.iterdir():
        with h5py.File(path, "r+") as file:
            file["data"].attrs["macros_image_convention"] = "opencv"
    assert HDF5Reader(tmp_path).roles().flip == "none"


def test_the_roles_of_robomimic_without_what_only_a_simulator_knows(tmp_path: Path) -> None:
    robomimic(tmp_path)
    reader = HDF5Reader(tmp_path)
    roles = reader.roles()
    assert roles.state == ("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos")
    assert (roles.flip, roles.lag, roles.text, reader.fps) == ("none", 0, TEXT, 20.0)
    assert any("only a simulator knows" in line and "obs/object" in line for line in reader.remarks)
    assert not any("next_obs" in key for key in reader.features)


def test_the_state_of_two_arms_has_both(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "two.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = env_args(robots=["Panda", "Panda"])
        sizes = {
            f"obs/robot{arm}_{name}": size
            for arm in (0, 1)
            for name, size in (("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2))
        }
        for key, array in vectors(4, 0, actions=14, **sizes).items():
            file[f"data/demo_0/{key}"] = array
    reader = HDF5Reader(tmp_path)
    assert len(reader.roles().state) == 6 and reader.embodiment == "panda+panda"
    assert reader.features["obs/robot1_eef_pos"].names == ("robot1_x", "robot1_y", "robot1_z")


def test_the_roles_of_aloha_and_what_it_does_not_tell(tmp_path: Path) -> None:
    aloha(tmp_path)
    reader = HDF5Reader(tmp_path)
    roles = reader.roles()
    assert roles.views == ("observations/images/cam_high", "observations/images/cam_left_wrist")
    assert (roles.state, roles.action, roles.text) == (("observations/qpos",), ("action",), None)
    assert (reader.fps, reader.embodiment) == (None, "aloha") and "50 Hz" in roles.reasons["fps"]
    assert any("no instruction" in line for line in reader.remarks)
    assert reader.features["action"].names[6::7] == ("left_gripper", "right_gripper")
    assert reader.features["action"].units[:7] == ("rad",) * 6 + ("",)


TOLD = {
    "text": ({"problem_info": json.dumps({"language_instruction": "open it"})}, "open it"),
    "quoted": ({"problem_info": json.dumps({"language_instruction": ' "open  it" '})}, "open it"),
    "words": ({"problem_info": json.dumps({"language_instruction": ["open", "it"]})}, "open it"),
    "letters": ({"problem_info": json.dumps({"language_instruction": [*"open it"]})}, "open it"),
    "inner quotes": (
        {"problem_info": json.dumps({"language_instruction": 'put it on the "plate" — 盘子'})},
        'put it on the "plate" — 盘子',
    ),
    "last word in quotes": (
        {"problem_info": json.dumps({"language_instruction": 'put it on the "plate"'})},
        'put it on the "plate"',
    ),
    "bytes": ({"problem_info": np.bytes_(b'{"language_instruction": "open it"}')}, "open it"),
    "bddl": ({"bddl_file_content": "(define (problem X)\n  (:language Open it)\n)"}, "Open it"),
    "blank, then bddl": (
        {"problem_info": json.dumps({"language_instruction": " "}), "bddl_file_content": "(:language a b)"},
        "a b",
    ),
    "the file's name": ({}, "turn on the stove"),
}


@pytest.mark.parametrize("kind", TOLD)
def test_where_the_instruction_is_found(kind: str, tmp_path: Path) -> None:
    attributes, text = TOLD[kind]
    with h5py.File(tmp_path / "KITCHEN_SCENE10_turn_on_the_stove_demo.hdf5", "w") as file:
        file.create_group("data").attrs.update(attributes)
        for key, array in vectors(4, 0, actions=7, **{"obs/ee_states": 6}).items():
            file[f"data/demo_0/{key}"] = array
    assert list(HDF5Reader(tmp_path).texts(TEXT, 0)) == [text]


def test_without_an_instruction_texts_are_empty_and_a_remark_says_so(tmp_path: Path) -> None:
    written = robomimic(tmp_path, told=False)
    reader = HDF5Reader(tmp_path)
    check(reader, written)
    assert reader.roles().text is None and TEXT not in reader.features
    assert any("no instruction" in line for line in reader.remarks)


@pytest.mark.parametrize("make", [aloha, robomimic])
def test_an_instruction_can_be_added_to_each_episode(make: Any, tmp_path: Path) -> None:
    written = make(tmp_path)
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        with h5py.File(path, "r+") as file:
            for group in file["data"].values() if "data" in file else [file]:
                group.attrs[TEXT] = f"open number {number}"
    reader = HDF5Reader(tmp_path)
    assert reader.roles().text == TEXT
    assert len({reader.texts(TEXT, episode)[0] for episode in range(len(written))}) == (
        1 if make is robomimic else len(written)
    )


def test_filters_are_named_with_the_episodes_to_choose(tmp_path: Path) -> None:
    robomimic(tmp_path)
    remarks = HDF5Reader(tmp_path).remarks
    assert any(line.endswith("mask/train names 3 episodes: sources.episodes=[0-2]") for line in remarks)
    assert any(line.endswith("mask/valid names 1 episodes: sources.episodes=[3]") for line in remarks)


def test_cameras_without_colours_are_passed_over(tmp_path: Path) -> None:
    robomimic(tmp_path)
    with h5py.File(tmp_path / "image.hdf5", "r+") as file:
        file["data/demo_0/obs/agentview_depth"] = np.zeros((6, *SIZE, 1), np.float32)
        file["data/demo_0/obs/reference"] = np.array([file.ref], h5py.ref_dtype)
    reader = HDF5Reader(tmp_path)
    assert any("passed over" in line and "agentview_depth" in line for line in reader.remarks)
    assert set(reader.roles().views) == {"obs/agentview_image", "obs/robot0_eye_in_hand_image"}


@pytest.mark.parametrize("steps", [[3], [0, 5], [5, 4, 0], [2, 2, 0, 2], [], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("kind", ["gzip", "aloha_jpeg", "aloha"])
def test_pictures_come_in_the_order_asked(kind: str, steps: list[int], tmp_path: Path) -> None:
    SETS[kind](tmp_path)
    reader = HDF5Reader(tmp_path)
    view, last = reader.roles().views[0], len(reader.lengths) - 1
    whole = reader.pictures(view, last, np.arange(reader.lengths[last]))
    wanted = np.array(steps, np.int64) % reader.lengths[last]
    assert np.array_equal(reader.pictures(view, last, wanted), whole[wanted])


def test_an_episode_of_200_frames_is_read_with_few_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    read = Array.read
    monkeypatch.setattr(Array, "read", lambda self, a, b: calls.append(b - a) or read(self, a, b))
    pictures = np.tile(smooth(20, 0, (128, 128)), (10, 1, 1, 1))
    for name, options in {
        "contiguous": {},
        "one": {"chunks": (1, 128, 128, 3)},
        "gzip": {"compression": "gzip", "compression_opts": 1},
    }.items():
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file["data/demo_0/actions"] = np.zeros((200, 7))
            file.create_dataset("data/demo_0/obs/agentview_rgb", data=pictures, **options)
        reader = HDF5Reader(tmp_path / f"{name}.hdf5")
        calls.clear()
        assert np.array_equal(reader.pictures("obs/agentview_rgb", 0, np.arange(200)), pictures)
        assert calls == [200], name
        calls.clear()
        reader.pictures("obs/agentview_rgb", 0, np.array([3, 150, 199]))
        assert len(calls) <= 3 and sum(calls) <= 60, name


def test_large_episodes_are_read_in_blocks_of_whole_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[tuple[int, int]] = []
    read = Array.read
    monkeypatch.setattr(Array, "read", lambda self, a, b: spans.append((a, b)) or read(self, a, b))
    monkeypatch.setattr(files, "BLOCK_BYTES", 10 * SIZE[0] * SIZE[1] * 3)
    pictures = smooth(40, 0)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.zeros((40, 7))
        file.create_dataset("data/demo_0/obs/agentview_rgb", data=pictures, chunks=(4, *SIZE, 3))
    reader = HDF5Reader(tmp_path / "a.hdf5")
    spans.clear()
    assert np.array_equal(reader.pictures("obs/agentview_rgb", 0, np.arange(1, 40)), pictures[1:])
    assert spans == [(1, 8), (8, 16), (16, 24), (24, 32), (32, 40)]


def test_pictures_as_texts_of_a_fixed_size_are_read(tmp_path: Path) -> None:
    pictures = smooth(3, 0)
    with h5py.File(tmp_path / "episode_0.hdf5", "w") as file:
        file["action"] = np.zeros((3, 14))
        file["observations/qpos"] = np.zeros((3, 14))
        file["observations/images/cam"] = np.array([encode(one, "PNG") for one in pictures], dtype="S")
    reader = HDF5Reader(tmp_path)
    assert np.array_equal(reader.pictures("observations/images/cam", 0, np.arange(3)), pictures)


def test_digests_tell_a_changed_picture(tmp_path: Path) -> None:
    aloha(tmp_path)
    view = "observations/images/cam_high"
    before = [HDF5Reader(tmp_path).picture_digest(view, episode) for episode in range(4)]
    with h5py.File(tmp_path / "episode_1.hdf5", "r+") as file:
        file[view][2, 100] ^= 1
    after = [HDF5Reader(tmp_path).picture_digest(view, episode) for episode in range(4)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    assert len(set(before)) == 4


def test_few_files_are_kept_open_and_threads_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_OPEN", 2)
    written = aloha(tmp_path, jpeg=False)
    reader = HDF5Reader(tmp_path)
    wrong: list[Any] = []

    def read_all(seed: int) -> None:
        for episode in np.random.default_rng(seed).integers(0, len(written), 15).tolist():
            for key in ("observations/images/cam_high", "observations/images/cam_left_wrist"):
                array = written[episode].arrays[key]
                if not np.array_equal(reader.pictures(key, episode, np.arange(len(array))), array):
                    wrong.append((episode, key))

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(os.listdir("/proc/self/fd")) < 200
    assert len(reader._files._own[2]._kept) <= 2


def test_forked_and_pickled_readers_open_their_own_files(tmp_path: Path) -> None:
    written = aloha(tmp_path, jpeg=False)
    reader = HDF5Reader(tmp_path)
    check(pickle.loads(pickle.dumps(reader)), written)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check(reader, written)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    check(reader, written)


def test_a_read_only_folder_and_file_are_enough(tmp_path: Path) -> None:
    written = robomimic(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with (tmp_path / "image.hdf5").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as a file system refuses that has no locks
        for path in tmp_path.iterdir():
            path.chmod(0o400)
        tmp_path.chmod(0o500)
        try:
            check(HDF5Reader(tmp_path), written)
        finally:
            tmp_path.chmod(0o700)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_this_process_has_opened_with_a_lock_is_read(tmp_path: Path) -> None:
    written = robomimic(tmp_path)
    with h5py.File(tmp_path / "image.hdf5", "r"):
        check(HDF5Reader(tmp_path), written)


def test_a_store_of_libero_is_upright_and_pairs_each_action_with_what_it_was_chosen_by(
    tmp_path: Path,
) -> None:
    written = libero(tmp_path)
    store = SourceConfig(path=tmp_path).open()
    assert isinstance(store, MappedStore) and store.spec.views == ("obs.agentview_rgb", "obs.eye_in_hand_rgb")
    row = 0
    for episode, one in zip(store.episodes, written, strict=True):
        here = slice(episode.start, episode.end)
        assert np.array_equal(store.actions[here], one.arrays["actions"][1:].astype(np.float32))
        state = np.concatenate([one.arrays["obs/ee_states"], one.arrays["obs/gripper_states"]], axis=1)
        assert np.array_equal(store.states[here], state[:-1].astype(np.float32))
        pictures = store.frames("obs.agentview_rgb", np.arange(episode.start, episode.end))
        assert np.array_equal(pictures, one.arrays["obs/agentview_rgb"][:-1, ::-1])
        assert episode.instruction == one.text
        row = episode.end
    assert row == len(store.states) and store.spec.state_units[0] == "m"
    whole = store.frames("obs.agentview_rgb", np.arange(row))
    for rows in (np.arange(row)[::-1], np.array([7, 3, 3, row - 1, 0])):
        assert np.array_equal(store.frames("obs.agentview_rgb", rows), whole[rows])


def test_a_format_is_found_by_the_names_of_files(tmp_path: Path) -> None:
    aloha(tmp_path)
    assert find_format(tmp_path).name == find_format(tmp_path / "episode_0.hdf5").name == "hdf5"
    store = find_format(tmp_path).open(
        tmp_path, Wanted(fps=50.0), [SourceConfig(path=tmp_path, labels={"text": False}).chosen], None
    )
    assert store.spec.fps == 50 and store.instructions == ("",)

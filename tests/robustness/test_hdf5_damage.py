"""Damaged and hostile HDF5 files: one message with file, key and cure; no traceback, hang or gigabytes."""

from __future__ import annotations

import io
import json
import os
import resource
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from fixtures.hdf5_sets import SIZE, aloha, encode, env_args, libero, padded, robomimic, smooth
from tutti.data.formats.hdf5.reader import HDF5Reader
from tutti.data.sources import SourceConfig
from tutti.errors import UserError

LONGEST_MESSAGE = 2500
MOST_BYTES = 400 * 2**20
"""How much more memory the process may have taken at any time than before."""
OBS = "data/demo_1/obs"
VIEW, STATE = f"{OBS}/agentview_image", f"{OBS}/robot0_eef_pos"


def read_everything(path: Path) -> None:
    reader = HDF5Reader(path)
    roles = reader.roles()
    for episode in range(len(reader.lengths)):
        for key in (*roles.state, *roles.action):
            reader.numbers(key, episode)
        for key in roles.views:
            reader.pictures(key, episode, np.arange(reader.lengths[episode]))
        reader.texts(roles.text or "", episode)


def refusal(path: Path) -> str:
    """The message for a set that must be refused, in bounded memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read_everything(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
    text = str(caught.value)
    assert len(text) < LONGEST_MESSAGE and path.name in text
    assert any(cure in text for cure in ("cure:", "Name an HDF5 file", "Correct the attribute"))
    return text


def instead(file: h5py.File, key: str, **options: Any) -> h5py.Dataset:
    """Another dataset in the place of one, of the same shape and type unless told otherwise."""
    old = file[key]
    options = {"shape": old.shape, "dtype": old.dtype} | options
    del file[key]
    return file.create_dataset(key, **options)


def external_link(file: h5py.File) -> None:
    del file[VIEW]
    file[VIEW] = h5py.ExternalLink("/etc/hostname", "/")


def soft_link(file: h5py.File) -> None:
    del file[VIEW]
    file[VIEW] = h5py.SoftLink(f"/{VIEW}")


def linked_episode(file: h5py.File) -> None:
    file["data/demo_1b"] = file["data/demo_1"]
    del file["data/demo_1"]
    file["data/demo_1"] = h5py.SoftLink("/data/demo_1b")


def virtual(file: h5py.File) -> None:
    shape, dtype = file[VIEW].shape, file[VIEW].dtype
    del file[VIEW]
    layout = h5py.VirtualLayout(shape=shape, dtype=dtype)
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", shape=shape, dtype=dtype)
    file.create_virtual_dataset(VIEW, layout)


def references(file: h5py.File) -> None:
    instead(file, STATE, dtype=h5py.ref_dtype)


def a_terabyte(file: h5py.File) -> None:
    instead(file, STATE, shape=(10**6, 10**6), dtype="u1", chunks=(1, 10**6))


def a_terabyte_of_actions(file: h5py.File) -> None:
    instead(file, "data/demo_1/actions", shape=(10**11, 7), chunks=(1000, 7), maxshape=(None, 7))


def a_terabyte_unchunked(file: h5py.File) -> None:
    instead(file, VIEW, shape=(7, 2**16, 2**16, 3))


def written_in_part(file: h5py.File) -> None:
    instead(file, VIEW, chunks=(1, *SIZE, 3))[:3] = 1


def huge_chunk(file: h5py.File) -> None:
    instead(file, VIEW, chunks=(10**6, *SIZE, 3), maxshape=(None, *SIZE, 3), compression=1)


def bomb(file: h5py.File) -> None:
    """A chunk of kilobytes that unpacks to many megabytes."""
    data = instead(file, VIEW, chunks=(7, *SIZE, 3), compression="gzip")
    data.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(30 * 2**20), 9))


def bomb_in_a_large_chunk(file: h5py.File) -> None:
    """The same where a chunk may be as large as what is packed."""
    for demo in (0, 1, 2, 10):
        length, key = file[f"data/demo_{demo}/actions"].shape[0], f"data/demo_{demo}/obs/agentview_image"
        shape, chunk = (length, 512, 512, 3), (7, 512, 512, 3)
        data = instead(file, key, shape=shape, maxshape=(None, *shape[1:]), chunks=chunk, compression="gzip")
        data[...] = np.ones(shape, np.uint8)
    file[VIEW].id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(80 * 2**20), 1))


def other_length(file: h5py.File) -> None:
    instead(file, VIEW, shape=(6, *SIZE, 3))[:] = 1


def other_size(file: h5py.File) -> None:
    instead(file, VIEW, shape=(7, 10, 10, 3))[:] = 1


def other_width(file: h5py.File) -> None:
    instead(file, STATE, shape=(7, 4))[:] = 1


def float_pictures(file: h5py.File) -> None:
    instead(file, VIEW, dtype="f4")[:] = 0.5


def texts_for_numbers(file: h5py.File) -> None:
    instead(file, STATE, dtype="S4")[:] = b"abc"


def long_texts_for_numbers(file: h5py.File) -> None:
    instead(file, STATE, dtype=h5py.string_dtype())[:] = "abc"


def compounds(file: h5py.File) -> None:
    instead(file, STATE, dtype=[("a", "f4"), ("b", "i4")])


def complex_numbers(file: h5py.File) -> None:
    instead(file, STATE, dtype="c16")[:] = 1


def scalar(file: h5py.File) -> None:
    instead(file, STATE, shape=(), dtype="f4")


def group_for_numbers(file: h5py.File) -> None:
    del file[STATE]
    file.create_group(STATE)


def missing_key(file: h5py.File) -> None:
    del file[STATE]


def missing_actions(file: h5py.File) -> None:
    del file["data/demo_1/actions"]


def no_steps(file: h5py.File) -> None:
    instead(file, "data/demo_1/actions", shape=(0, 7))


def no_episodes(file: h5py.File) -> None:
    del file["data"]
    file.create_group("data")


def number_for_env_args(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = 7


def list_for_env_args(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = json.dumps([1])


def no_json(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = "{"


def no_rate(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = env_args(control_freq="often")


def rate_of_nothing(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = env_args(control_freq=float("nan"))


def texts_in_a_list(file: h5py.File) -> None:
    file["data/demo_1"].attrs["ep_meta"] = ["{}", "{}"]


def no_utf8(file: h5py.File) -> None:
    file["data/demo_1"].attrs["ep_meta"] = np.bytes_(b'{"lang": "\xff"}')


HOSTILE: dict[Callable[[h5py.File], None], str] = {
    external_link: "a link to another file",
    soft_link: "a soft link",
    linked_episode: "a soft link",
    virtual: "takes them from other files",
    references: "references",
    a_terabyte: "never written",
    a_terabyte_of_actions: "at most 10,000,000 steps",
    a_terabyte_unchunked: "never written",
    written_in_part: "the others were never written",
    huge_chunk: "chunks of at most",
    bomb: "packed chunks of at most",
    bomb_in_a_large_chunk: "one that unpacks to more",
    other_length: "7 steps, as actions has",
    other_size: "as in the first episode",
    other_width: "as in the first episode",
    float_pictures: "as in the first episode",
    texts_for_numbers: "as in the first episode",
    long_texts_for_numbers: "arrays of numbers",
    compounds: "compounds",
    complex_numbers: "arrays of numbers",
    scalar: "arrays of numbers",
    group_for_numbers: "a group",
    missing_key: "is missing",
    missing_actions: "is missing",
    no_steps: "at least one step",
    no_episodes: "no episodes",
    number_for_env_args: "is no text",
    list_for_env_args: "expected an object",
    no_json: "not valid JSON",
    no_rate: "is no rate",
    rate_of_nothing: "is no rate",
    texts_in_a_list: "is no text",
    no_utf8: "utf-8",
}


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
def test_it_is_refused_by_one_message(spoil: Callable[[h5py.File], None], tmp_path: Path) -> None:
    robomimic(tmp_path)
    path = tmp_path / "image.hdf5"
    with h5py.File(path, "r+") as file:
        spoil(file)
    assert HOSTILE[spoil] in refusal(path)


def test_raw_data_in_another_file_is_refused(tmp_path: Path) -> None:
    robomimic(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(4096))
    with h5py.File(tmp_path / "image.hdf5", "r+") as file:
        instead(file, VIEW, external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])
    assert "takes them from other files" in refusal(tmp_path / "image.hdf5")


def test_a_filter_that_is_not_built_in_is_refused_and_no_plugin_is_loaded(tmp_path: Path) -> None:
    robomimic(tmp_path)
    path = tmp_path / "image.hdf5"
    with h5py.File(path, "r+") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((7, 3))
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())
        del file[STATE]
        kind, space = h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((7, 3))
        h5py.h5d.create(file.id, STATE.encode(), kind, space, plist).write(
            h5py.h5s.ALL, h5py.h5s.ALL, np.zeros((7, 3))
        )
    assert "filter 32001" in refusal(path)


def test_circles_and_deep_groups_beside_the_data_are_not_walked(tmp_path: Path) -> None:
    robomimic(tmp_path)
    with h5py.File(tmp_path / "image.hdf5", "r+") as file:
        file[f"{OBS}/again"] = file["data"]
        group = file[OBS]
        for _ in range(500):
            group = group.create_group("g")
    read_everything(tmp_path / "image.hdf5")


def broken_picture(content: bytes) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            rows = [encode(one) for one in smooth(5, 1)]
            del file["observations/images/cam_high"]
            file["observations/images/cam_high"] = padded([*rows[:2], content, *rows[3:]])

    return spoil


def encoded_as(mode: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, SIZE[::-1]).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {
    "cut": encode(smooth(1, 1)[0])[:300],
    "empty": b"",
    "no picture": b"text " * 50,
    "another size": encode(smooth(1, 1, (40, 40))[0]),
    "grey": encoded_as("L", "JPEG"),
    "gif": encoded_as("P", "GIF"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_damaged_picture_is_named_and_its_episode_can_be_left_out(kind: str, tmp_path: Path) -> None:
    aloha(tmp_path, episodes=(0, 1, 2))
    broken_picture(PICTURES[kind])(tmp_path / "episode_1.hdf5")
    source = {"path": tmp_path, "fps": 50, "labels": {"text": False}}
    store = SourceConfig(**source).open()
    with pytest.raises(UserError, match=r"(?s)episode_1.*cam_high at step 2 .*exclude=\[1\]"):
        store.frames(store.spec.views[0], np.arange(store.spec.num_frames))
    store = SourceConfig(**source, exclude=[1]).open()
    assert store.frames(store.spec.views[0], np.arange(store.spec.num_frames)).shape[0] == 4 + 6


def test_a_damaged_file_of_one_episode_can_be_left_out(tmp_path: Path) -> None:
    aloha(tmp_path, episodes=(0, 1, 2))
    path = tmp_path / "episode_0.hdf5"
    path.write_bytes(path.read_bytes()[:2000])
    source = {"path": tmp_path, "fps": 50, "labels": {"text": False}}
    with pytest.raises(UserError, match=r"(?s)episode_0.hdf5.*cannot be read.*sources.exclude=\[0\]"):
        SourceConfig(**source).open()
    assert [e.index for e in SourceConfig(**source, exclude=[0]).open().episodes] == [1, 2]


@pytest.mark.parametrize("name", ["KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", "open_it_demo.hdf5"])
def test_a_damaged_file_of_many_episodes_is_refused(name: str, tmp_path: Path) -> None:
    libero(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:5000])
    with pytest.raises(UserError, match=name):
        HDF5Reader(tmp_path)


def test_files_that_were_recorded_otherwise_are_not_mixed(tmp_path: Path) -> None:
    libero(tmp_path)
    with h5py.File(tmp_path / "open_it_demo.hdf5", "r+") as file:
        file["data"].attrs["env_args"] = env_args(control_freq=10)
    with pytest.raises(UserError, match=r"(?s)differs in fps.*expected: 20.*found:    10"):
        HDF5Reader(tmp_path)


@pytest.mark.parametrize("kind", ["empty", "text", "fifo", "folder", "missing", "other layout"])
def test_what_is_no_data_set_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "set.hdf5"
    match kind:
        case "empty" | "text":
            path.write_bytes(b"" if kind == "empty" else b"a text\n" * 100)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "other layout":
            with h5py.File(path, "w") as file:
                file["trajectory/actions"] = np.zeros(3)
    refusal(path)


def spoilt(content: bytes, seed: int) -> bytes:
    """Cut, or with some bytes of it changed: anywhere, where the file's structure lies, or in a row."""
    random, damaged = np.random.default_rng(seed), bytearray(content)
    if seed % 4 == 0:
        return bytes(damaged[: random.integers(0, len(content))])
    places = random.integers(0, len(content), random.integers(1, 20))
    if seed % 4 == 2:
        marks = [content.find(mark) for mark in (b"\x89HDF", b"TREE", b"SNOD", b"HEAP", b"GCOL")]
        places = marks[random.integers(0, 5)] + random.integers(0, 512, 6)
    elif seed % 4 == 3:
        places = places[0] + np.arange(random.integers(1, 64))
    for place in places.clip(0, len(content) - 1).tolist():
        damaged[place] = random.choice([0, 1, 127, 128, 255, random.integers(0, 256)])
    return bytes(damaged)


@pytest.mark.parametrize("kind", ["libero", "robomimic", "aloha"])
def test_random_damage_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    make = {"libero": libero, "robomimic": lambda path: robomimic(path, compression="gzip"), "aloha": aloha}
    make[kind](tmp_path)
    content = sorted(tmp_path.iterdir())[-1].read_bytes()
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for seed in range(40):
        path = tmp_path / "spoilt.hdf5"
        path.write_bytes(spoilt(content, seed))
        try:
            read_everything(path)
        except UserError as error:
            refused += 1
            assert len(str(error)) < LONGEST_MESSAGE and "spoilt.hdf5" in str(error), seed
    assert refused >= 15
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES

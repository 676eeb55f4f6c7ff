"""The frame cache: same bytes, whatever interrupts."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jaxtyping import Int64, UInt8
from test_data_loading import write_set

from fixtures.cache_builder import ROWS, SHARD, SIZE, MemoryStore
from tutti.data.cache import CacheConfig, building, cached_frames, decoding, resize_images
from tutti.data.sources import SourceConfig
from tutti.storage.files import exclusive_lock
from tutti.types import UserError


def test_pictures_of_the_right_size_are_cached_byte_for_byte(tmp_path: Path) -> None:
    store = MemoryStore(20, 8)
    frames = cached_frames(store, tmp_path, 8)
    np.testing.assert_array_equal(frames, store.pictures.transpose(1, 0, 4, 2, 3))
    with pytest.raises(ValueError, match="read-only"):
        frames[0] = 0


def test_an_interrupted_cache_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "SHARD_ROWS", 4)
    expected = cached_frames(MemoryStore(30, 8), tmp_path / "whole", 8)
    with pytest.raises(KeyboardInterrupt):
        cached_frames(MemoryStore(30, 8, fatal_row=17), tmp_path / "cut", 8)
    asked: list[int] = []
    frames = cached_frames(
        MemoryStore(30, 8, fatal_row=3), tmp_path / "cut", 8, lambda done, _: asked.append(done)
    )
    assert asked == [20, 24, 28, 30]  # rows 0 to 15 were kept: row 3 would have been fatal
    np.testing.assert_array_equal(frames, expected)
    assert len(cached_frames(MemoryStore(30, 8, fatal_row=0), tmp_path / "cut", 8)) == 30


def test_large_pictures_are_decoded_few_at_a_time_and_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore(30, 16)
    expected = cached_frames(store, tmp_path / "at once", 8)
    asked: list[int] = []

    def frames(view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        asked.append(len(rows))
        return MemoryStore.frames(store, view, rows)

    monkeypatch.setattr(store, "frames", frames)
    monkeypatch.setattr(decoding, "SHARD_BYTES", 4 * 3 * 16**2)
    np.testing.assert_array_equal(cached_frames(store, tmp_path / "in parts", 8), expected)
    assert max(asked) == 4 and sum(asked) == 30 * len(store.spec.views)


def test_a_changed_data_set_or_size_gets_its_own_cache(tmp_path: Path) -> None:
    store = MemoryStore(20, 8)
    for size in (8, 16):
        assert cached_frames(store, tmp_path, size).shape[-1] == size
    store.fingerprint = "changed"
    cached_frames(store, tmp_path, 8)
    assert len(list(tmp_path.glob("*/frames.u8"))) == 3


def test_of_a_source_only_the_episodes_that_are_used_take_room(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", lengths=(5, 6, 7))
    frames = [
        cached_frames(SourceConfig(path=folder, exclude=exclude).open(), tmp_path / "cache", 8)
        for exclude in ((), (1,))
    ]
    np.testing.assert_array_equal(frames[1], np.delete(frames[0], np.arange(5, 11), axis=0))
    sizes = [file.stat().st_size for file in (tmp_path / "cache").glob("*/frames.u8")]
    assert sorted(sizes) == [12 * 2 * 3 * 64, 18 * 2 * 3 * 64]


def test_a_full_disk_is_found_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said = (
        r"frame cache, the disk is full[\s\S]*needed: 0\.4 MiB[\s\S]*cure:.*data\.cache\.folder.*image_size"
    )
    store = MemoryStore(1000, 8, fatal_row=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(UserError, match=said):
            cached_frames(store, tmp_path, 8)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000 * 2 * 3 * 64 - 4097))
    with pytest.raises(UserError, match=said):
        cached_frames(store, tmp_path, 8)
    assert all(file.stat().st_blocks == 0 for file in tmp_path.glob("*/frames.partial"))


def test_size_room_time_and_place_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(building, "SHARD_ROWS", 4)
    clock = iter((0.0, 360.0))
    monkeypatch.setattr(building.time, "monotonic", lambda: next(clock))
    caplog.set_level("INFO", "tutti")
    for _ in range(2):
        cached_frames(MemoryStore(44, 8), tmp_path, 8)
    (line,) = caplog.messages
    assert line.startswith(f"frame cache: 0.0 MiB for 88 pictures of 8 px in {tmp_path}/8px-")
    assert " free), decoded in about 1:00:00; data.cache.folder chooses another folder" in line


def test_the_time_of_a_folder_is_that_of_its_last_use(tmp_path: Path) -> None:
    cached_frames(MemoryStore(20, 8), tmp_path, 8)
    (home,) = tmp_path.iterdir()
    os.utime(home, (1, 1))
    cached_frames(MemoryStore(20, 8), tmp_path, 8)
    assert home.stat().st_mtime > 1
    assert sorted(path.name for path in home.iterdir()) == [".lock", "complete.json", "frames.u8"]


@pytest.mark.parametrize("damage", ["cut", "no marker", "no pictures"])
def test_what_is_not_complete_is_built_anew(tmp_path: Path, damage: str) -> None:
    expected = cached_frames(MemoryStore(20, 8), tmp_path, 8).copy()
    (home,) = tmp_path.iterdir()
    if damage == "cut":
        os.truncate(home / "frames.u8", 100)
    else:
        (home / {"no marker": "complete.json", "no pictures": "frames.u8"}[damage]).unlink()
    np.testing.assert_array_equal(cached_frames(MemoryStore(20, 8), tmp_path, 8), expected)


def start_builder(home: Path, fatal_row: int = -1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fixtures.cache_builder", str(home), str(fatal_row)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def digest(frames: UInt8[np.ndarray, "n v 3 s s"]) -> str:
    return hashlib.sha256(frames.tobytes()).hexdigest()


def test_of_three_processes_one_builds_and_one_that_is_killed_is_carried_on(tmp_path: Path) -> None:
    """The first is killed in its fifth shard, while the others wait; the next one goes on there."""
    killed = start_builder(tmp_path, fatal_row=4 * SHARD)
    while not (tmp_path / "decoded").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    others = [start_builder(tmp_path), start_builder(tmp_path)]
    for one in others:
        assert one.stdout is not None
        assert one.stdout.readline().endswith("another process is decoding these pictures; waiting for it\n")
    (tmp_path / "go").touch()
    assert killed.wait() == -signal.SIGKILL
    said = [one.communicate()[0].splitlines() for one in others]
    expected = digest(cached_frames(MemoryStore(ROWS, SIZE), tmp_path / "alone", SIZE))
    assert [lines[-1] for lines in said] == [expected, expected]
    assert sorted(len(lines) for lines in said) == [1, 2], "one of them said what it builds, and where"
    decoded = [int(row) for row in (tmp_path / "decoded").read_text().splitlines()]
    assert decoded == sorted([*range(0, ROWS, SHARD), 4 * SHARD]), "nothing but the shard of the kill twice"


def test_three_processes_without_locks_each_build_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system without locks: three that begin at the same time, one of which is stopped."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    begun = threading.Barrier(3)

    class Together(MemoryStore):
        def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
            if view == "left":
                begun.wait(60)
            return super().frames(view, rows)

    def build(fatal_row: int) -> str:
        try:
            return digest(cached_frames(Together(20, 8, fatal_row), tmp_path, 8))
        except KeyboardInterrupt:
            return "stopped"

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(build, (-1, 3, -1)))
    expected = digest(cached_frames(MemoryStore(20, 8), tmp_path / "alone", 8))
    assert found == [expected, "stopped", expected]
    (home,) = tmp_path.glob("8px-*")
    assert sorted(path.name for path in home.iterdir()) == [".lock", "complete.json", "frames.u8"]


def test_a_folder_that_is_deleted_while_another_waits_is_made_again(tmp_path: Path) -> None:
    """The lock of a deleted file says nothing; the one that waited takes the lock of the new file."""
    home, waits = tmp_path / "home", threading.Event()
    home.mkdir()

    def wait() -> bool:
        with exclusive_lock(home, waiting=waits.set):
            with pytest.raises(UserError, match="busy"), exclusive_lock(home, "busy"):
                pass
            return True

    with ThreadPoolExecutor(1) as pool:
        with exclusive_lock(home):
            waited = pool.submit(wait)
            waits.wait(60)
            shutil.rmtree(home)
        assert waited.result(60)


def test_the_folder_is_the_users_or_follows_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TUTTI_CACHE", "XDG_CACHE_HOME", "NOWHERE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert CacheConfig().home() == Path("/home/me/.cache/tutti")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert CacheConfig().home() == Path("/home/me/.cache/tutti")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert CacheConfig().home() == Path("/fast/tutti")
    monkeypatch.setenv("TUTTI_CACHE", "~/pictures")
    assert CacheConfig().home() == Path("/home/me/pictures")
    assert CacheConfig(folder=Path("$XDG_CACHE_HOME/${HOME}x/~")).home() == Path("/fast//home/mex/~")
    assert CacheConfig.model_validate({"folder": "auto"}).folder == "auto"
    with pytest.raises(ValueError, match=r"\$NOWHERE/a: \$NOWHERE is not set"):
        CacheConfig(folder=Path("$NOWHERE/a"))


def test_a_complete_cache_is_used_where_nothing_can_be_written_and_a_new_one_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digest(cached_frames(MemoryStore(20, 8), tmp_path, 8))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for module, name in ((os, "utime"), (os, "replace"), (os, "open"), (Path, "mkdir")):
        monkeypatch.setattr(module, name, denied)
    assert digest(cached_frames(MemoryStore(20, 8), tmp_path, 8)) == expected
    with pytest.raises(UserError, match=r"cannot write the frame cache \(data\.cache\.folder\) \(Permission"):
        cached_frames(MemoryStore(21, 8), tmp_path, 8)


def test_resizing_averages_and_keeps_the_whole_picture() -> None:
    image = np.zeros((1, 16, 32, 3), dtype=np.uint8)
    image[:, :, 16:] = 200
    small = resize_images(image, 8)
    assert small.shape == (1, 3, 8, 8)
    assert (small[..., 0] == 0).all() and (small[..., 7] == 200).all()
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    assert resize_images(noise, 8).std() < 0.3 * noise.std()  # antialiased, not subsampled

"""The frame cache: same bytes, whatever interrupts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Int64, UInt8

from tutti.data import cache as cache_module
from tutti.data.cache import cached_frames, resize_images
from tutti.data.episodes import EpisodeStore, StoreSpec
from tutti.types import UserError


class MemoryStore(EpisodeStore):
    """Random pictures; dies when asked for `fatal_row`."""

    def __init__(self, num_frames: int, size: int, fatal_row: int = -1) -> None:
        self.name, self.fingerprint, self.fatal_row = "memory", f"{num_frames}-{size}", fatal_row
        random = np.random.default_rng(0)
        self.pictures = random.integers(0, 256, (2, num_frames, size, size, 3), dtype=np.uint8)
        self.spec = StoreSpec(
            views=("left", "right"),
            image_shapes=((size, size), (size, size)),
            state_dim=1,
            action_dim=1,
            fps=10.0,
            num_frames=num_frames,
            embodiment="none",
        )

    def frames(self, view: str, rows: Int64[np.ndarray, " k"]) -> UInt8[np.ndarray, "k h w 3"]:
        if self.fatal_row in rows:
            raise KeyboardInterrupt
        return self.pictures[self.spec.views.index(view)][rows]


def test_pictures_of_the_right_size_are_cached_byte_for_byte(tmp_path: Path) -> None:
    store = MemoryStore(20, 8)
    frames = cached_frames(store, tmp_path, 8)
    np.testing.assert_array_equal(frames, store.pictures.transpose(1, 0, 4, 2, 3))
    with pytest.raises(ValueError, match="read-only"):
        frames[0] = 0


def test_an_interrupted_cache_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_SHARD_BYTES", 4 * 2 * 3 * 8 * 8)  # four rows
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


def test_a_changed_data_set_or_size_gets_its_own_cache(tmp_path: Path) -> None:
    store = MemoryStore(20, 8)
    for size in (8, 16):
        assert cached_frames(store, tmp_path, size).shape[-1] == size
    store.fingerprint = "changed"
    cached_frames(store, tmp_path, 8)
    assert len(list(tmp_path.glob("*/frames.u8"))) == 3


def test_a_full_disk_is_found_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = MemoryStore(1000, 8, fatal_row=0)
    with pytest.raises(UserError, match=r"frame cache, the disk is full[\s\S]*needed: 0\.4 MiB[\s\S]*cure"):
        cached_frames(store, tmp_path, 8)


def test_resizing_averages_and_keeps_the_whole_picture() -> None:
    image = np.zeros((1, 16, 32, 3), dtype=np.uint8)
    image[:, :, 16:] = 200
    small = resize_images(image, 8)
    assert small.shape == (1, 3, 8, 8)
    assert (small[..., 0] == 0).all() and (small[..., 7] == 200).all()
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    assert resize_images(noise, 8).std() < 0.3 * noise.std()  # antialiased, not subsampled

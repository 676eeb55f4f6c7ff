"""Several sources: their names, weights by size, and what a batch says of them, whoever makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fixtures import squares_data as world
from tutti.config.run_config import build_config
from tutti.data.bundle import DataBundle
from tutti.data.config import DataConfig
from tutti.data.sources.config import SourceConfig, names_of
from tutti.distributed.ranks import Ranks
from tutti.runs.data_check import check_path
from tutti.runs.label_shares import mixture_lines
from tutti.types import Batch, DataNeeds, UserError

SIZES = (16, 4)
"""Episodes of the two sets, of 12 steps each."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("sets")
    sets = enumerate(zip(("large", "small"), SIZES, strict=True))
    return [world.write(home / name, world.episodes(size, seed)) for seed, (name, size) in sets]


def values(folders: list[Path], *sources: dict[str, Any], **data: Any) -> dict[str, Any]:
    given = sources or ({"weight": "auto"}, {"weight": "auto"})
    named = [{"path": str(path), **one} for path, one in zip(folders, given, strict=True)]
    rest = {"horizon": 4, "batch_size": 8, "image_size": world.SIZE, "validation_fraction": 0}
    return {**rest, "sources": named, "cache": {"folder": str(folders[0].parent / "cache")}, **data}


def built(folders: list[Path], *sources: dict[str, Any], **data: Any) -> DataBundle:
    return DataConfig.model_validate(values(folders, *sources, **data)).build(DataNeeds())


def source_of(batch: Batch) -> list[int]:
    assert batch.source is not None and (batch.source.sum(dim=1) == 1).all()
    return batch.source.int().argmax(dim=1).tolist()


@pytest.mark.parametrize(("temperature", "shares"), [(1.0, (0.8, 0.2)), (2.0, (2 / 3, 1 / 3))])
def test_auto_is_a_power_of_the_number_of_windows(
    folders: list[Path], temperature: float, shares: tuple[float, float]
) -> None:
    data = built(folders, mixture={"temperature": temperature})
    assert [share.windows for share in data.shares] == [12 * size for size in SIZES]
    assert [share.weight for share in data.shares] == pytest.approx(
        [(12 * size) ** (1 / temperature) for size in SIZES]
    )
    assert [share.share for share in data.shares] == pytest.approx(shares)
    rows = [row for number in range(90) for row in source_of(data.train.batch_at(number))]
    assert np.mean(rows) == pytest.approx(shares[1], abs=0.01)  # three epochs of 240
    described = data.describe()["mixture"]
    assert [one["name"] for one in described] == ["large", "small"]


def test_the_order_is_the_same_for_any_number_of_ranks_and_with_a_thread(folders: list[Path]) -> None:
    whole, ahead = built(folders, prefetch=0), built(folders, prefetch=3)
    assert ahead.source_names == ("large", "small")
    batches = [next(whole.train) for _ in range(40)]
    parts: list[DataBundle] = [built(folders) for _ in range(4)]
    for rank, part in enumerate(parts):
        part.train.share(Ranks(rank, 4))
    seen = np.zeros(2)
    for number, batch in enumerate(batches):
        threaded, ranked = next(ahead.train), [part.train.batch_at(number) for part in parts]
        assert torch.equal(batch.window, threaded.window)
        assert torch.equal(batch.window, torch.cat([one.window for one in ranked]))
        assert source_of(batch) == [one for part in ranked for one in source_of(part)]
        assert source_of(batch) == (batch.window >= 12 * SIZES[0]).int().tolist()
        seen += np.bincount(source_of(batch), minlength=2)
        for data in (whole, ahead):  # a function of the position, however many batches are ahead
            epochs = data.epochs({"consumed": number + 1})
            assert epochs == pytest.approx(tuple(seen / [share.windows for share in data.shares]))
    for data in (whole, ahead):
        data.train.close()


def test_one_source_changes_nothing(folders: list[Path]) -> None:
    data = built(folders[:1], {})
    assert next(data.train).source is None and "mixture" not in data.describe()
    data.train.close()


def test_sources_of_one_folder_are_told_apart(folders: list[Path]) -> None:
    twice = [folders[0], folders[0]]
    data = built(twice, {"episodes": ["0-3"]}, {"episodes": ["4-15"], "name": "rest"})
    assert data.source_names == ("large", "rest")
    batch = data.windows.gather(data.training_rows)
    assert source_of(batch) == [0] * 48 + [1] * 144


def test_shares_of_composed_batches(folders: list[Path]) -> None:
    videos: dict[str, Any] = {"labels": {"actions": False}}
    data = built(folders, {}, videos, mixture={"labelled": 0.75})
    assert [share.share for share in data.shares] == [0.75, 0.25]
    assert data.epochs({"consumed": 16}) == (96 / 192, 32 / 48)
    alone = built(folders, {}, videos, mixture={"labelled": 1.0})
    assert [share.share for share in alone.shares] == [1.0, 0.0]
    assert alone.epochs({"consumed": 24}) == (1.0, 0.0)


def test_names_are_the_folders_made_unique(tmp_path: Path) -> None:
    places = ["a/set", "b/set", "set-2", "bridge/1.0.0", "my set", "c/set"]
    sources = [SourceConfig.model_validate({"path": str(tmp_path / place)}) for place in places]
    sources[2] = sources[2].model_copy(update={"name": "set-2"})
    assert names_of(sources) == ["set", "set-3", "set-2", "bridge", "my-set", "set-4"]


@pytest.mark.parametrize(
    ("sources", "data", "words"),
    [
        (({"name": "a b"}, {}), {}, r"sources\.0\.name: expected 1 to 64 .*'a b'"),
        (({"name": "a/b"}, {}), {}, r"sources\.0\.name: expected 1 to 64 .*'a/b'"),
        (({"name": "a"}, {"name": "a"}), {}, "'a' is given twice"),
        (({"weight": "auto"}, {"weight": 2.0}), {}, r"sources\.0\.weight is auto, sources\.1\.weight 2"),
        (({"weight": "size"}, {}), {}, r"sources\.0\.weight"),
        (({}, {}), {"mixture": {"temperature": 5}}, "no source has weight: auto"),
        (({"weight": "auto"}, {"weight": "auto"}), {"mixture": {"temperature": 0.5}}, "temperature"),
    ],
)
def test_what_cannot_be_is_one_error(
    folders: list[Path], sources: tuple[dict[str, Any], ...], data: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        build_config({"data": values(folders, *sources, **data)}, "mine.yaml", [])


def test_a_line_for_each_source_before_training_and_by_the_check(folders: list[Path], tmp_path: Path) -> None:
    asked = {"data": values(folders), "training": {"steps": 120}}
    config = build_config(asked, "mine.yaml", [])
    lines = mixture_lines(config, config.data.build(DataNeeds()).shares)
    assert lines == [
        "source 0, large: 192 windows to train on, weight 13.8564 (auto: windows^(1/2)), 66.7 % of a batch, "
        "3.33 epochs in 120 steps",
        "source 1, small: 48 windows to train on, weight 6.9282 (auto: windows^(1/2)), 33.3 % of a batch, "
        "6.67 epochs in 120 steps",
    ]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(asked))
    checked = check_path(str(tmp_path / "mine.yaml"))
    assert list(checked.mixture) == lines and checked.to_dict()["mixture"] == lines
    assert check_path(str(folders[0])).mixture == []

"""Remote data sets: fetched once, whole or not at all; what is wrong is said in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest

from fixtures import squares_data
from tutti.data.sources import SourceConfig
from tutti.storage import remote
from tutti.types import UserError

URL = "memory://bucket/sets/squares"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TUTTI_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    squares_data.write(tmp_path / "squares", squares_data.episodes(2))
    system.put(str(tmp_path / "squares"), "/bucket/sets/squares", recursive=True)
    yield system
    system.store.clear()


def test_a_set_is_fetched_once_and_is_the_one_that_lies_there(store: Any, tmp_path: Path) -> None:
    source = SourceConfig.model_validate({"path": URL})
    assert source.url == URL and source.folder_name == "squares"
    assert SourceConfig.model_validate(source.model_dump(mode="json")) == source
    # A config that was written on another machine is of this one's folder of caches.
    said = {**source.model_dump(mode="json"), "path": "/home/somebody/.cache/tutti/squares"}
    assert SourceConfig.model_validate(said) == source
    assert not source.path.exists()  # a config alone fetches nothing
    assert source.rate() == 10
    here = SourceConfig(path=tmp_path / "squares").open()
    assert source.open().fingerprint == here.fingerprint
    store.store.clear()  # without network from now on
    assert source.open().fingerprint == here.fingerprint
    one = SourceConfig.model_validate({"path": f"{URL}/meta/info.json"})
    with pytest.raises(UserError, match=r"info\.json: there is no file there.*\n.*\n.*data\.sources\.path"):
        one.fetch()


def test_a_file_of_another_size_is_not_kept_and_the_next_call_fetches_only_what_lacks(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, get, asked = SourceConfig.model_validate({"path": URL}), store.get_file, list[str]()

    def cut(path: str, target: str, **more: Any) -> None:
        asked.append(path)
        get(path, target, **more)
        if path.endswith("info.json") and asked.count(path) == 1:
            file = Path(target)
            file.write_bytes(file.read_bytes()[:-1])

    monkeypatch.setattr(type(store), "get_file", lambda self, path, target, **more: cut(path, target, **more))
    with pytest.raises(UserError, match=r"info\.json: came with another size.*\n.*bytes\n.*found"):
        source.fetch()
    assert not [path for path in source.path.rglob("*") if path.name in ("info.json", ".partial-info.json")]
    first = len(asked)
    source.fetch()
    total = len(store.find("/bucket/sets/squares"))
    assert len(asked) == total + 1 and len(set(asked[first:])) == total - first + 1
    # A copy that lost a file is mended; a changed file of the store is not looked for.
    (source.path / "meta" / "info.json").unlink()
    source.fetch()
    assert (source.path / "meta" / "info.json").is_file()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://bucket/set", r"s3fs for s3:// is not installed.*\n.*tutti-vla\[remote\]"),
        ("nonsense://bucket/set", r"nonsense.*\n  expected: a URL of s3://"),
    ],
)
def test_a_scheme_without_its_package_is_named(
    url: str, why: str, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if url.startswith("s3"):

        def absent(url: str) -> None:
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec, "url_to_fs", absent)
    with pytest.raises(UserError, match=why):
        SourceConfig.model_validate({"path": url}).fetch()
    assert remote.is_url(url) and not remote.is_url("/data/set") and not remote.is_url("C:/x")

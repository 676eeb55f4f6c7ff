"""The formats that Tutti reads, and which of them a path is in: by the names of files alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tutti.data import formats
from tutti.data.episodes import EpisodeStore
from tutti.data.formats.chosen import Chosen
from tutti.data.formats.errors import data_error
from tutti.data.formats.hdf5.paths import recognises_hdf5
from tutti.data.formats.interface import EpisodeReader
from tutti.data.formats.lerobot import source as lerobot
from tutti.data.formats.mapped import MappedStore
from tutti.data.formats.picture_text.paths import recognises_pairs
from tutti.data.formats.rlds import source as rlds
from tutti.data.formats.wanted import Found, Wanted
from tutti.data.formats.zarr.stores import recognises_zarr
from tutti.errors import UserError, near_miss

LOOKED_AT, SHOWN = 2000, 8
"""Names of files that are looked at below a folder, and named in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format: its name in `sources.format`, what it is in a line that says what makes a path one of it, and
    how it is recognised (the reason, "" if it is not), looked into, and opened. `rate` is the one that a set
    stores, None where it stores none; whatever is wrong with an episode is no matter for it. What is opened
    may keep an index below the last argument, the folder of caches. `is_pairs`: it has pictures with texts,
    and no robot."""

    name: str
    what: str
    recognises: Callable[[Path], str]
    rate: Callable[[Path], float | None]
    look: Callable[[Path], Found]
    open: Callable[[Path, Wanted, Sequence[Chosen], Path | None], EpisodeStore]
    has_splits: bool = False
    is_pairs: bool = False


def mapped(
    name: str,
    what: str,
    recognises: Callable[[Path], str],
    read: Callable[[Path, str | None], EpisodeReader],
    **more: Any,
) -> Format:
    """The format of a reader of a path and the split that a source names; `more` are other fields."""
    own = dict[str, Any](
        rate=lambda path: read(path, None).fps,
        look=lambda path: Found.by(read(path, None)),
        open=lambda path, wanted, chosen, home: MappedStore(
            read(path, wanted.split), wanted, chosen, name, path=path, home=home
        ),
    )
    return Format(name=name, what=what, recognises=recognises, **own | more)


FORMATS: tuple[Format, ...] = (
    Format(
        name=lerobot.NAME,
        what="a LeRobotDataset: a folder with meta/info.json",
        recognises=lerobot.recognises,
        rate=lerobot.rate,
        look=lerobot.look,
        open=lerobot.open_source,
    ),
    mapped(
        "hdf5",
        "HDF5 of LIBERO, robomimic or ALOHA: a file, or a folder of *.hdf5 or *.h5",
        recognises_hdf5,
        lambda path, _: formats.HDF5Reader(path),  # with the HDF5 library, for those who have such a set
    ),
    mapped(
        "rlds",
        "an RLDS data set: a TFDS version folder with features.json, or the folder above it",
        rlds.recognises,
        rlds.read,
        rate=rlds.rate,
        has_splits=True,
    ),
    mapped(
        "zarr",
        "a Zarr replay buffer of diffusion policy or UMI: a folder with .zgroup, or a *.zarr.zip",
        recognises_zarr,
        lambda path, _: formats.ZarrReader(path),
        rate=lambda _: None,
    ),
    mapped(
        "picture_text",
        "picture-text pairs: a file or a folder of *.jsonl beside pictures, *.parquet, or *.tar (WebDataset)",
        recognises_pairs,
        lambda path, _: formats.PairsReader(path),
        rate=lambda _: None,
        is_pairs=True,
    ),
)
"""In the order in which a path is tried."""

_CONVERT = "convert it to a LeRobotDataset or to HDF5 (docs/how-to/own-data.md lists the formats)."
_TFRECORD = "prepare it with file_format=tfrecord."
KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"(policy_out|obs_dict|agent_data)\.pkl$",
        "raw BridgeData, whose numbers are Python pickles, which can run code; Tutti never unpickles",
        "take its RLDS copy, bridge_dataset of Open X-Embodiment.",
    ),
    (r"\.riegeli(-|$)", "a TFDS data set in Riegeli files", _TFRECORD),
    (r"\.array_record(-|$)", "a TFDS data set in ArrayRecord files", _TFRECORD),
    (
        r"\.tfrecord(-|$)",
        "TFRecord files without features.json beside them",
        "copy the whole version folder.",
    ),
    (r"\.(mcap|bag|db3)$", "a recording of ROS (MCAP, bag), whose topics have clocks of their own", _CONVERT),
    (r"\.zarr(\.zip)?$", "a folder with Zarr stores", "name the store itself (sources.path)."),
    (r"\.lance$", "a Lance data set", _CONVERT),
    (
        r"\.(tar\.(gz|bz2|xz|zst)|tgz)$",
        "a packed tar, whose members cannot be reached one by one",
        "unpack it to a plain .tar (gunzip).",
    ),
    (r"\.(pkl|pickle|pt|pth)$", "Python pickles, which can run code; Tutti never unpickles", _CONVERT),
    (r"\.(hdf5|h5)$", "HDF5 files in folders below it", "name the folder in which they lie (sources.path)."),
    (r"\.(npz|npy)$", "NumPy files", _CONVERT),
    (r"\.(mp4|avi|mkv|webm)$", "videos without a table of their episodes", _CONVERT),
)
"""What is no format of Tutti, by a pattern of its files' names; what it is; and a way out."""


def find_format(path: Path, named: str = "auto") -> Format:
    """The format of a path: the one that is `named`, else the first that recognises it.

    Raises: UserError that says what is missing, what was looked for, and what it is instead.
    """
    check_there(path)
    if named != "auto":
        return next(one for one in FORMATS if one.name == named)
    for one in FORMATS:
        if one.recognises(path):
            return one
    raise UserError(_unknown(path))


def check_there(path: Path) -> None:
    """Raises: UserError where there is nothing at the path, with a near miss."""
    if re.match(r"\w+:/", str(path)):
        raise data_error(
            f"{path}: it is an address, and Tutti reads local files alone.",
            cure="download the data set, and name the folder (sources.path).",
        )
    if not path.exists():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        hint = near_miss(path.name, [one.name for one in islice(beside, LOOKED_AT)])
        problem = f"{path}: there is no such file or folder.{hint}"
        raise data_error(problem, cure="correct the path (sources.path).")


def _unknown(path: Path) -> str:
    """The message for what no format recognises."""
    below = path.rglob("*") if path.is_dir() else [path]
    names = sorted({one.name for one in islice(below, LOOKED_AT)})
    known = next(
        ((what, cure) for pattern, what, cure in KNOWN if any(re.search(pattern, one) for one in names)), None
    )
    inside = sorted(one for one in path.iterdir() if one.is_dir()) if path.is_dir() else []
    sets = [one.name for one in islice(inside, LOOKED_AT) if any(f.recognises(one) for f in FORMATS)]
    problem = f"it is {known[0]}" if known else "it is in no format that Tutti reads"
    cure = known[1] if known else f"name the folder or file of a data set (sources.path), or {_CONVERT}"
    if sets:
        problem = f"it is no data set itself, but holds {len(sets)}"
        cure = f"name one of them: {', '.join(sets[:SHOWN])}{', ...' * (len(sets) > SHOWN)}."
    found = ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
    looked = [f"    {one.name}: {one.what}" for one in FORMATS]
    lines = [f"{path}: {problem}.", "  looked for:", *looked]
    return "\n".join([*lines, f"  found:    {found or 'nothing'}", f"  cure:     {cure}"])

"""Spoils data sets of every format, and configs of several robots, and counts what Tutti makes of them.

    python benchmarks/damaged_formats.py           # 2,002 inputs, 10 minutes; its table: benchmarks/results
    python benchmarks/damaged_formats.py --inputs 35 --output /tmp/damaged

Each rule draws its damage by a seed and says beforehand whether it must be refused; where nobody can know (a
bit of a picture) either will do. A training's data are then built, and batches read, in a process that is
measured. Wanted: no traceback, no more than a screen, and a message that names the file, the source or the
key. Exit code 1 if not.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import hostile_forms as forms
import numpy as np
from bounded_process import BoundedProcess, Outcome, command_line, kind_of

from tutti.config.run_config import build_config
from tutti.nested_dicts import merge
from tutti.runs.build import build_data
from tutti.runs.terminal import quiet

TESTS = Path(__file__).resolve().parents[1] / "tests"
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**30, float("nan"), "", "x", "9" * 99, "\x1b[31m", [], [1], {}, {"a": 1}),
    *(["x"] * 50, [[]], "0-", "3-1", "-0.4s", "1e999s"),
)
"""Values of another type, or out of range."""


BYTES = ("cut", "bit", "zeros", "empty", "doubled")


@dataclass
class Case:
    """Sound sets in `home`, the dice, a config of them, and what is known beforehand."""

    line: str
    home: Path
    random: random.Random
    config: dict[str, Any]
    note: str = ""
    must_refuse: bool = False
    named: tuple[str, ...] = field(default=())
    """Words of which a message must have one."""

    def only(self, *sources: str) -> None:
        """The config names the dot and these sources alone."""
        kept = [one for one in self.config["data"]["sources"] if one["name"] in ("dot", *sources)]
        self.config["data"]["sources"] = kept

    def source(self, name: str) -> dict[str, Any]:
        return next(one for one in self.config["data"]["sources"] if one["name"] == name)


def read(request: dict[str, Any]) -> int:
    """Builds the data of a config for the run in a folder, and reads two batches and those held out."""
    config = build_config(request["config"], "the case")
    with quiet(True):  # standard output is for the answer
        data = build_data(config, Path(request["run"]), config.objective.needs(), Path(request["run"]))
    for batch in (*(data.train.batch_at(number) for number in range(2)), *data.validation):
        assert bool(batch.actions.isfinite().all()) and bool(batch.observation.state.isfinite().all())
    return len(data.training_rows)


def spoil_bytes(case: Case, path: Path) -> str:
    """Cuts a file, or changes, adds or takes some bytes; gives what was done."""
    content, how = (
        bytearray(path.read_bytes()),
        case.random.choice(("cut", "bit", "zeros", "empty", "doubled")),
    )
    place = case.random.randrange(max(1, len(content)))
    if how == "bit":
        content[place] ^= 1 << case.random.randrange(8)
    elif how == "zeros":
        content[place : place + 64] = bytes(64)
    else:
        content = {"cut": content[:place], "empty": bytearray(), "doubled": content * 2}[how]
    path.write_bytes(content)
    return f"{path.name}: {how} at {place}"


def rlds(case: Case) -> None:
    """Records, whose sums tell of any change, and the descriptions of features and splits."""
    case.only("rlds")
    folder = case.home / "rlds" / "1.0.0"
    case.named = ("rlds",)
    if case.random.random() < 0.5:
        records = case.random.choice(sorted(folder.glob("*train*")))
        case.note = spoil_bytes(case, records)
        case.must_refuse = " bit" in case.note
        return
    path = folder / case.random.choice(("features.json", "dataset_info.json"))
    values = json.loads(path.read_text())
    place = case.random.choice([one for one in _places(values) if one])
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = case.random.choice(ODD)
    path.write_text(json.dumps(values))
    case.note = f"{path.name}: {'.'.join(map(str, place))[:60]} = {str(inner[place[-1]])[:20]!r}"


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(one for key, inner in below for one in _places(inner, (*path, key)))]


def hdf5(case: Case) -> None:
    """Arrays that are missing, of another length, size, type, or not finite; attributes; bytes."""
    case.only("panda")
    path = case.home / "panda" / "demos.hdf5"
    case.named = ("demos.hdf5", "panda")
    how = case.random.choice(("bytes", "missing", "short", "nan", "type", "attribute", "wide", "link"))
    if how == "bytes":
        case.note = spoil_bytes(case, path)
        return
    with h5py.File(path, "r+") as file:
        demo: Any = file[f"data/demo_{case.random.randrange(8)}"]
        key = case.random.choice(("actions", "obs/robot0_eef_pos", "obs/agentview_image"))
        old = demo[key][()]
        new: dict[str, Any] = {
            "short": old[: case.random.randrange(len(old))],
            "nan": np.where(np.arange(old.size).reshape(old.shape) == 7, np.nan, old),
            "type": np.array([b"x"] * len(old)),
            "wide": np.concatenate([old, old], axis=-1),
        }
        if how == "attribute":
            key = case.random.choice(("num_samples", "ep_meta"))
            demo.attrs[key] = case.random.choice(("{", "[1]", "\x1b[2J", "x" * 5000, '{"lang": 3}'))
        else:
            del demo[key]
        if how == "link":
            demo[key] = h5py.ExternalLink(str(case.home / "outside.hdf5"), "/secret")
        elif how in new:
            demo[key] = new[how]
        case.must_refuse = how in ("missing", "short", "nan", "type", "wide", "link")
        case.note = f"{demo.name}/{key}: {how}"


def zarr(case: Case) -> None:
    """Descriptions of arrays, ends of episodes, chunks."""
    case.only("watched")
    store = case.home / "watched"
    case.named = ("watched",)
    how = case.random.choice(("chunk", "described", "ends"))
    if how == "chunk":
        files = [one for one in sorted((store / "data").rglob("*")) if one.is_file()]
        case.note = spoil_bytes(case, case.random.choice(files))
        return
    from fixtures import zarr_sets

    if how == "ends":
        ends = case.random.choice(([12, 5, 72], [12, 24, 500], [], [-3, 72], [12, 12, 72], [10**15]))
        shutil.rmtree(store / "meta" / "episode_ends")
        zarr_sets.write_array(store / "meta" / "episode_ends", np.array(ends, np.int64), 7)
        case.note, case.must_refuse = f"episode_ends: {ends}", True
        return
    path = store / "data" / case.random.choice(("state", "camera_0")) / ".zarray"
    values = json.loads(path.read_text())
    key = case.random.choice(sorted(values))
    values[key] = case.random.choice(ODD)
    path.write_text(json.dumps(values))
    case.note = f"{path.parent.name}/.zarray: {key} = {str(values[key])[:20]!r}"


def pairs(case: Case) -> None:
    """Archives and lists of pictures with texts."""
    layout = case.random.choice(("tar", "lines", "parquet"))
    case.only(layout)
    case.named = (layout,)
    files = [one for one in sorted((case.home / layout).rglob("*")) if one.is_file()]
    path = case.random.choice(
        files if layout != "lines" else [*files, *[case.home / "lines/pairs.jsonl"] * 9]
    )
    if path.suffix == ".jsonl" and case.random.random() < 0.7:
        odd = case.random.choice(
            [
                b"{\n",
                b"\xff\n",
                b'{"file_name": "../../x.png", "text": "a"}\n',
                b'{"text": "a"}\n',
                b"[" * 10**5,
            ]
        )
        path.write_bytes(path.read_bytes() + odd)
        case.note, case.must_refuse = f"pairs.jsonl: {odd[:30]!r}", True
    else:
        case.note = spoil_bytes(case, path)


KEYS = (
    *(
        "embodiment",
        "views",
        "weight",
        "name",
        "labels",
        "state",
        "action",
        "fps",
        "resample",
        "split",
        "slots",
    ),
    *("conventions", "episodes", "text", "lag", "flip"),
)


def robots(case: Case) -> None:
    """Configs of several robots that do not fit together, or say what is not there."""
    case.only("panda", "watched", "tar")
    wrong: dict[str, Callable[[], Any]] = {
        "one robot of two sizes": lambda: case.source("panda").update(embodiment="dot"),
        "a view twice": lambda: case.source("panda").update(views={"front": "obs/agentview_image", "x": "y"}),
        "no such camera": lambda: case.source("watched").update(views={"front": "camera_9"}),
        "actions that are none": lambda: case.source("watched").update(
            labels={"actions": True}, action="none"
        ),
        "a set of no robot alone": lambda: case.config["data"].update(sources=[case.source("tar")]),
        "two names alike": lambda: case.source("panda").update(name="dot"),
        "another rate": lambda: case.source("watched").update(fps=7),
        "a resampled pair": lambda: case.source("tar").update(resample=5),
        "slots without canonical": lambda: case.source("dot").update(slots={"action": {"base": 0}}),
        "a gripper that is not told": lambda: (
            case.config["data"].update(slots="canonical"),
            case.source("dot").update(slots={"action": {"gripper": 2}}),
        ),
        "a dimension that is not there": lambda: (
            case.config["data"].update(slots="canonical"),
            case.source("dot").update(slots={"state": {"position": "1-3"}}),
        ),
        "relative actions of two": lambda: case.config["data"].update(canonical={"actions": "relative"}),
    }
    if case.random.random() < 0.6:
        name = case.random.choice(sorted(wrong))
        wrong[name]()
        case.note, case.must_refuse, case.named = name, True, ("sources", "data.")
        return
    key, value = case.random.choice(KEYS), case.random.choice(ODD)
    case.source(case.random.choice(("dot", "panda", "watched", "tar")))[key] = value
    case.note, case.named = f"sources.{key} = {str(value)[:30]!r}", (key, "sources")


def frame_cache(case: Case) -> None:
    """What a run keeps of the choice of its frame cache."""
    case.only("panda")
    path = case.home / "run" / "frame_cache.json"
    path.parent.mkdir()
    case.named = ("frame_cache.json",)
    case.config["data"]["cache"]["kind"] = "auto"
    if case.random.random() < 0.5:
        form = case.random.choice(sorted(forms.JSON))
        path.write_bytes(forms.JSON[form])
        case.note = form
    else:
        values = {"kind": case.random.choice(ODD), "why": case.random.choice(ODD)}
        path.write_text(json.dumps(values))
        case.note = str(values)[:60]
    case.must_refuse = True


def keys(case: Case) -> None:
    """History, horizon, canonical forms, mixture and cache of another type or out of range."""
    case.only("panda")
    places = (
        *("history", "horizon", "slots", "canonical", "canonical.rotation", "canonical.actions", "mixture"),
        *("mixture.temperature", "mixture.labelled", "cache.kind", "image_size", "tasks", "normalization"),
    )
    key, value = case.random.choice(places), case.random.choice(ODD)
    outer, _, inner = key.partition(".")
    case.config["data"][outer] = {inner: value} if inner else value
    case.note, case.named = f"data.{key} = {str(value)[:30]!r}", (outer, "data")


Rule = Callable[[Case], None]
Sound = tuple[Path, dict[str, Any]]
LINES: dict[str, Rule] = {
    "RLDS": rlds,
    "HDF5": hdf5,
    "Zarr": zarr,
    "picture-text": pairs,
    "robots": robots,
    "frame_cache.json": frame_cache,
    "keys": keys,
}


def write_sound(home: Path) -> dict[str, Any]:
    """A set of each format in `home`, and a config of all; paths are below {home}."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from fixtures import format_sets, pair_sets, squares_data

    squares_data.write(home / "dot", squares_data.episodes(6))
    format_sets.write_robomimic(home / "panda" / "demos.hdf5", squares_data.episodes(8, 1))
    format_sets.write_zarr(home / "watched", squares_data.episodes(6, 2))
    shutil.copytree(format_sets.RLDS, home / "rlds")
    for layout in ("tar", "lines", "parquet"):
        pair_sets.write(home / layout, layout)
    front = squares_data.VIEWS[0]
    robot: list[dict[str, Any]] = [
        {"path": "dot", "views": {"front": front}},
        {"path": "panda", "views": {"front": format_sets.FRONT}, "embodiment": "panda"},
        {"path": "watched", "views": {"front": "camera_0"}, "fps": 10, "text": {"say": "look"}}
        | {"labels": {"actions": False}, "embodiment": "watched"},
        {"path": "rlds", "fps": 10, "embodiment": "tiny", "labels": {"text": "where_present"}},
        *({"path": layout} for layout in ("tar", "lines", "parquet")),
    ]
    data = {"horizon": 4, "batch_size": 8, "image_size": 16, "validation_fraction": 0.25, "prefetch": 0}
    return {
        "data": data | {"sources": [one | {"name": one["path"]} for one in robot]},
        "objective": {"align": None, "recon": None, "state": {"offsets": [1]}},
        "evaluation": {"suite": "none"},
    }


def untouched(case: Case) -> None:
    """The sound set that the line is called after."""
    case.only(case.line)


def outcome(line: str, number: int, rule: Rule, sound: Sound, reader: BoundedProcess) -> Outcome:
    """Spoils copies of the sound sets, has them read, and judges what is said."""
    work = sound[0].parent
    home = work / "case"
    shutil.copytree(sound[0], home)
    config = copy.deepcopy(sound[1])
    for source in config["data"]["sources"]:
        source["path"] = str(home / source["path"])
    config = merge(config, {"data": {"cache": {"folder": str(work / "cache")}}})
    case = Case(line, home, random.Random(f"{line} {number}"), config)
    rule(case)
    said = reader.ask({"config": case.config, "run": str(home / "run")})
    judged = "refused: " + case.note if case.must_refuse else "either"
    kind = kind_of(said, judged, lambda answer: answer > 0)
    message = said.get("refused") or said.get("traceback") or ""
    if kind == "too strict":
        kind = "refused"
    if kind == "refused" and not any(name in message for name in case.named):
        kind = "unclear"
    shutil.rmtree(home)
    return Outcome(line, number, case.note, judged, kind, message, said["seconds"], said["megabytes"])


def outcomes_of(inputs: int) -> list[Outcome]:
    """So many spoilt inputs, as many of each line."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        sound = work / "sound", write_sound(work / "sound")
        reader = BoundedProcess(__file__)
        for source in sound[1]["data"]["sources"][1:]:  # or nothing below tells anything
            said = outcome(source["name"], 0, untouched, sound, reader)
            assert said.kind == "taken", said
        for number in range(-(-inputs // len(LINES))):
            outcomes += [outcome(line, number, rule, sound, reader) for line, rule in LINES.items()]
        reader.close()
    return outcomes


if __name__ == "__main__":
    sys.exit(command_line(__doc__, "damaged_formats", 2002, read, outcomes_of))

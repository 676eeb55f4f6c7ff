"""The rules of benchmarks/hostile_folders.py: each spoils a copy of a sound folder, by its number alone."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostile_forms as forms
import numpy as np
import torch
import yaml
from hostile_world import SECRET, STEP
from safetensors.torch import load_file, save_file

from tutti.storage.manifest import size_of

WEIGHTS = ("model.safetensors", "ema.safetensors", "objective.safetensors", "objective_ema.safetensors")
TEXTS = ("spec.json", "normalizer.json", "tokenizer.json", "config.yaml")
SAVED = ("optimizer.pt", "rng.pt")
IN_CHECKPOINT = (*WEIGHTS, *TEXTS, *SAVED, "state.json")
IN_EXPORT = ("model.safetensors", *TEXTS, "export.json")
JSON_OF_RUN = (
    *("stages.json", "summary.json", "model.json", "data.json", "data_content.json", "recording.json"),
    *("evaluation/results.json", "evaluation/open_loop.json", "probes/probes.json"),
    *("evaluation/videos/index.json", "failures/step-000003/failure.json", "checkpoints/best.json"),
    "init_from.json",
)
OTHERS_OF_RUN = (
    *("config.yaml", "records.jsonl", "first_batch.png", "shapes.txt", "probes/occlusion.png", ".lock"),
    *("failures/step-000003/batches.pt", "failures/step-000003/weights.pt", "evaluation/videos/reach-0.mp4"),
    *("report.html", "tensorboard"),
)
IN_STUDY = (
    "plan.json",
    "study.yaml",
    "costs.json",
    "cells/end_to_end/result.json",
    "cells",
    "cells/end_to_end",
)
RUN, CHECKPOINT, EXPORT, STUDY = "run", "checkpoint", "export", "study"


@dataclass
class Case:
    """A copy of the sound world in `home`, the dice, and what is known about it beforehand."""

    home: Path
    outside: Path
    canary: Path
    random: random.Random
    target: str = RUN
    note: str = ""
    refused_by: tuple[str, ...] = ()
    """Commands that must not accept it, whatever comes out."""
    free: bool = field(default=False)
    """Whether another result may come out: the change is one of values that nobody can know to be wrong."""

    @property
    def folder(self) -> Path:
        return {
            RUN: self.home / "run",
            CHECKPOINT: self.home / "run" / "checkpoints" / STEP,
            EXPORT: self.home / "export",
            STUDY: self.home / "study",
        }[self.target]

    def place(self, target: str, name: str, note: str) -> Path:
        """A file of the folder that is spoilt; its parents are there."""
        self.target, self.note = target, f"{target}/{name}: {note}"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def any_file(self, *, special: bool = True) -> tuple[str, str]:
        """A folder and one of the files in it."""
        everything = [
            *((CHECKPOINT, name) for name in IN_CHECKPOINT),
            *((EXPORT, name) for name in IN_EXPORT),
            *((RUN, name) for name in (*JSON_OF_RUN, *(OTHERS_OF_RUN if special else ()))),
            *((STUDY, name) for name in IN_STUDY[: None if special else 4]),
        ]
        return self.random.choice(everything)

    def list_again(self, path: Path) -> None:
        """Makes the manifest fit the file, as a stranger would who wants it to be read."""
        kind = {"crc32": "state.json", "sha256": "export.json"}
        for checksum, name in kind.items():
            manifest = self.folder / name
            if manifest.is_file() and path.name != name and path.is_file():
                table = json.loads(manifest.read_text())
                table["files"][str(path.relative_to(self.folder))] = size_of(path.read_bytes(), checksum)  # type: ignore[arg-type]
                manifest.write_text(json.dumps(table))


Rule = Callable[[Case], None]
READS_WEIGHTS = ("load", "export", "evaluate", "probe")


def pickles(case: Case) -> None:
    """A pickle in every place that could hold one."""
    target, name = case.random.choice(
        [
            *((CHECKPOINT, name) for name in (*IN_CHECKPOINT, "shards/.metadata", "shards/index.json")),
            *((EXPORT, name) for name in (*IN_EXPORT, "shards/.metadata")),
            *((RUN, name) for name in (*JSON_OF_RUN, *OTHERS_OF_RUN[:-2])),
            *((STUDY, name) for name in IN_STUDY[:4]),
        ]
    )
    protocol = case.random.randrange(-2, 6)
    content = (
        pickle.dumps(forms.Evil(case.canary), protocol=protocol)
        if protocol >= 0
        else forms.evil_archive(case.canary, zipped=protocol == -1)
    )
    path = case.place(target, name, f"a pickle ({protocol})")
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    case.list_again(path)


CLASS_KEYS = (
    *("model.action", "model.vision", "objective.action", "objective.mine", "objective.state", "balancing"),
    *("backward", "strategy", "training.optimizer"),
)
CLASSES = (
    *("canary_module:Evil", "canary_module.inner:Evil", "..canary_module:Evil", ".:Evil", "os:system"),
    *("builtins:exec", "canary_module:Evil\n", "/tmp/x.py:Evil", "tutti.cli.app:app", "x" * 5000 + ":Y"),
    *("\x1b[31mcanary_module:Evil", "canary_module:__import__", "importlib:import_module"),
)


def classes(case: Case) -> None:
    """A class of a stranger's named in a config, a manifest or a study."""
    target, name = case.random.choice(
        [(CHECKPOINT, "config.yaml"), (RUN, "config.yaml"), (EXPORT, "config.yaml"), (RUN, "stages.json")]
    )
    key, kind = case.random.choice(CLASS_KEYS), case.random.choice(CLASSES)
    path = case.place(target, name, f"{key}.kind {kind[:40]!r}")
    if name == "stages.json":
        book = json.loads(path.read_text())
        book["train"]["inputs"] |= {key.split(".")[0]: {key.split(".")[-1]: {"kind": kind}}}
        path.write_text(json.dumps(book))
    else:
        forms.edit_yaml(path, key, {"kind": kind})
        case.list_again(path)
    case.free = target != CHECKPOINT


def flipped_bits(case: Case) -> None:
    """A single bit of a file of weights or state."""
    target, name = case.random.choice(
        [*((CHECKPOINT, name) for name in (*WEIGHTS, *SAVED)), *[(EXPORT, WEIGHTS[0])] * 4]
    )
    path = case.place(target, name, "a bit")
    content = bytearray(path.read_bytes())
    place = case.random.randrange(len(content))
    content[place] ^= 1 << case.random.randrange(8)
    path.write_bytes(content)
    case.note += f" of byte {place}"
    if target == EXPORT:
        case.refused_by = ("load",)
    elif name == "ema.safetensors":
        case.refused_by = READS_WEIGHTS
    else:
        case.refused_by = ("train", "replay")


def missing(case: Case) -> None:
    """A listed file is missing, empty, cut or doubled."""
    target, name = case.random.choice(
        [*((CHECKPOINT, name) for name in IN_CHECKPOINT), *((EXPORT, name) for name in IN_EXPORT)]
    )
    how = case.random.choice(("missing", "empty", "cut", "doubled", "renamed"))
    path = case.place(target, name, how)
    content = path.read_bytes()
    if how in ("missing", "renamed"):
        path.unlink()
    if how == "renamed":
        path.with_name(name + ".bak").write_bytes(content)
    elif how != "missing":
        size = case.random.randrange(len(content)) if how == "cut" else 0
        path.write_bytes(content * 2 if how == "doubled" else content[:size])
    manifest = name in ("state.json", "export.json")
    case.refused_by = ("load",) if target == EXPORT else ("train", *READS_WEIGHTS)
    if manifest and how == "doubled":
        case.note += ", which is no JSON"


NAMES = (
    *(
        "../outside.txt",
        "/etc/hostname",
        "a\nb",
        "\x1b[2J",
        "..",
        ".",
        "",
        "a/b",
        "shards/../../x",
        "a" * 5000,
    ),
    *(
        "shards/rank-00000.safetensors",
        "extra.safetensors",
        "model.safetensors.bak",
        "config.yaml\0",
        "\udcff",
    ),
)


def extra_files(case: Case) -> None:
    """Files that nobody expects, and names in a manifest that are none."""
    target = case.random.choice((CHECKPOINT, EXPORT))
    manifest = "state.json" if target == CHECKPOINT else "export.json"
    how = case.random.choice(("listed", "listed", "there", "shards", "both manifests"))
    if how == "listed":
        path, name = case.place(target, manifest, "lists "), case.random.choice(NAMES)
        case.note += repr(name[:40])
        table = json.loads(path.read_text())
        table["files"][name] = size_of(b"", "crc32" if target == CHECKPOINT else "sha256")
        path.write_text(json.dumps(table))
        case.refused_by = READS_WEIGHTS if target == CHECKPOINT else ("load",)
    elif how == "shards":
        path = case.place(target, "shards/rank-00000.safetensors", "added")
        path.write_bytes(case.random.randbytes(100))
        (path.parent / ".metadata").write_bytes(forms.evil_pickle(case.canary))
        case.refused_by = ("load",) if target == EXPORT else ()
    elif how == "there":
        name = case.random.choice(
            ("ema.safetensors.bak", "notes.txt", "a\nb", "\x1b[2J", "model.pt", "x" * 255)
        )
        case.place(target, name, "added").write_bytes(forms.evil_archive(case.canary))
    else:
        other = "export.json" if target == CHECKPOINT else "state.json"
        case.place(target, other, "added").write_text(case.random.choice(("{}", "[]", '{"files": {}}')))


def not_finite(case: Case) -> None:
    """NaN or infinity among the weights or the statistics, checksums made to fit."""
    target = case.random.choice((CHECKPOINT, CHECKPOINT, EXPORT))
    value = case.random.choice((np.nan, np.inf, -np.inf))
    readers = ("load",) if target == EXPORT else READS_WEIGHTS
    if case.random.random() < 0.5:
        name = "model.safetensors" if target == EXPORT else case.random.choice(WEIGHTS[:2])
        path = case.place(target, name, f"a weight is {value}")
        tensors = {key: one.clone() for key, one in load_file(path).items()}
        key = case.random.choice([key for key, one in tensors.items() if one.is_floating_point()])
        tensors[key].view(-1)[case.random.randrange(tensors[key].numel())] = value
        save_file(tensors, path)
        case.refused_by = readers if target == EXPORT or name == WEIGHTS[1] else ("train",)
    else:
        path = case.place(target, "normalizer.json", f"a number is {value}")
        _change_a_number(path, case.random, value)
        case.refused_by = readers
    case.list_again(path)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(one for key, item in below for one in _places(item, (*path, key)))]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _replace(
    path: Path, dice: random.Random, make: Callable[[Any], Any], wanted: Callable[[Any], bool]
) -> str:
    """Replaces a value of a JSON file that is `wanted`; gives its place."""
    values = json.loads(path.read_text())
    places = [place for place in _places(values) if wanted(_at(values, place))]
    if not places:
        path.write_text(json.dumps(make(values)))
        return "all"
    place = dice.choice(places)
    if place:
        _at(values, place[:-1])[place[-1]] = make(_at(values, place))
    path.write_text(json.dumps(values if place else make(values)))
    return ".".join(map(str, place))[:60]


def _change_a_number(path: Path, dice: random.Random, value: float) -> None:
    _replace(path, dice, lambda _: value, lambda old: type(old) is float)


SIZES = (2**31, 2**62, 10**12, 10**30, -1, 0, 1e308, True)


def sizes(case: Case) -> None:
    """Absurd sizes in what a checkpoint says of its data, its model and its tokenizer."""
    target = case.random.choice((CHECKPOINT, CHECKPOINT, EXPORT))
    name = case.random.choice(("spec.json", "tokenizer.json", "config.yaml", "normalizer.json"))
    path = case.place(target, name, "")
    size = case.random.choice(SIZES)
    if name == "config.yaml":
        key = case.random.choice(
            [
                *("model.vision.width", "model.vision.depth", "model.language.width", "model.fusion.depth"),
                *("model.action.hidden", "model.vision.mlp_ratio", "model.language.num_tokens"),
                *("model.vision.heads", "model.fusion.heads"),
            ]
        )
        forms.edit_yaml(path, key, size)
        case.note += f"{key} = {size}"
    else:
        where = _replace(path, case.random, lambda _: size, lambda old: type(old) in (int, float))
        case.note += f"{where} = {size}"
        case.free = name == "normalizer.json"
    case.list_again(path)


def yaml_forms(case: Case) -> None:
    """Aliases, deep nesting, tags, controls and other odd texts in place of a config."""
    target, name = case.random.choice(
        [(CHECKPOINT, "config.yaml"), (EXPORT, "config.yaml"), (RUN, "config.yaml"), (STUDY, "study.yaml")]
    )
    form = case.random.choice(sorted(forms.YAML))
    path = case.place(target, name, form)
    path.write_text(forms.YAML[form])
    case.list_again(path)
    readers = {CHECKPOINT: READS_WEIGHTS, EXPORT: ("load",), RUN: ("evaluate", "probe", "replay")}
    case.refused_by = readers.get(target, ())  # the study that is reported is the user's own file


def encodings(case: Case) -> None:
    """Bytes that are no UTF-8, in files of text."""
    target, name = case.any_file(special=False)
    if name.endswith((".safetensors", ".pt")):
        target, name = RUN, "records.jsonl"
    path = case.place(target, name, "")
    content = path.read_bytes() if path.is_file() else b"{}"
    how = case.random.choice(("utf-16", "invalid", "zeros", "latin", "surrogate", "mark"))
    place = case.random.randrange(len(content) + 1)
    odd = {"invalid": b"\xff\xfe", "zeros": b"\0", "latin": b"\xe9", "surrogate": b"\xed\xa0\x80"}
    if how == "utf-16":
        content = content.decode("utf-8", "replace").encode("utf-16")
    elif how == "mark":
        content = b"\xef\xbb\xbf" + content
    else:
        content = content[:place] + odd[how] + content[place:]
    path.write_bytes(content)
    case.note += how
    case.list_again(path)
    case.free = True  # a byte more between two values, or in a text


def no_plain_files(case: Case) -> None:
    """A FIFO, /dev/zero, a folder, a loop of links, a socket or 50 GB in the place of any file."""
    target, name = case.any_file()
    how = case.random.choice(sorted(forms.SPECIAL))
    path = case.place(target, name, how)
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name("moved"))
    forms.SPECIAL[how](path)
    case.free = True  # results that are written anew


def links_outside(case: Case) -> None:
    """A link to a file of the user's own in the place of any file."""
    target, name = case.any_file()
    path = case.place(target, name, "a link to a secret")
    secret = case.outside / f"secret{path.suffix}"
    if path.is_dir():
        path.rename(path.with_name("moved"))
        secret = case.outside
    elif path.suffix in (".safetensors", ".pt", ".png") and path.is_file():
        secret.write_bytes(path.read_bytes())  # it would do what the file did
    else:
        secret.write_bytes(SECRET)
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    case.free = True


OTHER_TYPES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        "",
        "text",
        [],
        {},
        [1],
        {"a": 1},
        [[]],
        "\x1b[31m",
        "\udcff",
        "</script>",
    ),
    *(10**30, 1e308, float("nan"), ["x"] * 50, {"files": []}),
)


def other_types(case: Case) -> None:
    """A value of state.json, stages.json or another JSON file is of another type, or gone."""
    target, name = case.random.choice(
        [
            *[(CHECKPOINT, "state.json")] * 4,
            *[(RUN, "stages.json")] * 3,
            *[(EXPORT, "export.json")] * 2,
            *((CHECKPOINT, name) for name in TEXTS[:3]),
            *[(STUDY, name) for name in ("plan.json", "cells/end_to_end/result.json")] * 2,
        ]
    )
    path = case.place(target, name, "")
    other = case.random.choice(OTHER_TYPES)
    where = _replace(path, case.random, lambda _: other, lambda _: True)
    case.note += f"{where} = {str(other)[:30]!r}"
    case.list_again(path)
    case.free = name not in ("state.json", "export.json")


def empty_json(case: Case) -> None:
    """A JSON file that is empty, torn, or of another form."""
    target, name = case.any_file(special=False)
    while not name.endswith(".json"):
        target, name = case.any_file(special=False)
    form = case.random.choice(sorted(forms.JSON))
    path = case.place(target, name, form)
    path.write_bytes(forms.JSON[form])
    case.list_again(path)
    case.free = True


LINES = (
    *(b"\xff\xfe\n", b"\0" * 100, b"{", b'{"step": 1e999}\n', b"[" * 10**5 + b"\n", b"x" * 2**21 + b"\n"),
    *(
        b'{"step": "x", "loss/total": 1}\n',
        b'{"step": -5, "loss/total": 1}\n',
        b'{"step": 9007199254740993}\n',
    ),
    *(b'{"step": 3, "step": 4}\n', b'{"step": 3, "loss/\\u001b[31m": 1}\n', b'{"step": 3, "</script>": 1}\n'),
    *(b'{"step": 3, "' + b"n" * 10**5 + b'": 1}\n', b'{"step": NaN, "loss/total": NaN}\n', b"\r\r\r\n"),
)


def torn_records(case: Case) -> None:
    """records.jsonl torn, binary, or with odd lines."""
    path = case.place(RUN, "records.jsonl", "")
    lines, odd = path.read_bytes().splitlines(keepends=True), case.random.choice(LINES)
    place = case.random.randrange(len(lines) + 1)
    content = b"".join([*lines[:place], odd, *lines[place:]])
    if case.random.random() < 0.3:
        content = content[: case.random.randrange(len(content))]
        case.note += "cut, "
    path.write_bytes(content)
    case.note += f"line {place} {odd[:30]!r}"
    case.free = True


POISON = (
    *("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>'),
    *("javascript:alert(1)", "\x1b[2J\x1b]0;title\x07", "a\nb", "\x9b31m", "\u202egnp.exe", "{{ 7*7 }}"),
    *("[red]text[/red]", "[/]", "&lt;script&gt;", "x" * 20_000, "data:text/html,<script>alert(1)</script>"),
    *("'onmouseover='alert(1)", "../../../etc/passwd", "\udcff\ud800"),
)


def poisoned_texts(case: Case) -> None:
    """HTML, scripts and escape sequences in the texts that the report and the tables show."""
    name = case.random.choice((*JSON_OF_RUN[:11], "config.yaml", "records.jsonl"))
    study = case.random.random() < 0.25
    poison = case.random.choice(POISON)
    if study:
        path = case.place(STUDY, case.random.choice(("plan.json", "cells/end_to_end/result.json")), "")
    else:
        path = case.place(RUN, name, "")
    if name == "config.yaml" and not study:
        values = yaml.safe_load(path.read_text())
        values["name"] = poison
        path.write_text(yaml.safe_dump(values))
    elif name == "records.jsonl" and not study:
        with path.open("a") as file:
            file.write(json.dumps({"step": 9, f"metric/{poison}": 1.0, f"diag/share/{poison}/x": 0.5}) + "\n")
    elif case.random.random() < 0.5:
        where = _replace(path, case.random, lambda _: poison, lambda old: isinstance(old, str))
        case.note += where
    else:
        _replace(path, case.random, lambda old: {**old, poison: next(iter(old.values()), 1)}, _has_entries)
        case.note += "a key"
    case.note += f" {poison[:30]!r}"
    case.free = True


def _has_entries(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


FOLDERS = (
    *(
        "step-000009\n",
        "step-\x1b[31m",
        "step-" + "9" * 30,
        "step-٣",
        "step--1",
        "step-000004",
        "step-",
        "step-1e3",
    ),
    *(
        ".partial-step-000004",
        "step-000002.bak",
        "damaged-step-000002",
        "step-000008 copy",
        "step-" + "9" * 200,
    ),
)


def odd_names(case: Case) -> None:
    """Folders and files with odd names beside the checkpoints, saved steps, probes and videos."""
    home = case.random.choice(
        ("checkpoints", "failures", "spikes", "probes", "evaluation/videos", "evaluation", ".")
    )
    name = case.random.choice(FOLDERS)
    path = case.place(RUN, f"{home}/{name}", "")
    case.note = f"{RUN}/{home}/{name[:30]!r}"
    source = {"checkpoints": f"checkpoints/{STEP}", "failures": "failures/step-000003"}.get(home)
    path.mkdir(parents=True)
    for file in (case.folder / source).iterdir() if source else ():
        (path / file.name).write_bytes(file.read_bytes())
    case.free = True


def tensorboard_files(case: Case) -> None:
    """Things in the folder of TensorBoard's files, to which a resumed training writes."""
    path = case.place(RUN, "tensorboard", "")
    how = case.random.choice(("file", "link", "pickle", "binary", "fifo", "names", "dangling", "huge"))
    case.note += how
    event = path / f"events.out.tfevents.{case.random.randrange(10**10)}.x.1.0"
    moved = path.with_name("moved")
    if how in ("file", "link", "dangling"):
        path.rename(moved)
        if how == "file":
            path.write_bytes(b"x")
        else:
            path.symlink_to(case.outside / "sub" if how == "link" else case.outside / "nothing")
    elif how == "pickle":
        event.write_bytes(forms.evil_pickle(case.canary))
    elif how == "binary":
        event.write_bytes(case.random.randbytes(1000))
    elif how == "fifo":
        os.mkfifo(event)
    elif how == "names":
        (path / "events.out.tfevents.\x1b[31m\n").write_bytes(struct.pack("<Q", 2**60))
    else:
        event.write_bytes(struct.pack("<QI", 2**60, 0) + b"x" * 100)
    case.free = True


def other_states(case: Case) -> None:
    """Tensors and plain values of another form in optimizer.pt, rng.pt or a saved step, checksums fitting."""
    target, name = case.random.choice(
        [
            *((CHECKPOINT, name) for name in SAVED * 2),
            *((RUN, f"failures/step-000003/{name}") for name in ("batches.pt", "weights.pt")),
        ]
    )
    path = case.place(target, name, "")
    values = torch.load(path, weights_only=True)
    places = [place for place in _places(values) if place]
    place, other = case.random.choice(places), case.random.choice((*OTHER_TYPES[:14], torch.zeros(3), 10**30))
    _at(values, place[:-1])[place[-1]] = other
    torch.save(values, path)
    case.note += f"{'.'.join(map(str, place))[:60]} = {str(other)[:30]!r}"
    case.list_again(path)
    case.free = True


RULES: dict[str, Rule] = {
    "pickles": pickles,
    "classes": classes,
    "flipped bits": flipped_bits,
    "missing files": missing,
    "extra files": extra_files,
    "not finite": not_finite,
    "sizes": sizes,
    "YAML": yaml_forms,
    "encodings": encodings,
    "no plain files": no_plain_files,
    "links outside": links_outside,
    "other types": other_types,
    "empty JSON": empty_json,
    "records": torn_records,
    "poisoned texts": poisoned_texts,
    "odd names": odd_names,
    "TensorBoard": tensorboard_files,
    "other states": other_states,
}

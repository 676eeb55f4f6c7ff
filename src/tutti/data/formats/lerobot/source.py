"""LeRobotDataset as one of the formats: how it is recognised, what is in it, and how a source opens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tutti.data.conventions.config import ConventionsConfig
from tutti.data.episodes import WHERE_PRESENT, EpisodeStore, StoreSpec, Vector, bounds_of
from tutti.data.formats import interface
from tutti.data.formats.chosen import Chosen
from tutti.data.formats.errors import data_error
from tutti.data.formats.interface import Roles
from tutti.data.formats.lerobot import ACTION, STATE
from tutti.data.formats.lerobot.features import Feature, find_cameras, number_names, number_units
from tutti.data.formats.lerobot.metadata import Info, LeRobotMeta, read_info
from tutti.data.formats.lerobot.modality import TEXT_COLUMN, WHOLE, Rows
from tutti.data.formats.lerobot.reader import LeRobotStore, read_meta
from tutti.data.formats.wanted import AS_FOUND, Found, Wanted, guesses
from tutti.errors import UserError

NAME = "lerobot"
OPENPI = {"state": "state", "action": "actions"}
"""What openpi's converters call the two."""
TEXT, SPOKEN = "task", interface.Feature(kind="text")


def recognises(path: Path) -> str:
    """The file that makes a folder a LeRobotDataset; "" where it is none."""
    return "meta/info.json" if (path / "meta" / "info.json").is_file() else ""


def rate(path: Path) -> float:
    """Steps a second, by info.json alone."""
    return read_info(path).fps


def look(path: Path) -> Found:
    """What is in it, from its meta folder alone."""
    meta, info = read_meta(path, (Chosen(labels=WHERE_PRESENT),)), path / "meta" / "info.json"
    features = {key: _feature(feature) for key, feature in _every_feature(meta).items()}
    try:
        shapes, remark = find_cameras(meta.info.features, info, None)
    except UserError:  # the features tell
        shapes, remark = {}, ""
    roles = _with_text(replace(_vectors(meta.info, AS_FOUND), views=tuple(shapes)), meta)
    said, told_by, _ = _conventions(meta, roles)
    return Found(
        features={key: one for key, one in features.items() if one and key != "timestamp"}
        | {roles.text or TEXT: SPOKEN},
        roles=roles,
        lengths=meta.lengths,
        fps=meta.info.fps,
        embodiment=meta.info.robot_type or "unknown",
        conventions=said,
        told_by=told_by,
        remarks=tuple(filter(None, (remark, meta.modality.describe()))),
    )


def open_source(
    path: Path, wanted: Wanted, chosen: Sequence[Chosen], home: Path | None = None
) -> EpisodeStore:
    """The store of what a source says. Raises: UserError for what LeRobot's format tells by itself."""
    if wanted.say is not None:
        raise data_error(
            f"{path}: sources.text is {wanted.say!r}; LeRobot's instructions are in meta/.",
            cure="leave sources.text out.",
        )
    info = read_info(path)
    if wanted.fps not in (None, info.fps):
        raise data_error(
            f"{path}: sources.fps is {wanted.fps:g}; {path / 'meta' / 'info.json'} says {info.fps:g}.",
            cure="leave sources.fps out, or correct fps (and the timestamps) of the data set.",
        )
    if wanted.lag or wanted.flip not in (None, "none"):
        raise data_error(
            f"{path}: sources.flip and sources.lag are not for LeRobot's format, whose pictures are upright "
            "and come before their action.",
            cure="leave them out; or convert the data set anew.",
        )
    roles = _vectors(info, wanted)
    text = None if wanted.text == TEXT else wanted.text
    own = {"state": roles.state, "action": roles.action, "text": text}
    store = LeRobotStore(path, wanted.views, **own, chosen=chosen, home=home)
    roles = _with_text(replace(roles, views=store.spec.views), store.meta, guessed=text is None)
    store.format, store.roles = NAME, roles
    followed = np.ones(store.spec.num_frames, bool)
    followed[sum(bounds_of(store.episodes)) - 1] = False
    rows = Rows(store.states, store.actions, followed)
    store.conventions, told_by, why = _conventions(store.meta, roles, store.spec, rows)
    lines = [*guesses(roles).values()]
    if moved := store.conventions.action.motion:
        lines.insert(0, f"the action's {moved.dimensions} are {moved.kind} ({told_by['action.motion']})")
    elif why:
        lines.insert(0, f"meta/modality.json does not tell how the action moves the robot: {why}")
    store.remarks = (*store.remarks, *(f"{path}: {line}" for line in lines))
    return store


def _conventions(
    meta: LeRobotMeta, roles: Roles, spec: StoreSpec | None = None, rows: Rows | None = None
) -> tuple[ConventionsConfig, dict[str, str], str]:
    """What modality.json tells of the numbers (`Modality.conventions`), as far as there are any."""
    features: dict[Vector, Mapping[str, Feature]] = {}
    keys: dict[Vector, Sequence[str]] = {}
    for what, whole in WHOLE.items():
        features[what], many = meta.modality.features(meta.info.features, what, whole), getattr(roles, what)
        there = (spec is None or getattr(spec, f"{what}_dim")) and all(key in features[what] for key in many)
        keys[what] = many if there else ()
    return meta.modality.conventions(keys, features, rows)


def _vectors(info: Info, wanted: Wanted) -> Roles:
    """State and action: as the source says, else by LeRobot's names, else by openpi's."""
    found: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, str] = {}
    for field, usual in (("state", STATE), ("action", ACTION)):
        given: tuple[str, ...] | None = getattr(wanted, field)
        other = OPENPI[field]
        guessed = given is None and usual not in info.features and other in info.features
        found[field] = (other if guessed else usual,) if given is None else given
        if guessed:
            reasons[field] = f"there is no {usual}; openpi's data sets call it so"
    return Roles(state=found["state"], action=found["action"], reasons=reasons)


def _with_text(roles: Roles, meta: LeRobotMeta, *, guessed: bool = True) -> Roles:
    """The roles with what the instruction is: the task of a row, or one of GR00T's annotations."""
    if meta.text_column == TEXT_COLUMN:
        return replace(roles, text=TEXT)
    others = ", ".join(name for name in meta.modality.annotation if not meta.text_column.endswith(name))
    why = f"the task's description by meta/modality.json{f', not {others}' * bool(others)}"
    reasons = {**roles.reasons, "text": why} if guessed else roles.reasons
    return replace(roles, text=meta.text_column, reasons=reasons)


def _every_feature(meta: LeRobotMeta) -> dict[str, Feature]:
    """The features of info.json, and the slices that modality.json names."""
    found = dict(meta.info.features)
    for what, whole in WHOLE.items():
        named = meta.modality.features(meta.info.features, what, whole)
        found |= {key: one for key, one in named.items() if key in found or key.startswith(f"{what}.")}
    return found


def _feature(feature: Feature) -> interface.Feature | None:
    """A feature as all formats have it; None for what no role fits."""
    if feature.is_camera:
        return interface.Feature(kind="picture", shape=feature.image_shape[:2])
    if feature.dtype.startswith("float") and feature.is_vector:
        names, units = tuple(number_names(feature)), tuple(number_units(feature))
        return interface.Feature(kind="vector", shape=tuple(feature.shape), names=names, units=units)
    return None

"""What the attributes of HDF5 files say: rate, robot, how pictures are stored, instructions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tutti.data.formats.errors import data_error
from tutti.data.formats.hdf5.files import HDF5File
from tutti.data.formats.hdf5.layouts import LIBERO, Layout
from tutti.data.formats.interface import MAX_FPS, MIN_FPS, Flip
from tutti.storage.reading import parse_json, shown

TEXT = "language_instruction"
"""The key of the texts, wherever a file keeps them."""
_LANGUAGE = re.compile(r"\(:language\s+([^()]*)\)")
_SCENE = re.compile(r"^.*?SCENE\d+_")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What holds for all episodes of a file. `controller` is robosuite's, such as OSC_POSE; `reasons` says
    why `flip` and `lag` are what they are."""

    fps: float | None
    embodiment: str
    controller: str
    flip: Flip
    lag: int
    reasons: Mapping[str, str] = field(compare=False)

    def check_same(self, other: FileFacts, first: Path, path: Path) -> None:
        """Raises: UserError if another file of the folder, at `path`, says something else."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if one.compare and mine != theirs:
                raise data_error(
                    f"{path} differs in {one.name} from {first}.",
                    expected=mine,
                    found=theirs,
                    cure="keep files that are recorded differently in folders of their own.",
                )


def read_facts(file: HDF5File, layout: Layout) -> FileFacts:
    """Reads them from the attributes of the group of the episodes, `env_args` and what LIBERO adds."""
    home = layout.episodes
    settings = _json(file, home, "env_args")
    inner = settings.get("env_kwargs")
    given: Mapping[str, Any] = inner if isinstance(inner, dict) else {}
    fps = given.get("control_freq")
    if fps is not None and not (type(fps) in (int, float) and MIN_FPS <= fps <= MAX_FPS):
        key = f"{file.path}: control_freq in the attribute env_args of {home}"
        raise data_error(f"{key} is no rate.", expected=f"{MIN_FPS:g} to {MAX_FPS:g} Hz", found=shown(fps))
    robots = given.get("robots")
    names = [robots] if isinstance(robots, str) else robots if isinstance(robots, list) else []
    text = "+".join(name.lower() for name in names if isinstance(name, str))[:100]
    controllers = given.get("controller_configs")
    one = controllers[0] if isinstance(controllers, list) and controllers else controllers
    controller = one.get("type") if isinstance(one, dict) else None
    reasons: dict[str, str] = {}
    flip, lag = layout.flip, 0
    if layout is LIBERO:
        convention = file.attribute(home, "macros_image_convention")
        flip = "none" if convention == "opencv" else "vertical"
        said = (
            f"macros_image_convention is {shown(convention)}" if convention else "LIBERO's renderer does so"
        )
        reasons["flip"] = f"{said}: pictures have the {'top' if flip == 'none' else 'bottom'} row first"
        raw = convention is not None or bool(settings)
        lag = int(raw)
        reasons["lag"] = (
            "LIBERO's own files (with env_args) hold what was seen after each action"
            if raw
            else "files without env_args are regenerated, where each action follows what was seen"
        )
        controller = controller or "OSC_POSE"
    elif layout.embodiment == "aloha":
        reasons["lag"] = "as recorded; ACT itself pairs a real robot's picture with the action before it"
    return FileFacts(
        fps=None if fps is None else float(fps),
        embodiment=text or layout.embodiment,
        controller=controller if isinstance(controller, str) else "",
        flip=flip,
        lag=lag,
        reasons=reasons,
    )


def episode_text(file: HDF5File, episode: str, layout: Layout) -> str:
    """The instruction of an episode: its attribute `language_instruction`, which no layout has but everybody
    can add; else `lang` of its `ep_meta` (RoboCasa), `language_instruction` of `problem_info`,
    `(:language ...)` of `bddl_file_content`, and of LIBERO the name of the file. Empty where there is none.
    """
    home = layout.episodes
    if (own := file.attribute(episode, TEXT)) is not None or not home:
        return _plain(own or "")
    lang = _json(file, episode, "ep_meta").get("lang")
    if isinstance(lang, str) and lang.strip():
        return _plain(lang)
    told = _json(file, home, "problem_info").get(TEXT)
    if isinstance(told, list) and all(isinstance(word, str) for word in told):
        told = ("" if len(told) > 1 and max(map(len, told)) == 1 else " ").join(told)
    if isinstance(told, str) and told.strip():
        return _plain(told)
    if found := _LANGUAGE.search(file.attribute(home, "bddl_file_content") or ""):
        return _plain(found[1])
    if layout is LIBERO:
        return _plain(_SCENE.sub("", file.path.stem.removesuffix("_demo")).replace("_", " "))
    return ""


def _plain(text: str) -> str:
    """Without quotes around it, and with single spaces."""
    text = " ".join(text.split())
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _json(file: HDF5File, group: str, name: str) -> dict[str, Any]:
    """The object in a JSON attribute; empty where there is none."""
    text = file.attribute(group, name)
    where = f"{file.path}, attribute {name} of {group}"
    return parse_json(text, where, cure="Correct the attribute, or leave it out.") if text else {}

"""What `tutti data inspect` finds in a data set of any format: features, roles, ranges, and how to train."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

from tutti.data.bundle import evenly_spread
from tutti.data.checks.pictures import glimpses
from tutti.data.checks.recordings import Recorded
from tutti.data.episodes import WHERE_PRESENT, EpisodeStore, Use, Vector
from tutti.data.formats.chosen import Chosen
from tutti.data.formats.detect import Format, find_format
from tutti.data.formats.wanted import AS_FOUND, Found, Wanted, settle
from tutti.errors import UserError, printable
from tutti.types import LABELS, Label

EPISODES, ON_SHEET, HORIZON, SIZE = 200, 6, 16, 96
CELLS = 16
"""Pixels that the edge of a picture must be a multiple of, by default."""
OFFSETS = (2, 4, 6, 8, 12, 16, 24)
"""How many steps ahead states are predicted, by default."""
"""Episodes whose numbers are read and those on a contact sheet, at most; the horizon of the suggestion."""
_MARGIN, _LINE = 6, 14
_YAML: dict[str, Any] = {
    "sort_keys": False,
    "allow_unicode": True,
    "default_flow_style": None,
    "width": 100,
}


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A data set: its format and why it is taken for one, what was found before a number was read, and the
    store of some of its episodes; None, with the `problem`, where it cannot be opened. `wanted` is what
    the user said of it; `url` is where it was fetched from."""

    path: Path
    format: Format
    reason: str
    found: Found
    store: EpisodeStore | None
    problem: str
    wanted: Wanted = AS_FOUND
    url: str = ""

    @property
    def name(self) -> str:
        """What the user calls it: its URL or path."""
        return self.url or str(self.path)

    @cached_property
    def rows(self) -> Recorded | None:
        """The episodes whose numbers are known, as the checks of recorded data look at them."""
        return Recorded(store=self.store, training=self.store.episodes, held_out=()) if self.store else None

    def ranges(self, vector: Vector) -> list[tuple[str, float, float]]:
        """Name, smallest and largest finite value of each dimension; NaN where there is none."""
        if self.store is None:
            return []
        values = self.store.states if vector == "state" else self.store.actions
        names = getattr(self.store.spec, f"{vector}_names")
        low, high = (of.reduce(values, axis=0, initial=np.nan) for of in (np.fmin, np.fmax))
        return list(zip(names, low.tolist(), high.tolist(), strict=True))

    @property
    def instructions(self) -> list[str]:
        """The distinct instructions of the episodes that were read, without blank ones."""
        return [text for text in self.store.instructions if text.strip()] if self.store else []

    def values(self) -> dict[str, Any]:
        """The keys of a config that trains on it: what was guessed is said, so that it can be corrected."""
        roles, source = self.found.roles, dict[str, Any](path=self.name)
        pairs = self.format.is_pairs
        for field in ("views", "state", "action", "text", "flip", "lag"):
            value = getattr(roles, field)
            told = field in roles.reasons or getattr(self.wanted, field) is not None
            if told and value not in ((), None):
                source[field] = list(value) if isinstance(value, tuple) else value
        if not roles.state and not pairs:
            source["state"] = "none"
        if self.wanted.say is not None:
            source["text"] = {"say": self.wanted.say}
        if any("guessed" in why for why in self.found.told_by.values()):
            source["conventions"] = self.found.conventions.model_dump(mode="json", exclude_defaults=True)
        if self.found.fps is None and not pairs:
            source["fps"] = int(rate) if (rate := self._usual_rate).is_integer() else rate
        if labels := {label: use for label in LABELS if (use := self._use(label)) is not True}:
            source["labels"] = labels
        if pairs:
            return {"data": {"sources": [{"path": "path/to/robot/data"}, source]}}
        longest = int(max(self.found.lengths, default=2)) - roles.lag
        shapes = self.store.spec.image_shapes if self.store else ()
        edge = max(map(max, shapes), default=SIZE)
        values: dict[str, Any] = {
            "name": "mine",
            "data": {
                "sources": [source],
                "horizon": min(HORIZON, max(1, longest // 4)),
                "batch_size": 32,
                "image_size": min(SIZE, -(-edge // CELLS) * CELLS),
            },
            "model": {"size": "small"},
            "objective": self._objective(longest),
            "training": {"steps": 20000},
            "evaluation": {"suite": "none"},
        }
        return {key: value for key, value in values.items() if value}

    def _objective(self, longest: int) -> dict[str, Any]:
        """Without terms that the data cannot feed, and with offsets that an episode reaches."""
        objective = dict[str, Any]() if len(self.instructions) > 1 else {"align": None}
        if not self.found.roles.state:
            return objective | {"state": None}
        state = dict[str, Any]()
        if (ahead := [steps for steps in OFFSETS if steps < longest]) != [*OFFSETS]:
            state["offsets"] = ahead
        if self.rows is not None and len(self.rows.two_valued) == 1:
            state["gripper"] = {"dimension": next(iter(self.rows.two_valued))}
        return objective | ({"state": state} if state else {})

    def config(self) -> str:
        """The same as YAML, with what a reader must look at in comments."""
        if self.format.is_pairs:
            return f"# beside your robot's data set, and your other keys\n{as_yaml(self.values())}"
        return "".join(f"# {line}\n" for line in self.comments()) + as_yaml(self.values())

    def comments(self) -> Iterator[str]:
        """What a reader of the config must look at."""
        if self.found.fps is None:
            yield f"fps: {self._usual_rate:g} is a guess, the rate is not stored; give that of the recording"
        if self._use("text") is False:
            yield "no instruction is stored; text: {say: open the drawer} in place of labels gives all one"

    @property
    def _usual_rate(self) -> float:
        """Of a data set that stores none: what the format tells of others, or 20."""
        told = re.search(r"(\d+(?:\.\d+)?) Hz", self.found.roles.reasons.get("fps", "20 Hz"))
        return float(told[1]) if told else 20.0

    def _use(self, label: Label) -> Use:
        """How a source can use a label of the rows that were read."""
        roles = self.found.roles
        if label != "text" and self.format.is_pairs:
            return True
        if label == "state" and not roles.state:  # which `state: none` says
            return True
        silent = roles.text is None and self.wanted.say is None
        absent = {"actions": not roles.action, "text": silent, "state": False}[label]
        if self.store is None or absent:
            return not absent
        known = self.store.present[label]
        return "where_present" if known.any() and not known.all() else bool(known.all())


def as_yaml(values: dict[str, Any]) -> str:
    """Keys of a config, short ones on one line."""
    return yaml.safe_dump(values, **_YAML)


def inspect_path(path: Path, said: Wanted = AS_FOUND, url: str = "") -> Inspected:
    """Looks into a data set; `said` tells of features that a guess would get wrong; `url` is what it is a
    copy of.

    Raises: UserError where nothing is known of it, or a feature that is named is not there.
    """
    kind = find_format(path)
    found, store, problem = kind.look(path), None, ""
    if said != AS_FOUND:
        found = replace(found, roles=settle(said, found.roles, found.features, str(path)))
    roles, lengths = found.roles, found.lengths
    least = 1 if kind.is_pairs else 2
    some = evenly_spread(np.flatnonzero(lengths - roles.lag >= least), EPISODES).tolist()
    chosen = Chosen(episodes=tuple(range(one, one + 1) for one in some), labels=WHERE_PRESENT)
    state = said.state if roles.state else ()
    wanted = replace(said, state=state, fps=1.0 if found.fps is None else None)
    try:
        store = kind.open(path, wanted, [chosen], None)
    except UserError as error:
        problem = str(error)
    return Inspected(
        path=path,
        format=kind,
        reason=kind.recognises(path),
        found=found,
        store=store,
        problem=problem,
        wanted=said,
        url=url,
    )


def contact_sheet(rows: Recorded) -> Image.Image:
    """The first, middle and last picture of some episodes, a row each, view beside view, as trained on.

    Raises: UserError where a picture cannot be read.
    """
    some = evenly_spread(np.arange(len(rows.episodes)), ON_SHEET).tolist()
    few = Recorded(store=rows.store, training=[rows.episodes[number] for number in some], held_out=())
    looked = {(one.view, one.episode): Image.fromarray(one.strip) for one in glimpses(few, most=0)}
    views = rows.store.spec.views
    widths = [max(strip.width for (of, _), strip in looked.items() if of == view) for view in views]
    heights = [max(looked[view, episode].height for view in views) for episode in few.episodes]
    lefts = [_MARGIN + sum(widths[:place]) + _MARGIN * place for place in range(len(views))]
    size = lefts[-1] + widths[-1] + _MARGIN, sum(heights) + (_LINE + _MARGIN) * (len(heights) + 1)
    sheet = Image.new("RGB", size, (255, 255, 255))
    for left, width, view in zip(lefts, widths, views, strict=True):
        _write(sheet, (left, _MARGIN // 2), view, width)
    down = _LINE + _MARGIN
    for episode, height in zip(few.episodes, heights, strict=True):
        _write(sheet, (_MARGIN, down), f"{episode.index}: {episode.instruction}", size[0] - 2 * _MARGIN)
        for left, view in zip(lefts, views, strict=True):
            sheet.paste(looked[view, episode], (left, down + _LINE))
        down += height + _LINE + _MARGIN
    return sheet


def _write(sheet: Image.Image, place: tuple[int, int], text: str, width: int) -> None:
    """As much of a text as fits."""
    draw, text = ImageDraw.Draw(sheet), printable(text)
    while text and draw.textlength(text) > width:
        text = text[:-1]
    draw.text(place, text, fill=(0, 0, 0))

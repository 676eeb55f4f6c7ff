"""Checks of the cameras by some frames of some episodes: one colour, and frozen pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from tutti.data.bundle import evenly_spread
from tutti.data.checks.recordings import Recorded, say, some
from tutti.data.episodes import Episode
from tutti.findings import EMPTY_FRAMES_MAX, PICTURE_DEVIATION_MIN, RELATIVE_RANGE_MIN, Finding

EPISODES, FRAMES = 24, 72
"""At most so many episodes are looked at, evenly spread, and about so many frames of each view in all."""
THUMBNAIL = 112
"""Longest edge of a kept picture, in pixels."""
GAP = 2
LEAVE_OUT = "Leave the view out (data.sources.views)."
Read = Callable[[int, Int64[np.ndarray, " k"]], UInt8[np.ndarray, "k h w 3"]]
"""The pictures of view number i at ascending frame rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glimpse:
    """Frames of an episode in one view. `frames` are numbered in the episode; `deviations` are those of
    their pixels, of the channel that differs most; `change` is the largest difference of a pixel among them;
    `moved`: the robot did. `strip` has the first, the middle and the last side by side, made smaller."""

    view: str
    episode: Episode
    frames: tuple[int, ...]
    deviations: tuple[float, ...]
    change: int
    moved: bool
    strip: UInt8[np.ndarray, "h w 3"]


def glimpses(source: Recorded, read: Read | None = None, most: int = FRAMES) -> list[Glimpse]:
    """Looks at frames of each view. `read` gives pictures, by default those of the store, decoded.

    Raises: UserError where one cannot be read.
    """
    store, found = source.store, list[Glimpse]()
    read = read or (lambda view, rows: store.frames(store.spec.views[view], rows))
    chosen = evenly_spread(np.arange(len(source.episodes)), EPISODES).tolist()
    each = max(3, most // max(1, len(chosen)))
    for view, name in enumerate(store.spec.views):
        for number in chosen:
            episode = source.episodes[number]
            rows = evenly_spread(np.arange(episode.start, episode.end), each)
            pictures = read(view, rows)
            numbers = np.concatenate([store.states[rows], store.actions[rows]], axis=1)
            size = RELATIVE_RANGE_MIN * np.maximum(1.0, np.abs(numbers).max(0))
            found.append(
                Glimpse(
                    view=name,
                    episode=episode,
                    frames=tuple((rows - episode.start).tolist()),
                    deviations=tuple(float(picture.std((0, 1)).max()) for picture in pictures),
                    change=int((pictures.max(0) - pictures.min(0)).max()),
                    moved=bool((np.ptp(numbers, axis=0) > size).any()),
                    strip=_strip(pictures[sorted({0, len(pictures) // 2, len(pictures) - 1})]),
                )
            )
    return found


def _strip(pictures: UInt8[np.ndarray, "k h w 3"]) -> UInt8[np.ndarray, "p q 3"]:
    small: list[np.ndarray] = []
    for picture in pictures:
        image = Image.fromarray(np.ascontiguousarray(picture))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        small += [np.asarray(image), np.full((image.height, GAP, 3), 255, np.uint8)]
    return np.concatenate(small[:-1], axis=1)


def check_pictures(source: Recorded, looked: list[Glimpse]) -> Iterator[Finding]:
    """Views of one colour, and views that stand still while the robot moves."""
    for view in source.store.spec.views:
        here = [glimpse for glimpse in looked if glimpse.view == view]
        dark = [
            (glimpse.episode.index, frame)
            for glimpse in here
            for frame, deviation in zip(glimpse.frames, glimpse.deviations, strict=True)
            if deviation < PICTURE_DEVIATION_MIN
        ]
        share = len(dark) / max(1, sum(len(glimpse.frames) for glimpse in here))
        about: dict[str, Any] = {"source": source.name, "view": view}
        if dark:
            useless = share > EMPTY_FRAMES_MAX
            yield say(
                "one_colour",
                share,
                "fault" if useless else "hint",
                episode=dark[0][0],
                frame=dark[0][1],
                share=f"{100 * share:.{0 if useless else 1}f} %",
                why=": black, or covered." if useless else ".",
                cure=LEAVE_OUT if useless and not source.store.is_pairs else "",
                **about,
            )
        still = [
            glimpse
            for glimpse in here
            if glimpse.moved
            and glimpse.change <= PICTURE_DEVIATION_MIN
            and max(glimpse.deviations) >= PICTURE_DEVIATION_MIN
        ]
        moved = sum(glimpse.moved for glimpse in here)
        if still:
            everywhere = len(still) == moved
            episodes = [glimpse.episode.index for glimpse in still]
            yield say(
                "frozen",
                len(still) / moved,
                "fault" if everywhere else "warning",
                episode=episodes[0],
                where="every episode" if everywhere else f"{len(still)} of {moved} episodes",
                episodes="" if everywhere else f" ({', '.join(some(episodes))})",
                cure=LEAVE_OUT if everywhere else "Leave these episodes out (data.sources.exclude).",
                **about,
            )

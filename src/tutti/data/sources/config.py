"""Config of one source: a data set in any format, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tutti.data.conventions.config import ConventionsConfig
from tutti.data.conventions.slots import SlotsConfig
from tutti.data.episodes import EpisodeStore, Use
from tutti.data.formats.chosen import MAX_TEXT, TOLERANCE, Chosen
from tutti.data.formats.detect import find_format
from tutti.data.formats.errors import data_error
from tutti.data.formats.interface import MAX_FPS, MIN_FPS, Flip
from tutti.data.formats.lerobot.columns import MAX_TOLERANCE
from tutti.data.formats.mapped import without_rate
from tutti.data.formats.wanted import Wanted
from tutti.frozen_config import FrozenConfig
from tutti.storage.files import LocalPath, cache_home
from tutti.storage.remote import fetch, is_url, local_copy
from tutti.types import LABELS, Label

FormatName = Literal["lerobot", "hdf5", "rlds", "zarr", "picture_text"]
"""Those of `FORMATS`."""
ViewName = Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
FeatureKeys = Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]

_SPAN = r"^\d{1,10}-\d{1,10}$"
_NAME = r"^[^\s/\\@*\[\]]{1,64}$"
EpisodeNumbers = tuple[Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=_SPAN)], ...]


def _as_range(numbers: int | str) -> range:
    """Of 7, or of "0-99", both ends included."""
    first, last = map(int, numbers.split("-")) if isinstance(numbers, str) else (numbers, numbers)
    return range(first, last + 1)


class LabelsConfig(FrozenConfig):
    """Which labels of a source train the model, each true, false or where_present.

    true: every row must have it. false: it is neither used nor checked, and may be missing. where_present: it
    is used in the rows that have it; rows of NaN alone have no numbers, blank texts are none.
    """

    actions: Use = Field(default=True, description="The actions; without them a source is video.")
    text: Use = Field(default=True, description="The instructions; without them the model is told nothing.")
    state: Use = Field(default=True, description="The states; without them the state token is masked.")


class SpokenConfig(FrozenConfig):
    """An instruction for a data set that stores none."""

    say: Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=r"\S")] = Field(
        description="The instruction of all episodes."
    )


class SourceConfig(FrozenConfig):
    """One data set, or some episodes of it, in any format that Tutti reads."""

    path: LocalPath = Field(
        description="The data set: its folder, or its file; or a URL, s3://bucket/set, whose files are "
        "fetched once into the folder of caches."
    )
    url: Annotated[str, Field(max_length=2000)] = Field(
        default="", description="The URL that path was given as, which it then is the local copy of."
    )
    format: FormatName | Literal["auto"] = Field(
        default="auto", description="auto: the format that recognises the path."
    )
    name: Annotated[str, Field(pattern=_NAME)] = Field(
        default="auto",
        description="What records and report call it, without blanks and / \\ @ * [ ]; auto: the folder's "
        "name, with a number where several have it.",
    )
    embodiment: Annotated[str, Field(pattern=_NAME)] = Field(
        default="auto",
        description="The robot that it is of; auto: what the data set says. Sources of one robot have the "
        "same views, sizes and statistics; others may have their own.",
    )
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        default=1.0,
        description="Share of the samples: weight / sum of the weights of all sources; auto, of all or none: "
        "by their windows, as data.mixture.temperature says.",
    )
    views: FeatureKeys | dict[ViewName, str] | Literal["auto"] = Field(
        default="auto",
        description="The camera features to use, in order, or {front: FEATURE, wrist: FEATURE}: by the names "
        "that several sources share; auto: all, without depth and mono cameras.",
    )
    state: FeatureKeys | str = Field(
        default="auto",
        description="The feature that is the state, or several, joined in this order; none: no "
        "proprioception, a state without numbers; auto: by the format's usual names.",
    )
    action: FeatureKeys | str = Field(
        default="auto",
        description="The feature that is the action, or several, joined in this order; auto: by the format's "
        "usual names.",
    )
    text: str | SpokenConfig = Field(
        default="auto",
        description="The feature that is the instruction; auto: by the format's usual names; {say: TEXT}: "
        "one instruction for all episodes.",
    )
    answer: Annotated[str, Field(max_length=200)] = Field(
        default="none",
        description="Of picture-text pairs the column with what is to be said about the picture, which the "
        "next_token term learns: a caption, the answer to the question that text names; none: there is none.",
    )
    flip: Flip | Literal["auto"] = Field(
        default="auto",
        description="How pictures are stored: none, upright; vertical, bottom row first; turned, by 180 "
        "degrees. They are read upright. auto: as the format does.",
    )
    lag: Annotated[int, Field(ge=0, le=100)] | Literal["auto"] = Field(
        default="auto",
        description="So many steps after it was chosen an action is stored: 0 beside the observation it was "
        "chosen by, 1 beside the one that came of it. auto: as the format does.",
    )
    fps: Annotated[float, Field(ge=MIN_FPS, le=MAX_FPS)] | Literal["auto"] = Field(
        default="auto", description="Steps a second; auto: what the data set says."
    )
    resample: Annotated[float, Field(ge=MIN_FPS, le=MAX_FPS)] | Literal["auto", "keep"] = Field(
        default="auto",
        description="Steps a second that the source is brought to. keep: its own, beside sources of other "
        "rates. auto: its own, which must be that of the others.",
    )
    split: Annotated[str, Field(max_length=200)] = Field(
        default="auto",
        description="The split of an RLDS set, or all of them; auto: train, all where there is no train.",
    )
    conventions: ConventionsConfig | Literal["auto", "none"] = Field(
        default="auto",
        description="What the numbers of state and action are. auto: what the format stores (presets of RLDS "
        "sets do). none: they are learned as they are recorded.",
    )
    slots: SlotsConfig | Literal["auto"] = Field(
        default="auto",
        description="Which numbers are of which canonical slot, where data.slots is canonical; auto: by "
        "conventions and names.",
    )
    labels: LabelsConfig = Field(
        default_factory=LabelsConfig, description="Which of actions, text and state are used."
    )
    episodes: EpisodeNumbers | Literal["all"] = Field(
        default="all", description='The episodes to use: numbers and ranges, [3, "10-99"].'
    )
    exclude: EpisodeNumbers = Field(
        default=(), description="Episodes to leave out, such as damaged ones; nothing of them is checked."
    )
    per_task: Annotated[str, Field(pattern=r"^\d{1,7}-(\d{1,7})?$")] | Literal["all"] = Field(
        default="all",
        description="Of each task the episodes to train on, by their places in an order drawn by data.seed: "
        '"0-9" the first ten, "10-" all others.',
    )
    tolerance: float = Field(
        default=TOLERANCE,
        gt=0,
        le=MAX_TOLERANCE,
        description="How far a timestamp may lie off frame number / fps, in frames. Above the default, for "
        "times by a clock, video frames are taken by number.",
    )

    @model_validator(mode="before")
    @classmethod
    def _place_url(cls, given: Any) -> Any:
        # Also where it was placed before: the folder of caches of another machine is none here.
        url = given.get("url") or given.get("path") if isinstance(given, dict) else None
        if not isinstance(url, str) or not is_url(url):
            return given
        return {**given, "url": url, "path": local_copy(url, cache_home())}

    @field_validator("name", "embodiment", mode="before")
    @classmethod
    def _check_name(cls, given: Any) -> Any:
        if not isinstance(given, str) or re.fullmatch(_NAME, given) is None:
            raise ValueError(
                f"expected 1 to 64 characters without blanks and / \\ @ * [ ], found {given!r:.80}"
            )
        return given

    @field_validator("episodes", "exclude", mode="before")
    @classmethod
    def _check_numbers(cls, given: Any) -> Any:
        numbers = (given,) if isinstance(given, int | str) and given != "all" else given
        for one in numbers if isinstance(numbers, list | tuple) else ():
            is_span = isinstance(one, str) and re.fullmatch(_SPAN, one) is not None and len(_as_range(one))
            if not is_span and not (type(one) is int and one >= 0):
                raise ValueError(
                    f'expected episode numbers and rising ranges, [7, "10-19"], found {one!r:.60}'
                )
        return numbers

    @field_validator("state", "action", mode="before")
    @classmethod
    def _check_features(cls, given: Any) -> Any:
        many = given if isinstance(given, list | tuple) else [given]
        if not many or not all(isinstance(one, str) for one in many) or len(set(many)) < len(many):
            raise ValueError(
                f"expected the name of a feature, or several different ones, found {given!r:.60}"
            )
        return given

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        if self.places and self.places.stop is not None and self.places.start >= self.places.stop:
            raise ValueError(f'per_task: expected a rising range, such as "0-9", found {self.per_task!r}')
        return self

    @property
    def places(self) -> slice | None:
        """`per_task` as a slice of each task's order; None: all of it."""
        first, _, last = self.per_task.partition("-")
        return slice(int(first), int(last) + 1 if last else None) if first != "all" else None

    @property
    def chosen(self) -> Chosen:
        """What of the data set is read."""
        episodes = None if self.episodes == "all" else tuple(map(_as_range, self.episodes))
        exclude = tuple(map(_as_range, self.exclude))
        labels: dict[Label, Use] = {one: getattr(self.labels, one) for one in LABELS}
        return Chosen(episodes=episodes, exclude=exclude, tolerance=self.tolerance, labels=labels)

    @property
    def wanted(self) -> Wanted:
        """What it says of the features, None for what it leaves to the format."""

        def said(value: Any) -> Any:
            return None if value == "auto" else value

        def keys(value: str | tuple[str, ...]) -> tuple[str, ...] | None:
            return (value,) if isinstance(value, str) and value != "auto" else said(value)

        return Wanted(
            views=tuple(self.views.values()) if isinstance(self.views, dict) else said(self.views),
            state=() if self.state == "none" else keys(self.state),
            action=keys(self.action),
            text=said(self.text) if isinstance(self.text, str) else None,
            say=None if isinstance(self.text, str) else self.text.say,
            flip=said(self.flip),
            lag=said(self.lag),
            fps=said(self.fps),
            split=said(self.split),
            answer=None if self.answer == "none" else self.answer,
        )

    @property
    def view_names(self) -> tuple[str, ...]:
        """What its views are called beside other sources; empty: as their features."""
        return tuple(self.views) if isinstance(self.views, dict) else ()

    @property
    def folder_name(self) -> str:
        """What it is called by its path: the folder's name, or that above one that is a version."""
        place = self.path.resolve()
        named = place.parent if re.fullmatch(r"v?\d+(\.\d+)*", place.name) else place
        return re.sub(r"[\s/\\@*\[\]]", "-", named.name)[:60] or "root"

    @property
    def reads(self) -> tuple[Any, ...]:
        """What two sources have in common that can share a store."""
        own = self.path.resolve(), self.format, self.wanted, self.tolerance, self.conventions
        return *own, self.target, self.embodiment, self.view_names, self.slots

    @property
    def target(self) -> float | None:
        """The rate that it is resampled to; None: its own."""
        return None if isinstance(self.resample, str) else self.resample

    def rate(self) -> float:
        """Steps a second that are learned, without a look at the episodes. Raises: UserError where nothing
        tells them."""
        if self.target is not None:
            return self.target
        self.fetch()
        fps = find_format(self.path, self.format).rate(self.path) if self.fps == "auto" else self.fps
        if fps is None:
            raise without_rate(str(self.path))
        return fps

    @property
    def is_pairs(self) -> bool:
        """Whether it is pictures with texts, without a robot. Raises: UserError where nothing is there."""
        self.fetch()
        return find_format(self.path, self.format).is_pairs

    def fetch(self) -> None:
        """Makes sure that the files of a URL are there. Raises: UserError as `storage.remote.fetch`."""
        if self.url:
            fetch(self.url, self.path)

    def open(self) -> EpisodeStore:
        """Opens and checks the data set, as this source alone uses it."""
        return open_together([self])


def names_of(sources: Sequence[SourceConfig]) -> list[str]:
    """The names of sources, each another; those that are given stay."""
    taken = {source.name for source in sources}
    names: list[str] = []
    for source in sources:
        name, own = source.name, source.folder_name
        if name == "auto":
            name = next(one for n in count(1) if (one := own if n == 1 else f"{own}-{n}") not in taken)
        taken.add(name)
        names.append(name)
    return names


def rate_of(sources: Sequence[SourceConfig]) -> float | None:
    """The steps a second that times are counted in: the highest of sources that may differ, else that of the
    first robot's; None without one. Raises: UserError where nothing tells it."""
    robots = [source for source in sources if not source.is_pairs]
    several = [source for source in robots if source.resample != "auto"]
    return max((source.rate() for source in several or robots[:1]), default=None)


def open_together(sources: Sequence[SourceConfig], home: LocalPath | None = None) -> EpisodeStore:
    """The data set that these sources share, opened and checked for all of them; they read the same of it.
    `home` is the folder of caches, for an index."""
    first = sources[0]
    first.fetch()
    chosen, found = [source.chosen for source in sources], find_format(first.path, first.format)
    if first.split != "auto" and not found.has_splits:
        problem = (
            f"{first.path}: sources.split is {first.split!r}; data sets of the format {found.name} have none."
        )
        raise data_error(problem, cure="leave sources.split out.")
    if first.answer != "none" and not found.is_pairs:
        problem = (
            f"{first.path}: sources.answer is {first.answer!r}, and {found.name} has no picture-text pairs."
        )
        raise data_error(problem, cure="leave sources.answer out.")
    store = found.open(first.path, first.wanted, chosen, home)
    if first.embodiment != "auto" and not store.is_pairs:
        store.spec = replace(store.spec, embodiment=first.embodiment)
    store.view_names, store.name = first.view_names, first.url or store.name
    return store

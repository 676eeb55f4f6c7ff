"""Which episodes of a data set are used, what is asked of their labels, and the way out of a bad one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from jaxtyping import Bool, Float32, Int64

from tutti.data.content import spans
from tutti.data.episodes import ALL_USED, Use
from tutti.data.formats.errors import data_error
from tutti.types import Label

TOLERANCE = 0.25
"""How far a time may lie off frame number / fps, in frames, by default. Half a frame would be ambiguous."""
MAX_TEXT = 4096
"""Characters of an instruction."""
WITHOUT_TEXT = "train on its episodes without one (sources.labels.text=where_present)"
REPAIR = "repair or remove the episode, or record the data set again."
_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What of the episodes is used: those of the ranges `episodes`, all where it is None, without those of
    `exclude`. `tolerance` is how far times may lie off frame number / fps, in frames. Of `labels` those that
    are True must be in every row.
    """

    episodes: tuple[range, ...] | None = None
    exclude: tuple[range, ...] = ()
    tolerance: float = TOLERANCE
    labels: Mapping[Label, Use] = field(default_factory=lambda: ALL_USED)

    def mask(self, count: int, where: object) -> Bool[np.ndarray, " e"]:
        """Which of `count` episodes are used. Raises: UserError for a number that is none, or no episode."""
        kept = np.full(count, self.episodes is None)
        for key, ranges in (("episodes", self.episodes or ()), ("exclude", self.exclude)):
            for span in ranges:
                if span.stop > count:
                    problem = f"sources.{key} names episode {span.stop - 1}, which {where} does not have."
                    raise data_error(problem, expected=f"0 to {count - 1}", cure="correct the number.")
                kept[span.start : span.stop] = key == "episodes"
        if not kept.any():
            problem = f"sources.episodes and sources.exclude leave no episode of {where}."
            raise data_error(problem, expected=f"at least one of {count}", cure="leave fewer of them out.")
        return kept


ALL = Chosen()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The episodes that are used of a data set, by all choices that it was opened with. `parts` has those of
    each and what it asks of their labels. Of episodes that are in none, not `kept`, nothing is checked."""

    kept: Bool[np.ndarray, " e"]
    parts: tuple[tuple[Bool[np.ndarray, " e"], Mapping[Label, Use]], ...]

    @classmethod
    def of(cls, chosen: Sequence[Chosen], count: int, where: object) -> Self:
        """Of a data set with `count` episodes. Raises: UserError as `Chosen.mask`."""
        masks = [one.mask(count, where) for one in chosen]
        parts = tuple((mask, one.labels) for mask, one in zip(masks, chosen, strict=True))
        return cls(kept=np.any(masks, axis=0), parts=parts)

    @property
    def masks(self) -> tuple[Bool[np.ndarray, " e"], ...]:
        """The episodes of each choice."""
        return tuple(mask for mask, _ in self.parts)

    def asked(self, label: Label, use: Use) -> Bool[np.ndarray, " e"]:
        """The episodes that a choice with this use of the label names."""
        masks = [mask for mask, labels in self.parts if labels[label] == use]
        return np.any([np.zeros_like(self.kept), *masks], axis=0)

    def or_leave_out(self, episodes: Iterable[int]) -> str:
        """The way out of what is wrong with these episodes alone; empty if no other would be left."""
        bad = sorted(set(episodes))
        few = bad and len(bad) < int(self.kept.sum())
        return f" Or leave the episode{'s' * (len(bad) > 1)} out: {excluding(bad)}" * bool(few)

    def check_finite(
        self,
        what: str,
        label: Label,
        values: Float32[np.ndarray, "n d"],
        *,
        episode_of: Int64[np.ndarray, " n"],
        frames: Int64[np.ndarray, " n"],
        rows: Int64[np.ndarray, " n"],
    ) -> None:
        """Numbers must be finite where they are asked for; a row of NaN alone has none, and may be there
        where the label is used where present. `frames` number the rows in their episodes, `rows` in the data
        set; `what` names both set and feature.

        Raises: UserError with the first that is not.
        """
        unknown = ~np.isfinite(values)
        asked, lenient = (self.asked(label, use)[episode_of] for use in (True, "where_present"))
        # A row without a single number has none; a number that is missing among others is damage.
        asked |= lenient & ~unknown.all(axis=1)
        wrong = np.argwhere(unknown & asked[:, None])
        if len(wrong):
            place, dimension = wrong[0].tolist()
            raise data_error(
                f"{what} is {values[place, dimension]} in episode {episode_of[place]}, row "
                f"{frames[place]} of it (frame row {rows[place]}), dimension {dimension}; {len(wrong)} such "
                "values in all.",
                expected="finite numbers",
                cure=REPAIR + self.or_leave_out(episode_of[wrong[:, 0]].tolist()),
            )

    def check_spoken(
        self, name: str, texts: Sequence[str], text_of: Int64[np.ndarray, " n"], episode_of: np.ndarray
    ) -> None:
        """Instructions must not be blank where they are asked for. Raises: UserError."""
        silent = np.array([not text.strip() for text in texts], bool)[text_of]
        if (wrong := np.unique(episode_of[silent & self.asked("text", True)[episode_of]])).size:
            raise data_error(
                f"{name}: {len(wrong)} of the episodes have no instruction, such as {wrong[0]}.",
                expected="texts that are not blank",
                cure=WITHOUT_TEXT + "." + self.or_leave_out(wrong.tolist()),
            )


def excluding(episodes: Sequence[int]) -> str:
    """Ascending numbers as the config takes them: "sources.exclude=[3, 7-9]"."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans(episodes)]
    return f"sources.exclude=[{', '.join(texts[:_SHOWN])}{', ...' * (len(texts) > _SHOWN)}]"

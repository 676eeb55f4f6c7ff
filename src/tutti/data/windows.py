"""Windows: each (episode, t) as a training example of observation at t, actions from t on, later labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16, Int64, UInt8
from torch import Tensor

from tutti.data.conventions.chunks import RelativeChunks
from tutti.data.embodiments import CommonSpec, common_spec, robots_in, specs_of_robots
from tutti.data.episodes import VECTORS, Episode, rows_of
from tutti.data.normalize import Normalizer
from tutti.data.opened import Answers, Source, WindowRows, pictures_of, shown_views, warn_of_cut
from tutti.data.split import GroupOf
from tutti.data.tokenize import Tokenizer, normalized_text
from tutti.dimensions import gripper_dimensions
from tutti.durations import in_own_steps, paces
from tutti.errors import UserError
from tutti.storage.arrays import unpacked
from tutti.types import (
    LABELS,
    Batch,
    DataNeeds,
    Future,
    FutureLabel,
    History,
    Label,
    LaterStates,
    Observation,
    StateLabel,
)


class WindowIndex:
    """All windows of all sources. Window w is frame row w of the sources laid end to end.

    So a window's number names the same example whatever is held out for validation, and `gather` makes
    a batch of any of them, training or not: this is how a bad batch is replayed.

    The chunk of window t is actions[t : t + horizon]. Steps past the episode's end are 0 and masked, never
    repeated. `futures[k]` is the observation at t + k of the same episode for k in `needs.futures`; where
    that lies past the end it is masked and the last frame stands in. `futures["last"]` is that last frame of
    the episode, masked in picture-text pairs alone, which have no later one. `later_states` are those of
    `needs.states`, masked past the end: at t + k, the episode's `last`, or that at the `next_key` frame
    (`next_keyframes`), where one of `needs.grippers` opens or closes. `instructions` are the distinct
    normalised texts; spellings of one sentence share its `instruction_id`. `tasks` are the groups that
    `group_of` puts them into (without it each is its own), and `task_id` is their number.

    Steps are those of the highest rate of the sources: in one of half that rate k steps are k / 2 of its own
    rows, at least 1, and of a chunk the first half is used, the rest masked.

    Of picture-text pairs the embodiment is -1, none, and views that a source lacks are masked. `common` says
    where the numbers of robots of other sizes lie: what a robot lacks is 0 and masked (`Robots`).
    Rows whose label is not known (`Source.labelled`) have actions and states of 0 that are masked, and the
    text "", which is masked as well: all of them share its `instruction_id`.

    `observation.history` are the moments of `history` but the last, 0; one before the episode's start is
    masked, and the present stands in.

    `remarks` are lines for the user: what the stores leave out, and hands that no gripper is named of.
    `parts` are what the sources of a config use, each as the number of its store among `sources` and its
    episodes; where there are several, batches say which of them a window is of. Below `home`, the folder of
    caches, what is known of many rows is kept (`WindowRows.kept`).

    Raises: UserError if one of these is no gripper.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        horizon: int,
        history: Sequence[int] = (0,),
        normalizer: Normalizer,
        tokenizer: Tokenizer,
        needs: DataNeeds = DataNeeds(),
        group_of: GroupOf | None = None,
        parts: Sequence[tuple[int, Sequence[Episode]]] = (),
        common: CommonSpec | None = None,
        home: Path | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.horizon, self.history, self.needs = horizon, tuple(history), needs
        stores = [source.store for source in self.sources]
        common = common or common_spec(specs_of_robots(stores))
        self._relative = RelativeChunks.of(stores, normalizer)
        self._paces = paces([store.spec.fps for store in stores])
        counts = [store.spec.num_frames for store in stores]
        self._offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        named = [None if store.is_pairs else store.spec.embodiment for store in stores]
        self.embodiments = tuple(dict.fromkeys(name for name in named if name is not None))
        self._views = shown_views(self.sources)
        spoken = [tuple(map(normalized_text, store.instructions)) for store in stores]
        known = [source.known("text") for source in self.sources]
        texts = set[str]().union(*(some for some, own in zip(spoken, known, strict=True) if own.any()))
        self.instructions = tuple(sorted(texts if all(own.all() for own in known) else texts | {""}))
        groups = tuple(map(group_of, self.instructions)) if group_of else self.instructions
        self.tasks = tuple(sorted(set(groups)))
        place = {group: i for i, group in enumerate(self.tasks)}
        self._task = np.array([place[group] for group in groups], dtype=np.int64)
        self._has = {str(vector): common.present(vector) for vector in VECTORS}
        key = "gripper.dimension of the objective"
        grippers = gripper_dimensions(needs.grippers, common.action_dim, key, robots=common.robots)
        rows = WindowRows(self.sources, self.embodiments, self.instructions, normalizer, common, grippers)
        found = rows.kept(home)
        self._known = dict[Label, Bool[np.ndarray, " n"]]()
        self._known |= {label: found[f"known {label}"] for label in (*LABELS, "answer")}
        self._states, self._actions = found["states"], found["actions"]
        self._instruction, self._embodiment = found["instruction"], found["embodiment"]
        self._end, self._progress = found["end"], found["progress"]
        self._next_key, self._keyed = found["next_key"], found["keyed"]
        self._part, self._parts = self._numbered(parts), np.arange(len(parts))
        self.remarks = (*(line for store in stores for line in store.remarks), *unpacked(found["remarks"]))
        self._answers = Answers(stores, found["answer"], tokenizer if "answer" in needs.labels else None)
        text, mask = tokenizer.encode(self.instructions)
        warn_of_cut(tokenizer, self.instructions, mask)
        # By numpy: torch's own indexing would start a pool of threads in the loader's thread.
        self._text, self._text_mask = text.numpy(), mask.numpy()
        needed = 8 * np.ceil(self._text_mask.sum(axis=1) / 8).astype(np.int64)
        self._text_width = np.clip(needed, tokenizer.text_length, text.shape[1])

    def __len__(self) -> int:
        return len(self._end)

    def rows_of(self, source: int, episodes: Sequence[Episode]) -> Int64[np.ndarray, " _"]:
        """The windows of some episodes of a source, in order."""
        return rows_of(episodes) + self._offsets[source]

    def known(self, label: Label, windows: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of the windows have this label at their own time."""
        return self._known[label][windows]

    def having(self, label: Label, windows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " _"]:
        """Those of the windows that have this label at their own time."""
        return windows[self.known(label, windows)]

    def measurable(self, windows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " _"]:
        """Those of the windows that a policy is measured on: with actions, and of these those with an
        instruction, if any has one."""
        acting = self.having("actions", windows)
        told = self.having("text", acting)
        return told if len(told) else acting

    def before_key_frame(self, windows: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which windows have at most `horizon` actions to go until a gripper opens or closes."""
        key, last = self._next_key[windows], self._end[windows] - 1
        near = key - windows <= self._own(self.horizon, windows)
        return self._known["actions"][windows] & (key < last) & near

    def episodes_of(self, windows: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        """A number for each window that is equal exactly where the episode is: one past its last window."""
        return self._end[windows]

    def gather(self, windows: Int64[np.ndarray, " b"]) -> Batch:
        """The batch of these windows, in this order. Only copies; 64 windows take about a millisecond.

        Raises UserError where a number is no window of these sources.
        """
        if len(windows) == 0 or windows.min() < 0 or windows.max() >= len(self):
            raise UserError(f"windows: expected numbers in [0, {len(self)}), found {windows.tolist()[:8]}.")
        actions, mask = self.chunks(windows)
        later = [self._later(windows, label) for label in self.needs.futures]
        earlier = self._earlier(windows) if len(self.history) > 1 else None
        past = [] if earlier is None else [earlier[0].reshape(-1)]
        now, *then = pictures_of(
            self.sources, self._offsets, self._views.shape[1], [windows, *past, *(rows for rows, _ in later)]
        )
        history = None if earlier is None else self._moments(*earlier, then.pop(0))
        return Batch(
            observation=self._observation(windows, now, history),
            actions=actions,
            action_mask=mask,
            instruction_id=torch.from_numpy(self._instruction[windows]),
            embodiment=torch.from_numpy(self._embodiment[windows]),
            window=torch.from_numpy(windows.astype(np.int64)),
            futures={
                label: Future(observation=self._observation(rows, images), mask=torch.from_numpy(known))
                for label, (rows, known), images in zip(self.needs.futures, later, then, strict=True)
            },
            later_states=self._later_states(windows) if self.needs.states else None,
            progress=torch.from_numpy(self._progress[windows]),
            task_id=torch.from_numpy(self._task[self._instruction[windows]]),
            source=self._source(windows) if len(self._parts) > 1 else None,
            **self._answers.of(windows),
        )

    def _numbered(self, parts: Sequence[tuple[int, Sequence[Episode]]]) -> Int16[np.ndarray, " _"]:
        """The part that each window is of, -1 for none; nothing where there is one."""
        numbers = np.full(len(self) if len(parts) > 1 else 0, -1, np.int16)
        for number, (source, episodes) in enumerate(parts if len(parts) > 1 else ()):
            numbers[self.rows_of(source, episodes)] = number
        return numbers

    def _source(self, windows: Int64[np.ndarray, " b"]) -> Bool[Tensor, "b k"]:
        return torch.from_numpy(self._part[windows][:, None] == self._parts)

    def chunks(
        self, windows: Int64[np.ndarray, " n"]
    ) -> tuple[Float[Tensor, "n t a"], Bool[Tensor, "n t a"]]:
        """The normalised actions and masks of these windows alone, without their pictures."""
        end = self._end[windows]
        steps = windows[:, None] + np.arange(self.horizon)
        rows = np.minimum(steps, end[:, None] - 1)
        inside = (steps < end[:, None]) & self._known["actions"][rows]
        if self._paces is not None:
            inside &= steps < (windows + self._own(self.horizon, windows))[:, None]
        found = self._actions[rows]
        if self._relative is not None:
            found, known = self._relative.chunks(rows, windows)
            inside &= known[:, None]
        actions = found * inside[..., None]
        mask = np.broadcast_to(inside[..., None], actions.shape).copy()
        if (has := self._has["action"]) is not None:
            mask &= np.asarray(has[self._embodiment[windows]])[:, None]
        return torch.from_numpy(actions), torch.from_numpy(mask)

    def _own(self, steps: int, windows: Int64[np.ndarray, " n"]) -> int | Int64[np.ndarray, " n"]:
        """So many steps of the highest rate, in steps of each window's own source."""
        if self._paces is None:
            return steps
        each = np.array([in_own_steps(steps, pace) for pace in self._paces], np.int64)
        return each[np.searchsorted(self._offsets, windows, side="right") - 1]

    def masked_share(self, windows: Int64[np.ndarray, " n"]) -> float:
        """Which share of the actions of the chunks of these windows is masked, of those that have actions."""
        acting = self.having("actions", windows)
        inside = np.minimum(self._end[acting] - acting, self._own(self.horizon, acting))
        return 1 - float(inside.mean()) / self.horizon if len(acting) else 1.0

    def _earlier(
        self, windows: Int64[np.ndarray, " b"]
    ) -> tuple[Int64[np.ndarray, "b m"], Bool[np.ndarray, "b m"]]:
        """The rows of the earlier moments of each window, and whether they are in the episode."""
        rows = np.stack([windows + self._own(k, windows) for k in self.history[:-1]], axis=1)
        inside = (rows >= 0) & (self._end[np.maximum(rows, 0)] == self._end[windows][:, None])
        return np.where(inside, rows, windows[:, None]), inside

    def _moments(
        self,
        rows: Int64[np.ndarray, "b m"],
        inside: Bool[np.ndarray, "b m"],
        images: UInt8[np.ndarray, "k v 3 s s"],
    ) -> History:
        shown = self._shown(rows.reshape(-1)).reshape(*rows.shape, -1) & inside[..., None]
        return History(
            images=torch.from_numpy(images.reshape(*rows.shape, *images.shape[1:])),
            image_mask=torch.from_numpy(shown),
            state=torch.from_numpy(self._states[rows]),
            state_mask=torch.from_numpy(inside & self._known["state"][rows]),
        )

    def _later(
        self, windows: Int64[np.ndarray, " b"], label: FutureLabel
    ) -> tuple[Int64[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
        """The row of this later picture of each window, and whether it is in the episode."""
        end = self._end[windows]
        later = end - 1 if label == "last" else windows + self._own(label, windows)
        # A pair is no episode of a robot that ends later.
        mask = self._embodiment[windows] >= 0 if label == "last" else later < end
        return np.minimum(later, end - 1), mask

    def _later_states(self, windows: Int64[np.ndarray, " b"]) -> LaterStates:
        found = [self._later_state(windows, label) for label in self.needs.states]
        rows, mask = (np.stack(columns, axis=1) for columns in zip(*found, strict=True))
        return LaterStates(
            labels=self.needs.states, values=torch.from_numpy(self._states[rows]), mask=torch.from_numpy(mask)
        )

    def _later_state(
        self, windows: Int64[np.ndarray, " b"], label: StateLabel
    ) -> tuple[Int64[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
        """The row of this later state of each window, and whether it is in the episode and known."""
        end = self._end[windows]
        named = {"last": end - 1, "next_key": self._next_key[windows]}
        at = windows + self._own(label, windows) if isinstance(label, int) else named[label]
        row = np.minimum(at, end - 1)
        mask = (at < end) & self._known["state"][row]
        # The gripper's command tells where the key frames are.
        return row, mask & self._keyed[windows] if label == "next_key" else mask

    def targets(
        self, windows: Int64[np.ndarray, " n"], needs: DataNeeds
    ) -> tuple[Bool[np.ndarray, " n"], dict[str, Bool[np.ndarray, " n"]]]:
        """Which windows have the labels that a term needs; and which have each of its later targets as well,
        by words such as "+4" and "last"."""
        known = np.ones(len(windows), dtype=bool)
        for label in needs.labels:
            known &= self.known(label, windows)
        later = {f"+{k}": windows + self._own(k, windows) < self._end[windows] for k in needs.offsets}
        if "last" in needs.futures and any(source.store.is_pairs for source in self.sources):
            later["last picture"] = self._embodiment[windows] >= 0
        later |= {
            f"+{label}" if isinstance(label, int) else label: self._later_state(windows, label)[1]
            for label in needs.states
        }
        return known, {name: known & mask for name, mask in later.items()}

    def _observation(
        self,
        rows: Int64[np.ndarray, " b"],
        images: UInt8[np.ndarray, "b v 3 s s"],
        history: History | None = None,
    ) -> Observation:
        ids = self._instruction[rows]
        width = self._text_width[ids].max()
        return Observation(
            images=torch.from_numpy(images),
            image_mask=torch.from_numpy(self._shown(rows)),
            text=torch.from_numpy(self._text[:, :width][ids]),
            text_mask=torch.from_numpy(self._text_mask[:, :width][ids]),
            state=torch.from_numpy(self._states[rows]),
            state_mask=torch.from_numpy(self._known["state"][rows]),
            history=history,
            robots=robots_in(self._embodiment[rows], self._has) if len(self.embodiments) > 1 else None,
        )

    def _shown(self, rows: Int64[np.ndarray, " b"]) -> Bool[np.ndarray, "b v"]:
        """Which views these rows have."""
        return self._views[np.searchsorted(self._offsets, rows, side="right") - 1]

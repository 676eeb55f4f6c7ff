"""What the sources of a config use of their data sets: episodes and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from tutti.data.conventions.config import KEPT, CanonicalConfig
from tutti.data.conventions.slots import AUTO, assign, check_same, slots_of_robot
from tutti.data.conventions.store import apply, check_one_form, check_rotations_named, convention_of
from tutti.data.embodiments import CommonSpec, common_spec
from tutti.data.episodes import (
    ALL_USED,
    VECTORS,
    Episode,
    Episodes,
    EpisodeStore,
    StoreSpec,
    Use,
    Vector,
    mask_of,
    texts_of,
)
from tutti.data.formats.errors import data_error
from tutti.data.sources.config import SourceConfig, names_of, open_together
from tutti.data.split import GroupOf, are_held_out, episodes_at, pair_is_held_out
from tutti.durations import every_pace, most_steps
from tutti.errors import UserError
from tutti.types import LABELS, DataNeeds, Label


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a source uses of its data set: labels, and which episodes. Several parts may be of one store,
    which is opened once, decoded once and split once; no two train on the same episode.

    `name` is the source's own, other than the others'; `weight` is 1 until it is decided, where it is auto.
    `named` says which episodes of the data set the source names, all where it is None, before the split.
    `any_rate`: its steps a second may be other than those of the others.
    """

    store: EpisodeStore
    name: str = ""
    weight: float = 1.0
    labels: Mapping[Label, Use] = field(default_factory=lambda: ALL_USED)
    named: Bool[np.ndarray, " e"] | None = None
    places: slice | None = None
    any_rate: bool = False
    training: Sequence[Episode] = ()
    held_out: Sequence[Episode] = ()

    def own(self) -> Bool[np.ndarray, " e"]:
        """Which of the episodes of its store the source names."""
        numbers = Episodes.of(self.store.episodes).numbers
        return np.ones(len(numbers), bool) if self.named is None else self.named[numbers]

    @property
    def without(self) -> tuple[Label, ...]:
        """The labels that are not used."""
        return tuple(label for label in LABELS if not self.labels[label])

    def texts(self, episodes: Iterable[Episode]) -> set[str]:
        """The distinct instructions of these of its episodes that the model is told, normalised."""
        return texts_of(self.store, episodes) - {""} if self.labels["text"] else set()


def open_parts(
    sources: Sequence[SourceConfig],
    canonical: CanonicalConfig = KEPT,
    *,
    canonical_slots: bool = False,
    home: Path | None = None,
) -> list[Part]:
    """Opens and checks the data sets, each folder once: sources that read the same of it share a store. Their
    numbers are brought to the `canonical` form, and get their canonical slots if these are asked for. Below
    `home`, the folder of caches, large ones have an index."""
    groups: dict[Any, list[int]] = {}
    for number, source in enumerate(sources):
        groups.setdefault(source.reads, []).append(number)
    parts: dict[int, Part] = {}
    names = names_of(sources)
    for numbers in groups.values():
        store = open_together([sources[number] for number in numbers], home)
        if store.is_pairs and (told := {sources[n].resample for n in numbers} - {"auto"}):
            raise data_error(
                f"{store.name}: sources.resample is {told.pop()}, but picture-text pairs have no time.",
                cure="leave it out.",
            )
        first = sources[numbers[0]]
        said = convention_of(store, first.conventions, canonical_slots=canonical_slots)
        store = apply(store, said, canonical, first.target)
        if canonical_slots and not store.is_pairs:
            store.slots, lines = assign(store, AUTO if first.slots == "auto" else first.slots)
            store.remarks += lines
        for number, named in zip(numbers, store.parts, strict=True):
            source = sources[number]
            labels, places = dict(source.chosen.labels), source.places
            weight = 1.0 if source.weight == "auto" else source.weight
            if store.is_pairs:
                labels |= {"actions": False, "state": False}
            parts[number] = Part(
                store=store,
                name=names[number],
                weight=weight,
                labels=labels,
                named=named,
                places=places,
                any_rate=source.resample != "auto",
            )
    return [parts[number] for number in range(len(sources))]


def stores_of(parts: Iterable[Part]) -> list[EpisodeStore]:
    """The data sets in the order of the sources, each once."""
    return list(dict.fromkeys(part.store for part in parts))


def robots(parts: Sequence[Part]) -> list[Part]:
    """The parts that are recordings of a robot, without picture-text pairs. Raises: UserError if none is."""
    if found := [part for part in parts if not part.store.is_pairs]:
        return found
    raise UserError(
        f"data.sources: {', '.join(store.name for store in stores_of(parts))}: picture-text pairs alone. The "
        "policy learns from actions, which these do not have.\n  cure: name a robot's data set beside them."
    )


def slots(store: EpisodeStore, spec: StoreSpec) -> tuple[int, ...] | None:
    """Which of the views that the sources have in common those of a store are; None: all, in order. The
    picture of a pair is the view of its name, else the first."""
    if store.views == spec.views and not store.is_pairs:
        return None
    return tuple(spec.views.index(view) if view in spec.views else 0 for view in store.views)


def used_vectors(store: EpisodeStore, labels: Mapping[Label, Use]) -> list[Vector]:
    """Of states and actions those that are used and that the store has; a state without numbers is one."""
    return [
        vector
        for vector, label in VECTORS.items()
        if labels[label] is True or (labels[label] and getattr(store.spec, f"{vector}_dim"))
    ]


RATES = (
    "bring them to one rate by sources.resample=RATE, or give sources.resample: keep to each "
    "(docs/how-to/rates.md)."
)
"""What to do about rates that differ."""


def check_compatible(parts: Sequence[Part]) -> CommonSpec:
    """The same cameras in all sources of one embodiment, and the same sizes where they are used; one rate in
    all sources, unless all may have any. Gives what they have in common, the rate is the highest. Pairs of
    picture and text have none of these, and fit.

    Raises: UserError for others, for numbers of one embodiment in other conventions, or if none has actions.
    """
    groups: dict[str, list[Part]] = {}
    for part in robots(parts):
        groups.setdefault(part.store.spec.embodiment, []).append(part)
    check_rotations_named([store for group in groups.values() for store in stores_of(group)])
    every = [store for group in groups.values() for store in stores_of(group) if store.slots]
    check_same(every)
    spec = common_spec(
        {name: _of_one_robot(group) for name, group in groups.items()},
        {
            name: slots_of_robot((part.store, used_vectors(part.store, part.labels)) for part in group)
            for name, group in groups.items()
        }
        if every
        else None,
    )
    first = spec.own[spec.embodiment]
    for own in spec.own.values():
        if own.fps != first.fps and not all(part.any_rate for group in groups.values() for part in group):
            raise UserError(
                f"data.sources: the robots {spec.embodiment} and {own.embodiment} differ in fps.\n"
                f"  expected: {first.fps}\n  found:    {own.fps}\n  cure: {RATES}"
            )
    if not spec.action_dim:
        raise UserError("data.sources: no source has actions, which the policy learns from; one must.")
    if len(groups) > 1 and any(s.converted and s.converted.conversion.relative for s in stores_of(parts)):
        raise UserError(
            "data.canonical.actions is relative, which is learned of one robot, but the sources have "
            f"{len(groups)}: {', '.join(groups)}.\n  cure: set data.canonical.actions to delta or absolute."
        )
    return spec


def _of_one_robot(parts: Sequence[Part]) -> StoreSpec:
    """What the sources of one embodiment have in common: sizes and names of the labels are those of the first
    that uses them."""
    check_one_form(stores_of(parts))
    first = parts[0].store
    unknown = dict.fromkeys(first.spec.dimensions(), ())
    spec = replace(first.spec, views=first.views, state_dim=0, action_dim=0, **unknown)
    origin: dict[str, EpisodeStore] = dict.fromkeys(("views", "fps"), first)
    for part in parts:
        own, store = replace(part.store.spec, views=part.store.views), part.store
        used = used_vectors(store, part.labels)
        for what in (what for what in used if f"{what}_dim" not in origin):
            origin[f"{what}_dim"] = store
            copied = {name: getattr(own, name) for name in own.dimensions() if name.startswith(what)}
            spec = replace(spec, **copied, **{f"{what}_dim": getattr(own, f"{what}_dim")})
        for key in ("views", *(f"{what}_dim" for what in used), "fps"):
            expected, value = getattr(spec, key), getattr(own, key)
            if expected == value or (key == "fps" and all(one.any_rate for one in parts)):
                continue
            cure = RATES
            if key != "fps":
                cure = (
                    "if they are different robots, name each by sources.embodiment. Else choose the same "
                    "cameras by sources.views, and leave out labels that do not fit by sources.labels."
                )
            raise UserError(
                f"data.sources: {store.name} and {origin[key].name} differ in {key}; both are of the robot "
                f"{spec.embodiment}.\n  expected: {expected}\n  found:    {value}\n  cure: {cure}"
            )
        unused = {name: () for name in own.dimensions() if not any(name.startswith(what) for what in used)}
        if other := replace(own, **unused).contradiction(spec):
            named = dict.fromkeys(origin[f"{what}_dim"].name for what in used)
            raise UserError(
                f"data.sources: {' and '.join(named)} and {store.name} have {other}.\n"
                "  One number would mean two things to the model.\n"
                "  cure: bring the numbers of one set into the order and units of the other, or correct its "
                "names in meta/info.json."
            )
    return replace(spec, fps=max(part.store.spec.fps for part in parts))


def split_parts(
    parts: Sequence[Part], fraction: float, seed: int, count: int | None, group_of: GroupOf | None
) -> list[Part]:
    """The parts with their episodes: those held out and those to train on.

    One split over all stores (`are_held_out`), by the episodes' identities; what is trained on does not
    change it. A held-out episode that several parts name belongs to the one with the most labels. Of store
    number i each task's order, of which a part takes its `places` or else the first `count`, is drawn with
    `seed` + i. Picture-text pairs are no episodes of a task: they have a split of their own
    (`pair_is_held_out`), which leaves that of the others as it is, and `count` is not for them.

    Raises: UserError if a task has too few episodes, a part none to train on, or two would train on one.
    """
    stores = stores_of(parts)
    recorded = [store for store in stores if not store.is_pairs]
    every = {store: Episodes.of(store.episodes) for store in stores}
    episodes = Episodes.joined([every[store] for store in recorded])
    identities = [identity for store in recorded for identity in store.identities]
    flags = iter(are_held_out(episodes, identities, fraction, seed, group_of))
    held = {store: np.array([next(flags) for _ in every[store].starts], bool) for store in recorded}
    for store in (store for store in stores if store.is_pairs):
        held[store] = np.array([pair_is_held_out(one, fraction, seed) for one in store.identities], bool)
    found: list[Part] = []
    trainer = {store: np.full(len(every[store]), -1) for store in stores}
    for number, part in enumerate(parts):
        store, places = part.store, part.places or slice(0, None if part.store.is_pairs else count)
        training = every[store].where(part.own() & ~held[store])
        if places != slice(0, None):
            said = f"data.episodes_per_task is {count}"
            if part.places:
                last = "" if places.stop is None else places.stop - 1
                said = f"data.sources.{number}.per_task is {places.start}-{last}"
            training = episodes_at(training, places, seed + stores.index(store), group_of, said)
        if not len(training):
            raise UserError(
                f"data.sources.{number} has nothing to train on: of {store.name} it names only episodes that "
                "are held out.\n  cure: let it name more of them, or set data.validation_fraction=0."
            )
        trained = np.isin(every[store].numbers, training.numbers)
        if (twice := trained & (trainer[store] >= 0)).any():
            place = int(np.argmax(twice))
            raise UserError(
                f"data.sources {trainer[store][place]} and {number} would both train on episode "
                f"{every[store][place].index} of {store.name}.\n  cure: give each its own episodes "
                "(sources.episodes, or sources.per_task such as 0-9 and 10-), or name the set once, with a "
                "weight."
            )
        trainer[store][trained] = number
        found.append(replace(part, training=training))
    for number in sorted(range(len(parts)), key=lambda number: len(parts[number].without)):
        own = held[store := parts[number].store] & parts[number].own()
        found[number] = replace(found[number], held_out=every[store].where(own))
        held[store] &= ~own
    return found


Labelled = Mapping[EpisodeStore, Mapping[Label, Bool[np.ndarray, " n"]]]
"""The rows of each store whose label is used, by label."""


def labelled_rows(
    store: EpisodeStore, parts: Sequence[Part], spec: CommonSpec
) -> dict[Label, Bool[np.ndarray, " n"]]:
    """The rows of a store whose label is used: that of its part to train on, or of any part that names it.

    `spec` is what the sources have in common: numbers of another size than their robot's are none.
    """
    own, every, count = [], Episodes.of(store.episodes), store.spec.num_frames
    for part in (part for part in parts if part.store is store):
        own.append((part, mask_of(every.where(part.own()), count), mask_of(part.training, count)))
    found: dict[Label, Bool[np.ndarray, " n"]] = {}
    for label in LABELS:
        rows = np.zeros(count, dtype=bool)
        for part, named, _ in own:
            rows |= named & bool(part.labels[label])
        for part, _, trained in own:
            rows &= ~(trained & (not part.labels[label]))
        found[label] = rows & store.present[label]
    robot = spec.own.get(store.spec.embodiment, spec)
    for what, label in VECTORS.items():
        dim = getattr(robot, f"{what}_dim")
        if getattr(store.spec, f"{what}_dim") != dim or (not dim and getattr(spec, f"{what}_dim")):
            found[label][:] = False
    return found


def check_lengths(parts: Sequence[Part], needs: DataNeeds, horizon: int, history: Sequence[int]) -> None:
    """Raises: UserError for a source of whose episodes none is as long as the horizon, or reaches from the
    present to the farthest later or earlier moment."""
    recorded = [part for part in parts if not part.store.is_pairs]  # pairs end at once, and are masked
    rates = [part.store.spec.fps for part in recorded]
    asked = {"future": max(needs.offsets, default=0), "data.history": history[0]}
    for part, pace in zip(recorded, every_pace(rates), strict=True):
        longest = int(Episodes.of(part.store.episodes).lengths[part.own()].max())
        most, before = (most_steps(steps, pace) for steps in (longest, longest - 1))
        for name, steps in {"data.horizon": horizon * bool(part.labels["actions"]), **asked}.items():
            if abs(steps) > (most if name == "data.horizon" else before):
                slower = f" at {part.store.spec.fps:g} a second, {most} at {max(rates):g}" * (pace != 1)
                raise UserError(
                    f"{name} is {steps}, but the longest episode of {part.store.name} has {longest} frames"
                    f"{slower}.\n"
                    "  Episodes shorter than the horizon are masked at the end, and history before the "
                    f"start, but one must reach it.\n  cure: set data.horizon to at most {most}, future "
                    "offsets and data.history below it."
                )

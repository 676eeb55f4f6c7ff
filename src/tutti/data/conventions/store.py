"""Brings the numbers of an opened data set into the form that is learned, and its chunks where relative."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from tutti.data.conventions.config import CanonicalConfig, ConventionsConfig
from tutti.data.conventions.conversion import Conversion, extremes
from tutti.data.conventions.rates import ResampledStore
from tutti.data.conventions.usual import usual_conventions
from tutti.data.episodes import VECTORS, Converted, EpisodeStore, bounds_of
from tutti.data.formats.chosen import excluding
from tutti.data.formats.errors import data_error
from tutti.data.normalize import BLOCK
from tutti.errors import UserError


def convention_of(
    store: EpisodeStore, said: ConventionsConfig | Literal["auto", "none"], *, canonical_slots: bool = False
) -> ConventionsConfig:
    """What a source says of its numbers; auto: what its format stores, with canonical slots also what layout
    and names tell."""
    if isinstance(said, ConventionsConfig):
        return said
    if said == "none":
        return ConventionsConfig()
    return usual_conventions(store) if canonical_slots else store.conventions


def apply(
    store: EpisodeStore, said: ConventionsConfig, canonical: CanonicalConfig, rate: float | None = None
) -> EpisodeStore:
    """Makes the states and actions of a store, as they are recorded, those that are learned, in place; at
    another `rate` those of a store of its own.

    Digests stay those of the recorded numbers: the same data are the same episodes, and held out alike, in
    whatever form they are learned.

    Raises: UserError naming data set, key, episode and row for conventions that do not fit the numbers.
    """
    spec = store.spec
    conversion = Conversion.of(
        said, canonical, state_dim=spec.state_dim, action_dim=spec.action_dim, name=store.name
    )
    store.converted = Converted(conversion=conversion, spec=spec)
    made = store if rate in (None, spec.fps) else ResampledStore(store, rate)
    if made is store and not conversion.changes:
        return store
    ranges = {"state": extremes(store.states), "action": extremes(store.actions)}
    made.converted = Converted(conversion=conversion, spec=spec, ranges=ranges)
    _check(store, conversion)
    if conversion.changes:
        lines = "; ".join(f"{key} {value}" for key, value in conversion.said.lines())
        made.remarks += (f"{store.name}: conventions, which are brought to one form: {lines}",)
    _ = made.number_digests
    state, action = conversion.state, conversion.action
    states = np.empty((made.spec.num_frames, state.learned_dim), np.float32)
    actions = np.empty((made.spec.num_frames, action.learned_dim), np.float32)
    done = 0
    for rows, starts in _blocks(store):
        grid = made.resampling(rows, conversion) if isinstance(made, ResampledStore) else None
        some = conversion.learn(store.states[rows], store.actions[rows], starts, grid)
        here = slice(done, done := done + len(some[0]))
        states[here], actions[here] = some
    made.states, made.actions = states, actions
    vars(made).pop("present", None)
    state_names, state_units = state.names(spec.state_names, spec.state_units)
    action_names, action_units = action.names(spec.action_names, spec.action_units)
    made.spec = replace(
        made.spec,
        state_dim=state.learned_dim,
        action_dim=action.learned_dim,
        state_names=state_names,
        state_units=state_units,
        action_names=action_names,
        action_units=action_units,
    )
    return made


def check_one_form(stores: Sequence[EpisodeStore]) -> None:
    """Raises: UserError where two data sets of one robot would be learned in different forms, so that one
    number would mean two things."""
    converted = [(store, store.converted) for store in stores if store.converted]
    for what in VECTORS:
        having = [(s.name, c.conversion) for s, c in converted if getattr(c.spec, f"{what}_dim")]
        for name, conversion in having[1:]:
            first, its, mine = having[0][0], having[0][1].described(what), conversion.described(what)
            for key in {**its, **mine}:
                here, there = mine.get(key, ("nothing", False)), its.get(key, ("nothing", False))
                if here[0] != there[0] and (here[1] or there[1] or (key in mine and key in its)):
                    raise data_error(
                        f"data.sources: {first} and {name} have other conventions of the {what}, at the "
                        f"{key} as it is learned.",
                        expected=f"{there[0]}, as in {first}",
                        found=f"{here[0]} is said of {name}",
                        cure="say what each is by sources.conventions (one that is 0 closed to 1 open too), "
                        "and bring rotations and actions to one form by data.canonical.",
                    )


def check_rotations_named(stores: Sequence[EpisodeStore]) -> None:
    """Raises: UserError where no data set names a rotation although all are to be of one form."""
    converted = [store.converted.conversion for store in stores if store.converted]
    asked = {conversion.canonical.rotation for conversion in converted}
    if asked - {"keep"} and not any(conversion.turns for conversion in converted):
        raise data_error(
            f"data.canonical.rotation is {', '.join(asked)}, but no source names a rotation.",
            expected="sources.conventions.state.rotation or .action.rotation",
            cure="name dimensions and form of each, or leave data.canonical.rotation out.",
        )


def _blocks(store: EpisodeStore) -> Iterator[tuple[slice, Int64[np.ndarray, " e"]]]:
    """Rows of whole episodes, about `BLOCK` at a time since they are taken to float64, and where episodes
    begin among them."""
    begin, starts = 0, list[int]()
    for number, episode in enumerate(store.episodes, 1):
        starts.append(episode.start - begin)
        if episode.end - begin >= BLOCK or number == len(store.episodes):
            yield slice(begin, episode.end), np.array(starts, np.int64)
            begin, starts = episode.end, []


def _check(store: EpisodeStore, conversion: Conversion) -> None:
    """Raises: UserError for the first number that cannot be what is said of it."""
    found: dict[str, tuple[Bool[np.ndarray, " n"], np.ndarray, str]] = {}
    for rows, _ in _blocks(store):
        for wrong, key, values, expected in conversion.faults(store.states[rows], store.actions[rows]):
            everywhere = found.setdefault(
                key, (np.zeros(len(store.states), bool), values[np.argmax(wrong)], expected)
            )[0]
            everywhere[rows] = wrong
    for key, (wrong, first, expected) in found.items():
        raise _fault(store, np.flatnonzero(wrong), key, first, expected)


def _fault(
    store: EpisodeStore, rows: Int64[np.ndarray, " w"], key: str, found: np.ndarray, expected: str
) -> UserError:
    starts = bounds_of(store.episodes)[0]
    bad = [store.episodes[number] for number in np.unique(np.searchsorted(starts, rows, side="right") - 1)]
    episode = bad[0]
    few = len(bad) < len(store.episodes)
    leave = f" Or leave the episode{'s' * (len(bad) > 1)} out: {excluding([e.index for e in bad])}" * few
    return data_error(
        f"{key} does not fit episode {episode.index}, row {rows[0] - episode.start} of it; {len(rows):,} "
        "such rows in all.",
        expected=expected,
        found=", ".join(f"{value:.6g}" for value in found),
        cure=f"correct sources.conventions (none reads the numbers as they are), or the numbers.{leave}",
    )

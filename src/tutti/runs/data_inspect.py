"""Prints what `tutti data inspect` found in a data set, and writes its contact sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

from tutti.config.run_config import load_config
from tutti.data.checks.inspection import Inspected, contact_sheet
from tutti.data.checks.recordings import some
from tutti.data.episodes import PAIRS, VECTORS
from tutti.data.formats.interface import Feature
from tutti.data.formats.wanted import in_words
from tutti.data.normalize import EmbodimentStats
from tutti.data.sources import check_compatible, fit_normalizer, stores_of
from tutti.dimensions import Dimensions, Embodiment
from tutti.errors import UserError
from tutti.evaluation.open_loop import task_by_text
from tutti.report.formatting import duration
from tutti.runs.build import with_steps
from tutti.runs.terminal import print_line, print_table
from tutti.storage.files import write_atomically
from tutti.storage.reading import shown

ROLES = ("views", "state", "action", "text", "flip", "lag")
FEATURES, NAMES, DIMENSIONS, TEXTS = 60, 12, 64, 5
"""At most so many features, names of a vector, dimensions and instructions are printed."""


def print_inspected(inspected: Inspected) -> None:
    """What was found, what it is taken for and why, and the config to train on it."""
    for line in _lines(inspected):
        print_line(line)
    if inspected.problem:
        print_line(f"! It cannot be opened as it is: {inspected.problem}")
    roles = inspected.found.roles
    if not roles.views or not (roles.action or inspected.format.is_pairs):
        return
    print_line("To train on it, save this as mine.yaml; then: tutti data check mine.yaml\n")
    print_line(inspected.config())


def print_robots(names: Sequence[str], robots: Sequence[Embodiment]) -> None:
    """Of several robots that differ: their views, and where their numbers lie in the model's vectors."""
    heads = ("robot", "views", "state", "in the model", "action", "in the model")
    rows = [
        (name, ", ".join(one.views), *_spans(one.state_slots), *_spans(one.action_slots))
        for name, one in zip(names, robots, strict=False)
    ]
    if rows:
        print_table("Robots: how many numbers each has, and their places in the model's", heads, rows)


def print_robot(name: str, robot: Embodiment, stats: EmbodimentStats, model: Dimensions) -> None:
    """Each number of one robot: what it is, its place in the `model`'s vector, and between what it lies."""
    rows = list[tuple[str, ...]]()
    for vector in VECTORS:
        slots, own = getattr(robot, f"{vector}_slots"), getattr(stats, vector)
        called, units = getattr(robot, f"{vector}_names"), getattr(robot, f"{vector}_units")
        there = getattr(model, f"{vector}_names")
        for number, place in enumerate(slots[:DIMENSIONS]):
            unit = f" ({units[number]})" if units and units[number] else ""
            text = (called[number] if called else f"{vector}[{number}]") + unit
            spread = (f"{quantile[number]:.5g}" for quantile in (own.q01, own.q99))
            where = f"{place} {there[place]}" if there not in ((), called) else str(place)
            rows.append((f"{vector} {number}", text, where, *spread))
        rows += [(line.strip(), "", "", "", "") for line in _more(len(slots), DIMENSIONS, "numbers")]
    title = f"Robot {name}: views {', '.join(robot.views)}"
    print_table(title, ("its own", "what", "in the model", "1 %", "99 %"), rows)


def _spans(slots: Sequence[int]) -> tuple[str, str]:
    """How many places, and which, as "0-2, 5"."""
    begins = [n for n, place in enumerate(slots) if not n or place != slots[n - 1] + 1]
    runs = [(slots[begin], slots[end - 1]) for begin, end in pairwise([*begins, len(slots)])]
    said = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return str(len(slots)), said or "-"


def print_sources(path: str) -> None:
    """What the sources of a config have in common, and each number of each robot with its statistics."""
    config = load_config(path)
    parts = config.data.open()
    spec = check_compatible(parts)
    config = with_steps(config, spec.fps, say=False)
    data = config.data
    split = data.split(parts, task_by_text(config.record.spec))
    for store in stores_of(parts):
        what = "picture-text pairs" if store.is_pairs else f"episodes of the robot {store.spec.embodiment}"
        for line in (f"{store.name}: {store.format}, {len(store.episodes):,} {what}", *store.remarks):
            print_line(line)
    stats = fit_normalizer(split, spec, data.normalization, data.horizon).stats
    for name, robot in zip(spec.own, spec.each, strict=True):
        print_robot(name, robot, stats[name], spec)


def write_sheet(inspected: Inspected, path: Path) -> None:
    """Writes a PNG with some pictures of every view. Raises: UserError where they cannot be read."""
    if inspected.rows is None:
        raise UserError(f"{path}: there are no pictures to show. {inspected.problem}")
    content = BytesIO()
    contact_sheet(inspected.rows).save(content, format="PNG")
    write_atomically(path, content.getvalue())


def _lines(inspected: Inspected) -> Iterator[str]:
    found, roles = inspected.found, inspected.found.roles
    lengths = sorted(found.lengths.tolist())
    rate = "at a rate that is not stored"
    if found.fps is not None:
        rate = f"{duration(sum(lengths) / found.fps)} at {found.fps:g} a second"
    robot = f"; robot {found.embodiment}" * (not inspected.format.is_pairs)
    yield f"{inspected.name}: {inspected.format.name}, by {inspected.reason}{robot}"
    if inspected.format.is_pairs:
        yield f"  {len(lengths):,} {PAIRS}"
    elif lengths:
        spread = f"{lengths[0]:,} to {lengths[-1]:,} steps, {sum(lengths):,} in all"
        yield f"  {len(lengths):,} episodes of {spread}, {rate}"
    yield "  features"
    for key, feature in list(found.features.items())[:FEATURES]:
        yield f"    {feature.kind:8} {key}{_size(feature) * (not inspected.format.is_pairs)}"
    yield from _more(len(found.features), FEATURES, "features")
    yield "  taken for"
    for field in ("views", "text", "flip") if inspected.format.is_pairs else ROLES:
        why = f"   guessed: {roles.reasons[field]}" if field in roles.reasons else ""
        yield f"    {field:8} {in_words(getattr(roles, field))}{why}"
    yield from (f"    {key:8} {why}" for key, why in roles.reasons.items() if not hasattr(roles, key))
    if not inspected.format.is_pairs:
        yield f"  conventions{': none are stored; sources.conventions says them' * (not found.told_by)}"
    for key, value in found.conventions.lines():
        yield f"    {key:15} {value}   {found.told_by[key]}"
    if inspected.store is not None:
        texts = [shown(text, 80) for text in inspected.instructions]
        yield f"  instructions: {len(texts):,}{': ' * bool(texts)}{', '.join(some(texts, TEXTS))}"
    for vector in VECTORS:
        ranges = inspected.ranges(vector)
        if ranges:
            yield f"  {vector}, smallest and largest value"
        for number, (name, low, high) in enumerate(ranges[:DIMENSIONS]):
            yield f"    {number:3} {name:32} {low:12.5g} {high:12.5g}"
        yield from _more(len(ranges), DIMENSIONS, "dimensions")
    if inspected.store is not None and (read := len(inspected.store.episodes)) < len(lengths):
        yield f"  instructions and values are those of {read:,} episodes, evenly spread"
    yield from (f"  {remark}" for remark in found.remarks)


def _size(feature: Feature) -> str:
    size = " x ".join(map(str, feature.shape))
    names = ", ".join(some(feature.names, NAMES))
    return f"   {size}" * bool(size) + f"   ({names})" * bool(names)


def _more(count: int, most: int, what: str) -> Iterator[str]:
    if count > most:
        yield f"    and {count - most} more {what}"

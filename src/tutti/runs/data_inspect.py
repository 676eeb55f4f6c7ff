"""Prints what `tutti data inspect` found in a data set, and writes its contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from tutti.data.checks.inspection import Inspected, contact_sheet
from tutti.data.checks.recordings import some
from tutti.data.episodes import PAIRS, VECTORS
from tutti.data.formats.interface import Feature
from tutti.data.formats.wanted import in_words
from tutti.errors import UserError
from tutti.report.formatting import duration
from tutti.runs.terminal import print_line
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
    yield f"{inspected.path}: {inspected.format.name}, by {inspected.reason}{robot}"
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

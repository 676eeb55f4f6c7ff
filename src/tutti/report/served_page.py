"""The page of `tutti serve --page`: what a policy saw last, what it answered, and how fast."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tutti.report.blocks import (
    Block,
    Cell,
    Charts,
    Column,
    Gallery,
    Note,
    Page,
    Picture,
    Section,
    Tile,
    column,
    render,
    table,
)
from tutti.report.live import with_refresh
from tutti.report.svg.charts import Series, line_chart
from tutti.report.svg.drawing import Chart
from tutti.serving.observation import pictures, shortest, state_vector

if TYPE_CHECKING:
    from tutti.serving.server import Answered, PolicyServer

MAX_CURVES, MAX_EDGE = 32, 320
SECONDS = 1.0
"""Between two looks of the page for news."""


def served_page(server: PolicyServer) -> str:
    """The whole page, as things stand. It fetches nothing but itself, and can ask the policy nothing."""
    traffic, last, state = server.traffic, server.last, server.traffic.state
    waiting = "No observation has been answered yet."
    parts = {"Last observation": _observation, "Last chunk": _chunk, "Latency": _latency}
    sections = [
        Section(
            id=title.lower().replace(" ", "-"),
            title=title,
            blocks=[] if last is None else make(server, last),
            missing=waiting if last is None else "",
        )
        for title, make in parts.items()
    ]
    tiles = [
        Tile(value=f"{traffic.answers:,}", name="answers"),
        Tile(value=f"{1000 * traffic.percentile(50.0):.1f} ms", name="latency, p50"),
        Tile(value=f"{1000 * traffic.percentile(99.0):.1f} ms", name="latency, p99"),
        Tile(value=f"{traffic.clients:,}", name="clients connected", small=f"of {server.limits.clients:,}"),
        Tile(
            value=f"{traffic.mistakes:,}",
            name="observations not usable",
            small=f"{traffic.failures:,} failures, {traffic.refused:,} refused",
        ),
    ]
    page = Page(
        kicker="Tutti: policy server",
        name="Waiting for a robot" if last is None else f"\u201c{last.seen.instruction[:200]}\u201d",
        result="",
        tiles=tiles,
        notes=[],
        warnings=list(last.notes) if last else [],
        sections=sections,
        footer="Served by tutti serve --page, to be read only: it follows the last answer.",
    )
    return with_refresh(render(page), state, SECONDS)


def _observation(server: PolicyServer, last: Answered) -> list[Block]:
    spec = server.policy.spec
    shown = [
        Picture(png=_png(one), caption=f"{name}, {one.shape[1]} x {one.shape[0]} pixels")
        for name, one in zip(shortest(spec.views), pictures(last.seen.images, spec.views), strict=True)
    ]
    blocks: list[Block] = [Gallery(title="Pictures", pictures=shown)]
    if spec.state_dim and last.seen.state is not None:
        state = state_vector(last.seen.state, spec)
        rows: list[tuple[str, str, float]] = [
            (_name(spec.state_names, n), spec.state_units[n] if spec.state_units else "", value)
            for n, value in enumerate(state.tolist())
        ]
        columns: list[Column[tuple[str, str, float]]] = [
            column("state", lambda row: row[0]),
            column("value", lambda row: f"{row[2]:.4g}"),
            column("unit", lambda row: Cell(text=row[1], mood="text")),
        ]
        blocks.append(table(rows, columns))
    return blocks


def _png(picture: np.ndarray) -> bytes:
    """Of the picture, at most `MAX_EDGE` pixels along an edge."""
    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((MAX_EDGE, MAX_EDGE))
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _chunk(server: PolicyServer, last: Answered) -> list[Block]:
    """A curve for each dimension: they have units of their own, and none is told by its colour alone."""
    spec = server.policy.spec
    steps = np.arange(len(last.actions))
    charts = [
        _alone(
            _name(spec.action_names, n),
            Series(name="action", xs=steps.tolist(), ys=last.actions[:, n].tolist(), colour="c1"),
            unit=(spec.action_units[n] if spec.action_units else "") or "value",
            along=f"control step, {spec.fps:g} a second",
        )
        for n in range(min(spec.action_dim, MAX_CURVES))
    ]
    blocks: list[Block] = [Charts(charts=charts, small=True)]
    if spec.action_dim > MAX_CURVES:
        blocks.append(Note(text=f"{spec.action_dim - MAX_CURVES} more dimensions are left out."))
    return blocks


def _latency(server: PolicyServer, _: Answered) -> list[Block]:
    recent = server.traffic.recent
    first = server.traffic.answers - len(recent) + 1
    curve = Series(
        name="latency",
        xs=list(range(first, first + len(recent))),
        ys=[1000 * seconds for seconds in recent],
        colour="c1",
        kind="points" if len(recent) < 20 else "line",
    )
    title = "From the observation's arrival to its answer"
    return [Charts(charts=[_alone(title, curve, unit="ms", along="answer", zero=True)])]


def _alone(title: str, one: Series, *, unit: str, along: str, zero: bool = False) -> Chart:
    """A chart of one line, which needs no legend."""
    chart = line_chart(title, [one], unit=unit, log=False, zero=zero, along=along)
    return replace(chart, legend=[])


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if names else f"dimension {number}"

"""A small histogram: how often each value of one dimension occurs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tutti.report.formatting import plain
from tutti.report.svg.drawing import Chart, Scale, drawing, hover, line, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 280, 116, 6, 274, 6, 92
BINS, LEAST_HEIGHT = 40, 1.5


def histogram(title: str, values: Float[np.ndarray, " n"], help: str = "") -> Chart:
    """Bars over the range of `values`; one value alone is one bar. A bin that is not empty can be seen, so a
    spike far outside shows."""
    counts, edges = np.histogram(values, BINS)
    across = Scale(low=float(edges[0]), high=float(edges[-1]), start=LEFT, end=RIGHT)
    most, parts = max(1, int(counts.max(initial=0))), list[str]()
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            height = max(LEAST_HEIGHT, (BOTTOM - TOP) * count / most)
            x, end = across.pixel(low), across.pixel(high)
            bar = f'<rect class="bar c1" x="{x:.1f}" y="{BOTTOM - height:.1f}" '
            bar += f'width="{max(1.0, end - x - 0.6):.1f}" height="{height:.1f}"/>'
            parts.append(hover(f"{plain(low)} to {plain(high)}: {count:,}", bar))
    lowest, highest = (
        plain(float(end), 4) for end in ((values.min(), values.max()) if len(values) else (0, 0))
    )
    parts += [line("axis", (LEFT, BOTTOM), (RIGHT, BOTTOM)), text("tick", LEFT, BOTTOM + 15, lowest)]
    parts.append(text("tick end", RIGHT, BOTTOM + 15, highest))
    svg = drawing((WIDTH, HEIGHT), f"{title}: {lowest} to {highest}", parts)
    return Chart(title=title, help=help, svg=svg)

"""docs/pictures/pipeline.svg: data, the four parts of the model, and which part each term's gradient reaches.

    python benchmarks/picture_pipeline.py                     # of configs/demo.yaml
    python benchmarks/picture_pipeline.py CONFIG --to FILE    # of another config, built at its sizes

Everything in it is asked of the model and the objective that the config builds: parts, parameters, tokens,
kinds, heads; a dot is where the term has a gradient, taken on a batch of noise. The same config gives the
same bytes. It lies on a card of its own, which can be read on a light and on a dark page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tables import prints_user_errors

from tutti.config.run_config import RunConfig, load_config
from tutti.data.formats.detect import FORMATS
from tutti.models.describe import describe
from tutti.planning.footprint import dummy_batch
from tutti.report.svg.drawing import circle, drawing, text
from tutti.runs.build import expected_spec
from tutti.runs.terminal import print_line
from tutti.storage.files import write_atomically
from tutti.training.diagnostics.reach import reach

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "pipeline.svg"
WIDTH, ROWS, ROW = 880, 280, 46
"""Pixels: of the picture, the middle of the first term's row, and from row to row."""
BOXES = {
    "vision": (272, 44, 126, 62),
    "language": (368, 130, 134, 62),
    "fusion": (520, 44, 104, 148),
    "action": (652, 87, 116, 62),
}
"""x, y, width and height; each part's lane leaves it at the middle of its lower edge."""
TITLES = {
    "vision": "Vision encoder",
    "language": "Language encoder",
    "fusion": "Fusion",
    "action": "Action decoder",
}
SUM = 836
STYLE = (
    "text{font:13px sans-serif;fill:#20262e;text-anchor:middle} .head{font-weight:600;font-size:14px} "
    ".small{font-size:12px;fill:#5b6470} .left{text-anchor:start} .box{fill:#fff;stroke:#b9c0c8} "
    ".part{fill:#e9f2fa;stroke:#1f6fb2;stroke-width:1.5} path{fill:none} "
    ".flow{stroke:#5b6470;stroke-width:1.6;marker-end:url(#grey)} .row{stroke:#b9c0c8} "
    ".back{stroke:#c2571a;stroke-width:2.2;stroke-linejoin:round} .up{marker-end:url(#orange)} "
    ".dots circle{fill:#c2571a} .sum{fill:#fdf1e8;stroke:#c2571a;stroke-width:2} .said{fill:#a84612}"
)
MARKERS = "".join(
    f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{size}" markerHeight="{size}" '
    f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" style="fill:{colour}"/></marker>'
    for name, size, colour in (("grey", 9, "#5b6470"), ("orange", 12, "#c2571a"))
)


def thousands(number: int) -> str:
    """As in "469 k" or "1.1 M"."""
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def draw(config: RunConfig) -> str:
    """The picture as SVG.

    Raises: UserError if the model cannot be built.
    """
    spec = expected_spec(config)
    torch.manual_seed(config.seed)
    model = config.model.build(spec)
    objective = config.objective.build(model)
    table = reach(model, objective, dummy_batch(spec, 8, config.objective.needs()))
    reached_by = {
        term: [part for part in BOXES if norms[part] is not None] for term, norms in table.norms.items()
    }
    described = describe(model)
    sizes = {row.name: row.parameters for row in described.modules if row.depth == 1}
    seen = [row.tokens for row in described.tokens if row.name.startswith("vision")]
    told = {row.name: row.tokens for row in described.tokens}
    more = {
        "vision": f"{len(seen)} views, {sum(seen)} tokens",
        "language": f"{told['language']} token{'s' * (told['language'] > 1)}",
        "fusion": f"{sum(told.values())} tokens",
        "action": f"{spec.horizon} actions",
    }
    middle = {part: x + width / 2 for part, (x, _, width, _) in BOXES.items()}
    height = ROWS + ROW * (len(table.terms) - 1) + 74

    def box(kind: str, x: float, y: float, width: float, high: float, *lines: str) -> str:
        across, top = x + width / 2, y + high / 2 - 8.5 * (len(lines) - 1) + 4
        words = (text("small" if i else "head", across, top + 17 * i, one) for i, one in enumerate(lines))
        frame = f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{high}" rx="7"/>'
        return frame + "".join(words)

    def way(kind: str, drawn: str) -> str:
        return f'<path class="{kind}" d="{drawn}"/>'

    parts = [f"<style>{STYLE}</style><defs>{MARKERS}</defs>"]
    parts += [f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>']
    formats = [one.name for one in FORMATS]
    parts += [
        box(
            "box", 14, 44, 118, 148, "Episodes", "pictures, state,", "actions, text", "", *_in_lines(formats)
        ),
        box("box", 152, 44, 92, 148, "Batch", "windows", f"of {config.data.batch_size}"),
        way("flow", "M132 118H150"),
        way("flow", "M244 75H270"),
        way("flow", "M244 161H366"),
        way("flow", "M398 75H518"),
        way("flow", "M502 161H518"),
        way("flow", "M624 118H650"),
        way("flow", "M768 118H784"),
        text("left", 790, 115, "robot"),
        text("small left", 790, 131, "or simulator"),
    ]
    rows = {term: ROWS + ROW * number for number, term in enumerate(table.terms)}
    bus, last = SUM - 34, max(rows.values())
    for part, (x, y, width, high) in BOXES.items():
        parts.append(box("part", x, y, width, high, TITLES[part], thousands(sizes[part]), more[part]))
        reaching = [rows[term] for term in table.terms if part in reached_by[term]]
        if reaching:
            parts.append(way("back up", f"M{middle[part]:g} {max(reaching)}V{y + high + 2}"))
    for term, y in rows.items():
        parts.append(way("row", f"M14 {y + 23}H{bus - 12}") if y < last else "")
        kind = getattr(config.objective, term).kind
        head = sum(parameter.numel() for parameter in objective.terms[term].parameters())
        own = f", head {thousands(head)}" if head else ""
        parts.append(text("head left", 16, y - 2, term) + text("small left", 16, y + 15, f"{kind}{own}"))
        reached = [middle[part] for part in reached_by[term]]
        parts.append(way("back", f"M{bus} {y}H{min(reached, default=bus):g}"))
        parts.append(f'<g class="dots">{"".join(circle(x, y, 6) for x in reached)}</g>')
    centre = (ROWS + last) / 2
    parts += [
        way("back", f"M{SUM - 22} {centre:g}H{bus}M{bus} {ROWS}V{last}"),
        f'<circle class="sum" cx="{SUM}" cy="{centre:g}" r="24"/>' + text("head", SUM, centre + 5, "Σ λL"),
        text("head said left", 16, 222, "One backward pass: a dot is where"),
        text("head said left", 16, 240, "the gradient of a term arrives"),
        text(
            "left",
            16,
            height - 18,
            "L_total = " + " + ".join(f"λ{_low(n)} {t}" for n, t in enumerate(rows, 1)),
        ),
        text("left", bus - 250, height - 18, "θ ← θ − α ∇L_total: all parts in one step"),  # noqa: RUF001
        text(
            "head left",
            16,
            28,
            f"{config.name}: {thousands(described.parameters)} parameters, one batch, one loss",
        ),
    ]
    spoken = "; ".join(f"{term} reaches {', '.join(reached_by[term])}" for term in rows)
    found = str(drawing((WIDTH, height), f"Episodes, batch, four parts, and the loss: {spoken}.", parts))
    return found.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" ', 1) + "\n"


def _in_lines(words: list[str]) -> list[str]:
    """Two a line."""
    return [", ".join(words[start : start + 2]) for start in range(0, len(words), 2)]


def _low(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0 if it was drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="?", default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--to", type=Path, default=PICTURE)
    arguments = parser.parse_args(given)
    write_atomically(arguments.to, draw(load_config(arguments.config)))
    print_line(f"Written: {arguments.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

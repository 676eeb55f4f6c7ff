"""Pictures for docs/ of a finished run: its losses, rates, gradients, shares and success, each as an SVG.

python benchmarks/picture_training.py runs/demo draws charts of the run's report into
docs/pictures/training-NAME.svg, each on a card of its own that can be read on a light and on a dark page;
strategies-10.svg and strategies-50.svg, the differences of benchmarks/results/study_strategies.json; e1.svg,
e2.svg, towers-vision.svg and towers-language.svg, the comparisons of the studies of these names; and
seeds.svg, each task's success in every training of benchmarks/results/demo_seeds.json.
benchmarks/results/picture_training has the numbers of the heat map, with commit and machine of the run. The
same run gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from tables import RESULTS, Table, prints_user_errors, publish

from tutti.config.files import require_run
from tutti.errors import UserError
from tutti.report.blocks import Block, Charts, Fold
from tutti.report.formatting import percent
from tutti.report.inputs import Inputs, read_inputs
from tutti.report.sections.evaluation import success_section
from tutti.report.sections.gradients import influence_section
from tutti.report.sections.training import training_section
from tutti.report.svg.drawing import Chart, Scale, circle
from tutti.report.svg.rows import ForestRow, Row, forest_chart, row_chart, whisker
from tutti.runs.terminal import print_line
from tutti.storage.files import write_atomically
from tutti.studies.scores import in_words

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
SECTIONS = (training_section, influence_section, success_section)
DRAWN = {
    "losses": "Total and its weighted terms",
    "lambdas": "Lambdas",
    "shares": "Share of each part's ",
    "vision": "Shares of the gradient in the vision encoder",
    "rate": "Learning rate",
    "norms": "Gradient norm before clipping",
    "success": "Success rate",
}
"""What a picture is called, and the beginning of its chart's title in the report."""
SEEDS = RESULTS / "demo_seeds.json"
STUDY, LEVELS = RESULTS / "study_strategies.json", (10, 50)
"""Whose differences are drawn, and at how many demonstrations a task."""
COMPARED = {
    "e1": ("Main effect of each term", "the arms without it"),
    "e2": ("Joint training with unlabelled demonstrations minus each other arm", "the other arm"),
    "towers-vision": ("A frozen vision tower with ImageNet's weights minus each other arm", "the other arm"),
    "towers-language": ("Told new words: the first arm minus the second", "the second arm"),
    "towers-time": ("Told new words, trained as long as base: the arm minus base", "base"),
}
"""Whose comparisons are drawn: the chart's title, and what a difference of 0 equals."""


def charts_of(blocks: Sequence[Block]) -> Iterator[Chart]:
    """The charts of a section in their order, those that are folded away too."""
    for block in blocks:
        if isinstance(block, Charts):
            yield from block.charts
        elif isinstance(block, Fold):
            yield from charts_of(block.blocks)


def drawn(inputs: Inputs) -> dict[str, Chart]:
    """The chart of each picture.

    Raises: UserError that names the charts which the run has no records for.
    """
    charts = [chart for section in SECTIONS for chart in charts_of(section(inputs).blocks)]
    found = {
        name: chart
        for name, title in DRAWN.items()
        for chart in charts[::-1]
        if chart.title.startswith(title)
    }
    if missing := [title for name, title in DRAWN.items() if name not in found]:
        raise UserError(f"{inputs.folder}: expected a finished run, found no records for: {missing}.")
    return found


def points(interval: dict[str, float]) -> tuple[float, float]:
    """Both ends in points."""
    return 100 * interval["low"], 100 * interval["high"]


def comparisons(study: dict[str, Any], title: str, baseline: str) -> Chart:
    """The comparisons that a study was made for."""
    rows = [
        ForestRow(
            name=one["name"],
            value=100 * found["difference"]["value"],
            interval=points(found["difference"]["interval"]),
            wide=points(found["over_seeds"]),
            seeds=[100 * of for of in found["of_seeds"]],
            label=f"{100 * found['difference']['value']:+.1f}  "
            f"{in_words(found['verdict'], one['adjusted_p'])}",
        )
        for one in study["contrasts"]
        if not one["exploratory"]
        for found in [one["found"]]
    ]
    return forest_chart(f"{title}, {len(study['cells'])} trainings", rows, baseline=baseline)


def differences(study: dict[str, Any], level: int) -> Chart:
    """The arms of a study at one level, each against its baseline."""
    baseline, scores = study["study"]["baseline"], [one for one in study["scores"] if one["level"] == level]
    base = next(one for one in scores if one["arm"] == baseline)["seed_means"]
    rows: list[ForestRow] = []
    for one in scores:
        if (against := one["against"]) is not None:
            value = 100 * against["difference"]["value"]
            verdict = in_words(against["verdict"], one["adjusted_p"])
            row = ForestRow(
                name=one["arm"],
                value=value,
                interval=points(against["difference"]["interval"]),
                wide=points(against["over_seeds"]),
                seeds=[100 * (mean - of) for mean, of in zip(one["seed_means"], base, strict=True)],
                label=f"{value:+.1f}  {verdict}",
                mood={"better": "good", "worse": "bad"}.get(verdict, ""),
            )
            rows.append(row)
    return forest_chart(f"Against {baseline}, {level} demonstrations a task", rows, baseline=baseline)


def over_seeds(trained: Sequence[dict[str, Any]]) -> Chart:
    """Success of the same recipe from several seeds: median, range and each training, task by task."""
    rates = {
        task: [100 * mean(one["successes"][task]) for one in trained] for task in trained[0]["successes"]
    }
    rates["mean of the tasks"] = [mean(one) for one in zip(*rates.values(), strict=True)]

    def draw(across: Scale) -> list[Row]:
        rows: list[Row] = []
        for task, found in rates.items():
            middle, least, most = (round(of(found), 1) for of in (median, min, max))
            dots = "".join(circle(across.pixel(one), 7, 3) for one in found)
            marks = f'<g class="whisker c2 hollow">{dots}</g>'
            marks += whisker("c1", across, (least, most, middle), (-3, 5))
            label, tips = f"{middle:g} ({least:g} to {most:g})", [", ".join(f"{one:.1f}" for one in found)]
            rows.append(Row(task, label, tips, marks, strong=task not in trained[0]["successes"]))
        return rows

    across = Scale(low=0, high=100, start=210, end=560)
    return row_chart(
        f"Success of {len(trained)} trainings of the demo, median (lowest to highest)",
        draw,
        across,
        32,
        ticks=[("grid", tick, f"{tick:g}") for tick in across.ticks()],
        axis="% of 20 starts that no choice had looked at",
        legend=[("median and range", "c1", "line"), ("a training", "c2", "hollow")],
    )


def shares(inputs: Inputs) -> dict[str, dict[str, dict[str, float]]]:
    """Half of the run -> term -> part -> its share, as the heat map of the report has it: of the update where
    that was measured, else of the gradient."""
    records = inputs.records
    updates = bool(records.named("diag/update_share/*/*"))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for half, span in zip(("first", "second"), records.halves, strict=True):
        for term in records.terms:
            for part in records.parts:
                value = (
                    records.update_share(term, part, span)
                    if updates
                    else records.median(f"diag/share/{term}/{part}", span)
                )
                if value is not None:
                    found.setdefault(half, {}).setdefault(term, {})[part] = value
    return found


def share_table(found: dict[str, dict[str, float]], title: str) -> Table:
    """One line a term, one column a part."""
    parts = tuple(dict.fromkeys(part for of in found.values() for part in of))
    rows = tuple(
        (term, *(percent(of[part], 1) if part in of else "-" for part in parts)) for term, of in found.items()
    )
    return Table(title=title, heads=("term", *parts), rows=rows)


def of_results() -> dict[str, Chart]:
    """The charts that need no run, by name: of studies and seeds."""
    study = json.loads(STUDY.read_text(encoding="utf-8"))
    charts = {f"strategies-{level}": differences(study, level) for level in LEVELS}
    for name, said in COMPARED.items():
        compared = json.loads((RESULTS / f"study_{name}.json").read_text(encoding="utf-8"))
        charts[name] = comparisons(compared, *said)
    return charts | {"seeds": over_seeds(json.loads(SEEDS.read_text(encoding="utf-8"))["trained"])}


@prints_user_errors
def main(given: list[str] | None = None) -> int:
    """0 if every picture was drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=PICTURES)
    parser.add_argument("--output", type=Path, default=RESULTS / "picture_training", help="without suffix")
    arguments = parser.parse_args(given)
    inputs = read_inputs(require_run(arguments.run))
    charts = {f"training-{name}": chart for name, chart in drawn(inputs).items()}
    charts |= of_results()
    arguments.to.mkdir(parents=True, exist_ok=True)
    for name, chart in charts.items():
        path = arguments.to / f"{name}.svg"
        write_atomically(path, f"{chart._repr_svg_()}\n")
        print_line(f"Written: {path}, {path.stat().st_size / 1e3:.0f} kB")
    found, summary = shares(inputs), inputs.summary
    of = charts["training-shares"].title.removeprefix(DRAWN["shares"]).split()[0].rstrip(",")
    made = {"run": summary.name, "commit": summary.commit, "machine": summary.machine}
    made |= {"versions": summary.versions, "steps": inputs.records.get("loss/total")[0][-1]}
    note = (
        f"Medians over the diagnostic steps of one run, {summary.name}, {made['steps']} steps. "
        f"Commit {summary.commit}; {summary.machine.get('processor', '?')}. Command: "
        "`python benchmarks/picture_training.py runs/demo`."
    )
    tables = [share_table(one, f"Share of each part's {of}, {half} half") for half, one in found.items()]
    publish(arguments.output, "benchmarks/picture_training", tables, [note], made | {"shares": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())

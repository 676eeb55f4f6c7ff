"""The page of `tutti data check`: findings, pictures, histograms, lengths and texts of recorded data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from tutti.data.checks.pictures import Glimpse
from tutti.data.checks.result import CheckedPath, CheckedSource
from tutti.data.episodes import PAIRS
from tutti.data.formats.lerobot import VIEW
from tutti.data.tokenize import normalized_text
from tutti.report.blocks import (
    Block,
    Charts,
    Gallery,
    Note,
    Page,
    Picture,
    Section,
    Table,
    Tile,
    column,
    note_of,
    render,
    table,
)
from tutti.report.formatting import count, duration, plain
from tutti.report.sections.run import facts_of
from tutti.report.svg.histograms import histogram
from tutti.storage.files import write_atomically

EPISODES, TEXTS, DIMENSIONS = 8, 20, 64
"""At most so many episodes of each view, instructions, and dimensions of each vector are shown."""


def write_data_page(path: Path, checked: Sequence[CheckedPath]) -> None:
    """Writes one self-contained page of all checked paths, atomically."""
    findings = [finding for one in checked for finding in one.findings]
    sources = [source for one in checked for source in one.sources]
    problems = sum(finding.is_problem for finding in findings)
    hints = len(findings) - problems
    said = f"{problems or 'No'} problem{'s' * (problems > 1)}, {hints or 'no'} hint{'s' * (hints > 1)}."
    names = ", ".join(one.path for one in checked)
    page = Page(
        kicker="Tutti: recorded data",
        name=", ".join(Path(one.path).name for one in checked),
        result=said if findings else "Nothing is wrong.",
        tiles=_tiles(sources),
        notes=[],
        warnings=[],
        sections=[
            _findings_section(checked),
            *(_source_section(number, source) for number, source in enumerate(sources)),
        ],
        footer=f"Written by tutti data check {names}.",
    )
    write_atomically(path, render(page))


def _tiles(sources: Sequence[CheckedSource]) -> list[Tile]:
    rows = [source.rows for source in sources]
    episodes = sum(len(one.episodes) for one in rows)
    frames = sum(episode.length for one in rows for episode in one.episodes)
    seconds = sum(episode.length / one.store.spec.fps for one in rows for episode in one.episodes)
    texts = {normalized_text(episode.instruction) for one in rows for episode in one.episodes}
    held = sum(len(one.held_out) for one in rows)
    return [
        Tile(value=count(episodes), name="episodes", small=f"{held:,} held out"),
        Tile(value=count(frames), name="frames", small=duration(seconds)),
        Tile(value=count(len(texts)), name="instructions"),
    ]


def _findings_section(checked: Sequence[CheckedPath]) -> Section:
    blocks: list[Block] = []
    for one in checked:
        blocks += [note_of(finding) for finding in one.findings]
        if not one.findings:
            blocks.append(Note(text=f"{one.path}: nothing is wrong.", mood="good"))
    against = "; ".join(dict.fromkeys(one.against for one in checked if one.against))
    lead = f"Checked against {against}." if against else ""
    return Section(id="findings", title="Findings", lead=lead, blocks=blocks)


def _source_section(number: int, source: CheckedSource) -> Section:
    rows, spec = source.rows, source.rows.store.spec
    long = np.array([episode.length for episode in rows.episodes], np.float64)
    values = source.to_dict()
    shown = ("embodiment", "episodes", "frames", "seconds", "views", "stored_image_shapes", "instructions")
    facts = {name: values[name] for name in shown} | {"frames_a_second": spec.fps}
    if pairs := rows.store.is_pairs:
        facts = {name: values[name] for name in ("episodes", "views", "instructions")}
    blocks: list[Block] = [facts_of(facts)]
    for view in spec.views:
        looked = [glimpse for glimpse in source.looked if glimpse.view == view]
        chosen = np.linspace(0, len(looked) - 1, min(EPISODES, len(looked))).round().astype(int).tolist()
        what = "some pictures" if pairs else "the first, the middle and the last frame of some episodes"
        title = f"{view.removeprefix(VIEW)}: {what}"
        blocks.append(Gallery(title=title, pictures=[_picture(looked[place]) for place in chosen]))
    for vector in rows.vectors:
        chosen = rows.values(vector)[rows.sample.rows]
        charts = [
            histogram(
                f"{vector} {rows.dimension(vector, place)}",
                column.astype(np.float64),
                help=f"Median {plain(float(np.median(column)))}, deviation {plain(float(column.std()))}.",
            )
            for place, column in enumerate(chosen.T[:DIMENSIONS])
        ]
        blocks.append(Charts(charts=charts, small=True))
    if not pairs:
        blocks.append(Charts(charts=[histogram("episode lengths, frames", long)], small=True))
    blocks.append(_texts(source))
    sample = rows.sample
    lead = f"Histograms: {len(sample.rows):,} rows of {len(sample.episodes):,} training episodes"
    lead = f"{rows.name}. {PAIRS[:1].upper() + PAIRS[1:] if pairs else lead}."
    return Section(id=f"source-{number}", title=Path(rows.name).name, lead=lead, blocks=blocks)


def _picture(glimpse: Glimpse) -> Picture:
    png = BytesIO()
    Image.fromarray(glimpse.strip).save(png, format="PNG")
    episode = glimpse.episode
    return Picture(png=png.getvalue(), caption=f"Episode {episode.index}: {episode.instruction}")


def _texts(source: CheckedSource) -> Table:
    """The instructions by their number of episodes."""
    training, held = (
        Counter(normalized_text(episode.instruction) for episode in episodes)
        for episodes in (source.rows.training, source.rows.held_out)
    )
    texts = [text for text, _ in (training + held).most_common()]
    left = f"{len(texts) - TEXTS:,} more are not shown." if len(texts) > TEXTS else ""
    return table(
        texts[:TEXTS],
        [
            column("instruction", str),
            column("episodes", lambda text: f"{training[text] + held[text]:,}"),
            column("held out", lambda text: f"{held[text]:,}"),
        ],
        left,
    )

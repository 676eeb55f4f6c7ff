"""Checks recorded data: the cheap part at a training's start, and `tutti data check` with some pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tutti.config.files import find_config
from tutti.config.overrides import apply_overrides, parse_overrides
from tutti.config.run_config import RunConfig, build_config, load_config
from tutti.data.bundle import DataBundle
from tutti.data.checks.pictures import Glimpse, check_pictures, glimpses
from tutti.data.checks.recordings import Recorded, Recordings, say
from tutti.data.checks.result import CheckedPath, CheckedSource, KnownRobot
from tutti.data.checks.rows import by_severity, check_decoded, check_rows
from tutti.data.config import DataConfig
from tutti.data.episodes import PAIRS, texts_of
from tutti.data.normalize import Normalizer
from tutti.data.sources import (
    Part,
    check_compatible,
    fit_normalizer,
    robots,
    source_shares,
    stores_of,
)
from tutti.data.split import GroupOf, grouped
from tutti.distributed.world import world
from tutti.evaluation.open_loop import task_by_text
from tutti.findings import Finding
from tutti.objectives.terms.alignment import EmbeddingTermConfig
from tutti.runs.build import with_sources, with_steps
from tutti.runs.data_inspect import print_robot
from tutti.runs.folder import RunFolder
from tutti.runs.label_shares import label_shares, mixture_lines
from tutti.runs.terminal import print_findings, print_line
from tutti.storage.checkpoint import checkpoints
from tutti.types import UserError

FINDINGS = "data_findings.json"
"""What the checks found in the data of a run, before its first step."""


def check_training_data(config: RunConfig, data: DataBundle) -> list[Finding]:
    """Findings about data that a training has read already: nothing more is decoded, no number changes."""
    return check_decoded(data, Recordings.of_bundle(data, contrasting(config)))


def check_before_training(config: RunConfig, data: DataBundle, run: RunFolder) -> None:
    """Prints which sources feed which terms, where that is unequal, and what is wrong with the data, which is
    written into the run; on rank 0, before the first step."""
    if not world().first or checkpoints(run.path):
        return
    for line in mixture_lines(config, data.shares):
        print_line(line)
    if (shares := label_shares(config, data)).may_differ:
        shares.print()
    found = check_training_data(config, data)
    run.write_json(FINDINGS, [asdict(finding) for finding in found])
    if found:
        print_line(
            f"the data: {len(found)} remark{'s' if len(found) > 1 else ''}; `tutti data check` tells more"
        )
    print_findings(found)


def contrasting(config: RunConfig) -> dict[str, GroupOf]:
    """The terms that tell instructions or tasks apart and ever count, each with the task of a text."""
    task_of = grouped(config.data.tasks, task_by_text(config.record.spec)) or str
    return {
        name: str if term.positives == "instruction" else task_of
        for name, term in config.objective.terms().items()
        if isinstance(term, EmbeddingTermConfig) and not term.schedule.is_zero
    }


def named_grippers(config: RunConfig) -> list[tuple[str, int]]:
    """Keys of the config that name a gripper, each with a dimension of the action."""
    named = [
        (f"objective.{name}.gripper.dimension", dimension)
        for name, term in config.objective.terms().items()
        for dimension in term.needs(name).grippers
    ]
    gripper: Any = getattr(config.model.action, "gripper", "off")
    return named + ([] if gripper == "off" else [("model.action.gripper.dimension", gripper.dimension)])


def check_path(
    path: str, overrides: Sequence[str] = (), progress: Callable[[int, int], None] | None = None
) -> CheckedPath:
    """Checks a data set, or the sources of a config file, by all rows and some pictures of each view.

    A data set is checked against the defaults of a config. `overrides` are as for `tutti train`.
    """
    try:
        config = load_config(path, overrides) if is_config(path) else defaults_for(path, overrides)
        data = with_sources(config, Path("runs") / config.name)
        parts = data.open()
        only_pairs = all(part.store.is_pairs for part in parts)
        config = with_steps(config, None if only_pairs else max(p.store.spec.fps for p in robots(parts)))
    except UserError as error:
        return CheckedPath(path=path, findings=[say("unreadable", None, source=path, message=str(error))])
    try:
        if not only_pairs:
            check_compatible(parts)
        found, groups = list[Finding](), [parts]
    except UserError as error:  # each data set by itself, then
        found = [say("refused", None, source=path, message=str(error))]
        groups = [[part for part in parts if part.store is store] for store in stores_of(parts)]
    sources: list[CheckedSource] = []
    mixture: list[str] = []
    known: dict[str, KnownRobot] = {}
    for group in groups:
        try:
            split = data.split(group, task_by_text(config.record.spec))
            recordings = read_recordings(config, data, split)
            if len(groups) == 1 and not only_pairs:
                common = check_compatible(split)
                mixture += mixture_lines(config, source_shares(split, common, data.mixture.labelled))
                if common.robots:
                    stats = recordings.normalizer.stats
                    known = {
                        name: KnownRobot(embodiment=one, stats=stats[name], model=common)
                        for name, one in zip(common.own, common.robots, strict=True)
                    }
        except UserError as error:
            found.append(say("refused", None, source=path, message=str(error)))
            continue
        found += check_rows(recordings)
        for rows in recordings.sources:
            looked: list[Glimpse] = []
            try:
                looked += glimpses(rows)
                found += check_pictures(rows, looked)
            except UserError as error:
                found.append(say("unreadable", None, source=rows.name, message=str(error)))
            sources.append(CheckedSource(rows=rows, looked=looked))
            if progress is not None:
                progress(len(sources), len(parts))
    return CheckedPath(
        path=path,
        against=_against(config, path),
        sources=sources,
        mixture=mixture,
        robots=known,
        findings=by_severity(found),
    )


def is_config(path: str) -> bool:
    """Whether a path names a config file, its own or one that is shipped, in place of a data set."""
    place = Path(path)
    return not place.is_dir() and (
        path.endswith((".yaml", ".yml")) or (not place.exists() and find_config(place) is not None)
    )


def read_recordings(config: RunConfig, data: DataConfig, parts: Sequence[Part]) -> Recordings:
    """The rows of sources that are split, with the statistics that a training would fit, without pictures."""
    if all(part.store.is_pairs for part in parts):  # without numbers there is nothing to fit
        none = np.empty((1, 0))
        normalizer = Normalizer.fit(data.normalization, parts[0].store.spec.embodiment, none, none)
    else:
        normalizer = fit_normalizer(parts, check_compatible(parts), data.normalization, config.data.horizon)
    return Recordings(
        sources=list(map(Recorded.of_part, parts)),
        normalizer=normalizer,
        horizon=config.data.horizon,
        needs=config.objective.needs(),
        contrasting=contrasting(config),
        grippers=named_grippers(config),
    )


def defaults_for(path: str, overrides: Sequence[str]) -> RunConfig:
    """A config of nothing but defaults for one data set."""
    values: dict[str, Any] = {"data": {"sources": [{"path": path}]}}
    parsed = parse_overrides(overrides)
    apply_overrides(values, parsed, RunConfig())
    return build_config(values, path, parsed)


def print_checked(checked: CheckedPath) -> None:
    """What was looked at, the findings, and how many are serious."""
    for line in _summary(checked):
        print_line(line)
    for name, robot in checked.robots.items():
        print_robot(name, robot.embodiment, robot.stats, robot.model)
    print_findings(checked.findings)
    if checked.sources:
        count = sum(finding.is_problem for finding in checked.findings)
        said = f"{count} problem{'s' if count > 1 else ''}, marked with !." if count else "Nothing is wrong."
        print_line(said)


def _summary(checked: CheckedPath) -> list[str]:
    """What was looked at, in a few lines of text."""
    lines: list[str] = []
    for source in checked.sources:
        rows, spec = source.rows, source.rows.store.spec
        long = sorted(episode.length for episode in rows.episodes)
        shapes = zip(rows.store.views, spec.image_shapes, strict=True)
        views = ", ".join(f"{view.split('.')[-1]} {height} x {width}" for view, (height, width) in shapes)
        two = ", ".join(one["dimension"] for one in source.two_valued) or "none"
        texts = len(texts_of(rows.store, rows.told))
        without = [label for label, use in rows.labels.items() if not use]
        pictures = sum(len(one.frames) for one in source.looked)
        if rows.store.is_pairs:
            lines += [
                f"{rows.name}: {len(long):,} {PAIRS}",
                f"  texts: {texts:,}; held out: {len(rows.held_out):,} of {len(long):,} pairs",
                *(f"  {remark}" for remark in rows.store.remarks),
                f"  looked at all texts, and at {pictures:,} pictures",
            ]
            continue
        looked = len({one.episode.index for one in source.looked})
        lines += [
            f"{rows.name}: robot {spec.embodiment}, {len(long):,} episodes of {long[0]} to {long[-1]} frames "
            f"({sum(long):,}) at {spec.fps:g} a second",
            f"  views: {views}",
            f"  state {spec.state_dim}, action {spec.action_dim}; two-valued actions (grippers): {two}",
            f"  instructions: {texts:,}; held out: {len(rows.held_out):,} of {len(long):,} episodes",
            *([f"  not used of it (sources.labels): {', '.join(without)}"] if without else []),
            *(f"  {remark}" for remark in rows.store.remarks),
            f"  looked at all rows, and at {pictures:,} pictures of {looked:,} episodes",
        ]
    return [*lines, *checked.mixture, f"  against {checked.against}"] if lines else []


def _against(config: RunConfig, path: str) -> str:
    needs = config.objective.needs()
    said = f", offsets {', '.join(map(str, needs.steps_ahead))}" if needs.steps_ahead else ""
    return (
        f"{path if is_config(path) else 'the defaults of a config'}: data.horizon {config.data.horizon}{said}"
    )

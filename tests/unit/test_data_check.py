"""`tutti data check`: planted faults are named with their place, and a clean set gives no finding."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from fixtures import squares_data as world
from tutti import pipeline
from tutti.cli.app import app
from tutti.config.run_config import to_yaml
from tutti.data.checks.recordings import MESSAGES, reduced
from tutti.data.checks.result import CheckedPath
from tutti.data.formats.lerobot.writer import EpisodeRecord
from tutti.findings import Finding
from tutti.report.blocks import Note
from tutti.report.inputs import read_inputs
from tutti.report.page import SECTIONS
from tutti.runs.data_check import check_path

Change = Callable[[int, EpisodeRecord], EpisodeRecord]
COUNTS = {"lab": 24, "hall": 12}
"""Episodes of the two sources."""


def clean(name: str) -> list[EpisodeRecord]:
    """The world's episodes with two more states: the hand's opening, which follows the command, and a
    temperature."""
    random = np.random.default_rng(len(name))
    made: list[EpisodeRecord] = []
    for one in world.episodes(COUNTS[name], seed=len(name)):
        closed = np.roll(one.actions[:, 2:], 1, axis=0) + 0.05 * random.normal(size=(world.LENGTH, 1))
        warmth = 20 + random.normal(size=(world.LENGTH, 1))
        made.append(replace(one, states=np.concatenate([one.states, closed, warmth], 1).astype(np.float32)))
    return made


def on_actions(change: Callable[[int, np.ndarray], None]) -> Change:
    def changed(number: int, one: EpisodeRecord) -> EpisodeRecord:
        actions = one.actions.copy()
        change(number, actions)
        return replace(one, actions=actions)

    return changed


def on_states(change: Callable[[np.ndarray], None]) -> Change:
    def changed(_: int, one: EpisodeRecord) -> EpisodeRecord:
        states = one.states.copy()
        change(states)
        return replace(one, states=states)

    return changed


def on_pictures(view: str, change: Callable[[int, np.ndarray], np.ndarray]) -> Change:
    return lambda number, one: replace(
        one, images={**one.images, view: np.ascontiguousarray(change(number, one.images[view]))}
    )


def spike(number: int, actions: np.ndarray) -> None:
    if number == 5:
        actions[7, 0] = 300.0


def saturate(_: int, actions: np.ndarray) -> None:
    actions[:, 1] = np.clip(20 * actions[:, 1], -1, 1)


def flip(_: int, actions: np.ndarray) -> None:
    actions[:, 2] *= -1


def cool(states: np.ndarray) -> None:
    states[:, 3] = 20.0


def in_millimetres(states: np.ndarray) -> None:
    states[:, :2] *= 1000


def spell(number: int, one: EpisodeRecord) -> EpisodeRecord:
    return replace(one, instruction=one.instruction.capitalize() + " ") if number == 4 else one


def copy(number: int, one: EpisodeRecord) -> EpisodeRecord:
    return clean("lab")[8] if number == 9 else one


FAULTS: dict[str, tuple[str, Change]] = {
    "spellings": ("lab", spell),
    "duplicates": ("lab", copy),
    "constant_dimensions": ("lab", on_states(cool)),
    "heavy_tails": ("lab", on_actions(spike)),
    "clipped_actions": ("lab", on_actions(saturate)),
    "one_colour": ("lab", on_pictures(world.VIEWS[1], lambda _, frames: np.zeros_like(frames))),
    "frozen": (
        "lab",
        on_pictures(world.VIEWS[0], lambda n, frames: frames[:1].repeat(12, 0) if n == 3 else frames),
    ),
    "other_units": ("hall", on_states(in_millimetres)),
    "other_sign": ("hall", on_actions(flip)),
}
"""Kind of the finding: the source, and what is done to its episodes."""
OFFSET: dict[str, Any] = {"objective": {"state": {"offsets": [2, 4, 40]}}}
EXPECTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "spellings": ("hint", '"go to the red square", "Go to the red square "', {"episode": 4}),
    "duplicates": (
        "hint",
        "1 episode is an exact copy of another: episode 9 is episode 8",
        {"episode": 9},
    ),
    "constant_dimensions": ("hint", "of the state never moves", {"dimension": "3"}),
    "heavy_tails": ("warning", "is 300 in", {"episode": 5, "frame": 7, "dimension": "0"}),
    "clipped_actions": ("hint", "% in dimension 1: they are clipped", {"dimension": "1"}),
    "one_colour": ("fault", "mirror is one colour in 100 %", {"episode": 0, "frame": 0}),
    "frozen": ("warning", "front shows the same picture in 1 of 24 episodes looked at (3)", {"episode": 3}),
    "other_units": ("hint", "share the robot 'dot'", {"dimension": "0, 1"}),
    "other_sign": ("warning", "goes with state 2 in opposite ways", {"dimension": "2"}),
    "offset_never": ("warning", "No episode reaches +40", {}),
}
"""Written before the checks ran: kind, severity, what the sentence says, and the place that it names."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both sources as they should be."""
    folder = tmp_path_factory.mktemp("sound")
    for name in COUNTS:
        world.write(folder / name, clean(name))
    return folder


def checked(
    folder: Path, sound: Path, faults: Mapping[str, tuple[str, Change]], **sections: Any
) -> CheckedPath:
    sources: list[dict[str, str]] = []
    for name in COUNTS:
        made, changes = clean(name), [change for source, change in faults.values() if source == name]
        for change in changes:
            made = [change(number, one) for number, one in enumerate(made)]
        sources.append({"path": str(world.write(folder / name, made) if changes else sound / name)})
    config = world.config(sound, **sections)
    data = config.data.model_validate(config.data.model_dump() | {"sources": sources})
    (folder / "config.yaml").write_text(to_yaml(config.model_copy(update={"data": data})))
    return check_path(str(folder / "config.yaml"))


def agree(found: list[Finding], expected: list[str]) -> None:
    assert sorted(finding.kind for finding in found) == sorted(expected), [one.text for one in found]
    for finding in found:
        severity, said, place = EXPECTED[finding.kind]
        assert finding.severity == severity and said in finding.sentence, finding
        assert {key: getattr(finding, key) for key in place} == place


def test_ten_planted_faults_are_named_and_nothing_else(tmp_path: Path, sound: Path) -> None:
    found = checked(tmp_path, sound, FAULTS, **OFFSET)
    agree([*found.findings], [*EXPECTED])
    assert len(EXPECTED) == 10 and found.code == 1


@pytest.mark.parametrize("kind", FAULTS)
def test_one_planted_fault_is_named_and_nothing_else(tmp_path: Path, sound: Path, kind: str) -> None:
    agree([*checked(tmp_path, sound, {kind: FAULTS[kind]}).findings], [kind])


def test_clean_set_has_no_finding_and_ends_with_0(tmp_path: Path, sound: Path) -> None:
    found = checked(tmp_path, sound, {})
    assert ([*found.findings], found.code) == ([], 0)
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "config.yaml"), "--json"])
    read = json.loads(result.output)
    assert result.exit_code == 0 and read["paths"][0]["findings"] == []
    lab, hall = read["paths"][0]["sources"]
    assert (lab["episodes"], hall["episodes"]) == (24, 12)
    assert [one["dimension"] for one in lab["two_valued_actions"]] == ["2"]


def test_training_prints_and_keeps_its_remarks_once(
    tmp_path: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start, not at a resume."""
    training = {"steps": 2, "schedule": {"kind": "wsd", "warmup": 1}, "checkpoints": {"every": 1}}
    config = world.config(sound / "lab", training=training, **OFFSET)
    pipeline.train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "the data: 1 remark;" in said and "! No episode reaches +40" in said
    (kept,) = json.loads((tmp_path / "run" / "data_findings.json").read_text())
    assert (kept["kind"], kept["severity"]) == ("offset_never", "warning")
    notes = SECTIONS["data"][1](read_inputs(tmp_path / "run")).blocks
    assert any(isinstance(note, Note) and "No episode reaches +40" in note.text for note in notes)
    stages = json.loads((tmp_path / "run" / "stages.json").read_text())
    stages["train"]["finished"] = False  # as after an interruption
    (tmp_path / "run" / "stages.json").write_text(json.dumps(stages))
    pipeline.train(config, tmp_path / "run")
    assert "No episode reaches" not in capsys.readouterr().out


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", "check", *arguments])
    return result.exit_code, result.output


def test_page_shows_findings_pictures_and_every_dimension(tmp_path: Path, sound: Path) -> None:
    page = tmp_path / "page.html"
    code, said = command(str(sound / "hall"), "data.horizon=8", "--report", str(page))
    html = page.read_text()
    assert code == 1 and "! No episode reaches +12, +16, +24" in said and "1 problem, marked with !." in said
    assert "No episode reaches +12" in html and "default-src 'none'" in html
    assert html.count("data:image/png;base64") == 2 * 8, "eight episodes of each view"
    for name in (*(f"state {number}" for number in range(4)), *(f"action {number}" for number in range(3))):
        assert f">{name}</span>" in html, name


def write_json_file(folder: Path, name: str, text: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


OTHERS: dict[str, tuple[str, str, str]] = {
    "v16": ("meta/info.json", '{"codebase_version": "v1.6"}', "of version 'v1.6'"),
    "tfds": ("features.json", "{}", "dataset_info.json is missing"),
    "hdf5": ("demo.hdf5", "", "demo.hdf5"),
    "zarr": (".zgroup", "{}", "meta/episode_ends: it is missing"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_one_screen_that_names_them_and_end_with_2(tmp_path: Path, kind: str) -> None:
    name, text, said = OTHERS[kind]
    code, output = command(str(write_json_file(tmp_path / kind, name, text)), "--json")
    (finding,) = json.loads(output)["paths"][0]["findings"]
    assert code == 2 and finding["kind"] == "unreadable" and said in finding["sentence"]


def rewrite(path: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """Changes a column of a Parquet file."""
    table = pq.read_table(path)
    place = table.column_names.index(column)
    values = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(place, table.schema.field(column), values), path)


@pytest.mark.parametrize(
    ("column", "change", "said"),
    [
        ("timestamp", lambda times: [2 * time for time in times], "correct fps in meta/info.json"),
        ("timestamp", lambda times: [*times[:5], *(time + 3 for time in times[5:])], "timestamp of row 5"),
        ("frame_index", lambda rows: [*rows[1:], rows[0]], "frames must lie one after the other, in order"),
    ],
)
def test_what_the_reader_refuses_is_one_finding(
    tmp_path: Path, column: str, change: Callable[[list[Any]], list[Any]], said: str
) -> None:
    folder = world.write(tmp_path / "set", world.episodes(2))
    rewrite(next((folder / "data").rglob("*.parquet")), column, change)
    code, output = command(str(folder))
    assert code == 2 and output.startswith("! ") and said in " ".join(output.split())


def test_worst_exit_code_of_several_paths_counts_and_each_is_shown(tmp_path: Path, sound: Path) -> None:
    code, output = command(str(sound / "hall"), str(tmp_path / "nowhere"), "data.horizon=8", "--json")
    read = json.loads(output)["paths"]
    assert code == 2 and [one["exit_code"] for one in read] == [1, 2]
    assert command()[0] == 2


def test_the_same_data_set_twice_and_copies_in_another_source_are_named(tmp_path: Path, sound: Path) -> None:
    def sources(*places: Path) -> list[Finding]:
        text = ", ".join(f"{{path: {place}}}" for place in places)
        checked = check_path(str(sound / "lab"), [f"data.sources=[{text}]", "data.horizon=8"])
        return [finding for finding in checked.findings if finding.kind != "offset_never"]

    (refused,) = sources(sound / "lab", sound / "lab")
    assert refused.kind == "refused" and "0 and 1 would both train on episode" in refused.sentence
    (twice,) = sources(sound / "lab", Path(shutil.copytree(sound / "lab", tmp_path / "copy")))
    assert (twice.kind, twice.severity) == ("same_data_set", "fault") and "weight: 2" in twice.cure
    again = world.write(tmp_path / "again", clean("lab")[:6])
    found = {finding.kind: finding for finding in sources(sound / "lab", again)}
    assert found.keys() <= {"duplicates", "duplicates_across_split"}
    assert sum(int(finding.number or 0) for finding in found.values()) == 6
    assert f"of {sound / 'lab'}" in found["duplicates"].sentence


def test_every_kind_of_finding_has_its_line_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "check-data.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| (?:fault|warning|hint)", page, re.MULTILINE)
    assert sorted(documented) == sorted(MESSAGES)


def test_one_instruction_has_nothing_to_contrast_and_without_the_term_nothing_is_said(tmp_path: Path) -> None:
    records = [replace(one, instruction=world.TEXTS[0]) for one in world.episodes(4)]
    place = str(world.write(tmp_path / "set", records))
    given = ["data.horizon=8", "objective.state.offsets=[2,4]"]
    (finding,) = check_path(place, given).findings
    assert (finding.kind, finding.severity) == ("nothing_to_contrast", "hint")
    assert "align has nothing to contrast" in finding.text and "`objective.align` to null" in finding.cure
    assert check_path(place, [*given, "objective.align=null"]).findings == []


def test_wordings_of_one_task_are_nothing_to_contrast_unless_the_text_itself_counts(tmp_path: Path) -> None:
    records = [replace(one, instruction=world.TEXTS[i % 2]) for i, one in enumerate(world.episodes(8))]
    place = str(world.write(tmp_path / "set", records))
    given = ["data.horizon=8", "objective.state.offsets=[2,4]"]
    named = [*given, f"data.tasks={json.dumps({'go': world.TEXTS})}"]
    kinds = [
        {finding.kind for finding in check_path(place, overrides).findings}
        for overrides in (given, named, [*named, "objective.align.positives=instruction"])
    ]
    assert [found & {"nothing_to_contrast"} for found in kinds] == [set(), {"nothing_to_contrast"}, set()]
    (finding,) = (one for one in check_path(place, named).findings if one.kind == "nothing_to_contrast")
    assert "One task in 2 wordings" in finding.sentence


def test_extremes_of_many_rows_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    for rows, dim in ((1, 3), (256, 2), (1000, 14), (700, 0)):
        values = random.normal(size=(rows, dim)).astype(np.float32)
        assert np.array_equal(reduced(np.minimum, values), values.min(0))
        assert np.array_equal(reduced(np.maximum, values), values.max(0))


@pytest.mark.parametrize("text", [None, " \t"])
def test_episodes_without_an_instruction_are_one_finding_with_their_number(
    tmp_path: Path, text: str | None
) -> None:
    folder = world.write(tmp_path / "set", world.episodes(6))  # two tasks in turn
    path = folder / "meta" / "tasks.parquet"
    name = next(name for name in pq.read_schema(path).names if name != "task_index")
    rewrite(path, name, lambda texts: [text, *texts[1:]])
    code, output = command(str(folder))
    assert code == 2 and output.count("! ") == 1 and "3 of 6 have no instruction" in output

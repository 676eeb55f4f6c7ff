"""The report: one page that is whole, asks for nothing outside itself, and survives what a run may leave."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fixtures.report_runs import HOSTILE, RATES, evaluation, make_run, write_json
from tutti.evaluation.statistics.intervals import mean_of_rates, wilson
from tutti.report import write_report
from tutti.report.blocks import Table
from tutti.report.inputs import read_inputs
from tutti.report.sections.evaluation import videos_section
from tutti.report.sections.run import data_section
from tutti.runs.folder import RunFolder
from tutti.runs.summary import print_summary, write_summary

MOST_BYTES = 6_000_000
VOID = {"meta", "img", "br", "link", "input", "hr"}
JSON_FILES = (
    "evaluation/results.json",
    "evaluation/open_loop.json",
    "summary.json",
    "stages.json",
    "model.json",
    "data.json",
    "recording.json",
    "videos/index.json",
)


class Page(HTMLParser):
    """Reads a page: which elements are left open, which addresses it loads, the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.mistakes: list[str] = []
        self.addresses: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.mistakes.append(f"</{tag}> closes {self.open[-1:]} at {self.getpos()}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.seen.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).replace("\xa0", " ").split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "demo"))


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_element_is_closed(page: Page) -> None:
    assert (page.open, page.mistakes) == ([], [])


def test_nothing_is_fetched_from_outside(html: str, page: Page) -> None:
    assert [a for a in page.addresses if not a.startswith(("data:", "#"))] == []
    assert re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", html) == []
    policy = next(
        a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_page_is_small(html: str) -> None:
    assert len(html.encode()) < MOST_BYTES


def test_instruction_with_markup_stays_text(html: str, page: Page) -> None:
    assert "alert(1)" in page.text
    assert "<script>alert" not in html
    assert html.count("<script") == 1
    assert "b>faucet" not in html


def test_task_shows_its_count_and_wilson_interval(page: Page) -> None:
    low, high = wilson(14, 20).low, wilson(14, 20).high
    assert f"14/20 [{100 * low:.0f}-{100 * high:.0f} %]" in page.text
    assert all(task in page.text for task in RATES)


def test_headline_says_mean_interval_rollouts_and_seconds(page: Page) -> None:
    assert "succeeds in 81.2 % of the rollouts, mean of 8 tasks (95 % interval" in page.text
    assert "160 rollouts" in page.text
    assert "14 min 12 s" in page.text


def test_page_terminal_summary_and_notes_show_one_interval(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = write_summary(RunFolder(copied, new=False))
    print_summary(summary, copied)
    interval = mean_of_rates([(k, n) for k, n in summary["success"].values()])
    assert summary["mean"] == {"rate": pytest.approx(0.8125), **asdict(interval)}
    results = json.loads((copied / "evaluation" / "results.json").read_text())
    assert results["scores"]["policy"]["interval"] == asdict(interval)
    for place in (capsys.readouterr().out, Page(write_report(copied).read_text()).text, results["notes"][1]):
        assert interval.percent() in place, place


def test_wrong_instruction_verdict_is_said_in_words(page: Page) -> None:
    verdict = evaluation().verdicts[0]
    assert verdict.control == "wrong_instruction"
    assert verdict.sentence in page.text
    noted = [a["class"] for tag, a in page.elements if tag == "p" and "note" in (a.get("class") or "")]
    assert noted[0] == "note good"


def test_missing_wrong_instruction_control_is_said(copied: Path) -> None:
    path = copied / "evaluation" / "results.json"
    write_json(path, json.loads(path.read_text()) | {"verdicts": []})
    assert "nothing here shows that the text is used" in Page(write_report(copied).read_text()).text


def test_weak_task_is_warned_of(page: Page) -> None:
    assert "push succeeds in 8/20 rollouts (40 %), under 50 %." in page.text
    assert "reach succeeds in" not in page.text


def test_torn_last_record_is_left_out_and_said(page: Page) -> None:
    assert "1 torn line(s) left out" in page.text
    assert "150 records up to optimizer step 3,000" in page.text


def test_non_finite_record_and_failure_are_warned_of(copied: Path) -> None:
    with (copied / "records.jsonl").open("a") as file:
        file.write('\n{"step": 3020, "kind": "train", "loss/align/raw": NaN}\n')
    failure = copied / "failures" / "step-003021"
    failure.mkdir(parents=True)
    write_json(failure / "failure.json", {"step": 3021, "term": "align", "value": "nan"})
    text = Page(write_report(copied).read_text()).text
    assert "Non-finite values were recorded in loss/align/raw" in text
    assert "Training stopped before step 3021: align was nan." in text


def test_resumed_evaluation_and_unfinished_stage_are_warned_of(copied: Path) -> None:
    path = copied / "evaluation" / "results.json"
    write_json(path, json.loads(path.read_text()) | {"resumed": 12})
    stages = json.loads((copied / "stages.json").read_text())
    stages["train"]["finished"] = False
    write_json(copied / "stages.json", stages)
    text = Page(write_report(copied).read_text()).text
    assert "12 of its rollouts come from an interrupted run" in text
    assert "The stage 'train' has not finished" in text


def test_videos_play_muted_in_a_loop_with_controls(page: Page) -> None:
    videos = [attributes for tag, attributes in page.elements if tag == "video"]
    assert len(videos) == 13
    for video in videos:
        assert {"muted", "loop", "controls", "playsinline"} <= set(video)
        assert (video["src"] or "").startswith("data:video/mp4;base64,")


def test_videos_over_the_budget_are_named_and_every_task_keeps_one(run: Path) -> None:
    inputs = read_inputs(run)
    size = 4 * (run / "videos" / inputs.videos[0].file).stat().st_size // 3 + 64
    section = videos_section(inputs, 9 * size)
    groups = section.blocks[0].groups  # pyright: ignore[reportAttributeAccessIssue]
    embedded = {task: [video for video in videos if video.source] for task, videos in groups}
    left = [video for _, videos in groups for video in videos if not video.source]
    assert 8 <= sum(map(len, embedded.values())) <= 9
    assert all(videos for task, videos in embedded.items())
    assert left and all("too large: see videos/" in video.why for video in left)


def test_a_video_outside_the_folder_is_not_read(copied: Path) -> None:
    entry = {"task": "reach", "seed": 1, "success": True, "file": "../config.yaml"}
    write_json(copied / "videos" / "index.json", {"videos": [entry]})
    text = write_report(copied).read_text()
    assert "data:video" not in text
    assert "../config.yaml is missing" in text


def test_empty_run_says_what_has_not_run(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text())
    assert (page.open, page.mistakes) == ([], [])
    assert page.text.count("Not run yet") == 5
    assert "No training records yet" in page.text


def test_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [*JSON_FILES, "records.jsonl", "config.yaml", "first_batch.png", "videos"])
def test_any_one_input_may_be_missing(copied: Path, name: str) -> None:
    lines = (copied / "records.jsonl").read_text().splitlines(keepends=True)
    (copied / "records.jsonl").write_text("".join(lines[::10]))  # a whole training takes seconds to draw
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Page(write_report(copied).read_text()).mistakes == []


def test_broken_json_is_named_and_the_rest_is_shown(copied: Path) -> None:
    (copied / "model.json").write_text("{")
    text = Page(write_report(copied).read_text()).text
    assert "model.json: not valid JSON" in text
    assert "14/20" in text


def test_several_sources_are_rows_of_a_table(copied: Path) -> None:
    path = copied / "data.json"
    data = json.loads(path.read_text())
    data["sources"].append(data["sources"][0] | {"name": "runs/other/dataset", "frames": 7})
    write_json(path, data)
    blocks = data_section(read_inputs(copied)).blocks
    (sources,) = [block for block in blocks if isinstance(block, Table) and block.caption == "sources"]
    assert [row[0].text for row in sources.rows] == ["runs/demo/dataset", "runs/other/dataset"]
    assert sources.rows[1][[head for head, _ in sources.heads].index("frames")].text == "7"


ODD: tuple[Any, ...] = (
    None,
    [],
    {},
    "text",
    -3,
    1e400,
    float("nan"),
    True,
    [[1]],
    [{"a": [{}]}],
    {"k": {"k": None}},
)


@pytest.mark.parametrize("name", JSON_FILES)
def test_foreign_values_anywhere_never_stop_the_page(copied: Path, name: str) -> None:
    whole = json.loads((copied / name).read_text())
    for slow in ("records.jsonl", "first_batch.png"):
        (copied / slow).unlink()
    for seed in range(12):
        chance = random.Random(seed)
        write_json(copied / name, damaged(whole, chance))
        assert Page(write_report(copied).read_text(encoding="utf-8")).mistakes == []


def damaged(whole: Any, chance: random.Random) -> Any:
    """A copy in which one value, at some depth, is replaced by an odd one."""
    whole = copy.deepcopy(whole)
    parent: Any = None
    key: Any = None
    place = whole
    while isinstance(place, dict | list) and place and (parent is None or chance.random() < 0.8):
        parent, key = place, chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = place[key]
    if parent is None or chance.random() < 0.05:
        return chance.choice(ODD)
    parent[key] = chance.choice(ODD)
    return whole


def test_same_run_gives_the_same_bytes(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_nothing_but_the_page_is_left(run: Path) -> None:
    before = {path.name for path in run.iterdir()} | {"report.html"}
    write_report(run)
    assert {path.name for path in run.iterdir()} == before


def test_hostile_run_name_stays_text(copied: Path) -> None:
    summary = json.loads((copied / "summary.json").read_text())
    write_json(copied / "summary.json", summary | {"name": HOSTILE})
    assert write_report(copied).read_text().count("<script") == 1

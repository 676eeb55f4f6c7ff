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
    *("evaluation/results.json", "evaluation/open_loop.json", "summary.json", "stages.json", "model.json"),
    *("data.json", "recording.json", "evaluation/videos/index.json"),
)


class Page(HTMLParser):
    """Reads a page: which elements are left open, which addresses it loads, the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.mistakes: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.seen: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
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


def page_of(run: Path) -> Page:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert (page.open, page.mistakes) == ([], [])
    return page


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy with a tenth of the records: a whole training takes seconds to draw."""
    folder = Path(shutil.copytree(run, tmp_path / "demo"))
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[::10]))
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return page_of(run)


def test_nothing_is_fetched_from_outside_and_markup_stays_text(run: Path, page: Page) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    assert len(html.encode()) < MOST_BYTES
    addresses = [a.get(name) or "#" for _, a in page.elements for name in ("src", "href", "data", "poster")]
    assert [address for address in addresses if not address.startswith(("data:", "#"))] == []
    assert re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", html) == []
    policies = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert [(policy or "")[:18] for policy in policies] == ["default-src 'none'"]
    assert "alert(1)" in page.text and "<script>alert" not in html and "b>faucet" not in html
    assert html.count("<script") == 1


def test_same_run_gives_the_same_bytes_and_leaves_nothing_but_the_page(copied: Path) -> None:
    before = {path.name for path in copied.iterdir()} | {"report.html"}
    assert write_report(copied).read_bytes() == write_report(copied).read_bytes()
    assert {path.name for path in copied.iterdir()} == before


def test_the_instructions_of_the_first_batch_are_text_in_whatever_script(page: Page) -> None:
    assert "打开抽屉" in page.text


def test_success_is_said_by_task_and_in_the_headline(page: Page) -> None:
    low, high = wilson(14, 20).low, wilson(14, 20).high
    assert f"14/20 [{100 * low:.0f}-{100 * high:.0f} %]" in page.text
    assert all(task in page.text for task in RATES)
    assert "succeeds in 81.2 % of the rollouts, mean of 8 tasks (95 % interval" in page.text
    assert "160 rollouts" in page.text and "14 min 12 s" in page.text
    assert "push succeeds in 8/20 rollouts (40 %), under 50 %." in page.text
    assert "reach succeeds in" not in page.text
    verdict = evaluation().verdicts[0]
    assert verdict.control == "wrong_instruction" and verdict.sentence in page.text
    noted = [a["class"] for tag, a in page.elements if tag == "p" and "note" in (a.get("class") or "")]
    assert noted[0] == "note good"
    assert "1 torn line(s) left out" in page.text
    assert "150 records up to optimizer step 3,000" in page.text


def test_page_terminal_summary_and_notes_show_one_interval(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = write_summary(RunFolder(copied, new=False))
    print_summary(summary, copied)
    interval = mean_of_rates([(k, n) for k, n in summary["success"].values()])
    assert summary["mean"] == {"rate": pytest.approx(0.8125), **asdict(interval)}
    results = json.loads((copied / "evaluation" / "results.json").read_text())
    assert results["scores"]["policy"]["interval"] == asdict(interval)
    for place in (capsys.readouterr().out, page_of(copied).text, results["notes"][1]):
        assert interval.percent() in place, place


def test_every_place_says_one_training_and_marks_what_is_solved_without_pictures(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "evaluation" / "results.json"
    assert "olved without pictures" not in page_of(copied).text
    values = json.loads(path.read_text())
    for task in values["scores"]["no_image"]["tasks"]:
        if task["task"] == "drawer-close":
            task |= {"successes": 9, "interval": asdict(wilson(9, 10))}
    write_json(path, values)
    summary = write_summary(RunFolder(copied, new=False))
    print_summary(summary, copied)
    assert (summary["trainings"], summary["solved_without_pictures"]) == (1, ["drawer-close"])
    said, page = " ".join(capsys.readouterr().out.split()), page_of(copied).text
    assert "drawer-close *" in said and "drawer-close solved without pictures" in page
    for place in (said, page):
        assert "ne training: the interval says nothing about other seeds" in place
        assert "Solved without pictures: drawer-close. This success says little about looking" in place


def test_other_evaluations_are_listed_with_their_interval(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((copied / "evaluation" / "results.json").read_text())
    values["protocol"] |= {"policy": "step-003000, raw", "seed_first": 3000}
    for name, content in (("raw", json.dumps(values)), ("torn", "{")):
        (copied / "evaluations" / name).mkdir(parents=True)
        (copied / "evaluations" / name / "results.json").write_text(content)
    text = page_of(copied).text
    interval = evaluation().policy.interval.percent()
    assert f"raw 81.2 % [{interval}] step-003000, raw metaworld-8 3000 to 1019" in text
    summary = write_summary(RunFolder(copied, new=False))
    print_summary(summary, copied)
    assert summary["evaluations"]["raw"]["mean"] == summary["mean"] and list(summary["evaluations"]) == [
        "raw"
    ]
    assert f"Other evaluations: raw 81.2 % {interval}" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(copied / "evaluation")
    assert "Not run yet" in (text := page_of(copied).text) and "step-003000, raw" in text


def test_what_casts_doubt_on_the_numbers_is_warned_of(copied: Path) -> None:
    edit(copied / "evaluation" / "results.json", verdicts=[], resumed=12)
    stages = json.loads((copied / "stages.json").read_text())
    edit(copied / "stages.json", train=stages["train"] | {"finished": False})
    edit(copied / "summary.json", name=HOSTILE)
    (copied / "model.json").write_text("{")
    with (copied / "records.jsonl").open("a") as file:
        file.write('\n{"step": 3020, "kind": "train", "loss/align/raw": NaN}\n')
    failure = copied / "failures" / "step-003021"
    failure.mkdir(parents=True)
    write_json(failure / "failure.json", {"step": 3021, "term": "align", "value": "nan"})
    page = page_of(copied)
    for warning in (
        "nothing here shows that the text is used",
        "not played again 12",
        "The stage 'train' has not finished",
        "model.json: not valid JSON",
        "Non-finite values were recorded in loss/align/raw",
        "Training stopped before step 3021: align was nan.",
        "14/20",  # the rest is shown
    ):
        assert warning in page.text
    assert sum(tag == "script" for tag, _ in page.elements) == 1


def test_videos_play_muted_in_a_loop_and_those_over_the_budget_are_named(run: Path, page: Page) -> None:
    videos = [attributes for tag, attributes in page.elements if tag == "video"]
    assert len(videos) == 13
    for video in videos:
        assert {"muted", "loop", "controls", "playsinline"} <= set(video)
        assert (video["src"] or "").startswith("data:video/mp4;base64,")
    inputs = read_inputs(run)
    size = 4 * (run / "evaluation" / "videos" / inputs.videos[0].file).stat().st_size // 3 + 64
    section = videos_section(inputs, 9 * size)
    groups = section.blocks[0].groups  # pyright: ignore[reportAttributeAccessIssue]
    embedded = [[video for video in videos if video.source] for _, videos in groups]
    left = [video for _, videos in groups for video in videos if not video.source]
    assert all(embedded) and 8 <= sum(map(len, embedded)) <= 9
    assert left and all("too large: see evaluation/videos/" in video.why for video in left)


def test_a_video_outside_the_folder_is_not_read(copied: Path) -> None:
    entry = {"task": "reach", "seed": 1, "success": True, "file": "../config.yaml"}
    write_json(copied / "evaluation" / "videos" / "index.json", {"videos": [entry]})
    page = page_of(copied)
    assert not any(tag == "video" for tag, _ in page.elements)
    assert "../config.yaml is missing" in page.text


def test_empty_run_says_what_has_not_run_and_an_absent_one_is_named(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert page.text.count("Not run yet") == 5
    assert "No training records yet" in page.text
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", [*JSON_FILES, "records.jsonl", "config.yaml", "first_batch.png", "evaluation/videos"]
)
def test_any_one_input_may_be_missing(copied: Path, name: str) -> None:
    path = copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page_of(copied)


def test_several_sources_are_rows_of_a_table(copied: Path) -> None:
    (one,) = json.loads((copied / "data.json").read_text())["sources"]
    edit(copied / "data.json", sources=[one, one | {"name": "runs/other/dataset", "frames": 7}])
    blocks = data_section(read_inputs(copied)).blocks
    (sources,) = [block for block in blocks if isinstance(block, Table) and block.caption == "sources"]
    assert [row[0].text for row in sources.rows] == ["runs/demo/dataset", "runs/other/dataset"]
    assert sources.rows[1][[head for head, _ in sources.heads].index("frames")].text == "7"


ODD: tuple[Any, ...] = (
    *(None, [], {}, "text", -3, 1e400, float("nan"), True, [[1]], [{"a": [{}]}], {"k": {"k": None}}),
)


@pytest.mark.parametrize("name", JSON_FILES)
def test_foreign_values_anywhere_never_stop_the_page(copied: Path, name: str) -> None:
    whole = json.loads((copied / name).read_text())
    (copied / "records.jsonl").unlink()
    for seed in range(12):
        write_json(copied / name, damaged(whole, random.Random(seed)))
        page_of(copied)


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

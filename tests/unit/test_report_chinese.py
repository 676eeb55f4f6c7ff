"""The Chinese of a page: its table, and that nothing of a page gets lost or becomes code."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fixtures.report_runs import HOSTILE, make_run
from tutti.cli.app import app
from tutti.report import chinese
from tutti.report.blocks import Note, Page, Section, render
from tutti.report.chinese import in_language, translated


def page(text: str) -> Page:
    notes, section = [Note(text=text)], Section(id="a", title=text, lead=f"seed 3, {text}")
    more = {"result": text, "tiles": [], "warnings": [text], "sections": [section], "footer": ""}
    return Page(kicker="Warnings", name="name", notes=notes, **more)


def test_every_pattern_has_the_groups_that_its_words_name() -> None:
    exact, patterns = chinese._table()
    assert len(exact) > 150 and len(patterns) > 50
    for pattern, words in patterns:
        places = {int(place) for place in re.findall(r"{(\d+)}", words)}
        assert places <= set(range(pattern.groups)), pattern.pattern
        assert pattern.fullmatch("put the puck on the red goal") is None, pattern.pattern


@settings(max_examples=25)
@given(st.text(st.sampled_from("<>&\"' {}0a:,ä中\n"), min_size=1) | st.just(HOSTILE))
def test_a_strangers_text_stays_what_it_is(text: str) -> None:
    english = render(page(text))
    tags = re.compile(r"<[^>]*>")
    assert tags.findall(in_language(english, "zh"))[6:] == tags.findall(english)[6:]


def test_a_report_is_in_chinese_but_for_names_and_what_comes_from_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    done = CliRunner().invoke(app, ["report", str(run), "--language", "zh"])
    assert done.exit_code == 0 and "report.zh.html" in done.output
    assert 'lang="en"' in (run / "report.html").read_text()
    body = (run / "report.zh.html").read_text().partition("<body>")[2]
    shown = re.sub(r"<(script|style|pre|q|code)\b.*?</\1>", "<>", body, flags=re.DOTALL)
    texts = {unescape(found).strip() for found in re.findall(r">([^<>]+)<", shown)}
    english = [one for one in texts if re.search("[a-z]{3,}(,? [a-z]{2,}){3,}", one)]
    assert english == [], "no sentence is left"
    assert sum(bool(re.search("[一-鿿]", one)) for one in texts) > 100
    assert "please push" in body and "<script>alert(1)" not in body


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("success", "成功"),
        (" 14 min 12 s ", " 14 分 12 秒 "),
        ("over 8 tasks", "8 个任务"),
        ("maximum of fused", "fused 的最大值"),
        ("close the red tap", "close the red tap"),
    ],
)
def test_texts_by_example(text: str, words: str) -> None:
    assert translated(text) == words

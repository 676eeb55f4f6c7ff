"""README.md is one screen with the numbers of benchmarks/results; README.zh-CN.md is the same in Chinese."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
from readme_commands import bare

from tutti.evaluation.closed_loop.results import BLIND_RATE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")}
ENGLISH, CHINESE = PAGES.values()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
MAX_LINES, MAX_WORDS = 80, 800
TOUR = ("types.py", "pipeline.py", "models/vla.py", "objectives/unified.py", "training/trainer.py")


def prose(page: str) -> str:
    """A page without blocks of code, comments and the targets of its links."""
    page = re.sub(r"^    .*\n", "", FENCE.sub("", page), flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL))


def section(page: str, number: int) -> str:
    """The prose below a page's heading of this number, from 0."""
    return prose(page).split("\n## ")[number + 1]


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"[-+]?\.?\d[\d.,/]*(?<![.,])(?: %)?", text))


def test_it_is_one_screen() -> None:
    for page in PAGES.values():
        assert len([line for line in prose(page).splitlines() if line.strip()]) <= MAX_LINES
    assert len([word for word in prose(ENGLISH).split() if re.search(r"\w", word)]) <= MAX_WORDS
    assert "docs/pictures/obey.gif" in ENGLISH
    assert (ROOT / "docs/pictures/obey.gif").stat().st_size < 2_000_000


def test_both_have_the_same_headings_pictures_commands_numbers_and_link_to_each_other() -> None:
    assert "(README.zh-CN.md)" in ENGLISH and "(README.md)" in CHINESE
    for found in (r"^(#+) ", r"!\[[^\]]+\](\([^)]+\))", r"(<!--.*-->)"):
        here, there = (re.findall(found, page, re.MULTILINE) for page in PAGES.values())
        assert here == there and here
    blocks, translated = (
        [(kind, [bare(line) for line in text.splitlines()]) for kind, text in FENCE.findall(page)]
        for page in PAGES.values()
    )
    assert blocks == translated
    spoken, said = (set(re.findall(r"`([^`\n]+)`", prose(page))) for page in PAGES.values())
    assert spoken == said
    assert numbers(prose(ENGLISH)) == numbers(prose(CHINESE))
    targets, translated_targets = (
        set(re.findall(r"\]\(([^)\s]+)\)", page)) - {"README.md", "README.zh-CN.md"}
        for page in PAGES.values()
    )
    assert targets == translated_targets


def take(text: str, *said: str) -> str:
    """The text without these, each of which it must have."""
    for one in said:
        assert one in text, f"{one!r} is not in {text!r}"
        text = text.replace(one, "")
    return text


def test_the_table_of_results_is_what_the_trainings_of_several_seeds_came_to() -> None:
    found = result("demo_seeds")
    trained = found["trained"]
    rates = {
        task: [100 * mean(one["successes"][task]) for one in trained] for task in trained[0]["successes"]
    }
    means = [mean(of) for of in zip(*rates.values(), strict=True)]
    study = result("study_blind")
    blind = {task: mean(100 * mean(one["successes"][task]) for one in study["cells"]) for task in rates}
    left = section(ENGLISH, 2)
    for task, of in rates.items():
        shown = [f"{pick(of):.0f} %" for pick in (median, min, max)] + [f"{blind[task]:.0f} %"]
        left = take(left, f"| {task} | {' | '.join(shown)} |")
    shown = [f"**{pick(means):.1f} %**" for pick in (median, min, max)] + [f"{mean(blind.values()):.1f} %"]
    left = take(left, f"| {' | '.join(shown)} |", f"trained without pictures, {len(study['cells'])} seeds")
    assert (len(study["solvable_blind"]), len(rates)) == (5, 8)
    left = take(
        left, "**Five of the eight can be done without looking**", f"reaches {100 * BLIND_RATE:.0f} %"
    )
    *others, last = (task for task in rates if task not in study["solvable_blind"])
    assert f"is shown by {', '.join(others)} and {last}." in left
    numbered = [one["seed"] for one in trained]
    assert numbered == list(range(numbered[0], numbered[0] + len(trained)))
    seeds = f"{numbered[0]} to {numbered[-1]}"
    minutes = [one["seconds"] / 60 for one in trained]
    (episodes,) = {len(bits) for one in trained for bits in one["successes"].values()}
    (steps,) = {one["steps"] for one in trained}
    left = take(
        left, f"{len(trained)} trainings of the demo's recipe (seeds {seeds}), CPU only: {steps:,} steps"
    )
    where = f"minutes each on one thread of an {found['machine']['processor']}"
    left = take(left, f"{min(minutes):.0f} to {max(minutes):.0f} {where}")
    left = take(left, f"Success on {episodes} starts a task")
    rate, low, high = (100 * result("demo")["mean"][name] for name in ("rate", "low", "high"))
    left = take(left, f"{rate:.1f} % ({low:.0f} to {high:.0f} %, Price and Bonett")
    assert numbers(left) == []
    limits = section(ENGLISH, 6)
    assert numbers(take(limits, f"* {len(trained)} seeds on one CPU")) == []


def test_the_other_numbers_are_those_of_the_result_files() -> None:
    demo = result("demo")
    first = section(ENGLISH, 0)
    said = f"{demo['seconds'] / 60:.0f} minutes on {demo['machine']['cores']} cores"
    first = take(first, said)
    assert numbers(take(first, "Python 3.11 to 3.13")) == []
    left = section(ENGLISH, 1)
    shares = result("picture_training")["shares"]["first"]
    of = {term: f"{100 * shares[term]['vision']:.0f} %" for term in ("state", "action", "recon")}
    left = take(
        left, f"`state` makes {of['state']} of the vision encoder's update, `action` {of['action']}, "
    )
    left = take(left, f"`recon` {of['recon']}")
    wrong, blind = demo["controls"]["wrong_instruction"], demo["controls"]["no_image"]
    listened, told, looked = (
        "/".join(str(sum(column)) for column in zip(*pairs, strict=True))
        for pairs in ([demo["success"][task] for task in wrong], wrong.values(), blind.values())
    )
    left = take(left, f"{listened} becomes {told}; without pictures {looked}")
    modes = result("kill_resume")["modes"].values()
    kills, values, differ = (sum(one[key] for one in modes) for key in ("kills", "values", "differ"))
    left = take(left, f"{kills} random moments: {differ} of {values:,} values differ", "`kill -9`")
    study = result("study_e1")
    effects = [(one["name"], one["found"]) for one in study["contrasts"] if not one["exploratory"]]
    assert {found["verdict"] for _, found in effects} == {"unresolved"} and study["missing"] == []
    ends = [found["over_seeds"] for _, found in effects]
    ends += [found["difference"]["interval"] for _, found in effects]
    low, high = 100 * min(one["low"] for one in ends), 100 * max(one["high"] for one in ends)
    each = ", ".join(f"{name} {100 * found['difference']['value']:+.1f}" for name, found in effects)
    trained = f"{len(study['cells'])} trainings with every label: {each} points of success"
    left = take(left, "`tutti compare e1`; `e2`", f"{trained}, 95 % within {low:.1f} to {high:+.1f}")
    study = result("study_e2")
    over = {one["name"]: one for one in study["contrasts"] if not one["exploratory"]}
    assert study["missing"] == [] and all(one["adjusted_p"] >= 0.05 for one in over.values())
    left = take(left, f"{len(study['cells'])} with ten of a hundred demonstrations labelled")
    alone, twice = over["joint - action"], over["joint - action-2b"]
    gains = [f"{100 * one['found']['difference']['value']:+.1f}" for one in (alone, twice)]
    left = take(
        left, f"{gains[0]} over action alone (p {alone['adjusted_p']:.3f} after Holm)".replace("0.", ".", 1)
    )
    ends = twice["found"]["over_seeds"]
    wide = f"{100 * ends['low']:+.1f} to {100 * ends['high']:+.1f}"
    left = take(left, f"{gains[1]} over twice the labelled batch ({wide})")
    for name, arm in (("towers-vision", "sight"), ("towers-time", "both")):
        study = result(f"study_{name}")
        (one,) = (one for one in study["contrasts"] if one["name"] == f"{arm} - base")
        assert study["missing"] == [] and one["adjusted_p"] < 0.05 and one["found"]["verdict"] == "better"
        ends = one["found"]["difference"]["interval"]
        wide = f"{100 * ends['low']:+.1f} to {100 * ends['high']:+.1f}"
        gain = f"{100 * one['found']['difference']['value']:+.1f} ({wide}), better"
        left = take(left, f"{len(study['cells'])} trainings: {gain}")
    for name in ("towers-full", "towers-full-words"):  # "at full length both unresolved"
        assert [one["found"]["verdict"] for one in result(f"study_{name}")["contrasts"][:1]] == ["unresolved"]
    assert numbers(left) == []


@pytest.mark.parametrize("page", PAGES)
def test_the_five_files_are_about_as_long_as_it_says(page: str) -> None:
    rows = re.findall(r"^\| \[([^\]]+)\]\(src/tutti/\1\) \| (\d+) \|", PAGES[page], re.MULTILINE)
    assert [file for file, _ in rows] == list(TOUR)
    for file, said in rows:
        lines = len((ROOT / "src/tutti" / file).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(said)) <= max(15, 0.1 * lines), f"{file} has {lines} lines"

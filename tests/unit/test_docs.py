"""The pages: every file and every part of the code that they point at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tutti.config.run_config import load_config

ROOT = Path(__file__).resolve().parents[2]
HISTORY = ROOT / "docs" / "background" / "log.md"  # speaks of files as they were
PAGES = sorted(
    {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"} - {HISTORY}
)


BAR = re.compile(r"(?<!\\)\|")


def test_every_page_is_in_the_index_of_its_folder() -> None:
    """The site takes its order from there."""
    missing = [
        str(page.relative_to(ROOT))
        for page in (ROOT / "docs").rglob("*.md")
        if page.name != "index.md" and f"({page.name})" not in (page.parent / "index.md").read_text()
    ]
    assert missing == []


def test_every_link_to_a_file_leads_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_row_of_a_table_has_a_cell_for_each_column() -> None:
    """A bar within a cell is written as \\|."""
    odd = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            head, *rows = table.splitlines()
            odd += [f"{page.name}: {row}" for row in rows if len(BAR.findall(row)) != len(BAR.findall(head))]
    assert odd == []


def test_every_python_file_that_a_page_names_exists() -> None:
    """`training/trainer.py` is looked for below src/tutti, `benchmarks/x.py` below the root."""
    homes = (ROOT, ROOT / "src" / "tutti")
    missing = [
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        for name in re.findall(r"`((?:\w+/)+\w+\.pyi?)`", page.read_text(encoding="utf-8"))
        if not any((home / name).exists() for home in homes)
    ]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/debugging.md", "src/tutti/cli/app.py"])
def test_the_replay_that_a_newcomer_copies_begins_at_a_checkpoint_that_is_kept(page: str) -> None:
    training = load_config(ROOT / "configs" / "demo.yaml").training
    every, keep = training.checkpoints.every, training.checkpoints.keep
    steps = re.findall(r"replay runs/demo --step (\d+)", (ROOT / page).read_text(encoding="utf-8"))
    kept = range(every, training.steps + 1, every)[-keep:]
    assert steps and all(kept[0] < int(step) <= training.steps for step in steps)


def test_every_fault_that_was_found_has_its_test() -> None:
    """`unit/test_x.py::test_y` is looked for below tests/; docs/background/faults.md has one in each row."""
    named = re.compile(r"`(\w+/test_\w+\.py)::(test_\w+)`")
    missing = [
        f"{page.name}: {file}::{test}"
        for page in PAGES
        for file, test in named.findall(page.read_text(encoding="utf-8"))
        if not (path := ROOT / "tests" / file).exists()
        or f"\ndef {test}(" not in path.read_text(encoding="utf-8")
    ]
    assert missing == []
    lines = (ROOT / "docs" / "background" / "faults.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "| what holds now |" not in line]
    assert len(rows) > 60 and [row for row in rows if not named.search(row)] == []

"""The pages: every file, key, command and metric that they name exists."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from readme_commands import bare
from typer.core import TyperGroup

from tutti.cli.app import app
from tutti.config.run_config import load_config
from tutti.errors import UserError
from tutti.training.metric_names import METRICS, describe_metric

ROOT = Path(__file__).resolve().parents[2]
HISTORY = ROOT / "docs" / "background" / "log.md"  # speaks of files as they were
PAGES = sorted(
    {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"} - {HISTORY}
)
TAUGHT = [
    *ROOT.glob("README*.md"),
    *(ROOT / "docs" / "start").glob("*.md"),
    *(ROOT / "docs" / "zh").glob("*.md"),
]
"""Pages whose every command is checked: those that a newcomer copies from."""
SCHEMA: dict[str, Any] = json.loads((ROOT / "src" / "tutti" / "config" / "schema.json").read_text("utf-8"))
NO_KEYS = {"model.safetensors", "model.onnx", "model.int8.onnx", "model.spec", "model.vision.tokens_per_view"}
"""Files and attributes that are written as keys are."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
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


def headings(page: Path) -> set[str]:
    """The anchors that a Git host gives the headings of a page."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in found}


def test_every_link_to_a_part_of_a_page_names_one_of_its_headings() -> None:
    """Of pages outside of docs/ too, which the site's build does not read."""
    links = [
        (page, target, part)
        for page in PAGES
        for target, part in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", FENCE.sub("", page.read_text("utf-8")))
        if "://" not in target and (not target or target.endswith(".md"))
    ]
    broken = [
        f"{page.relative_to(ROOT)}: {target}#{part}"
        for page, target, part in links
        if (aim := page.parent / target if target else page).exists() and part not in headings(aim)
    ]
    assert len(links) > 20 and broken == []


def test_every_link_to_elsewhere_is_a_whole_https_address() -> None:
    """Whether somebody answers there is not asked: tests use no network."""
    links = {
        (str(page.relative_to(ROOT)), link)
        for page in PAGES
        for link in re.findall(r"\]\(([a-z]+:[^)\s]*)\)", FENCE.sub("", page.read_text("utf-8")))
    }
    assert len(links) > 3
    assert [
        one for one in links if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[\w./#?=&%+~-]*)?", one[1])
    ] == []


def holds(node: dict[str, Any], names: list[str]) -> bool:
    """Whether a part of the schema has a key below it; of a choice one kind will do."""
    if "$ref" in node:
        return holds(SCHEMA["$defs"][node["$ref"].rpartition("/")[2]], names)
    if not names or any(holds(kind, names) for kind in (*node.get("oneOf", ()), *node.get("anyOf", ()))):
        return True
    below = node.get("properties", {}).get(names[0], node.get("additionalProperties"))
    if isinstance(below, dict):
        return holds(below, names[1:])
    return isinstance(node.get("items"), dict) and holds(node["items"], names)


def test_every_config_key_that_a_page_names_exists() -> None:
    """`training.optimizer.lr`, or `training.optimizer.lr=0.005`; the changelog has those of before."""
    assert holds(SCHEMA, ["objective", "recon", "weight", "start"]) and holds(
        SCHEMA, ["data", "sources", "path"]
    )
    assert not holds(SCHEMA, ["training", "optimizer", "rate"]) and not holds(SCHEMA, ["training", "lr"])
    sections = "|".join(name for name in SCHEMA["properties"] if name not in ("base", "name", "seed"))
    named = re.compile(rf"`((?:{sections})\.[a-z_.0-9]+)[=`]")
    wrong = [
        f"{page.relative_to(ROOT)}: {key}"
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for key in {*named.findall(page.read_text(encoding="utf-8"))} - NO_KEYS
        if not holds(SCHEMA, key.split("."))
    ]
    assert wrong == []


def test_every_metric_that_the_chinese_page_names_is_recorded() -> None:
    kinds = "|".join({name.partition("/")[0] for name in METRICS})
    named = re.findall(rf"`((?:{kinds})/[\w/~]+)`", (ROOT / "docs/zh/index.md").read_text(encoding="utf-8"))
    assert len(named) > 10 and [name for name in named if describe_metric(name) is None] == []


def test_chinese_text_is_not_broken_within_a_paragraph() -> None:
    """A page shows the end of a line as a space, which Chinese does not have between two words."""
    wide = r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
    cut = re.compile(rf"^(?![|#]|    ).*{wide}\n(?!\n|[-*|#`]|    ).+", re.MULTILINE)
    texts = {page.name: FENCE.sub("", page.read_text(encoding="utf-8")) for page in PAGES}
    broken = [f"{name}: {found}" for name, text in texts.items() for found in cut.findall(text)]
    assert broken == []


def commands(page: Path) -> Iterator[str]:
    """What a page tells to type: lines of its blocks, and `tutti ...` within its text."""
    text = page.read_text(encoding="utf-8")
    for kind, block in FENCE.findall(text):
        if kind in ("", "sh"):
            yield from (bare(line) for line in re.sub(r"\\\n\s*", "", block).splitlines())
    yield from re.findall(r"`(tutti [^`]+)`", FENCE.sub("", text))


def mistake(line: str) -> str:
    """What is wrong with a command line: its name, an option, a config file or a key; else nothing."""
    command: Any = typer.main.get_command(app)
    words = shlex.split(line.partition(" | ")[0].partition(" > ")[0])[1:]
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in command.commands:
            return f"{name} is no command"
        command = command.commands[name]
    options = {"--help"}.union(*({*one.opts, *one.secondary_opts} for one in command.params))
    for word in words:
        if word.startswith("--"):
            if word.partition("=")[0] not in options:
                return f"{word} is no option"
            continue
        key, is_override, _ = word.partition("=")
        if is_override and not holds(SCHEMA, key.split(".")):
            return f"{key} is no key"
        if word.startswith("configs/") and not (ROOT / word).is_file():
            return f"{word} is no file"
    if command.name in ("record", "train", "doctor") and words[0].startswith("configs/"):
        try:
            load_config(ROOT / words[0], [word for word in words[1:] if not word.startswith("--")])
        except UserError as error:
            return str(error)
    return ""


def test_a_mistake_in_a_command_is_found() -> None:
    for line, wrong in (
        ("tutti trian configs/demo.yaml", "trian"),
        ("tutti data look x", "look"),
        ("tutti train configs/demo.yml", "demo.yml"),
        ("tutti train configs/demo.yaml training.stepz=3", "training.stepz"),
        ("tutti tune --rates configs/demo.yaml", "--rates"),
        ("tutti train configs/demo.yaml strategy.kind=staged", "staged"),
    ):
        assert wrong in mistake(line)
    assert mistake("tutti tune --rate configs/demo.yaml --seeds 3") == ""


@pytest.mark.parametrize("page", TAUGHT, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_for_newcomers_can_be_typed(page: Path) -> None:
    found = [line for line in commands(page) if line.startswith("tutti ")]
    assert (found or page.name == "index.md") and {
        line: mistake(line) for line in found if mistake(line)
    } == {}


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


@pytest.mark.parametrize(
    "page",
    ["docs/start/in-pieces.md", "docs/zh/index.md", "docs/how-to/debugging.md", "src/tutti/cli/app.py"],
)
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

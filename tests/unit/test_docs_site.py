"""The site's build: what the hooks add to it, and what it refuses, on a site of a few pages."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of the settings and hooks beside four pages, without the references, which need seconds."""
    pages = {
        "docs/index.md": "# Home\n\n![a dot](dot.svg)\n\n* [How](how/index.md)\n",
        "docs/dot.svg": "<svg/>",
        "docs/how/index.md": "# How\n\n* [Second](b.md)\n* [First](a.md)\n",
        "docs/how/a.md": "# A\n\n## Part\n\n[the code](../../code.py)\n",
        "docs/how/b.md": "# B\n\n[part](a.md#part), [rules](../../LICENSE), [notes](../../notes/read.md)\n",
        "notes/read.md": "# Notes\n\n[back](../docs/how/a.md), [numbers](numbers.json), ![dot](dot.svg)\n",
        "notes/dot.svg": "<svg/>",
        "LICENSE": "As is.\n",
        "notes/numbers.json": '{"loss": 0.25}\n',
        "code.py": "print('<loss>')\n",
    }
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    hooks = (ROOT / "docs" / "hooks.py").read_text()
    hooks = hooks.replace("return [*_config_pages(), *_python_pages()]", "return []")
    (tmp_path / "docs" / "hooks.py").write_text(hooks)
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(settings[: settings.index("\nplugins:")] + "\nplugins: [offline]\n")
    return tmp_path


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_of_the_config_has_a_row_and_every_class_a_table(hooks: ModuleType) -> None:
    schema = json.loads((hooks.PACKAGE / "config" / "schema.json").read_text())
    pages = {name: text for _, name, text in hooks._config_pages()}
    assert set(schema["properties"]) - set(pages) == {"base", "name", "seed"}
    text = "\n".join(pages.values())
    for found in schema["$defs"].values():
        assert found["description"] in text
        for key, value in found["properties"].items():
            assert f"| `{key}` |" in text or (key == "kind" and "pattern" not in value)
    row = "| `lr` | number | `0.001` | above 0 | Peak learning rate. |"
    assert row in pages["training"] and "| `adamw` |  | Optimiser and its rates. |" in pages["training"]
    links, anchors = re.findall(r"\]\(#([^)]+)\)", text), re.findall(r"\{ #(\S+) \}", text)
    assert set(links) == set(anchors) and len(anchors) > 60


def test_every_command_and_every_public_name_has_its_entry(hooks: ModuleType) -> None:
    from tutti.cli.app import COMMANDS

    for command in COMMANDS:
        assert f"## `tutti {command.__name__.replace('_', '-')}`" in hooks._commands()
    assert "`tutti data check`" in hooks._commands() and "[bold]" not in hooks._commands()
    text = "\n".join(text for _, _, text in hooks._python_pages())
    entries = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert "tutti.objectives.term.Term" in entries and len(entries) == len(set(entries)) > 150
    stubs = list(hooks.PACKAGE.rglob("__init__.pyi"))
    exported = {name for stub in stubs for name in re.findall(r'^    "(\w+)",$', stub.read_text(), re.M)}
    assert exported - {entry.rpartition(".")[2] for entry in entries} == {"__version__", "chunks", "pipeline"}


def made(site: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(site)
        build(load_config(str(site / "mkdocs.yml")))
    return site / "site"


def test_links_to_files_outside_of_the_pages_lead_to_copies_of_them(site: Path) -> None:
    found = made(site)
    assert 'href="../repository/code.py.html"' in (found / "how" / "a.html").read_text()
    assert "&lt;loss&gt;" in (found / "repository" / "code.py.html").read_text()
    notes = (found / "repository" / "notes" / "read.html").read_text()
    assert 'href="../../how/a.html"' in notes and 'href="numbers.json.html"' in notes
    assert "As is." in (found / "repository" / "LICENSE.html").read_text()
    assert (found / "repository" / "notes" / "dot.svg").read_text() == "<svg/>"
    assert "0.25" in (found / "repository" / "notes" / "numbers.json.html").read_text()


def test_the_order_of_the_pages_is_that_of_the_index(site: Path) -> None:
    page = (made(site) / "how" / "a.html").read_text()
    assert "a dot" not in page  # a picture is no page
    sidebar = page[page.index("md-sidebar--primary") : page.index("md-sidebar--secondary")]
    assert sidebar.index("Second") < sidebar.index("First")


@pytest.mark.parametrize(
    ("page", "text", "message"),
    [
        ("docs/how/a.md", "[gone](gone.md)", "gone.md"),
        ("docs/how/a.md", "[gone](b.md#gone)", "no such anchor|does not contain an anchor"),
        ("docs/how/a.md", "[gone](../../gone.py)", "gone.py"),
        ("docs/how/a.md", "![gone](gone.png)", "gone.png"),
        ("notes/read.md", "[gone](gone.md)", "gone.md"),
        ("docs/how/c.md", "# Not in the index", r"how/c\.md"),
        ("docs/how/a.md", "A list:\n* shown as text", "shown as text"),
        ("docs/how/a.md", "Named `norm/<term>` or norm/<term>.", "term.* read as HTML"),
        ("docs/how/a.md", "A table:\n| a | b |\n|---|---|\n| 1 | 2 |", "shown as text"),
    ],
)
def test_a_mistake_in_a_page_fails_the_build(
    site: Path, caplog: pytest.LogCaptureFixture, page: str, text: str, message: str
) -> None:
    file = site / page
    file.write_text((file.read_text() if file.exists() else "") + f"\n{text}\n")
    with caplog.at_level(logging.WARNING), pytest.raises(Abort):
        made(site)
    assert re.search(message, caplog.text)


def test_nothing_of_the_site_is_loaded_from_elsewhere(site: Path) -> None:
    found = made(site)
    loads = re.compile(r'(?:src|href)="(?:https?:)?//|url\(["\']?(?:https?:)?//|@import')
    files = [*found.rglob("*.html"), *found.rglob("*.css")]
    assert len(files) > 8 and [file for file in files if loads.search(file.read_text())] == []


def test_a_notebook_is_a_page_with_its_outputs_in_the_order_of_its_index(site: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Steps\n", "\n", "[the code](../../code.py)"]},
        {
            "cell_type": "code",
            "source": ["print(2 < 3)"],
            "outputs": [
                {"output_type": "stream", "text": ["True\n"]},
                {
                    "output_type": "execute_result",
                    "data": {"image/svg+xml": ["<svg/>"], "text/plain": ["Chart"]},
                },
            ],
        },
    ]
    (site / "docs" / "how" / "steps.ipynb").write_text(json.dumps({"cells": cells}))
    (site / "notes" / "read.md").write_text("# Notes\n\n[steps](../docs/how/steps.ipynb)\n")
    (site / "docs" / "how" / "index.md").write_text(
        "# How\n\n* [Steps](steps.ipynb)\n* [B](b.md)\n* [A](a.md)\n"
    )
    found = made(site)
    assert 'href="../../how/steps.html"' in (found / "repository" / "notes" / "read.html").read_text()
    page = (found / "how" / "steps.html").read_text()
    assert "data:image/svg+xml;base64,PHN2Zy8+" in page and "True" in page and "Chart" not in page
    links = re.findall(r'href="(?:\./)?(steps|b|a)\.html"', page.partition("<body")[2])
    assert list(dict.fromkeys(links)) == ["steps", "b", "a"]

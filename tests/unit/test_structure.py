"""The house: files are short, say what they are, know only the floors below; every metric is documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tutti.training.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "tutti"
FILES = sorted(PACKAGE.rglob("*.py"))
LAST_LINE = 350
MOST_STATEMENTS = 50
FORBIDDEN = {"utils.py", "helpers.py", "common.py", "base.py"}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def statements(node: ast.AST) -> int:
    return sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - 1


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_file_is_under_350_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < LAST_LINE


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_first_line_of_a_file_says_what_it_is(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith('"""')


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_functions_are_under_50_statements(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    assert {node.name: statements(node) for node in functions if statements(node) >= MOST_STATEMENTS} == {}


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [path for path in FILES if path.name in FORBIDDEN] == []


def test_file_imports_only_from_floors_below_its_own() -> None:
    """What import-linter checks in `make lint`, checked here too so that a test run alone finds it."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    floors = [re.split(r"\s*\|\s*", layer) for layer in linter["contracts"][0]["layers"]]
    height = {name: -number for number, floor in enumerate(floors) for name in floor}
    wrong = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in FILES
        if (own := path.relative_to(PACKAGE).with_suffix("").parts[0]) != "__init__"
        for target in imported(path)
        if target != own and height[target] >= height[own]
    ]
    assert wrong == []


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports anywhere in it, as `data` for `tutti.data.windows`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module="tutti", names=aliases):
                found |= {alias.name for alias in aliases if alias.name != "__version__"}
            case ast.ImportFrom(module=str(module)) if module.startswith("tutti."):
                found.add(module.split(".")[1])
            case ast.Import(names=aliases):
                found |= {alias.name.split(".")[1] for alias in aliases if alias.name.startswith("tutti.")}
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_metric_has_a_line_in_the_docs(metric: str) -> None:
    documented = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert f"| `{metric}` |" in documented


def test_documented_metrics_exist() -> None:
    documented = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([^`]+)` \|", documented, re.MULTILINE)) == set(METRICS)


def test_importing_tutti_and_asking_for_help_load_no_torch() -> None:
    code = "import sys, tutti, tutti.cli.main; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=False).returncode == 0

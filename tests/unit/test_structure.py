"""The house: short files that say what they are, imports that only go down, no circle, no unused name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter

import mutants

from fixtures.source_tree import (
    FILES,
    MODULES,
    PACKAGE,
    ROOT,
    circles,
    code_lines,
    imports,
    shown,
    tree,
    unused_names,
)
from tutti.training.metric_names import METRICS

MAX_LINES, MAX_STATEMENTS, MAX_FILES = 350, 50, 13
LONGER: dict[str, int] = {}
"""Files with more lines than that, since each replaces two that shared private names: file and limit."""
CROWDED: set[str] = set()
"""Folders that still hold more than MAX_FILES."""
MAX_CODE_LINES = 23_300
"""Lines of code of the package, without blank lines, comments and docstrings. It goes down."""
TOUR = ("types.py", "pipeline.py", "models/vla.py", "objectives/unified.py", "training/trainer.py")
"""What one reads to know Tutti."""
MAX_TOUR_LINES = 1000
FORBIDDEN = {"utils.py", "helpers.py", "common.py", "base.py"}
ROOMS_OF_TRAINING = (
    *("rng", "signals", "metric_names", "data_feed", "optim", "strategy", "device", "records"),
    *("backward", "parallel", "state", "update", "checkpointing", "validation"),
    *("faults", "diagnostics", "config", "trainer"),
)
"""Files and folders of tutti.training, each of which imports only those before it."""
KNOW_THE_TRAINER = ("training/trainer.py", "runs/", "debug/")
UNUSED: set[str] = set()
"""Public names that nothing uses, each with the reason why it may stay."""


def lines_of(name: str) -> int:
    return len((PACKAGE / name).read_text(encoding="utf-8").splitlines())


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(PACKAGE)): lines_of(str(path)) for path in FILES}
    assert {name: n for name, n in lengths.items() if n >= LONGER.get(name, MAX_LINES)} == {}
    assert all(lengths[name] >= MAX_LINES and limit <= 450 for name, limit in LONGER.items())


def test_first_line_of_a_file_says_what_it_is() -> None:
    assert [shown(path) for path in FILES if not path.read_text(encoding="utf-8").startswith('"""')] == []


def test_functions_are_under_50_statements() -> None:
    counts = {
        f"{shown(path)}: {node.name}": sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - 1
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(counts) > 1000
    assert {name: count for name, count in counts.items() if count >= MAX_STATEMENTS} == {}


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [shown(path) for path in FILES if path.name in FORBIDDEN] == []


def test_a_folder_holds_at_most_13_files() -> None:
    counts = Counter(
        str(path.parent.relative_to(PACKAGE))
        for path in FILES
        if path.name not in ("__init__.py", "__main__.py")
    )
    assert {folder for folder, count in counts.items() if count > MAX_FILES} == CROWDED


def test_the_package_grows_no_longer() -> None:
    assert sum(map(code_lines, FILES)) <= MAX_CODE_LINES


def test_the_tour_is_short() -> None:
    assert sum(map(lines_of, TOUR)) < MAX_TOUR_LINES


def test_file_imports_only_from_floors_below_its_own() -> None:
    """What import-linter checks in `make lint`, checked here too so that a test run alone finds it."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    floors = [re.split(r"\s*\|\s*", layer) for layer in linter["contracts"][0]["layers"]]
    height = {name: -number for number, floor in enumerate(floors) for name in floor}
    edges = {(module.split(".")[1], target.split(".")[1]) for module, target in graph_edges()}
    assert [edge for edge in sorted(edges) if edge[0] != edge[1] and height[edge[1]] >= height[edge[0]]] == []


def graph_edges() -> list[tuple[str, str]]:
    """All imports inside the package; the root hands out everything lazily, and is asked for nothing."""
    return [
        (module, target)
        for module in MODULES
        if module != "tutti"
        for target, _ in imports(module)
        if target not in ("tutti", module)
    ]


def test_only_the_version_is_imported_from_the_root() -> None:
    asked = {(module, name) for module in MODULES for target, name in imports(module) if target == "tutti"}
    assert {name for _, name in asked} <= {"__version__"}


def test_rooms_of_training_import_only_rooms_below() -> None:
    rooms = [
        tuple(name.split(".")[2] for name in edge)
        for edge in graph_edges()
        if all(name.startswith("tutti.training.") for name in edge)
    ]
    assert {room for edge in rooms for room in edge} == set(ROOMS_OF_TRAINING)
    height = ROOMS_OF_TRAINING.index
    assert {(a, b) for a, b in rooms if height(b) > height(a)} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for type checkers and inside functions count: what must be read together is one module."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, target in graph_edges():
        graph[module].add(target)
    assert circles(graph) == []


def test_nobody_below_the_trainer_knows_it() -> None:
    def knows(path: str) -> bool:
        return any(
            (isinstance(node, ast.Name) and node.id == "Trainer")
            or (isinstance(node, ast.alias) and node.name == "Trainer")
            or (isinstance(node, ast.Constant) and node.value == "Trainer")
            for node in ast.walk(tree(PACKAGE / path))
        )

    below = [
        name for path in FILES if not (name := str(path.relative_to(PACKAGE))).startswith(KNOW_THE_TRAINER)
    ]
    assert [name for name in below if knows(name)] == []


def test_every_public_name_is_used() -> None:
    """By the package, the benchmarks, the examples, or exported in an `__init__.pyi`; tests do not count."""
    assert set(unused_names()) == UNUSED


def test_metrics_and_their_docs_name_the_same() -> None:
    documented = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([^`]+)` \|", documented, re.MULTILINE)) == set(METRICS)


def test_importing_tutti_and_asking_for_help_load_no_torch() -> None:
    code = "import sys, tutti, tutti.cli.main; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=False).returncode == 0


def test_every_mutant_names_a_line_and_tests_that_are_there() -> None:
    """Whether the tests notice them is what benchmarks/mutants.py finds out, in minutes."""
    for mutant in mutants.read():
        mutant.apply((PACKAGE / mutant.file).read_text(encoding="utf-8"))
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), test

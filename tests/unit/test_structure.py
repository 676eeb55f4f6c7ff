"""The house: short files that say what they are, imports that only go down, no circle, no unused name."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import mutants

from tutti.training.metric_names import METRICS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "tutti"
FILES = sorted(PACKAGE.rglob("*.py"))
USERS = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]
"""Where a name of the package may be used; what only tests use is not used."""
MAX_LINES, MAX_STATEMENTS, MAX_FILES = 350, 50, 13
MAX_CODE_LINES = 45_395
"""Lines of code of the package, without blank lines, comments and docstrings. It goes down; it rose once, by
180, for some forty faults of search, judge, mirror and towers."""
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
TOLD = re.compile("(ModuleNotFound|Import)Error")
KNOW_THE_TRAINER = ("training/trainer.py", "runs/", "debug/")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """`tutti.data.windows`; a package is its `__init__`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def exports(package: str) -> Mapping[str, str]:
    """The names that a package hands out by its `__init__.pyi`, each with the module that defines it."""
    stub = MODULES[package].with_suffix(".pyi")
    if MODULES[package].name != "__init__.py" or not stub.is_file():
        return {}
    handed: dict[str, str] = {}
    for node in tree(stub).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            source = f"{package}.{node.module}" if node.module else package
            for alias in node.names:
                name = f"{source}.{alias.name}"
                handed[alias.asname or alias.name] = name if name in MODULES else source
    return handed


def imports(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a file imports of the package, for types and inside functions too."""
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "tutti")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tutti":
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = full if full in MODULES else exports(node.module).get(alias.name, node.module)
                yield target, alias.name


def public_names(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """The functions, classes and constants without a leading underscore that a file defines."""
    for node in tree(path).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case ast.Assign(targets=targets):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case _:
                names = []
        yield from ((name, node) for name in names if not name.startswith("_"))


def mentions(node: ast.AST) -> Counter[str]:
    """How often each name is read, imported or part of a string such as "tutti.pipeline:train"."""
    found: Counter[str] = Counter()
    for child in ast.walk(node):
        match child:
            case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name):
                found[name] += 1
            case ast.alias(name=name):
                found[name.split(".")[-1]] += 1
            case ast.Constant(value=str(text)) if len(text) < 200:
                found.update(text.replace(".", " ").replace(":", " ").replace("[", " ").split())
    return found


def unused_names() -> Iterator[str]:
    """`tutti.data.windows: name` for each public name that nothing uses but its own definition."""
    everywhere: Counter[str] = Counter()
    for path in USERS:
        everywhere.update(mentions(tree(path)))
    handed = {(source, name) for package in MODULES for name, source in exports(package).items()}
    for module, path in MODULES.items():
        for name, node in public_names(path):
            if everywhere[name] <= mentions(node)[name] and (module, name) not in handed:
                yield f"{module}: {name}"


def code_lines(path: Path) -> int:
    """Lines of a file that are neither blank, nor comment, nor docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for part in node.body:
                if (
                    isinstance(part, ast.Expr)
                    and isinstance(part.value, ast.Constant)
                    and isinstance(part.value.value, str)
                ):
                    docstrings |= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in (*no_code, tokenize.ENDMARKER):
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def lines_of(name: str) -> int:
    return len((PACKAGE / name).read_text(encoding="utf-8").splitlines())


def test_files_are_short_and_say_what_they_are_in_their_names_and_first_lines() -> None:
    long = [shown(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) >= MAX_LINES]
    silent = [shown(path) for path in FILES if not path.read_text(encoding="utf-8").startswith('"""')]
    drawers = [shown(path) for path in FILES if path.name in FORBIDDEN]
    counted = (path for path in FILES if path.name not in ("__init__.py", "__main__.py"))
    folders = Counter(str(path.parent.relative_to(PACKAGE)) for path in counted)
    crowded = [folder for folder, count in folders.items() if count > MAX_FILES]
    assert (long, silent, drawers, crowded) == ([], [], [], [])


def test_functions_are_under_50_statements() -> None:
    counts = {
        f"{shown(path)}: {node.name}": sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - 1
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(counts) > 1000
    assert {name: count for name, count in counts.items() if count >= MAX_STATEMENTS} == {}


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
    TopologicalSorter(graph).prepare()  # a CycleError names the modules


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
    assert list(unused_names()) == []


def test_metrics_and_their_docs_name_the_same() -> None:
    documented = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([^`]+)` \|", documented, re.MULTILINE)) == set(METRICS)


def loaded_with(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a file is loaded, or a function called: none for types, none in a guard."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
            or (isinstance(child, ast.Try) and any(TOLD.search(ast.dump(one)) for one in child.handlers))
        ):
            yield from loaded_with(child)


def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that one import loads: of this package by their place, of others the package."""
    if isinstance(node, ast.Import):
        yield from (alias.name if alias.name in MODULES else alias.name.split(".")[0] for alias in node.names)
    elif node.module:
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            handed = exports(node.module) if node.module in MODULES else {}
            own = full if full in MODULES else handed.get(alias.name, node.module)
            yield own if own in MODULES else node.module.split(".")[0]


def test_a_module_that_needs_an_extra_is_loaded_only_where_its_absence_is_told() -> None:
    """An environment without extras has every command but those that say which extra they lack.

    A file that imports a package which Tutti alone does not bring, or such a file, is imported at the top of
    another such file, or in a function that tells of its absence; a package itself in a file that does.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        re.split(r"[^\w.-]", one)[0]
        for name in project["optional-dependencies"]
        for one in project["optional-dependencies"][name]
    }
    extras -= {re.split(r"[^\w.-]", one)[0] for one in project["dependencies"]}
    homes = packages_distributions()
    foreign = {name for name, owners in homes.items() if extras & {*owners}}
    assert {"websockets", "msgpack", "optuna", "transformers"} <= foreign
    loads = {
        module: {to for node in loaded_with(tree(path)) for to in targets(node)}
        for module, path in MODULES.items()
    }
    needy = {module for module, found in loads.items() if found & foreign}
    while more := {module for module, found in loads.items() if found & needy} - needy:
        needy |= more
    assert "tutti.serving.client" in needy and "tutti.cli.app" not in needy
    untold = [
        f"{module}: {node.name} imports {to}"
        for module in MODULES.keys() - needy
        for node in ast.walk(tree(MODULES[module]))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for one in loaded_with(node)
        for to in targets(one)
        if (to in needy and not TOLD.search(ast.dump(node)))
        or (to in foreign and not TOLD.search(ast.dump(tree(MODULES[module]))))
    ]
    assert untold == []


def test_importing_tutti_and_asking_for_help_load_no_torch() -> None:
    code = "import sys, tutti, tutti.cli.app; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=False).returncode == 0


def test_every_mutant_names_a_line_and_tests_that_are_there() -> None:
    """Whether the tests notice them is what benchmarks/mutants.py finds out, in minutes."""
    for mutant in mutants.read():
        mutant.apply((PACKAGE / mutant.file).read_text(encoding="utf-8"))
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), test


def test_every_file_of_tests_has_a_name_of_its_own() -> None:
    """pytest imports them by it, and knows one of two that share it."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)

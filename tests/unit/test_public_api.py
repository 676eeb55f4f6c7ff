"""The public names: each `__init__.pyi` lists what exists, and what it lists is documented."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import tutti

PACKAGE = Path(tutti.__file__).parent
STUBS = sorted(PACKAGE.rglob("__init__.pyi"))


def package_of(stub: Path) -> str:
    return ".".join(("tutti", *stub.parent.relative_to(PACKAGE).parts))


def listed(stub: Path) -> list[str]:
    """The names in `__all__` of a stub."""
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{stub} has no __all__")


@pytest.mark.parametrize("stub", STUBS, ids=package_of)
def test_every_listed_name_can_be_imported_and_every_imported_name_is_listed(stub: Path) -> None:
    package = importlib.import_module(package_of(stub))
    imported = {
        alias.asname or alias.name
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = listed(stub)
    assert imported <= set(names) and len(set(names)) == len(names)
    assert [name for name in names if not hasattr(package, name)] == []
    assert set(names) - {"__version__"} <= {*dir(package)}


@pytest.mark.parametrize("stub", STUBS, ids=package_of)
def test_every_public_class_function_and_module_has_a_docstring(stub: Path) -> None:
    package = importlib.import_module(package_of(stub))
    objects = {name: getattr(package, name) for name in listed(stub)}
    undocumented = [
        name
        for name, value in objects.items()
        if (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value))
        and not value.__doc__
    ]
    assert undocumented == []


@pytest.mark.parametrize("name", ["term", "config", "weight_schedule"])
def test_examples_of_the_objectives_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tutti.objectives.{name}"))
    assert result.attempted >= 2 and result.failed == 0


def test_the_packages_own_examples_run() -> None:
    result = doctest.testmod(tutti)
    assert result.attempted >= 3 and result.failed == 0

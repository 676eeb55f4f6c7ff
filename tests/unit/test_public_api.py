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
def test_every_listed_name_can_be_imported_and_has_a_docstring(stub: Path) -> None:
    package = importlib.import_module(package_of(stub))
    names, tree = listed(stub), ast.parse(stub.read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    assert imported <= set(names) and len(set(names)) == len(names)
    assert set(names) - {"__version__"} <= {*dir(package)}
    objects = {name: getattr(package, name) for name in names}
    kinds = (inspect.isclass, inspect.isroutine, inspect.ismodule)
    assert [n for n, one in objects.items() if any(of(one) for of in kinds) and not one.__doc__] == []


@pytest.mark.parametrize("name", ["", "term", "config", "weight_schedule"])
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tutti.objectives.{name}") if name else tutti)
    assert result.attempted >= 2 and result.failed == 0

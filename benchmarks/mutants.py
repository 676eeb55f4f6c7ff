"""Do the tests protect the numbers? Each mutant of mutants.toml, one changed line, must make a test fail.

python benchmarks/mutants.py [--only WORD ...] changes one line at a time, in memory, and runs the tests that
are to notice it. Exit code 0: all are caught; 1: some are not, or name a line that is no more; 2: a test
fails without any of them.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import io
import multiprocessing
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "benchmarks" / "mutants.toml"
PYTEST = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(ROOT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """`old`, a part of `file` (below src/tutti/) that is there once, becomes `new`; `tests` must notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """The file's name for import."""
        return "tutti." + self.file.removesuffix(".py").replace("/", ".")

    def apply(self, text: str) -> str:
        """The file's text, changed. Raises: ValueError unless `old` is there exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.file}: {self.old!r} is there {text.count(self.old)} times. Mend {LIST.name}."
            )
        return text.replace(self.old, self.new)


def read(path: Path = LIST) -> list[Mutant]:
    """The list: for each file its tests, and pairs of old and new text."""
    files = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Mutant(file=file, old=old, new=new, tests=tuple(entry["tests"]))
        for file, entry in files.items()
        for old, new in entry["changes"]
    ]


def change(module: ModuleType, before: str, after: str) -> int:
    """Gives the loaded module's functions and constants what they would have with the text `after`, without
    an import: whoever has imported one of them has the changed one too. Gives how many were changed."""
    name = str(module.__file__)
    old, new = (dict(_codes(compile(text, name, "exec"))) for text in (before, after))
    changed = {key for key in new if new[key] != old.get(key)}
    done = 0
    for function in _functions(module):
        if function.__qualname__ in changed:
            function.__code__ = new[function.__qualname__]
            done += 1
    for node, other in zip(ast.parse(before).body, ast.parse(after).body, strict=True):
        if isinstance(other, ast.Assign) and ast.dump(node) != ast.dump(other):
            for target in other.targets:
                setattr(module, ast.unparse(target), ast.literal_eval(other.value))
                done += 1
    return done


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    """Every function's code below `code`, by qualified name, a function in a function only inside it."""
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield one.co_qualname, one
            if "<locals>" not in one.co_qualname:
                yield from _codes(one)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """The module's functions and methods, without what decorators have put around them."""
    classes = [one for one in vars(module).values() if inspect.isclass(one)]
    found: list[Any] = [*vars(module).values()]
    for one in classes:
        if one.__module__ == module.__name__:
            found += vars(one).values()
    for value in found:
        inner = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
        inner = inspect.unwrap(inner) if callable(inner) else inner
        if isinstance(inner, FunctionType) and inner.__module__ == module.__name__:
            yield inner


def passes(tests: Sequence[str], mutant: Mutant | None = None) -> bool:
    """Whether these test files pass, with the mutant if there is one. In a fork: this process stays whole.

    Raises: ValueError where the mutant changes nothing that is loaded.
    """
    before = after = ""
    module: ModuleType | None = None
    if mutant is not None:
        before = (ROOT / "src" / "tutti" / mutant.file).read_text(encoding="utf-8")
        after = mutant.apply(before)
        module = importlib.import_module(mutant.module)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(tests, module, before, after))
    process.start()
    process.join()
    if process.exitcode == NOTHING_CHANGED:
        raise ValueError(f"{mutant}: changes no function and no constant. Mend {LIST.name}.")
    return process.exitcode == 0


NOTHING_CHANGED = 99


def _run(tests: Sequence[str], module: ModuleType | None, before: str, after: str) -> None:
    """In a process of its own: changes the module, runs the tests, exits as pytest does."""
    if module is not None and not change(module, before, after):
        os._exit(NOTHING_CHANGED)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        code = int(pytest.main([*PYTEST, *(str(ROOT / test) for test in tests)]))
    os._exit(code)


def load() -> None:
    """Imports the tests' conftest first, which checks shapes, then what every test needs."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    importlib.import_module("conftest")
    del sys.modules["conftest"]  # pytest imports its own
    importlib.import_module("tutti.pipeline")


def main(given: Sequence[str] | None = None) -> int:
    """0 if every mutant is caught, 1 if not, 2 if the tests fail without one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="files with such a word")
    arguments = parser.parse_args(given)
    mutants = [mutant for mutant in read() if any(word in mutant.file for word in arguments.only)]
    load()
    wrong = 0
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        if not passes(tests):
            print(f"error: without any mutant these tests fail: {' '.join(tests)}")
            return 2
        for mutant in (one for one in mutants if one.tests == tests):
            try:
                said = "SURVIVES" if passes(tests, mutant) else "caught"
            except ValueError as error:
                said = str(error)
            wrong += said != "caught"
            print(f"{said}: {mutant.file}: {mutant.old} -> {mutant.new}", flush=True)
    print(f"{len(mutants) - wrong} of {len(mutants)} mutants are caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Do the tests protect the numbers? Each mutant of mutants.toml, one changed line, must make a test fail.

python benchmarks/mutants.py [--only WORD ...] copies the checkout, changes one line at a time and runs the
tests that are to notice it. Exit code 0: all are caught; 1: some survive, or name a line that is no more.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

# Loaded here once: each mutant is tested in a fork of this process, which itself never imports tutti.
import pyarrow.parquet
import pytest
import scipy.stats
import torch

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "benchmarks" / "mutants.toml"
COPIED = ("src", "tests", "benchmarks", "configs", "docs", "examples", "pyproject.toml", "README.md")
PYTEST = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider")
LOADED = (pyarrow.parquet, scipy.stats, torch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """`old`, a part of `file` (below src/tutti/) that is there once, becomes `new`; `tests` must notice."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The file's text, changed. Raises: ValueError unless `old` is there exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.file}: {self.old!r} is there {text.count(self.old)} times, not once. "
                f"Mend {LIST.name}."
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


def caught(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests fail in `copy` while it holds the mutant; afterwards it is as before."""
    path = copy / "src" / "tutti" / mutant.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(mutant.apply(whole), encoding="utf-8")
    try:
        return not passes(mutant.tests, copy)
    finally:
        path.write_text(whole, encoding="utf-8")


def passes(tests: Sequence[str], copy: Path) -> bool:
    """Whether these test files pass in `copy`."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(tests, copy))
    process.start()
    process.join()
    return process.exitcode == 0


def _run(tests: Sequence[str], copy: Path) -> None:
    """In a process of its own: runs the tests and exits as pytest does."""
    sys.dont_write_bytecode = True
    os.chdir(copy)
    sys.path[:0] = [str(copy / "src"), str(copy / "tests")]
    os.environ |= {"PYTHONPATH": f"{copy / 'src'}:{copy / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        code = int(pytest.main([*PYTEST, *tests]))
    os._exit(code)


def main(given: Sequence[str] | None = None) -> int:
    """0 if every mutant is caught, 1 if not, 2 if the tests fail without one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="files with such a word")
    arguments = parser.parse_args(given)
    mutants = [mutant for mutant in read() if any(word in mutant.file for word in arguments.only)]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            if not passes(tests, copy):
                print(f"error: without any mutant these tests fail: {' '.join(tests)}")
                return 2
        for number, mutant in enumerate(mutants, start=1):
            try:
                said = "caught" if caught(mutant, copy) else "SURVIVES"
            except ValueError as error:
                said = str(error)
            wrong += said != "caught"
            print(f"{number}/{len(mutants)} {said}: {mutant.file}: {mutant.old} -> {mutant.new}")
    print(f"{len(mutants) - wrong} of {len(mutants)} mutants are caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

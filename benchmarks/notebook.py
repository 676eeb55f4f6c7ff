"""Runs a notebook's cells in order in plain Python, and keeps what they print and show as its outputs.

python benchmarks/notebook.py docs/start/one-step.ipynb does so in a process of its own, in the notebook's
folder, as Jupyter would; with --check nothing is written, and the exit code is 1 if an output is not as it
was, numbers apart. nbclient and ipykernel would do the same, and bring 30 packages more.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from PIL import Image

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")
PROGRESS = re.compile(r"^.*: \d+/\d+ after .*\n", re.MULTILINE)
"""A line of a progress bar: how many there are depends on the machine."""


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of now. Raises: what a cell raises, noting the number of the cell."""
    space: dict[str, Any] = {"__name__": "__main__"}
    count, cells = 0, list(notebook["cells"])
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        count += 1
        try:
            outputs = _outputs("".join(cell["source"]), space, count)
        except Exception as error:
            error.add_note(f"in cell {number} of the notebook")
            raise
        cells[number] = cell | {"execution_count": count, "outputs": outputs}
    return notebook | {"cells": cells}


def _outputs(source: str, space: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Runs a cell: what it prints, and the value of its last line, if that is an expression."""
    body, last = ast.parse(source).body, None
    if body and isinstance(body[-1], ast.Expr):
        last = ast.Expression(body.pop().value)  # pyright: ignore[reportAttributeAccessIssue]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"<cell {count}>", "exec"), space)
        value = eval(compile(last, f"<cell {count}>", "eval"), space) if last is not None else None
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": [type(value).__name__]} | _shown(value)
        outputs.append(
            {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data}
        )
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    if isinstance(value, Image.Image):
        png = io.BytesIO()
        value.save(png, "PNG", optimize=True)
        return {"image/png": base64.b64encode(png.getvalue()).decode() + "\n"}
    if draw := getattr(value, "_repr_svg_", None):
        return {"image/svg+xml": draw().splitlines(keepends=True)}
    return {"text/plain": repr(value).splitlines(keepends=True)}


def texts(notebook: dict[str, Any]) -> list[str]:
    """What each cell printed with every number as #, and the kinds of pictures that it showed."""
    said: list[str] = []
    for cell in notebook["cells"]:
        for one in cell.get("outputs", ()):
            text = PROGRESS.sub("", "".join(one.get("text", ())))
            said.append(NUMBER.sub("#", re.sub(" +", " ", text)))
            said += sorted(one.get("data", ()))
    return said


def main(given: list[str] | None = None) -> int:
    """0 if all cells ran and, with --check, gave what is stored."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args(given)
    path = arguments.notebook.resolve()
    stored = json.loads(path.read_text(encoding="utf-8"))
    os.chdir(path.parent)
    try:
        now = run(stored)
    except Exception:
        traceback.print_exc()
        return 1
    if not arguments.check:
        path.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    elif texts(now) != texts(stored):
        print("The outputs are not those that are stored: python benchmarks/notebook.py", arguments.notebook)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

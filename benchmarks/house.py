"""The packages of Tutti, their sizes and imports: a picture for docs/, and counts beside another commit's.

python benchmarks/house.py [--against COMMIT] reads the sources, imports none of them, and writes
docs/pictures/packages.svg and benchmarks/results/house.md. The floors are those of pyproject.toml
(import-linter).
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tables import RESULTS, Table, publish

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "packages.svg"
SKIPPED = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(slots=True)
class Count:
    """Lines of Python files: all, code proper, comment lines, docstring lines; and the files."""

    files: int = 0
    lines: int = 0
    code: int = 0
    comments: int = 0
    docstrings: int = 0

    def add(self, text: str) -> None:
        """Counts one more file."""
        comments, code, docstrings = set[int](), set[int](), set[int]()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for one in node.body:
                    if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
                        docstrings |= set(range(one.lineno, (one.end_lineno or one.lineno) + 1))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments.add(token.start[0])
            elif token.type not in SKIPPED:
                code |= set(range(token.start[0], token.end[0] + 1))
        code -= docstrings
        self.files += 1
        self.lines += len(text.splitlines())
        self.code += len(code)
        self.comments += len(comments)
        self.docstrings += len(docstrings)


def part_of(path: Path, package: Path) -> str:
    """The package or module directly below tutti that a file belongs to."""
    return path.relative_to(package).with_suffix("").parts[0]


def counts(package: Path) -> dict[str, Count]:
    """The count of each part of the package, and of all as "total"."""
    found: dict[str, Count] = {"total": Count()}
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.setdefault(part_of(path, package), Count()).add(text)
        found["total"].add(text)
    return found


def largest_folder(package: Path) -> tuple[str, int]:
    """The folder with the most Python files besides `__init__`, and how many."""
    files = Counter(
        path.parent.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    )
    return files.most_common(1)[0]


def imports(package: Path) -> dict[str, set[str]]:
    """Which other parts each part imports, anywhere in its files and for type checking too."""
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        part = part_of(path, package)
        below = set(imported_parts(ast.parse(path.read_text(encoding="utf-8"))))
        found.setdefault(part, set()).update(below - {part})
    return {part: below & found.keys() for part, below in found.items()}


def imported_parts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="tutti", names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module)) if module.startswith("tutti."):
                yield module.split(".")[1]
            case ast.Import(names=aliases):
                yield from (alias.name.split(".")[1] for alias in aliases if alias.name.startswith("tutti."))


def floors() -> list[list[str]]:
    """The floors from the top down, as import-linter checks them."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return [re.split(r"\s*\|\s*", layer) for layer in linter["contracts"][0]["layers"]]


def direct(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that no longer path of imports implies, so that the picture can be read."""

    def below(part: str) -> set[str]:
        return edges[part] | {deep for one in edges[part] for deep in below(one)}

    return [
        (part, one)
        for part in edges
        for one in sorted(edges[part])
        if not any(one in below(other) for other in edges[part] - {one})
    ]


def draw(package: Path) -> str:
    """The floors as rows of boxes, arrows for imports, as SVG."""
    width, row, box, high, left = 1080, 92, 196, 46, 20
    sizes, rows = counts(package), [[part for part in floor if part != "__main__"] for floor in floors()]
    rows = [floor for floor in rows if floor]
    middles: dict[str, tuple[float, float]] = {}
    wide: dict[str, float] = {}  # a row of many parts has narrower boxes
    for number, floor in enumerate(rows):
        gap = (width - 2 * left) / len(floor)
        for place, part in enumerate(floor):
            wide[part] = min(box, gap - 12)
            middles[part] = (left + gap * (place + 0.5), 30 + number * row + high / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {30 + len(rows) * row}" '
        'font-family="system-ui, sans-serif" font-size="14">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#7a8aa0"/></marker></defs>',
    ]
    edges = {part: below for part, below in imports(package).items() if part in middles}
    for above, below in direct({part: one & middles.keys() for part, one in edges.items()}):
        (x, y), (to_x, to_y) = middles[above], middles[below]
        y, to_y = y + high / 2, to_y - high / 2
        bend = (to_y - y) / 2
        parts.append(
            f'<path d="M{x:.0f} {y:.0f} C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} '
            f'{to_x:.0f} {to_y:.0f}" fill="none" stroke="#7a8aa0" '
            'stroke-width="1.3" opacity="0.75" marker-end="url(#tip)"/>'
        )
    for part, (x, y) in middles.items():
        size = sizes[part]
        told = f"{size.files} files, " if size.files > 1 else ""
        parts.append(
            f'<rect x="{x - wide[part] / 2:.0f}" y="{y - high / 2:.0f}" '
            f'width="{wide[part]:.0f}" height="{high}" rx="7" '
            'fill="#eef3fb" stroke="#31527f"/>'
            f'<text x="{x:.0f}" y="{y - 3:.0f}" text-anchor="middle" font-weight="600">{escape(part)}</text>'
            f'<text x="{x:.0f}" y="{y + 14:.0f}" text-anchor="middle" font-size="11.5" fill="#51606f">'
            f"{told}{size.code:,} lines of code</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def table(package: Path, before: Path | None) -> Table:
    """Files and lines of each part, and of the package at the other commit."""
    heads = ("part", "files", "lines", "code", "comments", "docstrings", "comments per 100 lines of code")
    found = counts(package)
    rows = [line(part, found[part]) for part in (*sorted(found.keys() - {"total"}), "total")]
    if before is not None:
        rows.append(line("total before", counts(before)["total"]))
    return Table(title="Lines of src/tutti", heads=heads, rows=tuple(rows))


def line(name: str, size: Count) -> tuple[str, ...]:
    numbers = (size.files, size.lines, size.code, size.comments, size.docstrings)
    return (name, *(f"{number:,}" for number in numbers), f"{100 * size.comments / max(size.code, 1):.1f}")


def sources_of(commit: str, folder: Path) -> Path:
    """src/tutti as it was at a commit, unpacked into `folder`."""
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "src/tutti"], capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src" / "tutti"


def main() -> int:
    """Writes the picture and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", help="a commit whose counts stand beside today's")
    parser.add_argument("--output", type=Path, default=RESULTS / "house", help="without suffix")
    arguments = parser.parse_args()
    package = ROOT / "src" / "tutti"
    PICTURE.write_text(draw(package), encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        before = sources_of(arguments.against, Path(name)) if arguments.against else None
        packages = {"now": package} | ({"before": before} if before else {})
        notes = [
            f"{when}: the folder with the most Python files is {where}, {files} files."
            for when, (where, files) in ((when, largest_folder(one)) for when, one in packages.items())
        ]
        sizes = {
            when: {part: vars_of(size) for part, size in counts(one).items()}
            for when, one in packages.items()
        }
        publish(arguments.output, "benchmarks/house", [table(package, before)], notes, sizes)
    return 0


def vars_of(size: Count) -> dict[str, int]:
    return {name: getattr(size, name) for name in Count.__slots__}


if __name__ == "__main__":
    sys.exit(main())

"""Finds the config files and run folders that a user names, without importing torch."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from tutti.errors import UserError


def shipped_configs() -> Path:
    """The folder of the shipped configs: in an installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def config_file(path: Path) -> Path:
    """The file at `path`, or the shipped config of that name, with or without "configs/".

    Raises: UserError if there is neither, with the nearest name.
    """
    if path.exists():
        return path
    home = shipped_configs()
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    if (
        not path.exists()
        and not inside.is_absolute()
        and ".." not in inside.parts
        and (home / inside).is_file()
    ):
        return home / inside
    beside = [file.name for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    shipped = [f"configs/{file.relative_to(home).as_posix()}" for file in sorted(home.rglob("*.yaml"))]
    near = get_close_matches(path.name, beside, n=1) or get_close_matches(path.as_posix(), shipped, n=1)
    cure = (
        f" Did you mean '{path.with_name(near[0]) if near[0] in beside else near[0]}'?"
        if near
        else (f" Shipped with Tutti: {', '.join(shipped)}.")
    )
    raise UserError(f"{path}: no such config file.{cure}")


def require_run(path: Path) -> Path:
    """The folder of a run. Raises: UserError if it does not exist, naming the runs beside it."""
    if path.is_dir():
        return path
    found = (
        sorted(str(book.parent) for book in path.parent.glob("*/stages.json")) if path.parent.is_dir() else []
    )
    beside = f" There are: {', '.join(found[:8])}." if found else " A run is made by `tutti train CONFIG`."
    raise UserError(f"{path}: no such run.{beside}")

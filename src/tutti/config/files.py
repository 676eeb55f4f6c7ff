"""Finds and reads the config files and run folders that a user names, without torch."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tutti.config.messages import shipped_schema
from tutti.errors import UserError
from tutti.storage.reading import YAML_BYTES, parse_yaml, read_text, shown


def shipped_configs() -> Path:
    """The folder of the shipped configs: in an installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def released_policy() -> Path:
    """The folder of the policy that comes with Tutti, as benchmarks/release_policy.py makes it; it may be
    missing."""
    return Path(__file__).resolve().parents[1] / "released" / "demo"


def default_policy() -> Path:
    """The policy that acts where none is named: the one that comes with Tutti, or else that of the demo here.

    Raises: UserError if there is neither.
    """
    for folder, made in ((released_policy(), "export.json"), (Path("runs/demo"), "checkpoints")):
        if (folder / made).exists():
            return folder
    raise UserError(
        "No policy is named, none comes with this installation, and runs/demo has none. Make one: `tutti "
        "demo` (10 to 25 minutes), or name a run, a checkpoint or an export: tutti play RUN"
    )


def find_config(path: Path, *, study: bool = False) -> Path | None:
    """The file at `path`, or the shipped config of that name, with or without "configs/" and ".yaml".

    Shipped are runs (demo), plans (plans/3b or 3b), recipes of VLMs (vlm/pi0-like or pi0-like) and studies
    (studies/e1 or e1); where two share a name, as smoke does, `study` asks for the study.
    """
    names = (path,) if path.suffix or not path.name else (path, path.with_name(f"{path.name}.yaml"))
    if own := [one for one in names if path.name and one.exists() and not one.is_dir()]:
        return own[0]
    home = shipped_configs()
    if not path.is_absolute() and ".." not in path.parts:
        for folder in ("studies", "", "plans", "vlm") if study else ("", "plans", "vlm", "studies"):
            for name in names:
                inside = name.relative_to("configs") if name.parts[:1] == ("configs",) else name
                if (home / folder / inside).is_file():
                    return home / folder / inside
    return path if path.exists() else None


def config_file(path: Path, *, study: bool = False) -> Path:
    """As `find_config`.

    Raises: UserError if there is none, with the nearest name or all that are shipped.
    """
    if (found := find_config(path, study=study)) is not None:
        return found
    beside = {file.name: str(file) for file in path.parent.glob("*.yaml")}
    shipped = [f"configs/{name}" for name in shipped_names()]
    stems = {Path(name).stem: name for name in reversed(shipped)}
    near = [beside[name] for name in get_close_matches(path.name, beside, n=1)]
    near += get_close_matches(path.as_posix(), shipped, n=1)
    near += [stems[name] for name in get_close_matches(path.name, stems, n=1)]
    every = f"Shipped with Tutti: {', '.join(shipped)}."
    cure = f"Did you mean '{near[0]}'? `tutti configs` lists what is shipped." if near else every
    raise UserError(f"{path}: no such config file. {cure}")


def shipped_names() -> list[str]:
    """The names of the shipped configs, such as demo.yaml and studies/e1.yaml; runs come first."""
    home = shipped_configs()
    found = sorted(home.rglob("*.yaml"), key=lambda file: (len(file.relative_to(home).parts), file))
    return [file.relative_to(home).as_posix() for file in found]


def require_run(path: Path) -> Path:
    """The folder of a run. Raises: UserError if it does not exist, naming the runs beside it."""
    if path.is_dir():
        return path
    found = sorted(str(manifest.parent) for manifest in path.parent.glob("*/stages.json"))
    beside = f"There are: {', '.join(found[:8])}." if found else "A run is made by `tutti train CONFIG`."
    raise UserError(f"{path}: no such run. {beside}")


def check_path_text(path: Path) -> None:
    """Raises: UserError where a path that does not exist is an override, which an option took for its value,
    or has unprintable characters in it."""
    text = "" if path.exists() else str(path)
    key = text.partition("=")[0].partition(".")[0].partition("[")[0]
    if "=" in text and key in shipped_schema()["properties"]:
        raise UserError(
            f"'{text:.200}' stands where a path is expected, but looks like an override.\n"
            "  cure: name the path first; overrides come last."
        )
    if not text.isprintable():
        raise UserError(f"{text!r:.200} has unprintable characters in it, and does not exist.")


def read_yaml(path: Path, inside: Path | None = None, *, study: bool = False) -> dict[str, Any]:
    """The keys of a config file, which may be no link that leads out of the folder `inside`: those of a
    run, or of a study. What it builds on is not read (`layers.read_config`).

    Raises: UserError, naming the file and, where YAML fails, the line.
    """
    path = config_file(path, study=study)
    values = parse_yaml(read_text(path, YAML_BYTES, inside=inside), path)
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected keys such as `training:`, found {shown(values)}.")
    keys = {*(values or {})}
    if not study and keys >= {"base", "arms"}:
        raise UserError(f"{path} is a study of several trainings.\n  cure: tutti compare {path}")
    if study and "arms" not in keys and keys & {"record", "data", "model", "objective", "training"}:
        raise UserError(
            f"{path} is the config of one run, not a study, which has base, arms and baseline.\n"
            "  cure: `tutti configs` lists the studies that are shipped, to begin from."
        )
    return values or {}

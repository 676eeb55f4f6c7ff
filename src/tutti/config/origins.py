"""Where each value of a config comes from (`tutti config show`), and in what two differ (`... diff`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tutti.config.files import require_run, shipped_configs
from tutti.config.layers import composed, holds, read_layers
from tutti.config.overrides import apply_overrides, parse_overrides
from tutti.config.run_config import SEEDED, RunConfig, load_config, load_run_config
from tutti.key_effects import EFFECTS, effect_of
from tutti.models.config import preset_of
from tutti.nested_dicts import changed_keys
from tutti.storage.manifest import CONFIG

DEFAULT = "default"
_COLUMN, _WIDEST = 56, 10**6


def config_with_origins(path: Path, overrides: Sequence[str] = (), *, given: bool = False) -> str:
    """The whole config as YAML, each value with the file, override, preset or default that it is from in a
    comment; `given`: without defaults. `load_config` reads it to the same config.

    Raises: UserError as `load_config`.
    """
    values = load_config(path, overrides).model_dump(mode="json")
    origin = Origins(path, overrides)
    lines = "\n".join(_lines(values, origin, given=given))
    return f"# {path}: each value with where it comes from\n{lines}\n"


class Origins:
    """Tells of a key of a config what set it."""

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        self.layers, self.overrides = read_layers(path), parse_overrides(overrides)
        self.given = composed(self.layers, RunConfig())
        apply_overrides(self.given, self.overrides, RunConfig())
        model = self.given.get("model") or {}
        action = model.get("action") or {}
        self.size = model.get("size", RunConfig().model.size)
        vlm = model.get("vlm") is not None
        self.preset = {"model": preset_of(self.size, action.get("kind"), vlm=vlm)}

    def of(self, path: Sequence[str]) -> str:
        """Such as "demo.yaml", "training.steps=5", "model.size tiny", "seed" or "default"."""
        if holds(self.given, path):
            for one in reversed(self.overrides):
                if one.touches(path):
                    return f"override {one.text}"
            for layer in reversed(self.layers):
                if holds(layer.values, path):
                    home = shipped_configs()
                    inside = layer.source.is_relative_to(home)
                    return f"configs/{layer.source.relative_to(home)}" if inside else str(layer.source)
        if path[-1] == "seed" and path[0] in SEEDED and len(path) == 2 and "seed" in self.given:
            return "seed"
        by_size = len(path) > 2 and holds(self.preset, path)
        return f"model.size {self.size}" if by_size else DEFAULT


def _lines(
    values: Mapping[str, Any], origins: Origins, place: tuple[str, ...] = (), *, given: bool
) -> Iterator[str]:
    """Those of a mapping, indented; lists are one value."""
    indent = "  " * len(place)
    for key, value in values.items():
        path = (*place, str(key))
        if isinstance(value, Mapping) and value:
            below = list(_lines(value, origins, path, given=given))
            yield from (f"{indent}{key}:", *below) if below else ()
            continue
        origin = origins.of(path)
        if not (given and origin == DEFAULT):
            text = yaml.safe_dump({key: value}, default_flow_style=True, width=_WIDEST)[1:-2]
            yield f"{indent}{text}".ljust(_COLUMN) + f"  # {origin}"


def differences(one: Path, other: Path) -> list[str]:
    """A line for each key in which two configs differ, those that matter most first: both values, and what
    the key may change. Each is a config file, a shipped name, or the folder of a run.

    Raises: UserError as `load_config`.
    """
    first, second = (_config_of(path).model_dump(mode="json") for path in (one, other))
    weight = {effect: number for number, effect in enumerate(reversed(list(dict.fromkeys(EFFECTS.values()))))}
    lines = changed_keys(first, second)
    effects = [effect_of(line.partition(": ")[0]) for line in lines]
    rows = sorted(zip(effects, lines, strict=True), key=lambda row: weight[row[0]])
    return [f"{line}   [{effect}]" for effect, line in rows]


def _config_of(path: Path) -> RunConfig:
    if not path.is_dir():
        return load_config(path)
    return load_run_config(require_run(path) / CONFIG)

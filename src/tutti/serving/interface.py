"""What goes into a policy and comes out: names, units, ranges, as an export writes and prints them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tutti.data.conventions.served import RecordedVector, Served
from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.serving.observation import shortest
from tutti.types import DataSpec

MAX_ROWS = 32


def interface(
    spec: DataSpec, normalizer: Normalizer, tokenizer: Tokenizer, served: Served | None = None
) -> dict[str, Any]:
    """The inputs and outputs of a policy as plain data, for people and programs.

    `min` and `max` are the smallest and largest value that the training data have, over all robots. `name`
    is None where the data had none, `unit` "" where they did not say. With conventions that are `served` all
    four are those of the first source, as it was recorded. Several robots have an interface each, by name.
    """
    if len(spec.embodiments) > 1:
        each: dict[str, Any] = {}
        for name in spec.embodiments:
            own = served.of_robot(name) if served else None
            if (alone := spec.alone(name)).action_dim:
                each[name] = interface(alone, normalizer, tokenizer, own)
        return {"robots": each, "inputs": {"robots": list(each)}}

    def numbers(what: Literal["state", "action"], dim: int) -> list[dict[str, Any]]:
        keys = ("name", "unit", "min", "max")
        if served is not None:
            own: RecordedVector = getattr(served.sources[0], what)
            parts = (own.names or [None] * len(own.min), own.units or [""] * len(own.min), own.min, own.max)
            return [dict(zip(keys, row, strict=True)) for row in zip(*parts, strict=True)]
        stats = [getattr(both, what) for name, both in normalizer.stats.items() if name in spec.embodiments]
        low, high = (
            [
                float(f"{pick(values):.6g}")
                for values in zip(*(getattr(one, key) for one in stats), strict=True)
            ]
            for key, pick in (("min", min), ("max", max))
        )
        names = getattr(spec, f"{what}_names") or [None] * dim
        units = getattr(spec, f"{what}_units") or [""] * dim
        return [dict(zip(keys, row, strict=True)) for row in zip(names, units, low, high, strict=True)]

    own = spec if served is None else served.spec(spec, 0)
    return {
        "inputs": {
            "images": dict(zip(shortest(spec.views), spec.views, strict=True)),
            "image_size": spec.image_size,
            "state": numbers("state", spec.state_dim),
            "instruction_tokens": tokenizer.max_length,
            "robots": list(spec.embodiments),
        },
        "outputs": {
            "actions": numbers("action", spec.action_dim),
            "horizon": own.horizon,
            "fps": own.fps,
        },
        **({"conventions": dict(served.sources[0].conventions.lines())} if served else {}),
    }


def reads_state(about: Mapping[str, Any]) -> bool:
    """Of an `interface` in export.json: whether the model reads its state; exports of old do not say."""
    return about["inputs"].get("reads_state", True)


def table(about: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str, str, str]]]:
    """Title and rows (what, name, unit, smallest, largest) of an `interface`, for the terminal."""
    if "robots" in about:
        each = {name: table(one) for name, one in about["robots"].items()}
        rows = [(f"{name}: {row[0]}", *row[1:]) for name, (_, own) in each.items() for row in own]
        return "; ".join(title for title, _ in each.values()), rows
    inputs, outputs = about["inputs"], about["outputs"]
    size = f"resized to {inputs['image_size']} x {inputs['image_size']}"
    rows = [("image", name, size, "0", "255") for name in inputs["images"]]
    rows += _rows("state" if reads_state(about) else "state, not read", inputs["state"])
    rows.append(("instruction", "", f"at most {inputs['instruction_tokens']} tokens", "", ""))
    rows += _rows("action", outputs["actions"])
    each = f"{outputs['horizon']} actions a prediction, {outputs['fps']:g} a second"
    title = f"{each}; ranges of the training data ({', '.join(inputs['robots'])})"
    return title, rows


def _rows(what: str, numbers: list[dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    rows = [
        (what, one["name"] or str(place), one["unit"], f"{one['min']:.4g}", f"{one['max']:.4g}")
        for place, one in enumerate(numbers[:MAX_ROWS])
    ]
    more = len(numbers) - len(rows)
    return [*rows, (what, f"... {more} more in export.json", "", "", "")] if more else rows

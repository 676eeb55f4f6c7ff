"""Which keys of a config may change while its run goes on: the table of docs/reference/key-effects.md.

A key belongs to the longest entry that it begins with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NO_EFFECT = {
    "name": "names the run's folder",
    "record.workers": "each episode has a seed of its own",
    "evaluation.workers": "each rollout has a seed of its own",
    "data.sources.path": "whether the data are the same, their content tells",
    "data.sources.url": "whether the data are the same, their content tells",
    "data.sources.name": "names the source in the records",
    "model.vision.path": "whether it is the same tower, the SHA-256 of its weights tells",
    "model.vlm.path": "whether it is the same model, the SHA-256 of its weights tells",
    "model.language.path": "whether it is the same tower, the SHA-256 of its weights tells",
    "data.prefetch": "batches depend on their number alone",
    "data.cache": "the pictures are the same wherever they lie; another kind or quality are other pictures",
    "logging": "trackers are told, and change nothing",
    "training.log_every": "values are read, not changed",
    "training.evaluate_every": "a copy of the weights plays; the training goes on as if it had not",
    "training.evaluate_episodes": "likewise",
    "training.evaluate_first_seed": "likewise",
    "training.checkpoints": "a resumed run goes on to the same bits; but a rollback goes to what is there",
    "training.diagnostics": "they draw random numbers of their own and leave no gradient",
    "training.parallel.timeout": "it ends a training or does nothing",
}
"""Keys that no result depends on, each with the reason: another value is taken over, and one line says so."""

LAST_BITS = {
    "training.device": "another device adds up in another order; `auto` also takes bf16 on CUDA",
    "training.threads": "sums are cut into as many parts",
    "training.deterministic": "without it CUDA adds up in any order",
    "training.parallel": "gradients are added up in another order",
    "model.vision.cache": "each picture is computed alone, not in a batch",
    "training.compile": "fused operations round less often",
    "training.activation_checkpointing": "the same bits uncompiled; compiled it may be fused in another way",
}
"""Keys that may change the last bits, each with the reason: `tutti train` asks for `--allow-inexact`."""

ANOTHER_RESULT = (
    *("seed", "record", "model", "objective", "balancing", "backward", "strategy", "evaluation"),
    *("data.sources", "data.horizon", "data.batch_size", "data.image_size", "data.validation_fraction"),
    *("data.canonical", "data.slots", "data.history"),
    *("data.episodes_per_task", "data.validation_windows", "data.normalization", "data.vocab_size"),
    *("data.cache.kind", "data.cache.quality"),
    *("data.mixture", "data.tasks", "data.text_length", "data.augmentation", "data.seed"),
    *("training.steps", "training.seed", "training.optimizer", "training.schedule", "training.gradients"),
    *("training.accumulation", "training.batch_ramp", "training.ema", "training.fork"),
    *("training.init_from", "training.precision", "training.residual", "training.validation"),
)
"""All other keys: another value is another training, which is refused."""

ADDED_LATER = {"model.fusion.withhold_state": False, "model.language.remember": 0}
"""Keys that came after trainings had been kept by a hash of their config, each with the value at which all is
as it was: no hash has a key at that value, so a study goes on with a newer Tutti. A new key belongs here."""

EFFECTS = {
    name: effect
    for effect, names in (
        ("none", NO_EFFECT),
        ("last bits", LAST_BITS),
        ("another result", ANOTHER_RESULT),
    )
    for name in names
}


def effect_of(key: str) -> str:
    """What another value of this key may change; places in lists, as in data.sources.0.path, do not count."""
    parts = [part for part in key.split(".") if not part.isdecimal()]
    begins = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((EFFECTS[begin] for begin in begins if begin in EFFECTS), "another result")


def of_effect(lines: Sequence[str], *effects: str) -> list[str]:
    """Of lines such as "training.steps: 2000 -> 500" those whose keys have one of these effects."""
    return [line for line in lines if effect_of(line.partition(": ")[0]) in effects]


def with_effect(values: Any, key: str = "") -> Any:
    """Plain values of a config, sections at the top, without the keys that no result depends on, and without
    those of `ADDED_LATER` that leave all as it was."""
    if isinstance(values, list | tuple):
        return [with_effect(value, key) for value in values]
    if not isinstance(values, Mapping):
        return values
    below = {name: f"{key}.{name}" if key else str(name) for name in values}
    kept = {name: path for name, path in below.items() if effect_of(path) != "none" or _has_others(path)}
    return {
        name: with_effect(values[name], path)
        for name, path in kept.items()
        if path not in ADDED_LATER or values[name] != ADDED_LATER[path]
    }


def _has_others(key: str) -> bool:
    """Whether a key below this one has another effect than its own."""
    return any(one.startswith(f"{key}.") and effect != EFFECTS[key] for one, effect in EFFECTS.items())

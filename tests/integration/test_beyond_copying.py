"""Reconstruction teaches something: after a short real training each kind is below its copy baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fixtures import squares_data as world
from tutti.runs.build import build_training
from tutti.training.records import read_records

PATCHES = {"kind": "changed_patches", "weight": 1.0, "offsets": [2, 4], "width": 32, "heads": 2}
LATENT = {"kind": "future_latent", "weight": 1.0, "offsets": [2, 4], "hidden": 64}


def validations(tmp_path: Path, steps: int, **objective: Any) -> list[dict[str, float]]:
    """The held-out records of a training, at a quarter of it and at its end; names without "valid/"."""
    training = {
        "steps": steps,
        "validation": {"every": steps // 4},
        "diagnostics": {"every": 0},
        "schedule": {"kind": "wsd", "warmup": 10},
    }
    config = world.config(
        world.write(tmp_path / "set"),
        objective={"align": None, "state": None, "recon": None, **objective},
        training=training,
    )
    build_training(config, tmp_path / "run").fit()
    records = [record for record in read_records(tmp_path / "run") if record["kind"] == "validation"]
    return [
        {name.removeprefix("valid/").removeprefix("metric/"): value for name, value in records[at].items()}
        for at in (0, -1)
    ]


def test_future_patches_and_latents_learn_together_at_each_offset(tmp_path: Path) -> None:
    _, last = validations(tmp_path, 128, recon=PATCHES, latent=LATENT)
    for term in ("recon", "latent"):
        assert last[term] < last[f"{term}/copy_baseline"]
        for offset in (2, 4):
            assert last[f"{term}/value/{offset}"] < last[f"{term}/copy_baseline/{offset}"]
    assert last["action"] < 0.35


def test_latents_do_not_collapse_where_they_are_the_only_auxiliary_term(tmp_path: Path) -> None:
    first, last = validations(tmp_path, 60, latent=LATENT | {"offsets": [4]})
    assert last["latent"] < last["latent/copy_baseline"]
    assert last["latent/target_std"] > 0.8 * first["latent/target_std"]  # without the contrast it halves
    assert last["latent/target_rank"] > 10

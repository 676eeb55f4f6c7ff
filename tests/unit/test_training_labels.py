"""Windows that lack actions, text or state: what an update and a validation record of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.small_model import NumberedLoader
from fixtures.vla_training import BATCH, make_batch, make_trainer
from tutti.training.records import read_records
from tutti.training.trainer import Trainer
from tutti.types import Batch

QUIET: dict[str, Any] = {"steps": 2, "log_every": 2, "schedule": {"kind": "constant", "warmup": 1}}


def lacking(batch: Batch, *, actions: int = 0, text: int = 0, state: int = 0) -> Batch:
    """The batch whose first so many rows have no actions, no text and no state."""
    rows = torch.arange(len(batch.window))
    seen, later = batch.observation, batch.later_states
    assert later is not None
    known = rows >= state
    return replace(
        batch,
        observation=replace(
            seen,
            text_mask=seen.text_mask & (rows >= text)[:, None],
            state=torch.where(known[:, None], seen.state, 0.0),
            state_mask=known,
        ),
        action_mask=batch.action_mask & (rows >= actions)[:, None, None],
        later_states=replace(later, mask=later.mask & known[:, None]),
    )


class Given:
    """These batches, over and over."""

    def __init__(self, *batches: Batch) -> None:
        self.train = NumberedLoader(lambda number: batches[(number - 1) % len(batches)])
        self.validation = [make_batch(10_001)]


def recorded(folder: Path, *batches: Batch, log_every: int = 2) -> list[dict[str, float]]:
    """The records of two updates on these batches."""
    trained(folder, Given(*batches), log_every=log_every)
    return [one for one in read_records(folder) if one["kind"] == "train"]


def trained(folder: Path, data: Given, **training: Any) -> Trainer:
    trainer = make_trainer(folder, {"kind": "end_to_end"}, **{**QUIET, **training})
    trainer.fit(data)  # pyright: ignore[reportArgumentType]
    return trainer


def test_the_shares_of_labelled_windows_are_recorded_where_some_lack(tmp_path: Path) -> None:
    batches = [lacking(make_batch(0), actions=1, state=2), lacking(make_batch(1), actions=2)]
    (found,) = recorded(tmp_path / "some", *batches)
    shares = {name: value for name, value in found.items() if name.startswith("data/labelled")}
    assert shares == {"data/labelled/actions": 1 - 1.5 / BATCH, "data/labelled/state": 1 - 1 / BATCH}
    (whole,) = recorded(tmp_path / "all", make_batch(0), make_batch(1))
    assert not any(name.startswith("data/labelled") for name in whole)


def test_an_update_in_which_no_window_has_a_label_records_no_value_of_its_terms(tmp_path: Path) -> None:
    """Its 0 says that nothing was measured: the mean since the last record is that of the others."""
    whole, none = make_batch(0), lacking(make_batch(1), actions=BATCH, text=BATCH, state=BATCH)
    one, alone = recorded(tmp_path / "apart", whole, none, log_every=1)
    (both,) = recorded(tmp_path / "both", whole, none)
    for name in ("action", "align", "state"):
        assert both[f"loss/{name}/raw"] == one[f"loss/{name}/raw"] > 0
    assert both["metric/state/hold_baseline"] == one["metric/state/hold_baseline"]
    assert both["loss/recon/raw"] != one["loss/recon/raw"]
    assert both["data/labelled/text"] == 0.5 and math.isfinite(both["optim/grad_norm"])
    assert {name for name in alone if name.startswith("loss/")} == {
        "loss/total",
        "loss/recon/raw",
        "loss/recon/weighted",
    }
    assert alone["loss/total"] == pytest.approx(alone["loss/recon/weighted"])


def test_a_validation_counts_the_windows_that_have_the_label(tmp_path: Path) -> None:
    """Three batches of 4 windows: all with actions, one with, none."""
    data = Given(make_batch(0), make_batch(1))
    trainer = trained(tmp_path, data)
    whole, other = make_batch(50), lacking(make_batch(51), actions=3, state=BATCH)
    held = [whole, other, lacking(make_batch(52), actions=BATCH, state=BATCH)]
    data.validation = held
    values = trainer.validate(data)  # pyright: ignore[reportArgumentType]

    def alone(batch: Batch) -> dict[str, float]:
        data.validation = [batch]
        return trainer.validate(data)  # pyright: ignore[reportArgumentType]

    first, last = alone(whole), alone(other.apply(lambda value: value[3:]))
    assert values["valid/action"] == pytest.approx((4 * first["valid/action"] + last["valid/action"]) / 5)
    first_l1 = "valid/metric/action/first_l1"
    assert values[first_l1] == pytest.approx((4 * first[first_l1] + last[first_l1]) / 5)
    assert values["valid/state"] == pytest.approx(first["valid/state"])
    assert values["valid/recon"] == pytest.approx(sum(alone(batch)["valid/recon"] for batch in held) / 3)
    weights = {"align": 0.3, "action": 1.0, "recon": 0.2, "state": 1.0}
    total = sum(weight * values[f"valid/{name}"] for name, weight in weights.items())
    assert values["valid/total"] == pytest.approx(total, rel=1e-6)

    nothing = alone(lacking(whole, actions=BATCH, text=BATCH, state=BATCH))
    assert {name for name in nothing if name.count("/") == 1} == {"valid/recon", "valid/total"}

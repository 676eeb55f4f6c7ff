"""What a training does besides going on (skip, roll back, fork, resume schedule-free), on 2 ranks as on 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.checkpoints import load_latest
from fixtures.ranks import on_ranks
from fixtures.ranks_training import (
    OBJECTIVE,
    SIZE,
    TOLERANCE,
    Stream,
    forget,
    furthest,
    require_same_records,
    tensors_of,
    trainer_of,
)
from fixtures.run_equality import records
from fixtures.term_batches import as_double
from fixtures.vla_training import make_batch
from tutti.distributed.sharded_tensors import gather
from tutti.objectives.term import Model, Term, TermValue
from tutti.training.trainer import Trainer
from tutti.types import Batch, Features

KINDS = ("ddp", "fsdp")

BAD_WINDOW = 200 + SIZE - 1
"""The last row of batch 2: on two ranks it is rank 1's."""
NOTHING_HELD_OUT = {"validation": {"every": 0}}
SKIP = {"steps": 5, "gradients": {"non_finite": "skip"}, **NOTHING_HELD_OUT}
ROLL_BACK = {
    **NOTHING_HELD_OUT,
    "steps": 9,
    "checkpoints": {"every": 2, "keep": 3},
    "gradients": {
        "rollback": {
            "z_threshold": 6,
            "patience": 2,
            "rewind_steps": 2,
            "warmup": 3,
            "decay": 0.9,
        }
    },
}
SCHEDULE_FREE = {
    "steps": 4,
    "optimizer": {"kind": "schedule_free"},
    "ema": "off",
    "schedule": {"kind": "constant", "warmup": 1},
    "checkpoints": {"every": 2},
    "validation": {"every": 2, "raw": True},
}


class Steep(Term):
    """0, with the gradient 0 but for one window, where it is not finite though the value is."""

    def __init__(self, model: Model, **term: Any) -> None:
        super().__init__(**term)

    def compute(self, features: Features, batch: Batch, model: Any) -> TermValue:
        flat = features.readout[batch.window == BAD_WINDOW].sum() * 0
        value = flat.sqrt() if bool((batch.window == BAD_WINDOW).any()) else flat
        return TermValue(value=value, metrics={})


class LoudStream(Stream):
    """Batches 5 and 6 ask for actions a thousand times as large."""

    def __iter__(self) -> Iterator[Batch]:
        while True:
            number = self.position
            self.position += 1
            batch = as_double(make_batch(number, SIZE))
            if number in (5, 6):
                batch.actions.mul_(1000)
            yield batch


class Data:
    def __init__(self, stream: Stream | None = None) -> None:
        self.train = stream or Stream()
        self.validation = [as_double(make_batch(10_001, 6)), as_double(make_batch(10_002, 3))]


def seen_of(trainer: Trainer) -> dict[str, Any]:
    """What this rank itself has at the end, and what it reads."""
    saved = load_latest(trainer.run)
    assert saved is not None
    return {
        "records": records(trainer.run),
        "saved": {"tensors": saved.tensors, "optimizer": tensors_of(saved.optimizer)},
        "weights": gather({"model": trainer.model.state_dict(), "loss": trainer.objective.state_dict()}),
        "policy": {
            k: v
            for k, v in trainer.fault_policy.state_dict().items()
            if k in ("skipped", "rollbacks", "high")
        },
        "counts": (trainer.step, trainer.counters.samples),
        "random": torch.get_rng_state(),
    }


def trained_in(run: Path, changes: dict[str, Any], data: Data, **sections: Any) -> dict[str, Any]:
    trainer = trainer_of(run, changes, **sections)
    trainer.fit(data)
    return seen_of(trainer)


def train_all(folder: str, parallel: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every training of this file in one world, since it takes longer to make one than to train."""
    root, found = Path(folder), {}
    steep = {**OBJECTIVE, "steep": {"kind": f"{__name__}:Steep", "weight": 1.0}}
    found["skip a loss"] = trained_in(root / "loss", SKIP | parallel, Data(Stream((2, SIZE - 1))))
    found["skip a gradient"] = trained_in(root / "gradient", SKIP | parallel, Data(), objective=steep)
    found["roll back"] = trained_in(root / "back", ROLL_BACK | parallel, Data(LoudStream()))
    cooling = {"kind": "wsd", "warmup": 2, "decay_from": 3}
    fork = {"steps": 5, "fork": {"run": str(root / "loss"), "step": 3}, "schedule": cooling}
    found["fork"] = trained_in(root / "fork", fork | NOTHING_HELD_OUT | parallel, Data())
    free = root / "free"
    found["straight"] = trained_in(free, SCHEDULE_FREE | parallel, Data())
    forget(free, 4)
    found["resumed"] = trained_in(free, SCHEDULE_FREE | parallel, Data())
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """What all trainings of a kind give, on each rank."""

    @cache
    def on(kind: str) -> list[dict[str, Any]]:
        folder = str(tmp_path_factory.mktemp(kind))
        count, parallel = (1, {}) if kind == "one" else (2, {"parallel": {"kind": kind}})
        return on_ranks(count, train_all, folder, parallel)

    return on


CASES = ("skip a loss", "skip a gradient", "roll back", "fork", "straight", "resumed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_what_one_process_does(case: str, kind: str, trained: Any) -> None:
    (one,), several = trained("one"), trained(kind)
    expected, found = one[case], several[0][case]
    require_same_records(expected["records"], found["records"])
    assert furthest(expected["saved"], found["saved"]) < TOLERANCE
    assert found["policy"] == expected["policy"] and found["counts"] == expected["counts"]
    assert torch.equal(found["random"], expected["random"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_the_same(case: str, kind: str, trained: Any) -> None:
    first, second = (one[case] for one in trained(kind))
    assert furthest(first["weights"], second["weights"]) == 0
    assert [first[key] for key in ("policy", "counts", "records")] == [
        second[key] for key in ("policy", "counts", "records")
    ]
    assert torch.equal(first["random"], second["random"])


@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_each_has_done_what_it_is_here_for(kind: str, trained: Any) -> None:
    found = trained(kind)[0]
    assert found["skip a loss"]["policy"]["skipped"] == found["skip a gradient"]["policy"]["skipped"] == 1
    assert [len(found[c]["policy"]["rollbacks"]) for c in ("skip a loss", "roll back")] == [0, 1]
    assert found["roll back"]["policy"]["rollbacks"] == [[7, 4]]
    events = [record for record in found["roll back"]["records"] if record["kind"] == "event"]
    assert [(record["step"], record["optim/rollback_from"]) for record in events] == [(4, 7.0)]
    assert found["roll back"]["counts"] == (9, 12 * SIZE)  # three updates were made for nothing
    steps = [record["step"] for record in found["fork"]["records"] if record["kind"] == "train"]
    assert steps == [4, 5] and found["fork"]["records"][0]["optim/fork_step"] == 3


@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_schedule_free_goes_on_to_the_same_bits(kind: str, trained: Any) -> None:
    found = trained(kind)[0]
    assert furthest(found["straight"]["saved"], found["resumed"]["saved"]) == 0
    assert found["straight"]["records"] == found["resumed"]["records"]
    raw = [record for record in found["resumed"]["records"] if record["kind"] == "validation"]
    assert raw and all(r["valid/total"] != r["valid_raw/total"] for r in raw)

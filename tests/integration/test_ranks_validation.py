"""Held-out batches divided among the ranks: the same bits as when one judges all of them, and no row meets
another rank's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.ranks import on_ranks
from fixtures.ranks_training import MODEL, Stream, trainer_of
from fixtures.term_batches import as_double
from fixtures.vla_training import make_batch
from tutti.distributed.ranks import ONE_RANK, Ranks, current_ranks, shared_batch
from tutti.distributed.world import ONE_PROCESS, world
from tutti.training.data_feed import portion
from tutti.types import Batch

SIZES = (6, 6, 4, 2, 5)
OBJECTIVE = {
    "align": {"kind": "contrastive", "width": 16, "weight": 0.3},  # compares rows
    "near": {"kind": "state_contrastive", "width": 16, "weight": 0.1},  # compares rows, and draws views
    "recon": {"width": 16, "heads": 2, "downsample": 2, "weight": 0.2},
    "state": None,
}
MODEL_OF_NOISE = {**MODEL, "action": {"kind": "flow", "width": 16}}  # draws noise
MODEL_THAT_WRITES = {**MODEL, "action": {"kind": "fast", "width": 16}}  # stops where all is written
SETTINGS = {
    "steps": 2,
    "schedule": {"warmup": 1},
    "validation": {"every": 0, "raw": True},
    "checkpoints": {"every": 0},
    "ema": 0.5,
}


class Data:
    def __init__(self) -> None:
        self.train = Stream()
        self.validation: list[Batch] = []


def judged(
    run: str, parallel: dict[str, Any], counts: tuple[int, ...], model: dict[str, Any]
) -> list[dict[str, Any]]:
    """What validation gives of so many batches, divided among the ranks, and each of them judged by all."""
    trainer = trainer_of(Path(run), SETTINGS | parallel, objective=OBJECTIVE, model=model)
    data, judge = Data(), trainer.parallel.evaluate_held_out
    trainer.fit(data)
    passes: list[int] = []
    alone: list[bool] = []

    def watched(batch: Any, *rest: Any) -> Any:
        passes.append(len(batch.window))
        alone.append(current_ranks() == ONE_RANK)
        return judge(batch, *rest)

    trainer.parallel.evaluate_held_out = watched
    found: list[dict[str, Any]] = []
    for count in counts:
        data.validation = [as_double(make_batch(10_001 + n, size)) for n, size in enumerate(SIZES[:count])]
        random = torch.get_rng_state()
        passes.clear()
        with shared_batch(world().ranks), pytest.MonkeyPatch.context() as patch:
            divided, own = trainer.validate(data), list(passes)
            patch.setattr(trainer.parallel, "world", ONE_PROCESS)
            whole = trainer.validate(data)
        untouched = torch.equal(random, torch.get_rng_state())
        found.append({"divided": divided, "whole": whole, "passes": own, "untouched": untouched})
    return [{**one, "alone": all(alone)} for one in found]


@pytest.mark.parametrize(
    ("kind", "count", "counts", "model"),
    [
        ("ddp", 2, (5, 1), MODEL_OF_NOISE),
        ("fsdp", 2, (5, 1), MODEL_OF_NOISE),
        ("fsdp", 2, (5, 1), MODEL_THAT_WRITES),
        ("ddp", 4, (2,), MODEL_OF_NOISE),
    ],
)
def test_the_values_are_those_of_one_judge_to_the_last_bit(
    kind: str, count: int, counts: tuple[int, ...], model: dict[str, Any], tmp_path: Path
) -> None:
    """Also where there are fewer batches than ranks, who pass forward as often as the others."""
    ranks = on_ranks(count, judged, str(tmp_path), {"parallel": {"kind": kind}}, counts, model)
    for batches, *found in zip(counts, *ranks, strict=True):
        for one in found:
            assert one["divided"] == one["whole"] == found[0]["whole"]
            assert one["alone"] and one["untouched"]
            assert len(one["passes"]) == 2 * -(-batches // count)  # for the average and for the raw weights
        values = found[0]["divided"]
        for term in ("align", "near", "recon", "action", "total"):
            assert values[f"valid/{term}"] != values[f"valid_raw/{term}"]


def test_each_batch_is_judged_once_and_all_ranks_pass_forward_equally_often() -> None:
    batches = [make_batch(number, 2) for number in range(5)]
    for held_out in (lambda: batches, lambda: iter(batches)):  # a sequence, and what can only be gone through
        portions = [list(portion(held_out(), Ranks(rank, 3))) for rank in range(3)]
        assert [[number for number, _ in own] for own in portions] == [[0, 3], [1, 4], [2, None]]
        for own in portions:
            for number, batch in own:
                assert batch is batches[4 if number is None else number]
    assert [number for number, _ in portion(iter(batches), ONE_RANK)] == [0, 1, 2, 3, 4]
    assert list(portion([], Ranks(1, 3))) == []

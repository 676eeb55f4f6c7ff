"""bf16 on two processes: losses stay float32, so they differ from one process only by rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import ranks_training
from fixtures.ranks import on_ranks
from fixtures.vla_training import MODEL, SPEC, make_batch
from tutti.config.run_config import RunConfig
from tutti.models.config import ModelConfig
from tutti.objectives.config import ObjectiveConfig
from tutti.training.records import read_records
from tutti.training.trainer import Trainer

SETTINGS = {**ranks_training.SETTINGS, "steps": 3, "validation": {"every": 0}, "checkpoints": {"every": 0}}
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "fsdp, gathered in bf16": {"kind": "fsdp", "communication": "bf16"},
}
ROUNDED = 2**-8
"""Half the distance of neighbours in bf16, relative."""


class Stream(ranks_training.Stream):
    def __iter__(self) -> Any:
        while True:
            self.position += 1
            yield make_batch(self.position, ranks_training.SIZE)


class Data:
    def __init__(self) -> None:
        self.train, self.validation = Stream(), []


def first_losses(run: str, parallel: dict[str, Any], precision: str = "bf16") -> dict[str, Any]:
    """The first record's losses, and the types that the terms had."""
    given = {"training": SETTINGS | parallel | {"precision": precision}}
    config = RunConfig.model_validate({**given, "objective": ranks_training.OBJECTIVE})
    torch.manual_seed(0)
    model = ModelConfig.model_validate(MODEL).build(SPEC)
    loss = ObjectiveConfig.model_validate(ranks_training.OBJECTIVE).build(model)
    trainer = Trainer(config.training, model, loss, Path(run))
    evaluate, types = trainer.parallel.evaluate, set()

    def noted(*arguments: Any) -> Any:
        features, terms = evaluate(*arguments)
        types.update(value.dtype for value in (*terms.values.values(), terms.total, *terms.metrics.values()))
        return features, terms

    trainer.parallel.evaluate = noted
    trainer.fit(Data())
    first = read_records(trainer.run)[0]
    losses = {k: v for k, v in first.items() if k == "loss/total" or k.endswith("/raw")}
    return {"losses": losses, "types": types}


def all_kinds(run: str) -> dict[str, Any]:
    return {name: first_losses(f"{run}/{name}", {"parallel": kind}) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("precision")
    several = on_ranks(2, all_kinds, str(folder / "two"))[0]
    return several | {
        "one": on_ranks(1, first_losses, str(folder / "one"), {})[0],
        "exact": on_ranks(1, first_losses, str(folder / "exact"), {}, "fp32")[0],
    }


@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_every_term_metric_and_the_total_are_float32(kind: str, found: dict[str, Any]) -> None:
    assert found[kind]["types"] == {torch.float32}
    off_the_grid = [v for v in found[kind]["losses"].values() if v != float(torch.tensor(v).bfloat16())]
    assert len(off_the_grid) >= 4  # of 5: they were not in bf16 before either


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_where_weights_travel_in_float32_the_losses_are_those_of_one_process(
    kind: str, found: dict[str, Any]
) -> None:
    assert found[kind]["losses"] == pytest.approx(found["one"]["losses"], rel=1e-6)


def test_weights_gathered_in_bf16_change_a_loss_by_less_than_their_rounding(found: dict[str, Any]) -> None:
    rounded = found["fsdp, gathered in bf16"]["losses"]
    assert rounded != found["one"]["losses"]
    for reference in ("one", "exact"):
        assert rounded == pytest.approx(found[reference]["losses"], rel=2 * ROUNDED)

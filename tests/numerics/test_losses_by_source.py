"""The loss of each source, split off from one forward pass, is the term on the rows of that source alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_accumulation import EXACT, PARTS, PER_MICRO_BATCH, built, cut, uneven
from test_accumulation import _own_term as _own_term  # noqa: PLC0414 (a fixture)

from fixtures.ranks import on_ranks
from tutti.distributed.ranks import MicroBatches, current_ranks
from tutti.models.vla import VLA
from tutti.objectives.term import Term, TermValue
from tutti.objectives.unified import UnifiedLoss
from tutti.training.update import read_scalars, source_means, to_host
from tutti.types import Batch, Features

SOURCES = 3


def mixed(number: int) -> Batch:
    """Windows of three sources in turn; the third has neither actions, states nor later pictures."""
    batch = uneven(number)
    size = len(batch.window)
    source = torch.arange(size)[:, None] % SOURCES == torch.arange(SOURCES)
    there, later = ~source[:, 2], batch.later_states
    assert later is not None
    futures = {k: replace(one, mask=one.mask & there) for k, one in batch.futures.items()}
    return replace(
        batch,
        source=source,
        action_mask=batch.action_mask & there[:, None, None],
        observation=replace(batch.observation, state_mask=batch.observation.state_mask & there),
        futures=futures,
        later_states=replace(later, mask=later.mask & there[:, None]),
    )


def split(model: VLA, loss: UnifiedLoss, batches: list[Batch]) -> dict[str, float]:
    """What an update of these micro-batches records of each source."""
    update = MicroBatches(batches)
    scalars = []
    with torch.no_grad():
        for number, batch in enumerate(batches):
            with update.use(number):
                scalars.append(read_scalars(loss(model(batch.observation), batch, model)))
    return source_means(one.by_source for one in to_host(scalars)[0])


def plain(model: VLA, loss: UnifiedLoss, whole: Batch) -> dict[str, float]:
    """The terms on the rows of each source alone, each in a forward pass of its own."""
    assert whole.source is not None
    found: dict[str, float] = {}
    for source in range(SOURCES):
        rows = whole.source[:, source]
        own = replace(whole, source=None).apply(lambda value, rows=rows: value[rows])
        with torch.no_grad():
            terms = loss(model(own.observation), own, model)
        assert terms.by_source == {}
        found |= {f"{name}@{source}": value.item() for name, value in terms.values.items()}
    return found


@pytest.mark.parametrize("kind", EXACT)
def test_the_losses_of_sources_are_those_of_their_rows_alone(kind: str) -> None:
    model, loss = (module.eval() for module in built(kind, EXACT[kind]))  # hidden patches by the window
    whole = mixed(1)
    found, expected = split(model, loss, cut(whole, PARTS)), plain(model, loss, whole)
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-12)
    assert {name: expected[name] for name in expected.keys() - found.keys()} == dict.fromkeys(
        expected.keys() - found.keys(), 0.0
    )
    assert {"extra@0", "extra@1"} <= found.keys() and "action@2" not in found
    assert found["extra@0"] != found["extra@1"]


@pytest.mark.parametrize("kind", PER_MICRO_BATCH)
def test_a_loss_that_compares_rows_has_none(kind: str) -> None:
    model, loss = built(kind, PER_MICRO_BATCH[kind])
    assert {name.partition("@")[0] for name in split(model, loss, cut(mixed(1), PARTS))} == {"action"}


def test_the_value_is_to_the_bit_what_it_is_without_sources() -> None:
    for kind, given in EXACT.items():
        model, loss = (module.eval() for module in built(kind, given))
        batch = mixed(2)
        values = [
            loss(model(one.observation), one, model).values["extra"]
            for one in (batch, replace(batch, source=None))
        ]
        assert torch.equal(*values), kind


def of_ranks(kinds: tuple[str, ...]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for kind in kinds:
        model, loss = (module.eval() for module in built(kind, EXACT[kind]))
        found[kind] = split(model, loss, cut(mixed(1), 2))
    assert current_ranks().count == 2
    return found


def test_they_are_those_of_the_rows_on_all_ranks() -> None:
    kinds = ("future_states", "future_patches", "progress")
    for found in on_ranks(2, of_ranks, kinds):
        for kind in kinds:
            model, loss = (module.eval() for module in built(kind, EXACT[kind]))
            expected = plain(model, loss, mixed(1))
            assert found[kind] == pytest.approx({n: expected[n] for n in found[kind]}, rel=1e-12)


class Odd(Term):
    """Values and metrics that are no mean over rows, or one that is not the value."""

    def compute(self, features: Features, batch: Batch, model: Any) -> TermValue:
        mean = self.mean(features.readout.square(), batch)
        five = features.readout[0, :5]
        over_width = self.masked_mean(five, five > -9, _none)
        given = {"twice": 2 * mean, "width": over_width, "sum": self.sum_of([mean, mean]), "mean": mean}
        other = self.mean(-features.readout, batch)
        return TermValue(value=given[self.name], metrics={f"{self.name}/size": other})


def _none(batch: Batch) -> torch.Tensor:
    return batch.window > 0


def test_a_term_of_the_user_s_own_is_split_where_its_value_is_a_mean() -> None:
    model, _ = built("progress", EXACT["progress"])
    batch = mixed(1)
    features = model(batch.observation)
    found = {name: Odd(name=name)(features, batch, model) for name in ("twice", "width", "sum", "mean")}
    assert found["twice"].by_source is None and found["width"].by_source is None
    own, both = found["mean"].by_source, found["sum"].by_source
    assert own is not None and both is not None and own.shape == (1, 2, SOURCES)
    assert torch.equal(both, own.repeat(2, 1, 1))
    rows = features.readout.detach()[batch.source[:, 1]]  # pyright: ignore[reportOptionalSubscript]
    means = source_means([{"mean": own.numpy()}])
    assert means["mean@1"] == pytest.approx(rows.square().mean().item(), rel=1e-12)


def test_a_nan_stays_in_its_source() -> None:
    model, loss = built("chunk", {})
    batch = mixed(1)
    row = int(torch.nonzero(batch.action_mask[:, 0, 0] & batch.source[:, 0])[0])  # pyright: ignore
    batch.actions[row, 0, 0] = float("nan")
    found: dict[str, float] = split(model, loss, [batch])
    assert found["action@0"] != found["action@0"] and found["action@1"] > 0

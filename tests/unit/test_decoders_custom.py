"""A decoder of the user's own: the documented example works and is short; errors name the target."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fixtures.small_decoders import (
    ACTION,
    HORIZON,
    SMALL,
    WIDTH,
    batch,
    config,
    features,
    gradients,
    holes,
    narrow_model,
)
from fixtures.term_batches import only_decoder
from tutti.config.run_config import load_config
from tutti.models.describe import describe
from tutti.models.interfaces import ActionDecoder
from tutti.objectives.terms.actions import ChunkTerm
from tutti.types import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
LAPLACE = "own_decoder:Laplace"


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_decoder", raising=False)


def laplace(**options: object) -> ActionDecoder:
    torch.manual_seed(0)
    return config(LAPLACE, options=options).action.build(SMALL, WIDTH)


def test_the_example_is_short_and_learns_one_batch_as_part_of_a_model() -> None:
    assert len((EXAMPLES / "own_decoder.py").read_text().rstrip().splitlines()) <= 30
    model, given = narrow_model(LAPLACE, options={"hidden": 64}), batch(8)
    term = ChunkTerm(name="action")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = term(model(given.observation), given, model).value.item()
    for _ in range(120):
        optimizer.zero_grad()
        value = term(model(given.observation), given, model).value
        value.backward()
        optimizer.step()
    assert value.item() < 0.1 * first
    assert (model.predict(given.observation) - given.actions).abs().mean() < 0.1


def test_its_error_is_the_likelihood_and_its_gradient_heeds_the_mask() -> None:
    decoder, given, seen = laplace(hidden=8, least=0.1), batch(mask=holes()), features()
    assert decoder.predict(seen).shape == (4, HORIZON, ACTION)
    out = decoder.out(decoder.hidden(seen.readout).relu()).view(4, 2, HORIZON, ACTION)  # pyright: ignore
    spread = 0.1 * (1 + nn.functional.softplus(out[:, 1]))
    log_likelihood = torch.distributions.Laplace(out[:, 0], spread).log_prob(given.actions)
    error = decoder(seen, given)
    torch.testing.assert_close(error, -log_likelihood - math.log(2 * 0.1))
    value = ChunkTerm(name="action")(seen, given, only_decoder(decoder)).value
    formula = (error * given.action_mask).sum() / given.action_mask.sum()
    for mine, theirs in zip(gradients(decoder, value), gradients(decoder, formula), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_it_stands_in_a_config_file_and_in_the_models_description(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{action: {{kind: '{LAPLACE}', options: {{hidden: 32}}}}}}")
    found = load_config(path, ["model.action.options.hidden=16"]).model
    assert found.action.kind == LAPLACE
    assert type(found).model_validate(found.model_dump(mode="json")) == found
    model = found.build(SMALL)
    assert model.action.hidden.out_features == 16  # pyright: ignore[reportAttributeAccessIssue]
    rows = {row.name: row for row in describe(model).modules}
    assert rows["action"].flops == rows["action.hidden"].flops + rows["action.out"].flops > 0


class Product(ActionDecoder):
    """One that computes outside of any layer."""

    def __init__(self, spec: object, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, HORIZON * ACTION))

    def forward(self, features: object, batch: object) -> torch.Tensor:
        return (self.predict(features) - batch.actions).abs()  # pyright: ignore

    def predict(self, features: object) -> torch.Tensor:
        return (features.readout @ self.matrix).view(-1, HORIZON, ACTION)  # pyright: ignore


def test_what_a_decoder_computes_outside_its_layers_counts_in_its_row() -> None:
    model = config(f"{__name__}:Product").build(SMALL)
    description = describe(model)
    row = next(row for row in description.modules if row.name == "action")
    assert row.flops == 2 * model.fusion.width * HORIZON * ACTION
    assert sum(row.flops for row in description.modules if row.depth == 1) == description.flops


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("own_decoder:Gauss", {}, r"model\.action\.kind is 'own_decoder:Gauss'.*no such name.*Laplace"),
        (LAPLACE, {"hiden": 3}, r"own_decoder:Laplace does not accept options \['hiden'\]"),
    ],
)
def test_errors_name_the_target(kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(kind, options=options).build(SMALL)


def test_a_kind_that_is_no_class_is_refused_by_the_config() -> None:
    with pytest.raises(UserError, match=r"model\.action\.kind: expected .*found 'own_decoder\.Laplace'"):
        load_config(None, ["model.action.kind=own_decoder.Laplace"])

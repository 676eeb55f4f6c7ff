"""A backward of the user's own trains like a built-in one; errors name the target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fixtures.balanced_training import trainer
from fixtures.toy_training import Data
from tutti.types import UserError

OWN = '''
from tutti.training.backward.interface import Backward

class Half(Backward):
    """The plain sum times `factor`, and how often it was made."""

    def __init__(self, parameters, terms, factor=0.5):
        self.names, self.terms, self.factor, self.made = list(parameters), terms, factor, 0

    def add(self, terms, accumulation):
        (self.factor * terms.total / accumulation).backward()

    def finish(self):
        self.made += 1
        return {"backward/weight/all": self.factor}

    def state_dict(self):
        return {"made": self.made}

    def load_state_dict(self, state):
        self.made = state["made"]
'''


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_backward_of_a_test.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_it_moves_the_weights_and_its_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    fixed = {"kind": "shares"}
    own = {"kind": "own_backward_of_a_test:Half", "options": {"factor": 0.25}}
    quarter = trainer(tmp_path / "a", fixed, own, steps=4, gradients={"clip_norm": "off"})
    whole = trainer(tmp_path / "b", fixed, {"kind": "one"}, steps=4, gradients={"clip_norm": "off"})
    stream = iter(Data().train), iter(Data().train)
    for run, batches in zip((quarter, whole), stream, strict=True):
        torch.manual_seed(1)
        run.optimizer.zero_grad = lambda: None  # keeps the gradient to look at
        run.update(batches)
    for name, parameter in quarter.parameters.items():
        other = whole.parameters[name].grad
        assert parameter.grad is not None and other is not None
        torch.testing.assert_close(4 * parameter.grad, other, rtol=1e-4, atol=1e-7)
    assert quarter.backward.state_dict() == {"made": 1}
    assert quarter.backward.terms == ("align", "action", "recon")  # pyright: ignore
    again = trainer(tmp_path / "c", fixed, own, steps=4)
    again.fit(Data())
    resumed = trainer(tmp_path / "c", fixed, own, steps=6)
    resumed.fit(Data())
    assert resumed.backward.state_dict() == {"made": 6}


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        ({"kind": "no_such_module:Half"}, r"backward\.kind is 'no_such_module:Half'.*cannot be imported"),
        ({"kind": "own_backward_of_a_test:Whole"}, r"no such name.*Half"),
        ({"kind": "own_backward_of_a_test:Half", "options": {"fcator": 1}}, r"does not accept.*fcator"),
    ],
)
def test_errors_name_the_target(backward: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", {"kind": "shares"}, backward)

"""The moving average of the weights, held against its formula: these weights are judged and served."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutti.training.optim.ema import Ema, ema_decay


class Parts(nn.Module):
    """A parameter, one that is used under two names, one of whole numbers, and two buffers."""

    mean: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.first = nn.Linear(2, 1).double()
        self.second = self.first
        self.places = nn.Parameter(torch.tensor([3, 4]), requires_grad=False)
        self.register_buffer("mean", torch.tensor(0.5))
        self.register_buffer("count", torch.tensor(7))


@pytest.mark.parametrize(
    ("decay", "updates", "expected"),
    [(0.9, 0, 0.1), (0.9, 1, 2 / 11), (0.9, 79, 80 / 89), (0.9, 80, 0.9), (0.999, 80, 0.9), (0.05, 0, 0.05)],
)
def test_the_decay_rises_to_its_value(decay: float, updates: int, expected: float) -> None:
    assert ema_decay(decay, updates) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.9, 0.13])
def test_the_average_is_that_of_the_formula(decay: float) -> None:
    """Far from one half, so that the old and the new weights cannot be swapped."""
    module = Parts()
    average = Ema(module, decay)
    expected = module.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            module.weight.add_(torch.tensor([0.25 * (step + 1), -1.0]))
        average.update()
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * module.weight.detach()
    assert torch.allclose(average.shadow["weight"], expected, rtol=1e-12, atol=0)
    assert average.updates == 5
    assert not torch.allclose(average.shadow["weight"], module.weight.detach(), rtol=1e-3)


def test_a_shared_parameter_is_averaged_under_both_names() -> None:
    module = Parts()
    average = Ema(module, 0.9)
    before = module.first.weight.detach().clone()
    with torch.no_grad():
        module.first.weight += 1.0
    average.update()
    for name in ("first.weight", "second.weight"):
        assert torch.allclose(average.shadow[name], before + 0.9)


def test_what_is_no_number_of_the_model_is_copied() -> None:
    module = Parts()
    average = Ema(module, 0.9)
    with torch.no_grad():
        module.places.add_(10)
        module.mean.add_(1.0)
        module.count.add_(1)
    average.update()
    for name in ("places", "mean", "count"):
        assert torch.equal(average.shadow[name], module.state_dict()[name])


def test_the_average_is_no_view_of_the_module() -> None:
    module = Parts()
    average = Ema(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(9.0)
        module.mean.fill_(9.0)
    assert average.shadow["weight"].tolist() == [1.0, -2.0] and float(average.shadow["mean"]) == 0.5


def test_inside_the_block_the_module_has_the_average_and_afterwards_its_own() -> None:
    module = Parts()
    average = Ema(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update()
    own = {name: value.clone() for name, value in module.state_dict().items()}
    kept = {name: value.clone() for name, value in average.shadow.items()}
    with pytest.raises(KeyError), average.applied():
        assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
        assert not torch.equal(module.weight, own["weight"])
        raise KeyError
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in average.shadow.items())


def test_a_saved_average_goes_on_where_it_was() -> None:
    module = Parts()
    first, second = Ema(module, 0.9), Ema(module, 0.9)
    for _ in range(3):
        with torch.no_grad():
            module.weight.mul_(1.5)
        first.update()
    second.load({name: value.clone() for name, value in first.shadow.items()}, first.updates)
    for average in (first, second):
        with torch.no_grad():
            module.weight.copy_(torch.tensor([5.0, 6.0]))
        average.update()
    assert torch.equal(first.shadow["weight"], second.shadow["weight"])
    assert first.updates == second.updates == 4

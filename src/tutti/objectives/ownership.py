"""Who owns a parameter: the model what the robot needs, a term its head; nothing is in both."""

from __future__ import annotations

from torch import Tensor, nn

from tutti.types import UserError


def check_ownership(model: nn.Module, objective: nn.Module) -> None:
    """Raises: UserError if a term or the balancing has registered a part of the model as its own.

    It would be saved in both, its gradient would count twice in the norm and be clipped twice.
    """
    parts = {id(module): name for name, module in model.named_modules() if _tensors(module)}
    for name, module in objective.named_modules():
        if id(module) in parts:
            raise _refusal(name, parts[id(module)])
    owned = {id(value): name for name, value in _tensors(model)}
    for name, value in _tensors(objective):
        if id(value) in owned:
            raise _refusal(name, owned[id(value)])


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _refusal(place: str, part: str) -> UserError:
    holder, _, attribute = place.removeprefix("terms.").rpartition(".")
    what = f"model.{part}" if part else "the model itself"
    return UserError(
        f"objective{f'.{holder}' if holder else ''}: the attribute `{attribute}` is {what}, which the model "
        "owns already. Registered here too it would be saved twice, counted twice in the gradient's norm and "
        "clipped twice.\n"
        "  expected: a term owns its head, and uses the model without registering it\n"
        "  cure: take the part from the argument `model` of `compute`: model.vision. For weights of its own, "
        "a term may register a copy.deepcopy of the part."
    )

"""What every balancing is: how the lambdas are chosen."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tutti.distributed.ranks import current_ranks, mean_over_ranks
from tutti.objectives.objective import UpdateHooks
from tutti.objectives.weight_schedule import WeightSchedule


class Balancing(UpdateHooks, nn.Module, ABC):
    """lambda_i = w_i(progress) * b_i: the config's weight or schedule w_i times what the method says, b_i.

    A method writes `factors`, and learns in the hooks around an update; `forward` changes nothing, since
    validation calls it too. All its state is in buffers (and so in the checkpoint), in the order of `names`.
    Where the scale of b is free the b of the K computed terms sum to K: equal b are the plain sum.
    """

    def __init__(self, schedules: Mapping[str, WeightSchedule]) -> None:
        super().__init__()
        self.schedules = dict(schedules)
        self.names = tuple(self.schedules)
        self.register_load_state_dict_post_hook(lambda balancing, _: balancing.after_load())

    def after_load(self) -> None:
        """Called when buffers were loaded: to forget what the host knows of them, which saves it a wait."""

    @abstractmethod
    def factors(self, values: dict[str, Float[Tensor, ""]]) -> dict[str, float | Tensor]:
        """b of every computed term, without a gradient: a number, or a scalar tensor."""

    def is_active(self, name: str, progress: float) -> bool:
        """False where the term's weight is exactly 0 at `progress`: the term is then not computed."""
        return self.weight(name, progress) != 0

    def weight(self, name: str, progress: float) -> float:
        """w of a term at `progress`."""
        return self.schedules[name].at(progress)

    def forward(self, values: dict[str, Float[Tensor, ""]], progress: float) -> dict[str, Float[Tensor, ""]]:
        """lambda of every computed term, detached, in the precision and on the device of its value."""
        factors = self.factors(_of_all_ranks(values))
        lambdas: dict[str, Tensor] = {}
        for name, value in values.items():
            factor, weight = factors[name], self.weight(name, progress)
            # `full` fills on the device; `torch.tensor` would copy there and make the CPU wait.
            lambdas[name] = torch.full((), weight, dtype=value.dtype, device=value.device) * (
                factor.to(value.dtype) if isinstance(factor, Tensor) else factor
            )
        return lambdas

    if TYPE_CHECKING:
        __call__ = forward

    def in_order(self, values: Mapping[str, float], like: Tensor) -> Float[Tensor, " k"]:
        """Numbers by term as a vector in the order of `names`, NaN where there is none, in the precision and
        on the device of `like`, a buffer."""
        numbers = [values.get(name, math.nan) for name in self.names]
        # Made here and sent off: made there, the host would wait for all that the device has to do.
        return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)

    def by_name(
        self, vector: Float[Tensor, " k"], computed: Iterable[str]
    ) -> dict[str, float | Float[Tensor, ""]]:
        """The entries of a vector in the order of `names` that belong to the terms that are computed."""
        return {name: vector[self.names.index(name)] for name in computed}

    def softmax(
        self, logits: Float[Tensor, " k"], computed: Collection[str]
    ) -> dict[str, float | Float[Tensor, ""]]:
        """K softmax(logits) over the K terms that are computed, so that equal logits give each a 1."""
        if not computed:
            return {}
        chosen = torch.softmax(torch.stack([logits[self.names.index(name)] for name in computed]), 0)
        return dict(zip(computed, len(computed) * chosen, strict=True))


def _of_all_ranks(values: dict[str, Float[Tensor, ""]]) -> dict[str, Float[Tensor, ""]]:
    """The values of the whole batch, so that all ranks choose the same lambdas; alone as they are."""
    if current_ranks().count == 1 or not values:
        return values
    means = mean_over_ranks(torch.stack([value.detach().double() for value in values.values()]))
    return {name: mean.to(value.dtype) for (name, value), mean in zip(values.items(), means, strict=True)}

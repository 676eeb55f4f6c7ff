"""The same batches once more after an update, for objectives that ask what the update has done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tutti.distributed.ranks import MicroBatches
from tutti.training.device import Machine
from tutti.training.rng import load_rng_state, own_randomness
from tutti.training.validation import Reading, fetch, reading
from tutti.types import Batch, LossTerms


@torch.no_grad()
def look_again(
    forward: Callable[[Batch], LossTerms], update: MicroBatches, machine: Machine, random: dict[str, Any]
) -> list[dict[str, float]]:
    """The raw terms of each batch of an update, by `forward`, now that the weights have moved.

    Draws (dropout, noise) start from the random states `random`, those before the update: what differs from
    then is the weights alone. Afterwards the random states are what they were.
    """
    with own_randomness(0), machine.autocast():
        load_rng_state(random)
        readings: list[Reading] = []
        for number, batch in enumerate(update.batches):
            with update.use(number):
                readings.append(reading(forward(batch)))
        found, _ = fetch(readings)
    return [values for values, *_ in found]

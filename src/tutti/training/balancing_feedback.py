"""What a balancing of the terms learns from an update: their gradients, and their values after the step."""

from __future__ import annotations

from typing import Any

import torch

from tutti.objectives.objective import Objective
from tutti.training.backward.term_gradients import Gradients, added, shared_norms, term_gradients
from tutti.training.device import Machine
from tutti.training.parallel.ddp import Parallel
from tutti.training.rng import load_rng_state, own_randomness, rng_state
from tutti.training.state import TrainState
from tutti.training.update import (
    DeviceScalars,
    Evaluate,
    Observer,
    Update,
    mean_terms,
    read_scalars,
    to_host,
)
from tutti.types import Features, LossTerms


class GradientCalibration(Observer):
    """Shows the norms of the terms' gradients to a balancing that asks for them (gradient_share)."""

    def __init__(self, state: TrainState, parallel: Parallel) -> None:
        self.objective, self.backward, self.parallel = state.objective, state.backward, parallel
        self.parameters = list(state.parameters.values())
        self._gradients: Gradients = {}

    def before_batches(self, update: Update) -> None:
        update.shows_gradients |= self.objective.hooks.wants_gradients(update.step)

    def after_forward(self, update: Update, features: Features, terms: LossTerms) -> None:
        """Adds the micro-batch to the gradients of the update, and shows them after the last."""
        if not self.objective.hooks.wants_gradients(update.step):
            return
        self.parallel.require_term_gradients("a balancing that observes gradients")
        parts = {name: value / len(update.batches) for name, value in terms.values.items()}
        gradients = self.backward.masked(term_gradients(parts, self.parameters))
        self._gradients = added(self._gradients, gradients) if update.number else gradients
        if update.number == len(update.batches) - 1:
            self.objective.hooks.observe_gradients(shared_norms(self._gradients))
            self._gradients = {}


class Reevaluation(Observer):
    """Computes the terms of the same batches once more after the step, where a balancing asks (FAMO)."""

    def __init__(self, objective: Objective, evaluate: Evaluate, machine: Machine) -> None:
        self.objective, self.evaluate, self.machine = objective, evaluate, machine
        self._random: dict[str, Any] = {}

    def before_batches(self, update: Update) -> None:
        if self.objective.hooks.needs_losses_after_step:
            self._random = rng_state()

    def after_step(self, update: Update) -> None:
        if self.objective.hooks.needs_losses_after_step:
            after = reevaluate(update, self.evaluate, self.machine, self._random)
            self.objective.hooks.reevaluate(update.means, after)


@torch.no_grad()
def reevaluate(
    update: Update, evaluate: Evaluate, machine: Machine, random: dict[str, Any]
) -> dict[str, float]:
    """The raw terms of the batches of an update, means over the micro-batches, with the weights of now.

    Draws (dropout, noise) start from the random states `random`, those before the update: what differs from
    then is the weights alone. Afterwards the random states are what they were.
    """
    scalars: list[DeviceScalars] = []
    with own_randomness(0), machine.autocast():
        load_rng_state(random)
        for number, batch in enumerate(update.batches):
            with update.micro_batches.use(number):
                _, terms = evaluate(batch, update.point.progress, update.counting)
                scalars.append(read_scalars(terms))
        values, _ = to_host(scalars)
    return mean_terms(values)

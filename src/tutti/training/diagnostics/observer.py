"""Looking at a training while it runs: which term moves which part, and how healthy the features are."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tutti.distributed.ranks import current_ranks
from tutti.distributed.sharded_tensors import gather
from tutti.distributed.world import world
from tutti.training.backward.term_gradients import Gradients, term_gradients
from tutti.training.device import Machine
from tutti.training.diagnostics.loss_spikes import SpikeDetector, SpikesConfig
from tutti.training.diagnostics.measures import (
    feature_measures,
    gradient_measures,
    update_ratio,
    weighted_sum,
)
from tutti.training.diagnostics.noise_scale import NoiseScale
from tutti.training.faults.saved_steps import gather_batches, keep_newest, save_step
from tutti.training.optim.optimizers import part_of
from tutti.training.parallel.ddp import Parallel
from tutti.training.rng import own_randomness
from tutti.training.state import TrainState
from tutti.training.update import Observer, Update
from tutti.types import Batch

log = logging.getLogger("tutti.training")

SPIKES = "spikes"


class DiagnosticsConfig(BaseModel):
    """How often to look, at how much of the batch, and what counts as a loss spike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(default=50, ge=0, description="Updates between looks; 0: never (spikes stay on).")
    share: float = Field(
        default=0.5, gt=0, le=1, description="Share of the batch that a look takes; at 1 no noise scale."
    )
    spikes: SpikesConfig = Field(default_factory=SpikesConfig, description="The search for loss spikes.")


class Diagnostics(Observer):
    """Every `every` updates one look: the gradient of each term by itself, on the first windows of the batch.

    A look has a forward pass, features and random numbers of its own, in training mode, at the weights that
    the update starts from. It leaves `.grad`, buffers, modes and random states as they were, so the training
    goes on to the same bits. It costs about (1 + 2K) / 3 * share of a step for K terms.

    Parts are the model's children (vision, language, fusion, action). A frozen part has no gradient, so
    nothing is recorded for it. A term that the backward keeps from a part has norm 0 there. The shares are of
    sum_i lambda_i g_i; where the backward makes something else of the terms, there is no noise scale.
    """

    def __init__(
        self,
        config: DiagnosticsConfig,
        state: TrainState,
        parallel: Parallel,
        machine: Machine,
        *,
        seed: int,
        run: Path,
    ) -> None:
        self.config = config
        self.every = config.every if parallel.looks else 0
        if self.every != config.every:
            log.info("diagnostics.every is off: FSDP has no gradients of single terms to look at")
        self.model = state.model
        self.objective = state.objective
        self.backward = state.backward
        self.machine = machine
        self.seed = seed
        self.run = run
        self.parameters = list(state.parameters.values())
        self.noise = NoiseScale()
        self.spikes = SpikeDetector(config.spikes)
        self._numbers: dict[str, list[int]] = {}
        for number, name in enumerate(state.parameters):
            if part_of(name) not in ("model", "objective"):
                self._numbers.setdefault(part_of(name), []).append(number)
        self._found: dict[str, float] = {}
        self._before: dict[str, list[Tensor]] = {}

    def before_step(self, update: Update) -> None:
        self._watch(update.step + 1, update.batches, update.means)
        if self.every and (update.step + 1) % self.every == 0:
            self._look(update.step, update.batches, update.point.progress, update.counting)
            self._found["spikes"] = float(self.spikes.count)
            parts = self._learning().items()
            self._before = {part: [p.detach().clone() for p in own] for part, own in parts}

    def after_step(self, update: Update) -> None:
        """How far did each part go?"""
        for part, before in self._before.items():
            ratio = update_ratio(before, self._learning()[part])
            if ratio is not None:
                self._found[f"update_ratio/{part}"] = ratio
        self._before = {}

    def take(self) -> dict[str, float]:
        """What was found since the last call, by its name in the records; mostly nothing."""
        found = {f"diag/{name}": value for name, value in self._found.items() if math.isfinite(value)}
        self._found = {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, plain values."""
        return {"noise": self.noise.state_dict(), "spikes": self.spikes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`; one without a part of it leaves that part new."""
        if "noise" in state:
            self.noise.load_state_dict(state["noise"])
        if "spikes" in state:
            self.spikes.load_state_dict(state["spikes"])

    def _learning(self) -> dict[str, list[Tensor]]:
        """The parameters of each part that learns at present."""
        numbers = self._trainable()
        return {part: [self.parameters[n] for n in own] for part, own in numbers.items()}

    def _trainable(self) -> dict[str, list[int]]:
        """The same as numbers in `parameters`."""
        kept = {
            part: [n for n in own if self.parameters[n].requires_grad] for part, own in self._numbers.items()
        }
        return {part: own for part, own in kept.items() if own}

    def _look(self, step: int, batches: Sequence[Batch], progress: float, only: Collection[str]) -> None:
        size = len(batches[0].window)
        batch = batches[0].first(min(size, max(2, math.ceil(self.config.share * size))))
        with own_randomness(self.seed + step), self._buffers_kept():
            with self.machine.autocast():
                features = self.model(batch.observation)
                terms = self.objective(features, batch, self.model, progress, only)
            gradients = self.backward.routed(term_gradients(terms.values, self.parameters))
        lambdas = {name: float(value.detach()) for name, value in terms.lambdas.items()}
        self._found |= gradient_measures(gradients, lambdas, self._trainable())
        self._found |= feature_measures(features, batch.instruction_id)
        if self.backward.is_sum:
            self._found |= self._noise(gradients, lambdas, len(batch.window), batches)

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """A forward in training mode may move buffers (a batch norm's); afterwards they are as before."""
        kept = [
            (module, name, buffer, buffer.clone())
            for root in (self.model, self.objective)
            for module in root.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, saved in kept:
                    buffer.copy_(saved)
                    setattr(module, name, buffer)

    def _noise(
        self, gradients: Gradients, lambdas: Mapping[str, float], b: int, batches: Sequence[Batch]
    ) -> dict[str, float]:
        """The noise scale, over the parameters that both gradients reach."""
        ranks = current_ranks().count
        size, b = ranks * sum(len(batch.window) for batch in batches), ranks * b
        pairs = [
            (own, parameter.grad)
            for own, parameter in zip(weighted_sum(gradients, lambdas), self.parameters, strict=False)
            if own is not None and parameter.grad is not None
        ]
        if b >= size or not pairs:
            return {}
        small, large = (
            float(torch.nn.utils.get_total_norm([pair[side] for pair in pairs])) ** 2 for side in (0, 1)
        )
        return self.noise.add(small, large, b, size) if math.isfinite(small + large) else {}

    def _watch(self, number: int, batches: Sequence[Batch], values: Mapping[str, float]) -> None:
        """Looks for a loss spike; says, records and saves it."""
        levels = {term: level.mean for term, level in self.spikes.levels.items()}
        spikes = self.spikes.see(values)
        if not spikes:
            return
        self._found |= {f"spike/{term}": z for term, z in spikes.items()} | {
            "spikes": float(self.spikes.count)
        }
        folder, kept = self.run / SPIKES / f"step-{number:06d}", ""
        if self.config.spikes.keep:
            about = {
                "step": number,
                "terms": {
                    term: {"value": values[term], "mean": levels[term], "z": z} for term, z in spikes.items()
                },
            }
            weights = {"model": self.model.state_dict(), "objective": self.objective.state_dict()}
            self._save(folder, about, batches, weights)
            kept = f"; batch and weights are in {SPIKES}/{folder.name}"
        found = ", ".join(f"{t} {values[t]:.4g} (mean {levels[t]:.4g}, z {z:.1f})" for t, z in spikes.items())
        log.warning("step %d: loss spike: %s%s", number, found, kept)

    def _save(
        self,
        folder: Path,
        about: dict[str, Any],
        batches: Sequence[Batch],
        weights: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """The spike's batches and weights, those of all ranks, by the first one."""
        every, own = world(), gather(weights, keep=world().first)
        saved = gather_batches(every, batches)
        about["windows"] = [window for batch in saved for window in batch.window.tolist()]

        def write() -> None:
            save_step(folder, "spike.json", about, saved, own)
            keep_newest(folder.parent, self.config.spikes.keep)

        every.on_rank_zero(write)

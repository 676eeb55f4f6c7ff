"""The training loop: theta <- theta - alpha * d L_total / d theta, for every module in one step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from tutti.objectives.objective import Objective
from tutti.training import checkpoint as checkpoints
from tutti.training.backward import OneBackwardConfig
from tutti.training.backwards import BackwardConfig
from tutti.training.clock import Clock
from tutti.training.config import TrainingConfig
from tutti.training.diagnostics import Diagnostics
from tutti.training.ema import Ema, ema_decay
from tutti.training.feed import TrainingData
from tutti.training.first_step import show_first, warn_unmoved, warn_unreached
from tutti.training.gradients import compiled, shared_norms, term_gradients
from tutti.training.health import fail, non_finite
from tutti.training.interrupt import Interruptible
from tutti.training.machine import decide
from tutti.training.metrics import rate_metrics, term_metrics
from tutti.training.optimizer import part_of
from tutti.training.randomness import rng_state, seed_everything
from tutti.training.record import Meter, Recorder
from tutti.training.second_look import look_again
from tutti.training.snapshot import restore, snapshot
from tutti.training.strategy import EndToEndConfig, Moment, Strategy, StrategyConfig
from tutti.training.validation import term_values, validate
from tutti.types import Batch, Features, LossTerms, UserError

log = logging.getLogger("tutti.training")


class Trainer:
    """Moves model and objective through `config.steps` updates; run again, it continues where it stopped.

    `strategy` says which parts learn from which terms when, `backward` how the terms become one gradient.
    Everything it writes is under `run`: checkpoints/, records.jsonl, tensorboard/, first_batch.png,
    shapes.txt and, if it comes to that, failures/ and spikes/. `extra` are texts by file name that go into
    every checkpoint. `texts` gives the instructions of a batch, for its pictures. `progress` is called after
    each step with (step, steps, latest metrics).
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: nn.Module,
        objective: Objective,
        run: Path,
        *,
        strategy: StrategyConfig | None = None,
        backward: BackwardConfig | None = None,
        extra: dict[str, str] | None = None,
        texts: Callable[[Batch], list[str]] | None = None,
        progress: Callable[[int, int, dict[str, float]], None] | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.extra = extra or {}
        self.texts = texts
        self.progress = progress
        self.machine = decide(config.device, config.threads, config.precision)
        self.model = model.to(self.machine.device)
        self.objective = objective.to(self.machine.device)
        self._forward: Callable[..., Features] = compiled(model) if config.compile else self.model
        self.optimizer = config.optimizer.build(self.model, self.objective)
        self.parameters: dict[str, Parameter] = {
            f"{root}.{name}": parameter
            for root, module in (("model", self.model), ("objective", self.objective))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        warn_unmoved(self.parameters, self.optimizer)
        self.strategy_config = strategy or EndToEndConfig()
        self.strategy = Strategy(
            self.strategy_config.phases(),
            steps=config.steps,
            warmup=config.schedule.warmup,
            terms=self.objective.names,
        )
        self.backward_config = backward or OneBackwardConfig()
        self.backward = self.backward_config.build(self.parameters, self.objective.names)
        self.diagnostics = Diagnostics(
            config.diagnostics,
            self.model,
            self.objective,
            self.parameters,
            backward=self.backward,
            machine=self.machine,
            seed=config.seed,
            run=run,
        )
        averaged = {"ema": self.model, "objective_ema": self.objective} if config.ema != "off" else {}
        self.averages = {name: Ema(module, float(config.ema)) for name, module in averaged.items()}
        self.step = 0
        self.samples = 0
        self.recorded = 0
        self.latest: dict[str, float] = {}
        self.meter = Meter()
        self.clock = Clock()
        self._phase: int | None = None

    def fit(self, data: TrainingData) -> Path:
        """Train to the last step, from the newest checkpoint of this run if there is one.

        Gives the folder of the last checkpoint.

        Raises: NonFiniteError (a UserError) before the optimiser moves by a non-finite value; UserError if
        the checkpoint does not fit or the disk is full; KeyboardInterrupt after Ctrl-C, when it has saved.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.machine.threads)
        log.info("training on %s", "; ".join(self.machine.reasons))
        try:
            seed_everything(self.config.seed)
            restore(self, data)
            with Recorder(self.run, after_step=self.step) as recorder, Interruptible() as interrupt:
                self._loop(data, recorder, interrupt)
            return self._save(data)
        finally:
            torch.set_num_threads(threads)

    def rehearse(self, stream: Iterator[Batch], step: int) -> None:
        """One update as it is made at `step` (0-based), which no record keeps: to measure what it costs."""
        self.step = step
        self._update(stream, report=False)

    def _loop(self, data: TrainingData, recorder: Recorder, interrupt: Interruptible) -> None:
        config = self.config
        stream = iter(data.train)
        self.model.train()
        self.objective.train()
        while self.step < config.steps:
            with self.clock.step():
                self._update(stream, report=self.step == 0)
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                self._record(recorder)
            if found := self.diagnostics.take():
                recorder.write(self.step, "diagnostics", found)
            if config.validate_every and (last or self.step % config.validate_every == 0):
                self._validate(data, recorder)
            if config.checkpoint_every and not last and self.step % config.checkpoint_every == 0:
                self._save(data)
            if self.progress is not None:
                self.progress(self.step, config.steps, self.latest)
            if interrupt.requested:
                log.warning("interrupted after step %d; saved in %s", self.step, self._save(data))
                raise KeyboardInterrupt

    def _update(self, stream: Iterator[Batch], *, report: bool) -> None:
        """One step: batches in, terms, one backward pass each, look, clip, move, average."""
        config, clock = self.config, self.clock
        moment = self._enter(self.strategy.at(self.step))
        factor = config.schedule.factor(moment.step, moment.steps)
        self.optimizer.set_factor(factor, {**moment.phase.learning_rates})
        batches: list[Batch] = []
        values: list[dict[str, float]] = []
        random = rng_state() if self.objective.looks_again else {}
        for _ in range(config.accumulation):
            with clock.part("data"):
                batch = next(stream).to(self.machine.device, non_blocking=True)
                batches.append(batch)
            with clock.part("forward"), self.machine.autocast():
                features, terms = self._evaluate(batch, moment)
                values.append(self._collect(terms, batches))
            with clock.part("backward"):
                if len(batches) == 1 and self.objective.wants_gradients(self.step):
                    found = term_gradients(terms.values, list(self.parameters.values()))
                    self.objective.observe_gradients(shared_norms(self.backward.routed(found)))
                self.backward.add(terms, config.accumulation)
            if report and len(batches) == 1:
                show_first(self.run, batch, features, terms, self.texts)
        with clock.part("backward"):
            self.meter.add(self.backward.finish())
            norm = self._gradient_norm(batches)
        if report:
            warn_unreached(self.parameters, self.objective.names, self._counting(moment))
        with clock.part("diagnostics"):
            self.diagnostics.before(
                self.step, batches, _means(values), moment.progress, self._counting(moment)
            )
        with clock.part("optimizer"):
            self._clip(norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.objective.looks_again:
                again = look_again(lambda one: self._evaluate(one, moment)[1], batches, self.machine, random)
                self.objective.look_again(_means(values), _means(again))
            self.objective.after_step(_means(values))
            for average in self.averages.values():
                average.update()
        with clock.part("diagnostics"):
            self.diagnostics.after()
        self.step += 1
        self.samples += sum(len(batch.window) for batch in batches)

    def _enter(self, moment: Moment) -> Moment:
        """At the start of a phase: parts that it freezes take no part in the backward pass.

        The optimiser keeps their moments: it skips what has no gradient.
        """
        if moment.index != self._phase:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(part_of(name) not in moment.phase.frozen)
            if len(self.strategy.phases) > 1:
                log.info("phase '%s' from step %d on", moment.phase.name, self.step + 1)
            self._phase = moment.index
        return moment

    def _counting(self, moment: Moment) -> tuple[str, ...]:
        return moment.phase.counting(self.objective.names)

    def _evaluate(self, batch: Batch, moment: Moment) -> tuple[Features, LossTerms]:
        features = self._forward(batch.observation)
        return features, self.objective(features, batch, moment.progress, self._counting(moment))

    def _gradient_norm(self, batches: list[Batch]) -> Tensor:
        """The global norm of the gradient; a non-finite one stops the run."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if non_finite({"gradient": float(norm)}):
            raise self._failure("gradient", float(norm), batches)
        return norm

    def _clip(self, norm: Tensor) -> None:
        """Scale the gradient down to `clip_norm` if it is longer, and note its norm before."""
        size, limit = float(norm), self.config.clip_norm
        clipped = limit != "off" and size > limit
        if limit != "off" and clipped:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), limit, norm)
        self.meter.add(
            {"optim/grad_norm": size, "optim/grad_norm_max": size, "optim/clip_share": float(clipped)}
        )

    def _collect(self, terms: LossTerms, batches: list[Batch]) -> dict[str, float]:
        """Note every term, raw and weighted, and stop at a non-finite one. Gives the raw terms."""
        values, lambdas, metrics, total = term_values(terms)
        bad = non_finite({**values, "total": total})
        if bad:
            raise self._failure(bad[0], {**values, "total": total}[bad[0]], batches)
        self.meter.add(term_metrics(values, lambdas, metrics, total))
        return values

    def _record(self, recorder: Recorder) -> None:
        """Write the means since the last record, with the time shares."""
        moment = self.strategy.at(self.step - 1)
        factor = self.config.schedule.factor(moment.step, moment.steps)
        values = self.meter.take() | rate_metrics(self.optimizer, factor)
        values["data/samples"] = float(self.samples)
        if len(self.strategy.phases) > 1:
            values["strategy/phase"] = float(moment.index)
        if "ema" in self.averages:
            average = self.averages["ema"]
            values["optim/ema_decay"] = ema_decay(average.decay, average.updates - 1)
        values |= self.clock.take(self.samples - self.recorded)
        self.recorded = self.samples
        recorder.write(self.step, "train", values)
        self.latest |= values

    def _validate(self, data: TrainingData, recorder: Recorder) -> None:
        """Record every term on held-out episodes, with averaged weights and, if asked for, raw ones."""
        started = monotonic()
        moment = self.strategy.at(self.step - 1)
        share = (moment.step + 1) / moment.steps
        parts = (self.model, self.objective, data.validation, self.machine)
        seed, only = self.config.seed, self._counting(moment)
        values: dict[str, float] = {}
        if self.averages:
            with self.averages["ema"].applied(), self.averages["objective_ema"].applied():
                values |= validate(*parts, progress=share, seed=seed, only=only)
            if self.config.validate_raw:
                values |= validate(*parts, progress=share, seed=seed, only=only, prefix="valid_raw")
        else:
            values |= validate(*parts, progress=share, seed=seed, only=only)
        if values:
            recorder.write(
                self.step, "validation", values | {"time/validation_seconds": monotonic() - started}
            )
            self.latest |= values

    def _save(self, data: TrainingData) -> Path:
        return checkpoints.save(self.run, snapshot(self, data), keep=self.config.keep_checkpoints)

    def _failure(self, term: str, value: float, batches: list[Batch]) -> UserError:
        weights = {"model": self.model.state_dict(), "objective": self.objective.state_dict()}
        parameters = self.parameters if term == "gradient" else None
        return fail(
            self.run,
            term=term,
            step=self.step + 1,
            value=value,
            batches=batches,
            weights=weights,
            parameters=parameters,
        )


def _means(values: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each value over the micro-batches of a step."""
    return {name: sum(one[name] for one in values) / len(values) for name in values[0]}

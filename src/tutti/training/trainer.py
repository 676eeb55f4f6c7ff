"""The training loop: theta <- theta - alpha * d L_total / d theta, for every module in one step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import torch
from torch import nn

from tutti.distributed.ranks import MicroBatches, shared_batch
from tutti.distributed.sharded_tensors import total_norm
from tutti.distributed.world import world
from tutti.objectives.objective import Objective
from tutti.training.backward.one import OneBackwardConfig
from tutti.training.backward.term_gradients import Gradients, added, shared_norms, term_gradients
from tutti.training.backward.union import BackwardConfig
from tutti.training.checkpointing.fork import note_fork
from tutti.training.checkpointing.recovery import restore
from tutti.training.checkpointing.resume import RunSettings
from tutti.training.checkpointing.saver import Saver
from tutti.training.clock import Clock
from tutti.training.compilation import prepared
from tutti.training.config import TrainingConfig
from tutti.training.data_feed import TrainingData, fed, shared
from tutti.training.device import decide
from tutti.training.diagnostics.observer import Diagnostics
from tutti.training.faults.non_finite import NonFiniteError, non_finite
from tutti.training.faults.policy import FaultPolicy, KeptState
from tutti.training.faults.rollback import roll_back
from tutti.training.faults.trouble import failure
from tutti.training.first_step import show_first, warn_alone, warn_unmoved, warn_unreached
from tutti.training.metrics import rate_metrics, term_metrics
from tutti.training.optim.ema import Ema, ema_decay
from tutti.training.optim.optimizers import part_of, trainable
from tutti.training.parallel.ddp import Computation
from tutti.training.records import Meter, Recorder, recorder_of
from tutti.training.rng import rng_state, seed_everything
from tutti.training.second_look import look_again
from tutti.training.signals import Interruptible
from tutti.training.state import TrainState
from tutti.training.strategy import EndToEndConfig, Moment, Strategy, StrategyConfig
from tutti.training.validation import Reading, TermValues, fetch, reading, validated
from tutti.types import Batch, Features, LossTerms

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
        self.texts = texts
        self.progress = progress
        self.machine = decide(config.device, config.threads, config.precision)
        self.machine.settle(deterministic=config.deterministic)
        self.model = model.to(self.machine.device)
        self.objective = objective.to(self.machine.device)
        forward = prepared(self.model, self.objective, config)
        computation = Computation(model=self.model, objective=self.objective, forward=forward, world=world())
        self.parallel = config.parallel.build(computation, self.machine)
        self.optimizer = config.optimizer.build(self.model, self.objective)
        self.parameters = trainable(self.model, self.objective)
        warn_unmoved(self.parameters, self.optimizer)
        strategy, backward = strategy or EndToEndConfig(), backward or OneBackwardConfig()
        self.strategy = Strategy(
            strategy.phases(),
            steps=config.steps,
            warmup=config.schedule.warmup,
            terms=self.objective.names,
        )
        self.backward = backward.build(self.parameters, self.objective.names)
        self.parallel.start(self.backward)
        self.diagnostics = Diagnostics(
            self.parallel.looking(config.diagnostics),
            self.model,
            self.objective,
            self.parameters,
            backward=self.backward,
            machine=self.machine,
            seed=config.seed,
            run=run,
        )
        self.saver = Saver(run, config.checkpoints, self.parallel.world)
        self.policy = FaultPolicy(config.gradients, self.parameters)
        averaged = {"ema": self.model, "objective_ema": self.objective} if config.ema != "off" else {}
        self.averages = {name: Ema(module, float(config.ema)) for name, module in averaged.items()}
        self.meter = Meter()
        self.clock = Clock()
        self.state = TrainState(
            model=self.model,
            objective=self.objective,
            optimizer=self.optimizer,
            backward=self.backward,
            averages=self.averages,
            parts={"meter": self.meter, "diagnostics": self.diagnostics, "policy": self.policy},
        )
        self.counters = self.state.counters
        self.settings = RunSettings(
            run=run,
            training=config,
            strategy=strategy,
            backward=backward,
            machine=self.machine,
            texts=extra or {},
        )
        self._phase: int | None = None
        self._measured: Gradients = {}

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.counters.step

    def fit(self, data: TrainingData) -> Path:
        """Train to the last step, from the newest checkpoint of this run if there is one.

        Gives the folder of the last checkpoint.

        Raises: NonFiniteError (a UserError) before the optimiser moves by a non-finite value, unless the
        policy (`config.gradients`) is to skip it; UserError if it diverges and may not be rolled back, if
        the checkpoint does not fit, none is whole, or the disk is full; KeyboardInterrupt after Ctrl-C and
        Terminated (an exit with code 0) after SIGTERM, when it has saved.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.machine.threads)
        ranks, most = self.parallel.world.ranks, self.config.accumulation
        log.info(
            "training on %s; %s", "; ".join(self.machine.reasons), self.config.parallel.reason(ranks.count)
        )
        try:
            seed_everything(self.config.seed)
            self.state.parts["loader"] = data.train
            damaged = restore(self.state, self.settings, self.config.fork, self.parallel.world)
            recording = (self.run, self.step, len(self.policy.rollbacks)) if ranks.first else None
            with (
                shared_batch(ranks),
                self.saver,
                self.parallel.world.name_missing_ranks(),
                fed(shared(data, ranks, most), self.machine.device, most) as moved,
                recorder_of(recording) as recorder,
                Interruptible(relayed=ranks.count > 1) as interrupt,
            ):
                self.state.parts["loader"] = moved.train  # knows which batches are still on their way
                note_fork(self.config.fork, self.run, self.step, recorder)
                if damaged:
                    recorder.write(self.step, "event", {"fault/damaged_checkpoints": float(len(damaged))})
                self._loop(moved, recorder, interrupt)
                saved = self._save(wait=True)
                if asked := self.parallel.world.max(interrupt.asked):
                    interrupt.leave(self.step, saved, asked)
                return saved
        finally:
            torch.set_num_threads(threads)

    def rehearse(self, stream: Iterator[Batch], step: int) -> None:
        """One update as it is made at `step` (0-based), which no record keeps: to measure what it costs."""
        self.counters.step = step
        self._update(stream, report=False)

    def _loop(self, data: TrainingData, recorder: Recorder, interrupt: Interruptible) -> None:
        config = self.config
        stream = iter(data.train)
        self.model.train()
        self.objective.train()
        while self.step < config.steps:
            self.objective.before_step(self.step)
            with self.clock.step():
                self._update(stream, report=self.step == 0)
            self.counters.seconds += self.clock.last
            if self.policy.diverged:
                self.saver.wait()
                roll_back(self.state, self.settings, self.policy, recorder, self.parallel.world)
                continue
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                self._record(recorder)
            if found := self.diagnostics.take():
                recorder.write(self.step, "diagnostics", found)
            if (every := config.validation.every) and (last or self.step % every == 0):
                self._validate(data, recorder)
            if (every := config.checkpoints.every) and not last and self.step % every == 0:
                self._save()
            if self.progress is not None:
                self.progress(self.step, config.steps, self.counters.latest)
            if asked := self.parallel.world.max(max(interrupt.asked, self.saver.failed)):
                interrupt.leave(self.step, self._save(wait=True), asked)

    def _update(self, stream: Iterator[Batch], *, report: bool) -> None:
        """One step of the run: an update, unless a value is not finite and the policy leaves it out."""
        batches: list[Batch] = []
        kept = KeptState(self.backward, *((self.model, self.objective) if self.policy.may_skip else ()))
        try:
            self._attempt(stream, batches, report=report)
        except NonFiniteError as error:
            self.policy.skip(error)
            kept.put_back()
            self._leave_out()
        self.counters.step += 1
        self.counters.samples += sum(len(batch.window) for batch in batches) * self.parallel.world.ranks.count

    def _attempt(self, stream: Iterator[Batch], batches: list[Batch], *, report: bool) -> None:
        """An update: batches in, terms, one backward pass each, look, clip, move, average.

        The batches come first, since a mean is over the rows of all of them.
        """
        config, clock = self.config, self.clock
        moment = self._enter(self.strategy.at(self.step))
        accumulation = config.accumulation_at(self.step)
        self.optimizer.set_factor(self._factor(self.step), {**moment.phase.learning_rates})
        readings: list[Reading] = []
        random = rng_state() if self.objective.looks_again else {}
        with clock.part("data"):
            while len(batches) < accumulation:
                batches.append(next(stream).to(self.machine.device, non_blocking=True))
        update, calibrates = MicroBatches(batches), self.objective.wants_gradients(self.step)
        for number, batch in enumerate(batches):
            self.parallel.micro_batch(last=number == accumulation - 1)
            with clock.part("forward"), self.machine.autocast(), update.use(number):
                features, terms = self._evaluate(batch, moment)
                readings.append(reading(terms))
            with clock.part("backward"):
                if calibrates or not self.backward.is_sum:
                    self._check(fetch(readings)[0], batches)  # what looks at gradients is not shown a NaN
                if calibrates:
                    self._calibrate(terms, number, accumulation)
                self.backward.add(terms, accumulation)
            if report and number == 0 and self.parallel.world.first:
                show_first(self.run, batch, features, terms, self.texts)
        warn_alone(update)
        with clock.part("backward"):
            combined = self.backward.finish()
            self.parallel.finish()
            norm = total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
            found, (size,) = fetch(readings, norm)  # the one place where the host waits for the device
            values = self._collect(found, size, batches)
            self.policy.see(sum(total for *_, total in found) / len(found), moment.index)
            self.meter.add(combined)
        if report and self.parallel.looks:
            warn_unreached(self.parameters, self.objective.names, self._counting(moment))
        with clock.part("diagnostics"):
            self.diagnostics.before(
                self.step, batches, _means(values), moment.progress, self._counting(moment)
            )
        with clock.part("optimizer"):
            self.meter.add(self.policy.clipper.clip(norm, size))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.objective.looks_again:
                again = look_again(lambda one: self._evaluate(one, moment)[1], update, self.machine, random)
                self.objective.look_again(_means(values), _means(again))
            self.objective.after_step(_means(values))
            for average in self.averages.values():
                average.update()
        with clock.part("diagnostics"):
            self.diagnostics.after()

    def _calibrate(self, terms: LossTerms, number: int, accumulation: int) -> None:
        """Adds a micro-batch to the gradients that the balancing asked for, and shows them after the last."""
        self.parallel.single_terms("a balancing that observes gradients")
        parts = {name: value / accumulation for name, value in terms.values.items()}
        found = self.backward.routed(term_gradients(parts, list(self.parameters.values())))
        self._measured = added(self._measured, found) if number else found
        if number == accumulation - 1:
            self.objective.observe_gradients(shared_norms(self._measured))
            self._measured = {}

    def _leave_out(self) -> None:
        """Nothing moves, but the data have gone on as if something had."""
        self.parallel.drop()
        self.optimizer.zero_grad()

    def _factor(self, step: int) -> float:
        """What multiplies every base learning rate in update `step` (0-based)."""
        moment = self.strategy.at(step)
        return self.config.schedule.factor(moment.step, moment.steps) * self.config.batch_factor(step)

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
        return self.parallel.evaluate(batch, moment.progress, self._counting(moment))

    def _collect(self, found: list[TermValues], size: float, batches: list[Batch]) -> list[dict[str, float]]:
        """Stop at a non-finite term or gradient; note every term, raw and weighted. Gives the raw terms."""
        self._check(found, batches)
        if non_finite({"gradient": size}):
            raise failure(self, "gradient", size, batches)
        for values, lambdas, metrics, total in found:
            self.meter.add(term_metrics(values, lambdas, metrics, total))
        return [values for values, *_ in found]

    def _check(self, found: list[TermValues], batches: list[Batch]) -> None:
        """Stop at the first micro-batch with a non-finite term."""
        for number, (values, _, _, total) in enumerate(found, start=1):
            named = {**values, "total": total}
            if bad := non_finite(named):
                raise failure(self, bad[0], named[bad[0]], batches[:number])

    def _record(self, recorder: Recorder) -> None:
        """Write the means since the last record, with the time shares."""
        moment = self.strategy.at(self.step - 1)
        values = self.meter.take() | rate_metrics(self.optimizer, self._factor(self.step - 1))
        values |= self.policy.metrics()
        if self.config.batch_ramp != "off":
            values["optim/accumulation"] = float(self.config.accumulation_at(self.step - 1))
        values["data/samples"] = float(self.counters.samples)
        if len(self.strategy.phases) > 1:
            values["strategy/phase"] = float(moment.index)
        if "ema" in self.averages:
            average = self.averages["ema"]
            values["optim/ema_decay"] = ema_decay(average.decay, average.updates - 1)
        values["time/seconds"] = self.counters.seconds
        values |= self.clock.take(self.counters.samples - self.counters.samples_recorded)
        self.counters.samples_recorded = self.counters.samples
        recorder.write(self.step, "train", values)
        self.counters.latest |= values

    def _validate(self, data: TrainingData, recorder: Recorder) -> None:
        """Record every term on held-out episodes."""
        started = monotonic()
        if values := validated(self, data):
            recorder.write(
                self.step, "validation", values | {"time/validation_seconds": monotonic() - started}
            )
            self.counters.latest |= values

    def _save(self, *, wait: bool = False) -> Path:
        self.parallel.check()
        self.saver.wait()  # before the state is copied: what is being written may lie in the same memory
        checkpoint = self.state.checkpoint(self.saver.taken, self.settings.to_dict(), self.settings.texts)
        return self.saver.save(checkpoint, wait=wait)


def _means(values: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each value over the micro-batches of a step."""
    return {name: sum(one[name] for one in values) / len(values) for name in values[0]}

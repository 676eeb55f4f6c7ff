"""The training loop: theta <- theta - alpha * d L_total / d theta, for every module in one step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic

from torch import nn

from tutti.objectives.objective import Objective
from tutti.trackers import LoggerConfig, TensorBoardConfig
from tutti.training.backward import BackwardConfig, OneBackwardConfig
from tutti.training.checkpointing import Judge, Playing, RunSettings, Saver, restore
from tutti.training.config import TrainingConfig
from tutti.training.data_feed import BatchStream, OfSources, Texts, TrainingData, feed
from tutti.training.diagnostics import DiagnosticsObserver, FirstBatch
from tutti.training.diagnostics.calibration import GradientCalibration
from tutti.training.faults import FaultPolicy, NonFiniteGuard, roll_back
from tutti.training.parallel import LossModule
from tutti.training.records import Meter, MetricsWriter, StepTimer
from tutti.training.signals import Interruptible
from tutti.training.state import TrainState
from tutti.training.strategy import EndToEndConfig, Strategy, StrategyConfig
from tutti.training.update import Observer, Reevaluation, Update, read_scalars
from tutti.training.validation import validate

log = logging.getLogger("tutti.training")


class Trainer:
    """Moves model and objective through `config.steps` updates; run again, it continues where it stopped.

    `strategy` says which parts learn from which terms when, `backward` how the terms become one gradient.
    Everything it writes is under `run`: checkpoints/, records.jsonl, first_batch.png, shapes.txt and, if it
    comes to that, failures/ and spikes/. `loggers` are told its records. `files` are texts by file name that
    go into every checkpoint. `texts` gives the instructions of a batch. `progress` is called after each step
    with (step, steps, latest metrics). `judge` plays the checkpoints of `config.evaluate_every`.
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
        files: dict[str, str] | None = None,
        texts: Texts | None = None,
        loggers: Sequence[LoggerConfig] = (TensorBoardConfig(),),
        progress: Callable[[int, int, dict[str, float]], None] | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.config, self.run, self.progress = config, run, progress
        strategy, backward = strategy or EndToEndConfig(), backward or OneBackwardConfig()
        self.machine = config.machine()
        self.machine.set_determinism(deterministic=config.deterministic)
        self.model, self.objective = model.to(self.machine.device), objective.to(self.machine.device)
        joint = LossModule(self.model, self.objective, **config.of_blocks(self.machine))
        # Before the optimiser, which must hold the parameters that FSDP puts into the place of the model's.
        self.parallel = config.parallel.build(joint, self.machine)
        self.state = TrainState.build(
            self.model, self.objective, optimizer=config.optimizer, backward=backward, ema=config.ema
        )
        state = self.state
        self.parameters, self.optimizer = state.parameters, state.optimizer
        self.optimizer.ahead = self.machine.device.type == "cuda"
        self.backward, self.averages, self.counters = state.backward, state.averages, state.counters
        self.parallel.start(self.backward)
        self.strategy = Strategy(
            strategy.phases(), steps=config.steps, warmup=config.schedule.warmup, terms=objective.names
        )
        sections = {"training": config, "strategy": strategy, "backward": backward}
        self.settings = RunSettings(
            run=run, machine=self.machine, texts=files or {}, loggers=loggers, **sections
        )
        every, world = config.evaluate_every, self.parallel.world
        self.saver = Saver(run, config.checkpoints, world, every)
        self.playing = Playing(judge=judge, every=every, last=config.steps, world=world, saver=self.saver)
        self.fault_policy = FaultPolicy(config.gradients, self.parameters)
        self.meter, self.timer = Meter(), StepTimer()
        self.observers = self._build_observers(texts)
        shown, calibration = self.diagnostics, self.calibration
        state.parts |= {"meter": self.meter, "diagnostics": shown, "fault_policy": self.fault_policy}
        state.tensor_parts |= {"update_shares": shown.update_shares, "calibration": calibration}

    def _build_observers(self, texts: Texts | None) -> tuple[Observer, ...]:
        """What watches an update, in the order of the calls: the guard first, so that no other sees a NaN."""
        config, run, state, parallel, machine = self.config, self.run, self.state, self.parallel, self.machine
        self.guard = NonFiniteGuard(run, state, self.fault_policy, parallel, machine)
        self.first_batch = FirstBatch(run, state, parallel, texts)
        self.diagnostics = DiagnosticsObserver(
            config.diagnostics, state, parallel, machine, seed=config.seed, run=run
        )
        self.calibration = GradientCalibration(
            state, parallel, machine, self.strategy, warmup=config.schedule.warmup, seed=config.seed
        )
        reevaluation = Reevaluation(self.objective, parallel.evaluate, machine)
        return (self.guard, self.calibration, self.first_batch, reevaluation, self.diagnostics)

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.counters.step

    def fit(self, data: TrainingData) -> Path:
        """Train to the last step, from the newest checkpoint if there is one. Gives the last one's folder.

        Raises: NonFiniteError (a UserError) before the optimiser moves by a non-finite value, unless
        `config.gradients` is to skip it; UserError if it diverges and may not be rolled back, no checkpoint
        fits or is whole, or the disk is full; after it has saved KeyboardInterrupt (Ctrl-C) or Terminated.
        """
        world = self.parallel.world
        log.info("training on %s; %s", "; ".join(self.machine.reasons), self.config.parallel.reason)
        with self.machine.computing(self.config.seed):
            self.state.parts["loader"] = data.train
            self.sources = OfSources(data)
            event = restore(self.state, self.settings, self.config.fork, world)
            with (
                self.saver,
                world.name_missing_ranks(),
                feed(data, world.ranks, self.machine.device, self.config.accumulation) as fed,
                self.settings.records(self.step, self.fault_policy.rollbacks, world) as writer,
                Interruptible(relayed=world.ranks.count > 1) as interrupt,
            ):
                # It knows which batches are still on their way to the device, and does not count them.
                self.state.parts["loader"] = fed.train
                if event:
                    writer.write(self.step, "event", event)
                self.first_batch.enabled = True
                self._loop(fed, writer, interrupt)
                saved = self.save(wait=True)
                if number := world.max(interrupt.received):
                    interrupt.leave(self.step, saved, number)
                return saved

    def _loop(self, data: TrainingData, writer: MetricsWriter, interrupt: Interruptible) -> None:
        config, world, stream = self.config, self.parallel.world, iter(data.train)
        self.model.train()
        self.objective.train()
        if self.playing.missing(self.step) and self._play(writer, interrupt):
            return  # interrupted anew: `fit` leaves at this step, the only one at which it is missing
        while self.step < config.steps:
            self.update(stream)
            if self.fault_policy.diverged:
                self.saver.wait()  # the newest checkpoint may be the one to go back to
                roll_back(self.state, self.settings, self.fault_policy, writer, world)
                continue
            last = self.step == config.steps
            if last or self.step % config.log_every == 0:
                self._record(writer)
            if found := self.calibration.take():
                writer.write(self.step, "event", found)
            if measures := self.calibration.take_shares() | self.diagnostics.take():
                writer.write(self.step, "diagnostics", measures)
            if (every := config.validation.every) and (last or self.step % every == 0):
                self._validate(data, writer)
            if self.playing.due(self.step):
                self._play(writer, interrupt)
            elif (every := config.checkpoints.every) and not last and self.step % every == 0:
                self.save()
            if self.progress is not None:
                self.progress(self.step, config.steps, self.counters.latest)
            # One agreement a step: what one rank was told, or could not write, ends the training on all.
            if number := world.max(max(interrupt.received, self.saver.failed)):
                interrupt.leave(self.step, self.save(wait=True), number)

    def rehearse(self, stream: BatchStream, step: int) -> None:
        """One update as it is made at `step` (0-based), which no record keeps: to measure what it costs."""
        follows, self.counters.step = step == self.step, step
        self.update(stream, follows=follows)

    def update(self, stream: BatchStream, *, follows: bool = True) -> None:
        """One step of the run on the next batches: an update, unless a value is not finite and the policy
        leaves it out. `follows`: the steps before it were made, by which the balancing sets its lambdas."""
        self.timer.start()
        if follows:
            self.objective.hooks.before_step(self.step)
        point = self.strategy.enter(self.step, self.parameters)
        update = Update(
            step=self.step, point=point, active_terms=point.phase.active_terms(self.objective.names)
        )
        with self.guard.skipping():
            self._update(update, stream)
        # Also where the update is left out: its batches are used up, and schedules go on with the data.
        self.counters.step += 1
        self.counters.samples += sum(len(b.window) for b in update.batches) * self.parallel.world.ranks.count
        self.counters.seconds += self.timer.stop()

    def _update(self, update: Update, stream: BatchStream) -> None:
        """theta <- theta - alpha * d / d theta sum_i lambda_i L_i, on batches that count as one."""
        lap, num_batches = self.timer.lap, self.config.accumulation_at(update.step)
        self.optimizer.set_factor(self._factor(update), {**update.point.phase.learning_rates})
        for observer in self.observers:
            observer.before_batches(update)
        # All batches first: a mean counts the rows of all of them, before the first forward pass.
        while len(update.batches) < num_batches:
            update.batches.append(next(stream).to(self.machine.device, non_blocking=True))
        lap("data")
        for observer in self.observers:
            observer.after_batches(update)
        lap("diagnostics")
        for number, batch in enumerate(update.batches):
            self.parallel.micro_batch(last=number == num_batches - 1)
            with self.machine.autocast(), update.micro_batches.use(number):
                features, terms = self.parallel.evaluate(batch, update.point.progress, update.active_terms)
                update.scalars.append(read_scalars(terms, batch))
            lap("forward")
            for observer in self.observers:
                observer.after_forward(update, features, terms)
            # After the observers: a backward pass frees the graph that they may still walk.
            self.backward.add(terms, num_batches)
            lap("backward")
        combined = self.backward.finish()
        self.parallel.finish()
        # The one place where the host waits for the device; all numbers of the update come in one transfer.
        update.read(self.parameters.values(), self.objective, meanwhile=self.optimizer.prepare)
        lap("backward")
        for observer in self.observers:
            observer.before_step(update)
        lap("diagnostics")
        clipped = self.fault_policy.clipper.clip(update.grad_norm, update.size)
        for values in (*update.to_records(), combined, clipped):
            self.meter.add(values)
        update.clip = dict(self.fault_policy.clipper.factors)
        for observer in self.observers:
            observer.after_clipping(update)
        if self.fault_policy.clipper.clipped:
            self.optimizer.discard()
        self.optimizer.step()
        self.optimizer.zero_grad()
        lap("optimizer")
        for observer in self.observers:
            observer.after_step(update)
        lap("diagnostics")
        # Targets, balancing and averages follow the weights as they are after the step.
        self.objective.update_targets(self.model)
        self.objective.hooks.after_step(update.means)
        for average in self.averages.values():
            average.update()
        lap("optimizer")

    def _factor(self, update: Update) -> float:
        """What multiplies every base learning rate."""
        point = update.point
        return self.config.schedule.factor(point.step, point.steps) * self.config.batch_factor(update.step)

    def _record(self, writer: MetricsWriter) -> None:
        """Write the means since the last record, with the time shares."""
        counters = self.counters
        values = {k: v for k, v in self.meter.take().items() if v < 1 or not k.startswith("data/labelled/")}
        values |= self.optimizer.metrics() | self.fault_policy.metrics()
        if self.config.batch_ramp != "off":
            values["optim/accumulation"] = float(self.config.accumulation_at(self.step - 1))
        if len(self.strategy.phases) > 1:
            values["strategy/phase"] = float(self.strategy.at(self.step - 1).index)
        if "ema" in self.averages:
            values["optim/ema_decay"] = self.averages["ema"].last_decay
        values |= {"data/samples": float(counters.samples), "time/seconds": counters.seconds}
        values |= self.timer.take(counters.samples - counters.samples_recorded)
        counters.samples_recorded = counters.samples
        values = self.sources.named(values, self.state.parts["loader"].state_dict())
        writer.write(self.step, "train", values)
        counters.latest |= values

    def validate(self, data: TrainingData) -> dict[str, float]:
        """Every term on held-out episodes with the weights that are served, as valid/..., and, if the config
        says so and these are an average, with those in training as valid_raw/..."""
        point = self.strategy.at(self.step - 1)
        evaluate = partial(
            validate,
            self.parallel,
            self.machine,
            data.validation,
            progress=(point.step + 1) / point.steps,
            seed=self.config.seed,
            only=point.phase.active_terms(self.objective.names),
        )
        with self.state.serving() as averaged:
            values = evaluate()
        return values | evaluate(prefix="valid_raw") if averaged and self.config.validation.raw else values

    def _validate(self, data: TrainingData, writer: MetricsWriter) -> None:
        started = monotonic()
        if values := self.validate(data):
            values = self.sources.named(values) | {"time/validation_seconds": monotonic() - started}
            writer.write(self.step, "validation", values)
            self.counters.latest |= values

    def _play(self, writer: MetricsWriter, interrupt: Interruptible) -> bool:
        self.counters.latest |= self.playing(self.save(wait=True), self.step, writer, interrupt)
        return self.parallel.world.max(interrupt.received) > 0

    def save(self, *, wait: bool = False) -> Path:
        """Write a checkpoint, or begin to unless it is to `wait`. Gives the folder that it will have."""
        self.parallel.check()
        self.saver.wait()  # before the state is copied: what is being written may lie in the same memory
        checkpoint = self.state.checkpoint(self.saver.collect, self.settings.to_dict(), self.settings.texts)
        return self.saver.save(checkpoint, wait=wait)

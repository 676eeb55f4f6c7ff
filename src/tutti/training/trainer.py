"""The training loop: theta <- theta - alpha * d L_total / d theta, for every module in one step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from tutti.training import checkpoint as checkpoints
from tutti.training.checkpoint import Checkpoint
from tutti.training.clock import Clock
from tutti.training.config import TrainingConfig
from tutti.training.ema import Ema, ema_decay
from tutti.training.first_batch import save_pictures, shapes_tree
from tutti.training.health import fail, gradient_warnings, non_finite
from tutti.training.interrupt import Interruptible
from tutti.training.machine import decide
from tutti.training.randomness import load_rng_state, rng_state, seed_everything
from tutti.training.record import Meter, Recorder
from tutti.training.resume import check_settings
from tutti.training.validation import term_values, validate
from tutti.types import Batch, Features, LossTerms, UserError

log = logging.getLogger("tutti.training")


@runtime_checkable
class TrainLoader(Protocol):
    """An endless stream of batches that knows its place."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any], /) -> None: ...


@runtime_checkable
class TrainingData(Protocol):
    """What `Trainer.fit` needs of the data."""

    @property
    def train(self) -> TrainLoader: ...
    @property
    def validation(self) -> Iterable[Batch]: ...


class Trainer:
    """Moves model and objective through `config.steps` updates; run again, it continues where it stopped.

    Everything it writes is under `run`: checkpoints/, records.jsonl, tensorboard/, first_batch.png,
    shapes.txt and, if it comes to that, failures/. `extra` are texts by file name that go into every
    checkpoint. `texts` gives the instructions of a batch, for its pictures. `progress` is called after each
    step with (step, steps, latest metrics).
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: nn.Module,
        objective: nn.Module,
        run: Path,
        *,
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
        self._forward: Callable[..., Features] = torch.compile(model) if config.compile else self.model
        self.optimizer = config.optimizer.build(self.model, self.objective)
        self.parameters: dict[str, Parameter] = {
            f"{root}.{name}": parameter
            for root, module in (("model", self.model), ("objective", self.objective))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self._check_owners()
        averaged = {"ema": self.model, "objective_ema": self.objective} if config.ema != "off" else {}
        self.averages = {name: Ema(module, float(config.ema)) for name, module in averaged.items()}
        self.step = 0
        self.samples = 0
        self.recorded = 0
        self.latest: dict[str, float] = {}
        self.meter = Meter()
        self.clock = Clock()

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
            self._resume(data)
            with Recorder(self.run, after_step=self.step) as recorder, Interruptible() as interrupt:
                self._loop(data, recorder, interrupt)
            return self._save(data)
        finally:
            torch.set_num_threads(threads)

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
        """One step: batches in, terms, one backward pass each, clip, move, average."""
        config, clock = self.config, self.clock
        self.optimizer.set_factor(config.schedule.factor(self.step, config.steps))
        batches: list[Batch] = []
        for _ in range(config.accumulation):
            with clock.part("data"):
                batch = next(stream).to(self.machine.device, non_blocking=True)
                batches.append(batch)
            with clock.part("forward"), self.machine.autocast():
                features = self._forward(batch.observation)
                terms: LossTerms = self.objective(features, batch, self.step / config.steps)
                self._collect(terms, batches)
            with clock.part("backward"):
                (terms.total / config.accumulation).backward()
            if report and len(batches) == 1:
                self._show_first(batch, features, terms)
        with clock.part("backward"):
            norm = self._gradient_norm(batches)
        if report:
            self._warn_unreached()
        with clock.part("optimizer"):
            self._clip(norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            for average in self.averages.values():
                average.update()
        self.step += 1
        self.samples += sum(len(batch.window) for batch in batches)

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

    def _collect(self, terms: LossTerms, batches: list[Batch]) -> None:
        """Note every term, raw and weighted, and stop at a non-finite one."""
        values, lambdas, metrics, total = term_values(terms)
        bad = non_finite({**values, "total": total})
        if bad:
            raise self._failure(bad[0], {**values, "total": total}[bad[0]], batches)
        self.meter.add(
            {"loss/total": total}
            | {f"loss/{name}/raw": value for name, value in values.items()}
            | {f"loss/{name}/weighted": lambdas[name] * value for name, value in values.items()}
            | {f"lambda/{name}": value for name, value in lambdas.items()}
            | {f"metric/{name}": value for name, value in metrics.items()}
        )

    def _record(self, recorder: Recorder) -> None:
        """Write the means since the last record, with the time shares."""
        rates = self.optimizer.learning_rates
        main = rates.get("muon", rates.get("adamw", 0.0))
        values = self.meter.take() | {
            "optim/lr": main,
            "optim/lr_factor": self.config.schedule.factor(self.step - 1, self.config.steps),
            "data/samples": float(self.samples),
        }
        if "muon" in rates and "adamw" in rates:
            values["optim/lr_adamw"] = rates["adamw"]
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
        share = self.step / self.config.steps
        parts = (self.model, self.objective, data.validation, self.machine)
        seed = self.config.seed
        values: dict[str, float] = {}
        if self.averages:
            with self.averages["ema"].applied(), self.averages["objective_ema"].applied():
                values |= validate(*parts, progress=share, seed=seed)
            if self.config.validate_raw:
                values |= validate(*parts, progress=share, seed=seed, prefix="valid_raw")
        else:
            values |= validate(*parts, progress=share, seed=seed)
        if values:
            recorder.write(
                self.step, "validation", values | {"time/validation_seconds": monotonic() - started}
            )
            self.latest |= values

    def _save(self, data: TrainingData) -> Path:
        tensors: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            **{name: average.shadow for name, average in self.averages.items()},
        }
        state = {
            "loader": data.train.state(),
            "samples": self.samples,
            "seconds": self.clock.seconds,
            "ema_updates": {name: average.updates for name, average in self.averages.items()},
            "meter": self.meter.state(),
            "metrics": self.latest,
            "training": self.config.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
        }
        saved = Checkpoint(
            step=self.step,
            tensors=tensors,
            optimizer=self.optimizer.state_dict(),
            rng=rng_state(),
            state=state,
            extra=self.extra,
        )
        folder = checkpoints.save(self.run, saved, keep=self.config.keep_checkpoints)
        return folder

    def _resume(self, data: TrainingData) -> None:
        """Continue from the newest checkpoint of this run, if there is one."""
        saved = checkpoints.load_latest(self.run)
        if saved is None:
            return
        check_settings(saved, self.config, self.machine, self.run)
        modules = {"model": self.model, "objective": self.objective}
        try:
            for name, module in modules.items():
                module.load_state_dict(saved.tensors.get(name, {}))
            for name, average in self.averages.items():
                average.load(saved.tensors.get(name, {}), saved.state["ema_updates"][name])
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"The checkpoint in {self.run} does not fit this model or objective: {str(error)[:600]}\n"
                "Resume with the same model and objective, or give the new run another name."
            ) from error
        self.optimizer.load_state_dict(saved.optimizer)
        load_rng_state(saved.rng)
        data.train.load_state(saved.state["loader"])
        self.step = saved.step
        self.samples = self.recorded = saved.state["samples"]
        self.clock.seconds, self.latest = saved.state["seconds"], saved.state["metrics"]
        self.meter.load_state(saved.state["meter"])
        log.info("resuming after step %d of %d", self.step, self.config.steps)

    def _warn_unreached(self) -> None:
        for warning in gradient_warnings(self.parameters):
            log.warning(warning)

    def _check_owners(self) -> None:
        owned = {id(parameter) for parameter in self.optimizer.parameters}
        orphans = [name for name, parameter in self.parameters.items() if id(parameter) not in owned]
        for name in orphans:
            log.warning("parameter %s is moved by no optimiser", name)

    def _show_first(self, batch: Batch, features: Features, terms: LossTerms) -> None:
        """Pictures and shapes of the first batch, once a run."""
        tree = shapes_tree({"batch": batch, "features": features, "terms": terms})
        self.run.mkdir(parents=True, exist_ok=True)
        checkpoints.write_text_atomically(self.run / "shapes.txt", tree)
        try:
            save_pictures(batch, self.run / "first_batch.png", self.texts(batch) if self.texts else None)
        except OSError as error:
            raise checkpoints.disk_error(error, self.run / "first_batch.png") from error

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

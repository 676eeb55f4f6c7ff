"""A step of a run made once more, to the same bits, with everything about it in sight.

`replay` makes a training's own step again from the newest checkpoint before it; `replay_saved` (culprits.py)
takes a batch and weights that a failure or a loss spike has saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tutti.config.run_config import RunConfig
from tutti.debug.compare_runs import Comparison, untimed
from tutti.plugin import Trust
from tutti.runs.build import build_parts, training_threads
from tutti.runs.folder import RunFolder
from tutti.runs.terminal import print_line, progress_bar
from tutti.storage.checkpoint import checkpoints, step_of
from tutti.training.backward.term_gradients import term_gradients
from tutti.training.faults.non_finite import NonFiniteError
from tutti.training.optim.optimizers import part_of
from tutti.training.records import read_records
from tutti.training.trainer import Trainer
from tutti.types import Batch, Features, LossTerms, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a debugger sees: forward pass done, its graph alive, nothing moved yet.

    `gradients[term][parameter]` is d L_i / d theta of the raw term; a parameter that it does not reach, or
    may not move, is absent. `batch` is the last micro-batch of the step, `terms` and `gradients` are of it.
    """

    step: int
    batch: Batch
    features: Features
    terms: LossTerms
    gradients: Mapping[str, Mapping[str, Tensor]]
    trainer: Trainer

    @property
    def names(self) -> dict[str, Any]:
        """The names that a debugger finds."""
        own = {name: getattr(self, name) for name in ("step", "batch", "features", "terms", "gradients")}
        trainer = self.trainer
        return own | {"model": trainer.model, "objective": trainer.objective, "trainer": trainer}


Debugger = Callable[[Scope], None]


def no_debugger(scope: Scope) -> None:
    """Looks at nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One step, made again.

    `start` is the step of the checkpoint it began from (0: none). `batches` are its micro-batches with their
    `texts`; `terms[term]` is (raw, lambda) as means over them, `metrics` likewise. `norms[part][term]` is
    |lambda_i g_i| of the whole step, `gradient[part]` the norm of what the optimiser got, after clipping; it
    is empty if the step failed. `recorded` and `replayed` are the record of this step as it is in the run and
    as it came out now, without times: empty where none was written; `differences` compares them bit by bit.
    `failure` is what stopped the step, empty if nothing did.
    """

    step: int
    start: int
    batches: tuple[Batch, ...]
    texts: tuple[tuple[str, ...], ...]
    terms: Mapping[str, tuple[float, float]]
    metrics: Mapping[str, float]
    norms: Mapping[str, Mapping[str, float]]
    gradient: Mapping[str, float]
    recorded: Mapping[str, Any]
    replayed: Mapping[str, Any]
    differences: Comparison
    failure: str


class _Reached(Exception):
    """The step is done; the training need not go on."""


@dataclass(slots=True)
class _Watch:
    """Collects what the objective and the optimisers of a trainer see in one step."""

    trainer: Trainer
    step: int
    debugger: Debugger
    batches: list[Batch] = field(default_factory=list)
    readings: list[LossTerms] = field(default_factory=list)
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    gradient: dict[str, float] = field(default_factory=dict)

    def forward(self, module: Any, given: tuple[Any, ...], terms: LossTerms) -> None:
        """After the objective's forward pass: the gradient of each term, on the graph that training uses."""
        micro_batches = self.trainer.config.accumulation_at(self.step - 1)
        if self.trainer.step != self.step - 1 or len(self.batches) == micro_batches:
            return  # another step, or the diagnostics' own look at this one
        features, batch = given[0], given[1]
        self.batches.append(batch)
        self.readings.append(terms)
        names = list(self.trainer.parameters)
        found = term_gradients(terms.values, list(self.trainer.parameters.values()))
        found = self.trainer.backward.routed(found)
        gradients = {
            term: {name: g for name, g in zip(names, own, strict=True) if g is not None}
            for term, own in found.items()
        }
        for term, own in gradients.items():
            sums = self.sums.setdefault(term, {})
            factor = terms.lambdas[term].detach() / micro_batches
            for name, value in own.items():
                sums[name] = sums[name] + factor * value if name in sums else factor * value
        if len(self.batches) == micro_batches:
            trainer = self.trainer
            self.debugger(
                Scope(
                    step=self.step,
                    batch=batch,
                    features=features,
                    terms=terms,
                    gradients=gradients,
                    trainer=trainer,
                )
            )

    def before_optimizer(self, *_: Any) -> None:
        """Before the first optimiser moves anything: the norm of the whole gradient by part."""
        if self.trainer.step == self.step - 1 and not self.gradient:
            own = {n: p.grad for n, p in self.trainer.parameters.items() if p.grad is not None}
            self.gradient |= norms_by_part(own)

    def progress(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Ends the training after the step."""
        if step >= self.step:
            raise _Reached

    @property
    def terms(self) -> dict[str, tuple[float, float]]:
        """Raw value and lambda of each term, means over the micro-batches."""
        return {
            name: (
                _mean([terms.values[name] for terms in self.readings]),
                _mean([terms.lambdas[name] for terms in self.readings]),
            )
            for name in self.readings[0].values
        }

    @property
    def metrics(self) -> dict[str, float]:
        """What the terms report, means over the micro-batches."""
        return {
            name: _mean([terms.metrics[name] for terms in self.readings]) for name in self.readings[0].metrics
        }

    @property
    def norms(self) -> dict[str, dict[str, float]]:
        """|lambda_i g_i| by part and term."""
        by_term = {term: norms_by_part(own) for term, own in self.sums.items()}
        parts = dict.fromkeys(part for own in by_term.values() for part in own)
        return {part: {term: own.get(part, 0.0) for term, own in by_term.items()} for part in parts}


def norms_by_part(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of the gradients of each part of the model, and of the objective's heads."""
    by_part: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        by_part.setdefault(part_of(name), []).append(gradient)
    return {part: float(torch.nn.utils.get_total_norm(own)) for part, own in by_part.items()}


def _mean(values: list[Tensor]) -> float:
    return sum(float(value.detach()) for value in values) / len(values)


def replay(
    folder: Path | str, step: int, debugger: Debugger = no_debugger, *, trust_code: Trust = False
) -> Replay:
    """Makes update number `step` (from 1) of the run in `folder` again, exactly as its training made it.

    It goes on from the newest kept checkpoint before the step, or, where there is none, from the start, in a
    temporary folder: nothing of the run changes. `debugger` is called when the step's last forward pass is
    done and nothing has moved yet. `trust_code`: classes of the user's own that the run names are imported.

    Raises: UserError if the run has no training, or no such step.
    """
    run = RunFolder(Path(folder), new=False, trust_code=trust_code)
    config = run.config()
    if not 1 <= step <= config.training.steps:
        raise UserError(f"--step is {step}; the run has steps 1 to {config.training.steps}.")
    linked = [path for path in checkpoints(run.path) if step_of(path) < step]
    _announce(run.path, step, linked)
    with (
        training_threads(config),
        TemporaryDirectory(prefix="tutti-replay-") as name,
        progress_bar("replaying") as bar,
    ):
        scratch = Path(name)
        (scratch / "checkpoints").mkdir()
        for path in linked:
            (scratch / "checkpoints" / path.name).symlink_to(path.resolve())
        data, model, objective = build_parts(config, run.path)
        trainer = Trainer(
            quiet(config),
            model,
            objective,
            scratch,
            strategy=config.strategy,
            backward=config.backward,
        )
        with _watching(trainer, step, debugger) as watch:
            first: list[int] = []

            def progress(now: int, steps: int, metrics: dict[str, float]) -> None:
                first.append(now)
                bar(now - first[0] + 1, step - first[0] + 1)
                watch.progress(now, steps, metrics)

            trainer.progress = progress
            failure = ""
            try:
                trainer.fit(data)
            except _Reached:
                pass
            except NonFiniteError as error:
                failure = str(error).splitlines()[0]
            finally:
                data.train.close()
            if not watch.batches:
                raise UserError(f"{run.path}: the replay ended before step {step}. {failure}".rstrip())
        recorded, replayed, compared = _compare(run.path, scratch, step)
        return Replay(
            step=step,
            start=first[0] - 1 if first else trainer.step,
            batches=tuple(watch.batches),
            texts=tuple(tuple(data.texts(batch)) for batch in watch.batches),
            terms=watch.terms,
            metrics=watch.metrics,
            norms=watch.norms,
            gradient=dict(watch.gradient),
            recorded=recorded,
            replayed=replayed,
            differences=compared,
            failure=failure,
        )


def quiet(config: RunConfig) -> Any:
    """The training section without validations and checkpoints, on which no step depends; the latter stay
    where a rollback goes back to them."""
    values = config.training.model_dump(mode="json")
    values["validation"]["every"] = 0
    values["checkpoints"] |= {"keep_every": 0, "keep_best": "off"}
    if config.training.gradients.rollback == "off":
        values["checkpoints"]["every"] = 0
    return config.training.model_validate(values)


@contextmanager
def _watching(trainer: Trainer, step: int, debugger: Debugger) -> Iterator[_Watch]:
    watch = _Watch(trainer, step, debugger)
    handles = [trainer.objective.register_forward_hook(watch.forward)]
    handles += [
        optimizer.register_step_pre_hook(watch.before_optimizer)
        for optimizer in trainer.optimizer.optimizers.values()
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _announce(run: Path, step: int, linked: list[Path]) -> None:
    """Says from where, and by the run's own records about how long it takes."""
    start = step_of(linked[-1]) if linked else 0
    times = [(r["time/seconds"], r["step"]) for r in read_records(run) if "time/seconds" in r]
    about = f", about {(step - start) * times[-1][0] / times[-1][1]:.0f} s by its records" if times else ""
    where = f"from {linked[-1].name}" if linked else "from the start, as no checkpoint before it is kept"
    print_line(f"step {step}: replayed {where}: {step - start} updates{about}")
    kept = [step_of(path) for path in checkpoints(run)]
    if not linked and kept:
        print_line(
            f"Steps {kept[0] + 1} and later begin at a kept checkpoint (of {', '.join(map(str, kept))}); "
            "training.checkpoints.keep_every keeps more of them."
        )


def _compare(run: Path, scratch: Path, step: int) -> tuple[dict[str, Any], dict[str, Any], Comparison]:
    """The train record of the step in both folders, and what differs."""
    found = [
        next((untimed(r) for r in read_records(path) if (r["step"], r["kind"]) == (step, "train")), {})
        for path in (run, scratch)
    ]
    compared = Comparison()
    if all(found):
        compared.add(f"record of step {step}", *found)
    return *(found), compared  # pyright: ignore[reportReturnType]

"""`tutti replay RUN --step N`: repeats one training step bit for bit and shows its terms and gradients.

The training goes on from the newest checkpoint before the step. `replay_command.py` repeats a step that a
failure or a loss spike has saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutti.config.run_config import RunConfig
from tutti.debug.compare_runs import Comparison, untimed
from tutti.plugin import Trust
from tutti.runs.build import training_threads, trial_training
from tutti.runs.folder import RunFolder
from tutti.runs.terminal import print_line, progress_bar
from tutti.storage.checkpoint import checkpoints, step_of
from tutti.training.backward.term_gradients import term_gradients
from tutti.training.faults.non_finite import NonFiniteError
from tutti.training.optim.learning_rates import part_of
from tutti.training.records import read_records
from tutti.training.trainer import Trainer
from tutti.training.update import Observer, Update
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
        names = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return names | {"model": self.trainer.model, "objective": self.trainer.objective}


Debugger = Callable[[Scope], object]


NON_FINITE = {
    "inputs": "not finite in the data",
    "weights": "not finite to begin with",
    "module": "first module whose output is not finite",
    "gradient": "first parameter whose gradient is not finite, in backward order",
    "terms": "value or gradient is not finite of the term",
}
"""Where the values of a step first become non-finite, from the cause towards the effect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One repeated step: of the run as it was trained, or saved in failures/ or spikes/.

    `start` is the step of the checkpoint it began from (0: none). `batches` are its micro-batches with their
    `texts`; `terms[term]` is (raw, lambda), `metrics` what the terms report, `norms[part][term]`
    |lambda_i g_i|: of the whole step (means over the micro-batches), or of the one micro-batch that a saved
    step shows. `gradient[part]` is the norm of what the optimiser got, after clipping; empty if the step
    failed. `differences` compares the record of this step in the run and as it came out now, bit by bit and
    without times; it has no values where none was written. `failure` is what stopped the step, empty if
    nothing did. `about` is what was noted when the step was saved, `non_finite` names what is not finite by
    the keys of NON_FINITE; it is empty where all is.
    """

    step: int
    batches: Sequence[Batch]
    texts: Sequence[Sequence[str]]
    terms: Mapping[str, tuple[float, float]]
    metrics: Mapping[str, float]
    norms: Mapping[str, Mapping[str, float]]
    start: int = 0
    gradient: Mapping[str, float] = field(default_factory=dict)
    differences: Comparison = field(default_factory=Comparison)
    failure: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    non_finite: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        """Whether the step is finite and equal to its record."""
        return not (self.failure or self.differences.num_differing or self.non_finite)


class StepTable(Observer):
    """Terms and gradient norms of a step, gathered over its micro-batches."""

    def __init__(self, trainer: Trainer, step: int, debugger: Debugger | None) -> None:
        self.trainer, self.step, self.debugger = trainer, step, debugger
        self.batches: list[Batch] = []
        self._terms: list[LossTerms] = []
        self._sums: dict[str, dict[str, Tensor]] = {}

    def after_forward(self, update: Update, features: Features, terms: LossTerms) -> None:
        if update.step == self.step - 1:
            self.add(update.batches[update.number], features, terms, of=len(update.batches))

    def add(self, batch: Batch, features: Features, terms: LossTerms, *, of: int = 1) -> Scope:
        """Computes the gradient of each term on the graph that training uses; at the last `of` the
        micro-batches the debugger is called."""
        trainer, names = self.trainer, list(self.trainer.parameters)
        by_term = trainer.backward.masked(term_gradients(terms.values, list(trainer.parameters.values())))
        gradients = {
            term: {name: g for name, g in zip(names, row, strict=True) if g is not None}
            for term, row in by_term.items()
        }
        self.batches.append(batch)
        self._terms.append(terms)
        for term, named in gradients.items():
            sums = self._sums.setdefault(term, {})
            factor = terms.lambdas[term].detach() / of
            for name, value in named.items():
                sums[name] = sums[name] + factor * value if name in sums else factor * value
        scope = Scope(
            step=self.step,
            batch=batch,
            features=features,
            terms=terms,
            gradients=gradients,
            trainer=trainer,
        )
        if len(self.batches) == of and self.debugger is not None:
            self.debugger(scope)
        return scope

    def replay(self, **about: Any) -> Replay:
        """The step, its numbers as means over the micro-batches; `about` are further fields."""
        made, first = self._terms, self._terms[0]
        by_term = {term: norms_by_part(sums) for term, sums in self._sums.items()}
        parts = dict.fromkeys(part for norms in by_term.values() for part in norms)
        return Replay(
            step=self.step,
            terms={
                n: (_mean([t.values[n] for t in made]), _mean([t.lambdas[n] for t in made]))
                for n in first.values
            },
            metrics={n: _mean([t.metrics[n] for t in made]) for n in first.metrics},
            norms={p: {term: norms.get(p, 0.0) for term, norms in by_term.items()} for p in parts},
            **about,
        )


def norms_by_part(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of the gradients of each part of the model, and of the objective's heads."""
    by_part: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        by_part.setdefault(part_of(name), []).append(gradient)
    return {part: float(torch.nn.utils.get_total_norm(group)) for part, group in by_part.items()}


def _mean(values: Sequence[Tensor]) -> float:
    return sum(float(value.detach()) for value in values) / len(values)


def replay_step(
    folder: Path | str, step: int, debugger: Debugger | None = None, *, trust_code: Trust = False
) -> Replay:
    """Repeats update number `step` (from 1) of the run in `folder`, exactly as its training made it.

    It goes on from the newest kept checkpoint before the step, or, where there is none, from the start, in a
    temporary folder: nothing of the run changes. `debugger` is called when the step's last forward pass is
    done and nothing has moved yet. `trust_code`: classes of the user's own that the run names are imported.

    Raises: UserError if the run has no training, or no such step.
    """
    run = RunFolder(Path(folder), new=False, trust_code=trust_code)
    config = run.config()
    if not 1 <= step <= config.training.steps:
        raise UserError(f"--step is {step}; the run has steps 1 to {config.training.steps}.")
    before = [path for path in checkpoints(run.path) if step_of(path) < step]
    start = step_of(before[-1]) if before else 0
    _announce(run.path, step, start)
    with (
        training_threads(config),
        trial_training(without_checkpoints(config), run.path, before) as training,
        progress_bar("replaying") as bar,
    ):
        trainer, scratch = training.trainer, training.trainer.settings.run
        table = StepTable(trainer, step, debugger)
        trainer.observers = (table, *trainer.observers)
        first: list[int] = []

        def progress(now: int, steps: int, metrics: dict[str, float]) -> None:
            first.append(now)
            bar(now - first[0] + 1, step - first[0] + 1)
            if now >= step:
                raise _Done

        failure, gradient = "", dict[str, float]()

        def before_optimizer(*_: Any) -> None:
            if trainer.step == step - 1 and not gradient:
                found = {name: p.grad for name, p in trainer.parameters.items() if p.grad is not None}
                gradient.update(norms_by_part(found))

        for optimizer in trainer.optimizer.optimizers.values():
            optimizer.register_step_pre_hook(before_optimizer)
        try:
            training.fit(progress)
        except _Done:
            pass
        except NonFiniteError as error:
            failure = str(error).splitlines()[0]
        if not table.batches:
            raise UserError(f"{run.path}: the replay ended before step {step}. {failure}".rstrip())
        differences = Comparison()
        recorded, replayed = (_record(path, step) for path in (run.path, scratch))
        if recorded and replayed:
            differences.add(f"record of step {step}", recorded, replayed)
        return table.replay(
            start=first[0] - 1 if first else trainer.step,
            batches=table.batches,
            texts=[training.data.texts(batch) for batch in table.batches],
            gradient=gradient,
            differences=differences,
            failure=failure,
        )


class _Done(Exception):
    """The step is done; the training need not go on."""


def without_checkpoints(config: RunConfig) -> RunConfig:
    """The config without validations and checkpoints, on which no step depends; the latter stay, but are
    copied nowhere, where a rollback goes back to them."""
    values = config.training.model_dump(mode="json")
    values["validation"]["every"] = 0
    values["checkpoints"] |= {"keep_every": 0, "keep_best": "off", "mirror": "off"}
    if config.training.gradients.rollback == "off":
        values["checkpoints"]["every"] = 0
    return config.model_copy(update={"training": config.training.model_validate(values)})


def _announce(run: Path, step: int, start: int) -> None:
    """Says from where, and by the run's own records about how long it takes."""
    times = [(r["time/seconds"], r["step"]) for r in read_records(run) if "time/seconds" in r]
    about = f", about {(step - start) * times[-1][0] / times[-1][1]:.0f} s by its records" if times else ""
    where = f"from step-{start:06d}" if start else "from the start, as no checkpoint before it is kept"
    print_line(f"step {step}: replayed {where}: {step - start} updates{about}")
    kept = [step_of(path) for path in checkpoints(run)]
    if not start and kept:
        print_line(
            f"Steps {kept[0] + 1} and later begin at a kept checkpoint (of {', '.join(map(str, kept))}); "
            "training.checkpoints.keep_every keeps more of them."
        )


def _record(run: Path, step: int) -> dict[str, Any]:
    """The train record of the step; empty if none was written."""
    records = (untimed(r) for r in read_records(run) if (r["step"], r["kind"]) == (step, "train"))
    return next(records, {})

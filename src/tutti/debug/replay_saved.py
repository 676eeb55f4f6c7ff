"""`tutti replay RUN --failure`: repeats a saved step and finds the first module and gradient not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutti.debug.compare_runs import leaves
from tutti.debug.replay import (
    Debugger,
    NonFinite,
    Replay,
    StepTable,
    no_debugger,
    without_checkpoints,
)
from tutti.plugin import Trust
from tutti.runs.build import BuiltTraining, training_threads, trial_training
from tutti.runs.folder import RunFolder
from tutti.runs.terminal import print_line
from tutti.storage.checkpoint import step_folders, step_of
from tutti.storage.reading import read_json, shown
from tutti.training.faults.saved_steps import load_step
from tutti.training.rng import own_randomness
from tutti.training.trainer import Trainer
from tutti.types import Batch, UserError

ABOUT = ("failure.json", "spike.json")
MAX_LISTED = 4
MAX_STEP = 2**53


def replay_saved_step(
    folder: Path | str, debugger: Debugger = no_debugger, *, trust_code: Trust = False
) -> Replay:
    """Repeats a step saved in RUN/failures/step-N or RUN/spikes/step-N, from its batches and weights.

    Its micro-batches run in turn until one gives a value that is not finite; that one, or else the last, is
    shown. Random draws (dropout, noise) are new ones from the run's seed and the step: they are not saved.
    `trust_code`: classes of the user's own that the run names are imported.

    Raises: UserError if the folder is no saved step of a run, or is of another model.
    """
    folder = Path(folder)
    about = _about(folder)
    run = RunFolder(folder.parent.parent, new=False, trust_code=trust_code)
    config, step = run.config(), about["step"]
    batches, weights = load_step(folder)
    with training_threads(config), trial_training(without_checkpoints(config), run.path) as training:
        _load(training.trainer, weights, folder)
        try:
            table, found = _repeat(training, batches, step, debugger)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            said = shown(str(error), 400, quoted=False)
            raise UserError(f"{folder}: its batches do not fit this model: {said}") from error
        texts = tuple(tuple(training.data.texts(batch)) for batch in batches)
    bad_weights = tuple(name.replace("/", ".") for name, _ in _non_finite_tensors(weights))
    bad_inputs = tuple(line for batch in batches for line in _bad_inputs(batch))
    return Replay(
        step=step,
        about=about,
        batches=tuple(batches),
        texts=texts,
        terms=table.terms,
        norms=table.norms,
        non_finite=replace(found, weights=bad_weights, inputs=bad_inputs),
    )


def saved_steps(run: Path) -> list[Path]:
    """The saved steps of a run, failures and spikes, oldest first."""
    folders = [*step_folders(run / "failures"), *step_folders(run / "spikes")]
    return sorted(folders, key=lambda path: (step_of(path), path.parent.name))


def _about(folder: Path) -> dict[str, Any]:
    for name in ABOUT:
        if (folder / name).exists():
            about = read_json(folder / name)
            step = about.get("step")
            if type(step) is not int or not 0 < step < MAX_STEP:
                raise UserError(f"{folder / name}: step: expected a whole number, found {shown(step)}.")
            return about
    newest = ", ".join(str(path) for path in saved_steps(folder)[-MAX_LISTED:])
    raise UserError(
        f"{folder}: no saved step here (expected {' or '.join(ABOUT)})."
        + (
            f" There are: {newest}."
            if newest
            else " A run saves one when a value is not finite or a loss spikes."
        )
    )


def _load(trainer: Trainer, weights: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    try:
        for name, module in (("model", trainer.model), ("objective", trainer.objective)):
            module.load_state_dict(weights[name])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: its weights are of another model: {str(error)[:400]}") from error


def _repeat(
    training: BuiltTraining, batches: list[Batch], step: int, debugger: Debugger
) -> tuple[StepTable, NonFinite]:
    """The micro-batches in turn, until one gives a value that is not finite; what is known of the last."""
    trainer = training.trainer
    trainer.model.train()
    trainer.objective.train()
    moment = trainer.strategy.at(step - 1)
    frozen = tuple(f"model.{part}." for part in moment.phase.frozen)
    for name, parameter in trainer.parameters.items():
        parameter.requires_grad_(not name.startswith(frozen))
    if not batches:
        raise LookupError("no batch is saved")
    table, found = StepTable(trainer, step, no_debugger), NonFinite()
    for batch in batches:
        table = StepTable(trainer, step, debugger)
        with (
            own_randomness(training.config.training.seed + step),
            _non_finite_outputs(trainer) as modules,
        ):
            moved = batch.to(trainer.machine.device)
            with trainer.machine.autocast():
                features = trainer.model(moved.observation)
                counting = moment.phase.counting(trainer.objective.names)
                terms = trainer.objective(features, moved, trainer.model, moment.progress, counting)
            scope = table.add(moved, features, terms)
            gradient = _first_bad_gradient(trainer, terms.total)
        bad_terms = tuple(
            term
            for term, gradients in scope.gradients.items()
            if not all(map(_is_finite, (terms.values[term], *gradients.values())))
        )
        found = NonFinite(module=next(iter(modules), ""), gradient=gradient, terms=bad_terms)
        if found != NonFinite():
            break
    return table, found


@contextmanager
def _non_finite_outputs(trainer: Trainer) -> Iterator[list[str]]:
    """Collects the modules whose output is not finite, in the order in which they are done."""
    modules: list[str] = []

    def watch(name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            for _, tensor in _non_finite_tensors(output):
                modules.append(f"{name} ({type(module).__name__}), output {tuple(tensor.shape)}")
                return

        return check

    roots = (("model", trainer.model), ("objective", trainer.objective))
    handles = [
        module.register_forward_hook(watch(f"{root}.{name}" if name else root))
        for root, top in roots
        for name, module in top.named_modules()
    ]
    try:
        yield modules
    finally:
        for handle in handles:
            handle.remove()


def _first_bad_gradient(trainer: Trainer, total: Tensor) -> str:
    """The first parameter whose gradient of the total is not finite, as the backward pass comes to it."""
    names: list[str] = []

    def watch(name: str) -> Any:
        return lambda gradient: None if _is_finite(gradient) else names.append(name)

    learning = {name: p for name, p in trainer.parameters.items() if p.requires_grad}
    handles = [parameter.register_hook(watch(name)) for name, parameter in learning.items()]
    try:
        if total.requires_grad:
            torch.autograd.grad(total, list(learning.values()), retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(names), "")


def _bad_inputs(batch: Batch) -> Iterator[str]:
    """A sentence for each tensor of a batch that is not finite: how often, the first and its window."""
    for name, tensor in _non_finite_tensors(batch):
        bad = ~torch.isfinite(tensor)
        index = [int(i) for i in bad.nonzero()[0]]
        yield (
            f"batch.{name.replace('/', '.')}{index} is {float(tensor[tuple(index)])}, "
            f"in window {int(batch.window[index[0]])}; {int(bad.sum())} such"
        )


def _non_finite_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    for name, leaf in leaves(value):
        if isinstance(leaf, Tensor) and not _is_finite(leaf):
            yield name, leaf


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def print_non_finite(found: NonFinite) -> None:
    """What is not finite, from the cause towards the effect."""
    lines = {
        "the weights are not finite to begin with": ", ".join(found.weights[:MAX_LISTED]),
        "first module whose output is not finite": found.module,
        "first parameter whose gradient is not finite, in backward order": found.gradient,
        "terms whose value or gradient is not finite": ", ".join(found.terms),
    }
    for line in found.inputs[:MAX_LISTED]:
        print_line(f"not finite in the data: {line}")
    for what, names in lines.items():
        if names:
            print_line(f"{what}: {names}")
    if found == NonFinite():
        print_line("Every value is finite in this replay: random draws may matter, or it was a loss spike.")

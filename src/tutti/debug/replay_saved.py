"""A saved bad batch met again by the weights that it met: where do the values first go wrong?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tutti.config.run_config import RunConfig
from tutti.debug.replay import Debugger, Scope, no_debugger, norms_by_part, quiet
from tutti.plugin import Trust
from tutti.runs.build import build_parts, training_threads
from tutti.runs.folder import RunFolder
from tutti.runs.terminal import print_line
from tutti.storage.checkpoint import step_folders, step_of
from tutti.storage.reading import read_json, shown
from tutti.training.backward.term_gradients import term_gradients
from tutti.training.faults.saved_steps import load_failure
from tutti.training.rng import own_randomness
from tutti.training.trainer import Trainer
from tutti.types import Batch, LossTerms, UserError

ABOUT = ("failure.json", "spike.json")
SHOWN = 4
FARTHEST = 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedReplay:
    """A saved step of failures/ or spikes/, made again up to its gradients.

    `about` is what was noted when it was saved. `terms[term]` is (raw, lambda) and `norms[part][term]` is
    |lambda_i g_i|, both of the micro-batch shown: the first with a non-finite value, else the last.
    `weights` and `inputs` are the non-finite entries there were to begin with, as sentences; `module` the
    first whose output is not finite, with its shape; `gradient` the first parameter, in the order of the
    backward pass, whose gradient is not finite; `culprits` the terms whose value or gradient is not. All are
    empty where everything is finite.
    """

    step: int
    about: Mapping[str, Any]
    batches: tuple[Batch, ...]
    texts: tuple[tuple[str, ...], ...]
    terms: Mapping[str, tuple[float, float]]
    norms: Mapping[str, Mapping[str, float]]
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    module: str
    gradient: str
    culprits: tuple[str, ...]

    @property
    def finite(self) -> bool:
        """Whether no value was found that is not finite."""
        return not (self.weights or self.inputs or self.module or self.gradient or self.culprits)


def replay_saved(
    folder: Path | str, debugger: Debugger = no_debugger, *, trust_code: Trust = False
) -> SavedReplay:
    """Makes a step again that lies in RUN/failures/step-N or RUN/spikes/step-N, from its batch and weights.

    Random draws (dropout, noise) are new ones from the run's seed and the step: they are not saved.
    `trust_code`: classes of the user's own that the run names are imported.

    Raises: UserError if the folder is no saved step of a run, or is of another model.
    """
    folder = Path(folder)
    about = _about(folder)
    run = RunFolder(folder.parent.parent, new=False, trust_code=trust_code)
    config, step = run.config(), about["step"]
    batches, weights = load_failure(folder)
    with training_threads(config), TemporaryDirectory(prefix="tutti-replay-") as scratch:
        data, model, objective = build_parts(config, run.path)
        data.train.close()
        trainer = Trainer(
            quiet(config),
            model,
            objective,
            Path(scratch),
            strategy=config.strategy,
            backward=config.backward,
        )
        _load(trainer, weights, folder)
        try:
            found = _meet(trainer, batches, config, step, debugger)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            said = shown(str(error), 400, quoted=False)
            raise UserError(f"{folder}: its batches do not fit this model: {said}") from error
    return SavedReplay(
        step=step,
        about=about,
        batches=tuple(batches),
        texts=tuple(tuple(data.texts(batch)) for batch in batches),
        weights=tuple(_bad_weights(weights)),
        inputs=tuple(line for batch in batches for line in bad_entries(batch, batch.window.tolist())),
        **found,
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
            if type(step) is not int or not 0 < step < FARTHEST:
                raise UserError(f"{folder / name}: step: expected a whole number, found {shown(step)}.")
            return about
    there = ", ".join(str(path) for path in saved_steps(folder)[-SHOWN:])
    raise UserError(
        f"{folder}: no saved step here (expected {' or '.join(ABOUT)})."
        + (
            f" There are: {there}."
            if there
            else " A run saves one when a value is not finite or a loss spikes."
        )
    )


def _load(trainer: Trainer, weights: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    try:
        for name, module in (("model", trainer.model), ("objective", trainer.objective)):
            module.load_state_dict(weights[name])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: its weights are of another model: {str(error)[:400]}") from error


def _meet(
    trainer: Trainer, batches: list[Batch], config: RunConfig, step: int, debugger: Debugger
) -> dict[str, Any]:
    """The micro-batches in turn, until one gives a value that is not finite; what is known of the last."""
    trainer.model.train()
    trainer.objective.train()
    moment = trainer.strategy.at(step - 1)
    names = list(trainer.parameters)
    for name, parameter in trainer.parameters.items():
        parameter.requires_grad_(not name.startswith(tuple(f"model.{part}." for part in moment.phase.frozen)))
    found: dict[str, Any] = {}
    for batch in batches:
        with own_randomness(config.training.seed + step), _outputs(trainer) as outputs:
            moved = batch.to(trainer.machine.device)
            with trainer.machine.autocast():
                features = trainer.model(moved.observation)
                counting = moment.phase.counting(trainer.objective.names)
                terms: LossTerms = trainer.objective(features, moved, moment.progress, counting)
            raw = term_gradients(terms.values, list(trainer.parameters.values()))
            gradients = {
                term: {n: g for n, g in zip(names, own, strict=True) if g is not None}
                for term, own in raw.items()
            }
            debugger(
                Scope(
                    step=step,
                    batch=moved,
                    features=features,
                    terms=terms,
                    gradients=gradients,
                    trainer=trainer,
                )
            )
            first = _first_bad_gradient(trainer, terms.total)
        by_term = {
            term: norms_by_part({n: terms.lambdas[term].detach() * g for n, g in own.items()})
            for term, own in gradients.items()
        }
        parts = dict.fromkeys(part for own in by_term.values() for part in own)
        found = {
            "terms": {
                name: (float(value.detach()), float(terms.lambdas[name].detach()))
                for name, value in terms.values.items()
            },
            "norms": {part: {t: own.get(part, 0.0) for t, own in by_term.items()} for part in parts},
            "module": outputs[0] if outputs else "",
            "gradient": first,
            "culprits": tuple(
                term
                for term, own in gradients.items()
                if not all(map(_finite, (terms.values[term], *own.values())))
            ),
        }
        if outputs or first or found["culprits"]:
            break
    return found


@contextmanager
def _outputs(trainer: Trainer) -> Iterator[list[str]]:
    """Collects the modules whose output is not finite, in the order in which they are done."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not _finite(tensor):
                    seen.append(f"{name} ({type(module).__name__}), output {tuple(tensor.shape)}")
                    return

        return look

    roots = (("model", trainer.model), ("objective", trainer.objective))
    handles = [
        module.register_forward_hook(watch(f"{root}.{name}" if name else root))
        for root, top in roots
        for name, module in top.named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first_bad_gradient(trainer: Trainer, total: Tensor) -> str:
    """The first parameter whose gradient of the total is not finite, as the backward pass comes to it."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        return lambda gradient: None if _finite(gradient) else seen.append(name)

    learning = {name: p for name, p in trainer.parameters.items() if p.requires_grad}
    handles = [parameter.register_hook(watch(name)) for name, parameter in learning.items()]
    try:
        if total.requires_grad:
            torch.autograd.grad(total, list(learning.values()), retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else ""


def bad_entries(value: Any, windows: list[int], name: str = "batch") -> list[str]:
    """A sentence for each tensor of a batch that is not finite: how often, the first and its window."""
    if isinstance(value, Tensor):
        if _finite(value):
            return []
        bad = ~torch.isfinite(value)
        index = [int(i) for i in bad.nonzero()[0]]
        where = f"[{', '.join(map(str, index))}]"
        first, window = float(value[tuple(index)]), windows[index[0]]
        return [f"{name}{where} is {first}, in window {window}; {int(bad.sum())} such"]
    if is_dataclass(value):
        items = [(f"{name}.{one.name}", getattr(value, one.name)) for one in fields(value)]
    elif isinstance(value, Mapping):
        items = [(f"{name}[{key}]", item) for key, item in value.items()]
    else:
        return []
    return [line for label, item in items for line in bad_entries(item, windows, label)]


def _bad_weights(weights: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    for root, own in weights.items():
        for name, value in own.items():
            if not _finite(value):
                yield f"{root}.{name}"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for one in fields(value):
            yield from _tensors(getattr(value, one.name))


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def describe_culprits(found: SavedReplay) -> None:
    """What is not finite, from the cause towards the effect."""
    lines = (
        [f"not finite to begin with: the weights {', '.join(found.weights[:SHOWN])}"] if found.weights else []
    )
    lines += [f"not finite in the data: {line}" for line in found.inputs[:SHOWN]]
    if found.module:
        lines.append(f"first module whose output is not finite: {found.module}")
    if found.gradient:
        lines.append(f"first parameter whose gradient is not finite, in backward order: {found.gradient}")
    if found.culprits:
        lines.append(f"terms whose value or gradient is not finite: {', '.join(found.culprits)}")
    for line in lines or ["every value is finite in this replay: random draws may matter, or it was a spike"]:
        print_line(line)

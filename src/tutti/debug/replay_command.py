"""`tutti replay`: one step of a run or a saved one; what it prints and writes, and its two debuggers."""

from __future__ import annotations

import code
import pdb as debugger_of_python
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutti.debug.replay import (
    NON_FINITE,
    Debugger,
    Replay,
    Scope,
    StepTable,
    replay_step,
    without_checkpoints,
)
from tutti.nested_dicts import leaves
from tutti.plugin import Trust
from tutti.runs.build import training_threads, trial_training
from tutti.runs.folder import RunFolder
from tutti.runs.terminal import print_line, print_table
from tutti.storage.checkpoint import checkpoints, step_folders, step_of
from tutti.storage.files import write_json
from tutti.storage.reading import read_json, shown
from tutti.training.diagnostics.first_batch import save_pictures
from tutti.training.faults.saved_steps import load_step
from tutti.training.rng import own_randomness
from tutti.training.trainer import Trainer
from tutti.types import Batch, UserError

FOLDER = "replays"
ABOUT = ("failure.json", "spike.json")
MAX_LISTED = 4
MAX_STEP = 2**53


def run_replay(
    path: Path, step: int | None, *, failure: bool, pdb: bool, shell: bool, trust_code: Trust = False
) -> bool:
    """`tutti replay`: a step of a run, or a saved one. True if it is finite and as it was recorded.

    Raises: UserError if the options do not say which step, or there is none.
    """
    debugger = debug if pdb else prompt if shell else None
    is_saved = path.parent.name in ("failures", "spikes")
    if is_saved + failure + (step is not None) != 1:
        raise UserError(
            f"{path}: which step? Give one of --step N, --failure (the newest saved one), or a folder "
            "in the run's failures/ or spikes/."
        )
    if step is not None:
        repeated = replay_step(path, step, debugger, trust_code=trust_code)
        print_replay(repeated, path / FOLDER / f"step-{step:06d}")
        return repeated.succeeded
    if failure:
        saved = saved_steps(path)
        if not saved:
            raise UserError(f"{path}: nothing is saved in failures/ or spikes/. Give --step N.")
        path = saved[-1]
    repeated = replay_saved_step(path, debugger, trust_code=trust_code)
    print_replay(repeated, path.parent.parent / FOLDER / f"step-{repeated.step:06d}-saved")
    return repeated.succeeded


def print_replay(repeated: Replay, folder: Path) -> None:
    """The tables, the comparison with the record or what is not finite, and the files in `folder`."""
    if repeated.about:
        note = str(repeated.about.get("message", "a loss spike")).splitlines()[0]
        print_line(f"Saved at step {repeated.step}: {note}")
    rows = [
        (name, f"{raw:.7g}", f"{factor:.4g}", f"{raw * factor:.7g}")
        for name, (raw, factor) in repeated.terms.items()
    ]
    total = sum(raw * factor for raw, factor in repeated.terms.values())
    heads = ("term", "raw", "lambda", "weighted")
    print_table(f"Step {repeated.step}", heads, [*rows, ("total", "", "", f"{total:.7g}")])
    if repeated.metrics:
        print_line(", ".join(f"{name} {value:.5g}" for name, value in repeated.metrics.items()))
    got = {"optimiser got": repeated.gradient} if repeated.gradient else {}
    columns = {
        term: {part: norms.get(term, 0.0) for part, norms in repeated.norms.items()}
        for term in repeated.terms
    } | got
    norms = [(part, *(f"{one.get(part, 0.0):.4g}" for one in columns.values())) for part in repeated.norms]
    print_table("Norm of lambda_i g_i", ("part", *columns), norms)
    _write(repeated, folder)
    if repeated.failure:
        print_line(f"! {repeated.failure}")
    compared = repeated.differences
    for what, label in NON_FINITE.items():
        for name in repeated.non_finite.get(what, ())[:MAX_LISTED]:
            print_line(f"{label}: {name}")
    if repeated.about:
        if not repeated.non_finite:
            print_line("Every value is finite here: random draws may matter, or it was a loss spike.")
    elif not compared.num_values:
        print_line(f"No record was written at step {repeated.step}: there is nothing to compare with.")
    elif compared.first is None:
        print_line(f"0 of {compared.num_values} recorded values differ: this is the step as it was.")
    else:
        print_line(
            f"! {compared.num_differing} of {compared.num_values} recorded values differ. The first (in the "
            f"run, now): {compared.first}. Other threads, versions, device or data?"
        )


def _write(repeated: Replay, folder: Path) -> None:
    windows: list[dict[str, int | str]] = []
    for number, (batch, texts) in enumerate(zip(repeated.batches, repeated.texts, strict=True)):
        save_pictures(batch.to("cpu"), folder / f"batch-{number}.png", list(texts), most=64)
        named = zip(batch.window.tolist(), texts, strict=True)
        windows += [{"window": window, "instruction": text} for window, text in named]
    terms = {name: {"raw": raw, "lambda": factor} for name, (raw, factor) in repeated.terms.items()}
    result = {"step": repeated.step, "terms": terms, "norms": repeated.norms, "windows": windows}
    write_json(folder / "replay.json", result)
    print_line(f"Written: {folder} (replay.json and pictures of {len(repeated.batches)} batches)")


def _banner(scope: Scope, end: str) -> str:
    return f"step {scope.step}, before its backward pass. In scope: {', '.join(scope.names)}. {end} goes on."


def debug(scope: Scope) -> None:
    """`--pdb`: stops in a statement whose variables are the step's; `c` goes on with it."""
    print_line(_banner(scope, "c"))
    debugger_of_python.runctx("None", scope.names, {})


def prompt(scope: Scope) -> None:
    """`--shell`: a Python prompt with the same variables; Ctrl-D goes on."""
    code.interact(banner=_banner(scope, "Ctrl-D"), local=scope.names, exitmsg="")


def replay_saved_step(
    folder: Path | str, debugger: Debugger | None = None, *, trust_code: Trust = False
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
    trial = trial_training(without_checkpoints(config), run.path, checkpoints(run.path))
    with training_threads(config), trial as training:
        trainer = training.trainer
        try:
            for name, module in trainer.state.modules.items():
                module.load_state_dict(weights[name])
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{folder}: its weights are of another model: {str(error)[:400]}") from error
        try:
            table, found = _repeat(trainer, batches, step, debugger, seed=config.training.seed + step)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            said = shown(str(error), 400, quoted=False)
            raise UserError(f"{folder}: its batches do not fit this model: {said}") from error
        texts = [training.data.texts(batch) for batch in batches]
    found |= {
        "weights": [name.replace("/", ".") for name, _ in _non_finite_tensors(weights)],
        "inputs": [line for batch in batches for line in _bad_inputs(batch)],
    }
    non_finite = {what: names for what, names in found.items() if names}
    return table.replay(about=about, batches=batches, texts=texts, non_finite=non_finite)


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
    raise UserError(
        f"{folder}: no saved step here (expected {' or '.join(ABOUT)}). A run saves one in failures/ or "
        "spikes/ when a value is not finite or a loss spikes."
    )


def _repeat(
    trainer: Trainer, batches: list[Batch], step: int, debugger: Debugger | None, *, seed: int
) -> tuple[StepTable, dict[str, list[str]]]:
    """The micro-batches in turn, until one gives a value that is not finite; what is known of the last."""
    if not batches:
        raise LookupError("no batch is saved")
    trainer.model.train()
    trainer.objective.train()
    point = trainer.strategy.enter(step - 1, trainer.parameters)
    active_terms = point.phase.active_terms(trainer.objective.names)
    table, found = StepTable(trainer, step, debugger), dict[str, list[str]]()
    for batch in batches:
        table = StepTable(trainer, step, debugger)
        moved = batch.to(trainer.machine.device)
        with own_randomness(seed), _non_finite_outputs(trainer) as modules:
            with trainer.machine.autocast():
                features = trainer.model(moved.observation)
                terms = trainer.objective(features, moved, trainer.model, point.progress, active_terms)
            scope = table.add(moved, features, terms)
            gradient = _first_bad_gradient(trainer, terms.total)
        bad_terms = [
            term
            for term, gradients in scope.gradients.items()
            if not all(map(_is_finite, (terms.values[term], *gradients.values())))
        ]
        found = {"module": modules[:1], "gradient": gradient, "terms": bad_terms}
        if any(found.values()):
            break
    return table, found


@contextmanager
def _non_finite_outputs(trainer: Trainer) -> Iterator[list[str]]:
    """Collects the modules whose output is not finite, in the order in which they are done."""
    modules: list[str] = []

    def check(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for _, tensor in islice(_non_finite_tensors(output), 1):
            modules.append(f"{name} ({type(module).__name__}), output {tuple(tensor.shape)}")

    with ExitStack() as hooks:
        for root, top in trainer.state.modules.items():
            for name, module in top.named_modules(prefix=root):
                hooks.enter_context(module.register_forward_hook(partial(check, name)))
        yield modules


def _first_bad_gradient(trainer: Trainer, total: Tensor) -> list[str]:
    """The first parameter whose gradient of the total is not finite, as the backward pass comes to it."""
    names: list[str] = []

    def check(name: str, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            names.append(name)

    learning = {name: p for name, p in trainer.parameters.items() if p.requires_grad}
    with ExitStack() as hooks:
        for name, parameter in learning.items():
            hooks.enter_context(parameter.register_hook(partial(check, name)))
        if total.requires_grad:
            torch.autograd.grad(total, list(learning.values()), retain_graph=True, allow_unused=True)
    return names[:1]


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

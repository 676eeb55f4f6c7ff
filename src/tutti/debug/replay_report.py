"""What `tutti replay` prints and writes: terms, gradient norms, pictures of the batch; its two debuggers."""

from __future__ import annotations

import code
import json
import pdb as debugger_of_python
from pathlib import Path

from tutti.debug.replay import Replay, Scope, no_debugger, replay_step
from tutti.debug.replay_saved import print_non_finite, replay_saved_step, saved_steps
from tutti.plugin import Trust
from tutti.runs.terminal import print_line, print_table
from tutti.storage.files import write_atomically
from tutti.training.diagnostics.first_batch import save_pictures
from tutti.types import UserError

FOLDER = "replays"


def run_replay(
    path: Path, step: int | None, *, failure: bool, pdb: bool, shell: bool, trust_code: Trust = False
) -> bool:
    """`tutti replay`: a step of a run, or a saved one. True if it is finite and as it was recorded.

    Raises: UserError if the options do not say which step, or there is none.
    """
    debugger = debug if pdb else prompt if shell else no_debugger
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
    _print_terms(repeated)
    if repeated.metrics:
        print_line(", ".join(f"{name} {value:.5g}" for name, value in repeated.metrics.items()))
    _print_norms(repeated)
    _write(repeated, folder)
    if repeated.failure:
        print_line(f"! {repeated.failure}")
    compared = repeated.differences
    if repeated.about:
        print_non_finite(repeated.non_finite)
    elif not compared.num_values:
        print_line(f"No record was written at step {repeated.step}: there is nothing to compare with.")
    elif compared.first is None:
        print_line(f"0 of {compared.num_values} recorded values differ: this is the step as it was.")
    else:
        print_line(
            f"! {compared.num_differing} of {compared.num_values} recorded values differ. The first (in the "
            f"run, now): {compared.first}. Other threads, versions, device or data?"
        )


def _print_terms(repeated: Replay) -> None:
    rows = [
        (name, f"{raw:.7g}", f"{factor:.4g}", f"{raw * factor:.7g}")
        for name, (raw, factor) in repeated.terms.items()
    ]
    total = sum(raw * factor for raw, factor in repeated.terms.values())
    heads = ("term", "raw", "lambda", "weighted")
    print_table(f"Step {repeated.step}", heads, [*rows, ("total", "", "", f"{total:.7g}")])


def _print_norms(repeated: Replay) -> None:
    terms = list(dict.fromkeys(term for norms in repeated.norms.values() for term in norms))
    whole = repeated.gradient
    rows = [
        (
            part,
            *(f"{norms[term]:.4g}" for term in terms),
            *([f"{whole.get(part, 0.0):.4g}"] if whole else []),
        )
        for part, norms in repeated.norms.items()
    ]
    print_table("Norm of lambda_i g_i", ("part", *terms, *(["optimiser got"] if whole else [])), rows)


def _write(repeated: Replay, folder: Path) -> None:
    names: list[str] = []
    windows: list[dict[str, int | str]] = []
    for number, (batch, texts) in enumerate(zip(repeated.batches, repeated.texts, strict=True)):
        names.append(f"batch-{number}.png")
        save_pictures(batch.to("cpu"), folder / names[-1], list(texts), most=64)
        windows += [
            {"window": window, "instruction": text}
            for window, text in zip(batch.window.tolist(), texts, strict=True)
        ]
    terms = {name: {"raw": raw, "lambda": factor} for name, (raw, factor) in repeated.terms.items()}
    result = {"step": repeated.step, "terms": terms, "norms": repeated.norms, "windows": windows}
    write_atomically(folder / "replay.json", json.dumps(result, indent=1) + "\n")
    print_line(f"Written: {folder} (replay.json, {', '.join(names)})")


def debug(scope: Scope) -> None:
    """`--pdb`: stops in this function, whose variables are the step's; `c` goes on with it."""
    step, batch, features, terms = scope.step, scope.batch, scope.features, scope.terms
    gradients, trainer = scope.gradients, scope.trainer
    model, objective = trainer.model, trainer.objective
    print_line(f"step {step}, before its backward pass. In scope: {', '.join(scope.names)}. c goes on.")
    debugger_of_python.set_trace()
    del batch, features, terms, gradients, model, objective


def prompt(scope: Scope) -> None:
    """`--shell`: a Python prompt with the same variables; Ctrl-D goes on."""
    banner = (
        f"step {scope.step}, before its backward pass. In scope: {', '.join(scope.names)}. Ctrl-D goes on."
    )
    code.interact(banner=banner, local=scope.names, exitmsg="")

"""What `tutti replay` shows and writes: terms, gradient norms, pictures of the batch; its two debuggers."""

from __future__ import annotations

import code
import json
import pdb as debugger_of_python
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.table import Table

from tutti.debug.replay import Replay, Scope, no_debugger, replay
from tutti.debug.replay_saved import SavedReplay, describe_culprits, replay_saved, saved_steps
from tutti.plugin import Trust
from tutti.runs.terminal import console, print_line
from tutti.storage.files import write_atomically
from tutti.training.diagnostics.first_batch import save_pictures
from tutti.types import UserError

FOLDER = "replays"


def run_replay(
    given: Path, step: int | None, *, failure: bool, pdb: bool, shell: bool, trust_code: Trust = False
) -> bool:
    """`tutti replay`: a step of a run, or a saved one. True if it is finite and as it was recorded.

    Raises: UserError if the options do not say which step, or there is none.
    """
    debugger = debug if pdb else prompt if shell else no_debugger
    is_saved = given.parent.name in ("failures", "spikes")
    if is_saved + failure + (step is not None) != 1:
        raise UserError(
            f"{given}: which step? Give one of --step N, --failure (the newest saved one), or a folder "
            "in the run's failures/ or spikes/."
        )
    if step is not None:
        found = replay(given, step, debugger, trust_code=trust_code)
        show_replay(found, given)
        return not found.failure and not found.differences.num_differing
    folder = given
    if failure:
        saved = saved_steps(given)
        if not saved:
            raise UserError(f"{given}: nothing is saved in failures/ or spikes/. Give --step N.")
        folder = saved[-1]
    again = replay_saved(folder, debugger, trust_code=trust_code)
    show_saved(again, folder.parent.parent)
    return again.finite


def show_replay(found: Replay, run: Path) -> None:
    """The tables, the comparison with the record, and where pictures and numbers were written."""
    _show_terms(found.step, found.terms)
    if found.metrics:
        print_line(", ".join(f"{name} {value:.5g}" for name, value in found.metrics.items()))
    _show_norms(found.norms, found.gradient)
    _write(found, run / FOLDER / f"step-{found.step:06d}")
    if found.failure:
        print_line(f"! {found.failure}")
    compared = found.differences
    if not compared.num_values:
        print_line(f"No record was written at step {found.step}: there is nothing to compare with.")
    elif compared.first is None:
        print_line(f"0 of {compared.num_values} recorded values differ: this is the step as it was.")
    else:
        print_line(
            f"! {compared.num_differing} of {compared.num_values} recorded values differ. The first (in the "
            f"run, now): {compared.first}. Other threads, versions, device or data?"
        )


def show_saved(found: SavedReplay, run: Path) -> None:
    """The tables, then what is not finite and where it begins."""
    note = found.about.get("message", "a loss spike")
    print_line(f"Saved at step {found.step}: {str(note).splitlines()[0]}")
    _show_terms(found.step, found.terms)
    _show_norms(found.norms, {})
    _write(found, run / FOLDER / f"step-{found.step:06d}-saved")
    describe_culprits(found)


def _show_terms(step: int, terms: Mapping[str, tuple[float, float]]) -> None:
    table = _table(f"Step {step}", "term", "raw", "lambda", "weighted")
    for name, (raw, factor) in terms.items():
        table.add_row(name, f"{raw:.7g}", f"{factor:.4g}", f"{raw * factor:.7g}")
    table.add_row("total", "", "", f"{sum(raw * factor for raw, factor in terms.values()):.7g}")
    console.print(table)


def _show_norms(norms: Mapping[str, Mapping[str, float]], whole: Mapping[str, float]) -> None:
    terms = list(dict.fromkeys(term for own in norms.values() for term in own))
    heads = ("part", *terms, *(("optimiser got",) if whole else ()))
    table = _table("Norm of lambda_i g_i", *heads)
    for part, own in norms.items():
        last = (f"{whole.get(part, 0.0):.4g}",) if whole else ()
        table.add_row(part, *(f"{own[term]:.4g}" for term in terms), *last)
    console.print(table)


def _write(found: Replay | SavedReplay, folder: Path) -> None:
    names: list[str] = []
    for number, (batch, own) in enumerate(zip(found.batches, found.texts, strict=True)):
        names.append(f"batch-{number}.png")
        save_pictures(batch.to("cpu"), folder / names[-1], list(own), most=64)
    windows = [
        {"window": window, "instruction": text}
        for batch, own in zip(found.batches, found.texts, strict=True)
        for window, text in zip(batch.window.tolist(), own, strict=True)
    ]
    terms = {name: {"raw": raw, "lambda": factor} for name, (raw, factor) in found.terms.items()}
    result = {"step": found.step, "terms": terms, "norms": found.norms, "windows": windows}
    write_atomically(folder / "replay.json", json.dumps(result, indent=1) + "\n")
    print_line(f"Written: {folder} (replay.json, {', '.join(names)})")


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head == heads[0] else "right")
    return table


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

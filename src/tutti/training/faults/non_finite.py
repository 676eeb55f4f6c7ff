"""Values that are not finite: a guard that stops or skips the update before the optimiser moves."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import Parameter

from tutti.distributed.ranks import ONE_RANK, shared_batch
from tutti.training.device import Machine
from tutti.training.faults.policy import FaultPolicy
from tutti.training.faults.saved_steps import save_step
from tutti.training.parallel.ddp import Parallel
from tutti.training.rng import own_randomness, remember_buffers
from tutti.training.state import TrainState
from tutti.training.update import Observer, Update, to_host
from tutti.types import Batch, Features, LossTerms, UserError

GRADIENT = "gradient"
MAX_WINDOWS = 16
"""Windows that a message lists."""


class NonFiniteError(UserError):
    """A loss term or the gradient is NaN or infinite. The optimiser has not moved.

    `term` is the term's name, "total" or "gradient"; `step` the number of the update that did not happen.
    """

    def __init__(self, message: str, *, term: str, step: int, windows: list[int], folder: Path) -> None:
        super().__init__(message)
        self.term = term
        self.step = step
        self.windows = windows
        self.folder = folder


class NonFiniteGuard(Observer):
    """Stops or skips an update with a NaN or infinity, and saves its batches and weights for a replay.

    Terms are checked with the gradient's norm when the backward pass is complete, which costs no further
    synchronisation; before it only where an observer or the backward looks at single gradients.
    """

    def __init__(
        self, run: Path, state: TrainState, policy: FaultPolicy, parallel: Parallel, machine: Machine
    ) -> None:
        self.run, self.state, self.policy = run, state, policy
        self.parallel, self.machine = parallel, machine

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Leaves out an update inside the block that is not finite: nothing moves, but the data go on.

        Raises: NonFiniteError where the policy (`training.gradients`) is to stop.
        """
        backward = self.state.backward
        # What an update moves before it is known whether it is left out.
        kept = copy.deepcopy(backward.state_dict()) if self.policy.may_skip else None
        restore_buffers = remember_buffers(*(self.state.modules.values() if self.policy.may_skip else ()))
        try:
            yield
        except NonFiniteError as error:
            if not self.policy.skip(error.step, error.term, error.folder):
                raise
            backward.drop()
            if kept is not None:
                backward.load_state_dict(kept)
            restore_buffers()
            self.parallel.drop()
            self.state.optimizer.zero_grad()

    def after_forward(self, update: Update, features: Features, terms: LossTerms) -> None:
        if update.shows_gradients or not self.state.backward.is_sum:
            update.terms, _ = to_host(update.scalars)
            self._check(update)

    def before_step(self, update: Update) -> None:
        self._check(update)
        if not math.isfinite(update.size):
            raise self._error(update, GRADIENT, update.size, update.batches)
        self.policy.observe(update.total, update.point.index)

    def _check(self, update: Update) -> None:
        """Stops at the first micro-batch with a term that is not finite."""
        for number, one in enumerate(update.terms, start=1):
            for name, value in {**one.values, "total": one.total}.items():
                if not math.isfinite(value):
                    raise self._error(update, name, value, update.batches[:number])

    def _error(self, update: Update, term: str, value: float, batches: list[Batch]) -> NonFiniteError:
        """The error for a term (or "total", or "gradient"), when batch and weights are saved.

        On several ranks the value is the mean over them, so all come here together. Each checks its own rows
        by themselves; the message names the ranks where the fault lies and their windows, or all of them if
        it shows nowhere alone. What is saved is the batch of all, as one process would have met it.
        """
        world, step = self.parallel.world, update.step + 1
        where = (
            _modules_of(self.state.parameters)
            if term == GRADIENT and self.parallel.gives_term_gradients
            else ""
        )
        windows, named = [window for batch in batches for window in batch.window.tolist()], ""
        if world.ranks.count > 1:
            restore_buffers = remember_buffers(*self.state.modules.values())  # what is saved is what was met
            of_rank = dict(enumerate(world.all_gather((self._is_here(update, term, batches), windows))))
            restore_buffers()
            bad = {rank: own for rank, (here, own) in of_rank.items() if here}
            bad = bad or {rank: own for rank, (_, own) in of_rank.items()}
            named = f" on rank {', '.join(map(str, bad))}"
            windows = [window for own in bad.values() for window in own]
        folder = self.run / "failures" / f"step-{step:06d}"
        listed = ", ".join(map(str, windows[:MAX_WINDOWS])) + (", ..." if len(windows) > MAX_WINDOWS else "")
        subject = f"the {term}" if term in (GRADIENT, "total") else f"the loss term '{term}'"
        message = (
            f"Step {step}: {subject} is {value}{where}{named}. Training stopped before the optimiser moved.\n"
            f"Windows of the batch{named}: {listed}.\n"
            f"Batch and weights are saved in {folder}; look at them: tutti replay {folder}\n"
            "Look for non-finite or extreme values in these windows; else lower training.optimizer.lr, "
            "lengthen training.schedule.warmup, or clip more tightly (training.gradients)."
        )
        about: dict[str, Any] = {"step": step, "term": term, "value": str(value), "windows": windows}
        about |= {"message": message} | ({"skipped": True} if self.policy.may_skip else {})
        save_step(folder / "failure.json", about, batches, self.state.modules, world)
        return NonFiniteError(message, term=term, step=step, windows=windows, folder=folder)

    def _is_here(self, update: Update, term: str, batches: Sequence[Batch]) -> bool:
        """Whether this rank's rows alone have the fault: a forward pass without other ranks' rows."""
        gradient = term == GRADIENT and self.parallel.gives_term_gradients
        with (
            own_randomness(0),
            shared_batch(ONE_RANK),
            self.machine.autocast(),
            torch.set_grad_enabled(gradient),
        ):
            for batch in batches:
                _, terms = self.parallel.plain(batch, update.point.progress, update.active_terms)
                if gradient:
                    learning = [p for p in self.state.parameters.values() if p.requires_grad]
                    values = torch.autograd.grad(terms.total, learning, allow_unused=True)
                else:
                    named = {**terms.values, "total": terms.total}
                    values = [v for name, v in named.items() if term in (name, GRADIENT)]
                if not all(bool(value.isfinite().all()) for value in values if value is not None):
                    return True
        return False


def _modules_of(parameters: Mapping[str, Parameter]) -> str:
    """Where gradients are not finite: modules at two levels ("model.vision"), with the number in each."""
    totals: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, parameter in parameters.items():
        module = ".".join(name.split(".")[:2])
        totals[module] += 1
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            counts[module] += 1
    if not counts:
        return " (its norm overflows)"
    return " in " + ", ".join(f"{module} ({n} of {totals[module]})" for module, n in counts.items())

"""A step that went wrong, on one process or on one rank of several, saved whole by the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutti.distributed.ranks import ONE_RANK, shared_batch
from tutti.distributed.sharded_tensors import gather
from tutti.distributed.world import World
from tutti.training.faults.non_finite import NonFiniteError, batch_from_dict, batch_to_dict, fail, non_finite
from tutti.training.rng import own_randomness
from tutti.types import Batch

if TYPE_CHECKING:
    from tutti.training.trainer import Trainer


def failure(trainer: Trainer, term: str, value: float, batches: list[Batch]) -> NonFiniteError:
    """The error for a term (or "total", or "gradient") that is not finite, when batch and weights are saved.

    On several ranks the value is the mean over them, so all come here together. Each looks at its own rows by
    themselves; the message names the ranks where the fault lies and their windows, or all of them if it shows
    nowhere alone. What is saved is the batch of all, as one process would have met it.
    """
    world = trainer.parallel.world
    weights = gather(
        {"model": trainer.model.state_dict(), "objective": trainer.objective.state_dict()}, keep=world.first
    )
    settings: dict[str, Any] = {"term": term, "step": trainer.step + 1, "value": value}
    settings |= {"skipped": trainer.policy.may_skip, "weights": weights}
    settings |= {"parameters": trainer.parameters if term == "gradient" and trainer.parallel.looks else None}
    if world.ranks.count == 1:
        return fail(trainer.run, batches=batches, **settings)
    own = [window for batch in batches for window in batch.window.tolist()]
    found = world.all_gather((_is_here(trainer, term, batches), own))
    bad = {rank: windows for rank, (here, windows) in enumerate(found) if here}
    everything = rows_of_all(world, batches)

    def save() -> tuple[str, dict[str, Any]]:
        ranks = bad or {rank: windows for rank, (_, windows) in enumerate(found)}
        made = fail(trainer.run, batches=everything, ranks=ranks, **settings)
        about = {"term": made.term, "step": made.step, "windows": made.windows, "folder": made.folder}
        return str(made), about

    message, about = world.on_rank_zero(save)
    return NonFiniteError(message, **about)


def rows_of_all(world: World, batches: Sequence[Batch]) -> list[Batch]:
    """The whole batches whose rows the ranks hold, on the CPU; all ranks must call it."""
    if world.ranks.count == 1:
        return list(batches)
    parts = world.all_gather([batch_to_dict(batch.to("cpu")) for batch in batches])
    return [batch_from_dict(_joined(same)) for same in zip(*parts, strict=True)]


def _joined(parts: Sequence[Any]) -> Any:
    """Equal structures with their tensors one behind the other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    return first


def _is_here(trainer: Trainer, term: str, batches: Sequence[Batch]) -> bool:
    """Whether this rank's rows alone have the fault: a forward pass once more, with no other rank's rows."""
    moment = trainer.strategy.at(trainer.step)
    only = moment.phase.counting(trainer.objective.names)
    with own_randomness(trainer.config.seed), shared_batch(ONE_RANK), trainer.machine.autocast():
        for batch in batches:
            if term == "gradient" and trainer.parallel.looks:
                _, terms = trainer.parallel.plain(batch, moment.progress, only)
                learning = [p for p in trainer.parameters.values() if p.requires_grad]
                gradients = torch.autograd.grad(terms.total, learning, allow_unused=True)
                if not all(bool(g.isfinite().all()) for g in gradients if g is not None):
                    return True
                continue
            with torch.no_grad():
                _, terms = trainer.parallel.plain(batch, moment.progress, only)
            values = {**terms.values, "total": terms.total}
            if non_finite({name: float(v) for name, v in values.items() if term in (name, "gradient")}):
                return True
    return False

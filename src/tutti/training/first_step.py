"""What is said once, at the first step: the batch as pictures, its shapes, parameters that nothing moves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path

from torch.nn.parameter import Parameter

from tutti.distributed.ranks import MicroBatches
from tutti.storage.files import write_atomically
from tutti.training.faults.non_finite import gradient_warnings
from tutti.training.first_batch import save_pictures, shapes_tree
from tutti.training.optim.optimizers import OptimizerSet
from tutti.types import Batch, Features, LossTerms

log = logging.getLogger("tutti.training")


def show_first(
    run: Path,
    batch: Batch,
    features: Features,
    terms: LossTerms,
    texts: Callable[[Batch], list[str]] | None = None,
) -> None:
    """Pictures and shapes of the first batch into `run`. `texts` gives the batch's instructions.

    Raises: UserError if the disk is full.
    """
    tree = shapes_tree({"batch": batch, "features": features, "terms": terms})
    write_atomically(run / "shapes.txt", tree)
    save_pictures(batch, run / "first_batch.png", texts(batch) if texts else None)


def warn_unreached(
    parameters: Mapping[str, Parameter], names: Collection[str], counting: Collection[str]
) -> None:
    """Warns of what should have a gradient and has none: not of frozen parts, nor of the heads (and the
    decoder) of the terms among `names` that are not `counting`."""
    out = [name for name in names if name not in counting]
    silent = tuple("model.action." if name == "action" else f"objective.terms.{name}." for name in out)
    learning = {n: p for n, p in parameters.items() if p.requires_grad and not n.startswith(silent)}
    for warning in gradient_warnings(learning):
        log.warning(warning)


def warn_alone(update: MicroBatches) -> None:
    """Warns, once in a process, of a mean that is not that of the whole update."""
    if update.unknown:
        _tell_alone()


@cache
def _tell_alone() -> None:
    log.warning(
        "training.accumulation: a term of your own takes a masked_mean of each micro-batch alone: the lone "
        "row of one counts as much as the many of another. Give masked_mean its mask as a function of the "
        "batch too, `of=` (docs/terms.md)"
    )


def warn_unmoved(parameters: Mapping[str, Parameter], optimizer: OptimizerSet) -> None:
    """Warns of parameters that no optimiser owns."""
    owned = {id(parameter) for parameter in optimizer.parameters}
    for name, parameter in parameters.items():
        if id(parameter) not in owned:
            log.warning("parameter %s is moved by no optimiser", name)

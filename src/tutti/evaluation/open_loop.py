"""Open loop: the error of predicted actions on held-out episodes, and whether the text moves them. No
simulator.

Validation error is a poor judge of policies (SIMPLER, arXiv 2405.05941: r = .46 with real success, rollouts
.98); it finds broken training fast, and the part that is executed is the part that counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.models.vla import VLA
from tutti.suites.environment import EnvironmentFactory
from tutti.types import Batch, Observation, UserError

PARTS = ("first", "executed", "chunk")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionError:
    """Masked mean absolute error sum m |a^ - a*| / sum m: of the first action, of the executed part, of the
    chunk.
    """

    first: float
    executed: float
    chunk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupError:
    """The errors over `windows` held-out windows, normalised and in data units (the mean over action
    dimensions).

    `swap` = sum m |a(l) - a(l')| / sum m |a(l) - a*| over the chunk, where l' is another group's
    instruction: how far the text moves the actions, in units of the error. Near 0 the model ignores its
    text. None with one group only.
    """

    name: str
    windows: int
    normalised: ActionError
    data: ActionError
    swap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoopResult:
    """`overall` over all windows, `groups` by task (or instruction) in the order of their names."""

    overall: GroupError
    groups: tuple[GroupError, ...]
    executed: int
    chunk: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def tasks_of(instructions: Sequence[str], suite: EnvironmentFactory) -> tuple[str, ...]:
    """The task that each instruction belongs to; a text that the suite does not know is its own group."""
    task = {
        text: name
        for name in suite.tasks
        for split in ("train", "held_out")
        for text in suite.instructions(name, split)
    }
    return tuple(task.get(text, text) for text in instructions)


@torch.no_grad()
def measure(
    model: VLA,
    batches: Iterable[Batch],
    normalizer: Normalizer,
    tokenizer: Tokenizer,
    instructions: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    partners: Mapping[str, str] | None = None,
    actions_per_query: int = 4,
) -> OpenLoopResult:
    """Errors of `model.predict` over `batches` (held-out windows), per group and in all.

    `instructions[i]` is the text of `instruction_id` i, `groups[i]` the task it belongs to (left out: each
    text is its own group). The swapped instruction comes from the group `partners` names, else from the
    next group by name.

    Raises UserError where there is no batch, an instruction_id has no text, or a prediction is not finite.
    """
    if groups is None:
        groups = instructions
    if len(groups) != len(instructions):
        raise UserError(
            f"groups: expected one for each of {len(instructions)} instructions, got {len(groups)}."
        )
    names = tuple(groups)
    swapped = swapped_texts(names, partners or {})
    encoded = tokenizer.encode(list(instructions))
    added = _Sums(
        model,
        names,
        swapped=swapped,
        encoded=encoded,
        scale=_scales(model, normalizer),
        executed=actions_per_query,
    )
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            added.add(batch)
    finally:
        model.train(was_training)
    sums = added.groups
    if not sums:
        raise UserError("open loop: there is no held-out window. Raise data.validation_fraction.")
    everything: dict[str, float] = defaultdict(float)
    for found in sums.values():
        for key, value in found.items():
            everything[key] += value
    return OpenLoopResult(
        overall=_group("all", everything, swapped is not None),
        groups=tuple(_group(name, sums[name], swapped is not None) for name in sorted(sums)),
        executed=min(actions_per_query, model.spec.horizon),
        chunk=model.spec.horizon,
    )


class _Sums:
    """Sums of absolute errors and their counts, per group."""

    def __init__(
        self,
        model: VLA,
        names: tuple[str, ...],
        *,
        swapped: Int[Tensor, " i"] | None,
        encoded: tuple[Tensor, Tensor],
        scale: Float[Tensor, "e a"],
        executed: int,
    ) -> None:
        self.model, self.names, self.swapped, self.encoded = model, names, swapped, encoded
        self.scale, self.executed = scale, executed
        self.groups: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, batch: Batch) -> None:
        """Predicts the batch, with its own texts and with the swapped ones."""
        device = next(self.model.parameters()).device
        batch = batch.to(device)
        ids = batch.instruction_id.cpu()
        if int(ids.max()) >= len(self.names):
            raise UserError(
                f"open loop: instruction_id {int(ids.max())} has no text; only {len(self.names)} were given."
            )
        predicted = self._predict(batch.observation)
        mask = batch.action_mask
        errors = {"error": predicted - batch.actions}
        if self.swapped is not None:
            other = self.swapped[ids]
            told = replace(
                batch.observation,
                text=self.encoded[0][other].to(device),
                text_mask=self.encoded[1][other].to(device),
            )
            errors["moved"] = predicted - self._predict(told)
        row_scale = self.scale.to(device)[batch.embodiment][:, None, :]
        rows: dict[str, Tensor] = {"windows": torch.ones(len(ids))}
        for name, error in errors.items():
            size = torch.where(mask, error.abs(), 0.0)
            rows |= {f"{name}/{key}": value for key, value in _parts(size, self.executed).items()}
            rows |= {
                f"{name}/data/{key}": value for key, value in _parts(size * row_scale, self.executed).items()
            }
        rows |= {f"count/{key}": value for key, value in _parts(mask.double(), self.executed).items()}
        table = {key: value.double().cpu() for key, value in rows.items()}
        for group in {self.names[i] for i in ids.tolist()}:
            here = torch.tensor([self.names[i] == group for i in ids.tolist()])
            for key, value in table.items():
                self.groups[group][key] += float(value[here].sum())

    def _predict(self, observation: Observation) -> Float[Tensor, "b t a"]:
        predicted = self.model.predict(observation)
        if not bool(torch.isfinite(predicted).all()):
            raise UserError(
                "open loop: the model predicts NaN or infinity for a held-out window. Look for weights that "
                "have diverged (in the records of the training) and for extreme states."
            )
        return predicted


def _parts(values: Float[Tensor, "b t a"], executed: int) -> dict[str, Float[Tensor, " b"]]:
    """Sums over the first action, the executed part and the chunk of each window."""
    lengths = {"first": 1, "executed": executed, "chunk": values.shape[1]}
    return {name: values[:, :length].double().sum((1, 2)) for name, length in lengths.items()}


def _group(name: str, sums: Mapping[str, float], with_swap: bool) -> GroupError:
    def error(prefix: str) -> ActionError:
        means = {part: sums[f"{prefix}/{part}"] / max(1.0, sums[f"count/{part}"]) for part in PARTS}
        return ActionError(**means)

    distance = sums["error/chunk"]
    return GroupError(
        name=name,
        windows=int(sums["windows"]),
        normalised=error("error"),
        data=error("error/data"),
        swap=sums["moved/chunk"] / distance if with_swap and distance > 0 else None,
    )


def swapped_texts(names: Sequence[str], partners: Mapping[str, str]) -> Int[Tensor, " i"] | None:
    """For each instruction the number of its replacement: that of the same rank in the partner's group.

    `names[i]` is the group (task) of instruction i. None where there is one group only."""
    members: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        members[name].append(number)
    order = sorted(members)
    if len(order) < 2:
        return None
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    other: list[int] = []
    for number, name in enumerate(names):
        partner = partners.get(name, following[name])
        texts = members.get(partner) or members[following[name]]
        other.append(texts[members[name].index(number) % len(texts)])
    return torch.tensor(other)


def _scales(model: VLA, normalizer: Normalizer) -> Float[Tensor, "e a"]:
    """Data units per normalised unit of each embodiment's actions; 0 where it has no such dimension."""
    table = torch.zeros(len(model.spec.embodiments), model.spec.action_dim)
    for row, name in enumerate(model.spec.embodiments):
        if name not in normalizer.stats:
            raise UserError(f"embodiment {name!r} has no statistics; found {', '.join(normalizer.stats)}.")
        _, scale = normalizer.stats[name].action.center_and_scale(normalizer.kind)
        table[row, : len(scale)] = torch.from_numpy(scale).float()
    return table

"""Probes on a checkpoint over held-out windows, without a simulator: does it look, listen, or copy?

| probe | file | question |
|---|---|---|
| removal | removal.py | how far the actions owe to the text, each view, the state |
| baselines | baselines.py | whether one input alone, by a plain regression, does as well |
| linear probes | linear_probe.py | what training put into the features |
| consistency | consistency.py | whether successive chunks agree |
| occlusion | occlusion.py | where in the picture the action comes from |

They find a model that is broken in a way that the loss does not show. They do not replace rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from tutti.data.config import DataBundle
from tutti.evaluation.probes.baselines import Baseline, Leak, baselines, state_leak
from tutti.evaluation.probes.chunk_consistency import Consistency, consistency
from tutti.evaluation.probes.findings import Finding, findings
from tutti.evaluation.probes.input_ablation import Removals, changes, remove
from tutti.evaluation.probes.linear_probe import Probe, linear_probes
from tutti.evaluation.probes.occlusion import Maps, Occlusion, occlude
from tutti.evaluation.probes.samples import held_out, training
from tutti.models.vla import VLA

HELD_OUT, TRAINING = 2000, 4000
"""At most so many windows of held-out and of training episodes, evenly spread."""
PARTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Everything that was found, over `windows` held-out windows of `episodes` episodes."""

    windows: int
    episodes: int
    training_windows: int
    executed: int
    seed: int
    removals: Removals
    baselines: tuple[Baseline, ...]
    leak: Leak
    probes: tuple[Probe, ...]
    consistency: Consistency | None
    occlusion: Occlusion
    findings: tuple[Finding, ...]

    @property
    def alarms(self) -> tuple[Finding, ...]:
        """What belongs at the top of a report."""
        return tuple(found for found in self.findings if found.alarm)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def run_probes(
    model: VLA,
    untrained: VLA,
    data: DataBundle,
    *,
    groups: Sequence[str],
    partners: Mapping[str, str],
    execute: int,
    most_held_out: int = HELD_OUT,
    most_training: int = TRAINING,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ProbeResult, Maps]:
    """All probes of `model` on `data`, and the occlusion maps to draw.

    `untrained` has the same config and fresh weights. `groups[i]` is the task of instruction i, `partners`
    the task whose text a task is told in the swap, `execute` the actions that are carried out of a chunk. The
    same arguments give the same numbers.

    Raises: UserError if no episode is held out.
    """
    met, seen = held_out(data, most_held_out), training(data, most_training)
    texts, steps = data.windows.instructions, min(execute, model.spec.horizon)
    modes = model.training, untrained.training
    model.eval()
    untrained.eval()

    def done(part: int) -> None:
        if progress is not None:
            progress(part, PARTS)

    try:
        changed = changes(model, data.tokenizer, texts, groups, partners)
        removals, errors = remove(model, met, changed, execute=steps, seed=seed)
        done(1)
        alone = baselines(seen, met, errors, groups=groups, execute=steps, seed=seed)
        leak = state_leak(seen, met)
        done(2)
        linear = linear_probes(model, untrained, seen, met, groups=groups, seed=seed)
        done(3)
        chunks = consistency(model, met, centre=_centre(data), execute=steps, seed=seed)
        done(4)
        patches, maps = occlude(model, met, texts, execute=steps, seed=seed)
        done(5)
    finally:
        model.train(modes[0])
        untrained.train(modes[1])
    return ProbeResult(
        windows=len(met),
        episodes=met.num_episodes,
        training_windows=len(seen),
        executed=steps,
        seed=seed,
        removals=removals,
        baselines=alone,
        leak=leak,
        probes=linear,
        consistency=chunks,
        occlusion=patches,
        findings=findings(
            removals=removals,
            baselines=alone,
            leak=leak,
            probes=linear,
            chunks=chunks,
            occlusion=patches,
        ),
    ), maps


def _centre(data: DataBundle) -> Float64[np.ndarray, " a"]:
    """What a command of 0 is in normalised units."""
    embodiment = data.spec.embodiments[0]
    return data.normalizer.apply_action(np.zeros(data.spec.action_dim), embodiment)

"""Probes of a checkpoint on held-out episodes, without a simulator: which inputs does the policy use?

| probe | file | question |
|---|---|---|
| input ablation | input_ablation.py | how far the actions depend on the text, each view, the state |
| baselines | baselines.py | whether a regression from one input alone does as well |
| linear probes | linear_probe.py | what training put into the features |
| chunk consistency | chunk_consistency.py | whether successive chunks agree |
| occlusion | occlusion.py | which image patches move the action |

They find a model that is broken in a way that the loss does not show. They do not replace rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from tutti.data.bundle import DataBundle
from tutti.data.checks.leak import Leak, state_leak
from tutti.data.samples import held_out, training
from tutti.evaluation.probes.baselines import Baseline, baselines
from tutti.evaluation.probes.chunk_consistency import ChunkConsistency, chunk_consistency
from tutti.evaluation.probes.findings import findings
from tutti.evaluation.probes.input_ablation import InputAblations, ablate, input_changes
from tutti.evaluation.probes.linear_probe import Probe, linear_probes
from tutti.evaluation.probes.occlusion import Maps, Occlusion, occlude
from tutti.findings import Finding
from tutti.models.vla import VLA

HELD_OUT, TRAINING = 2000, 4000
"""Maximum numbers of windows of held-out and of training episodes, evenly spread."""
PARTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Results of all probes, over `windows` held-out windows of `episodes` episodes."""

    windows: int
    episodes: int
    training_windows: int
    executed: int
    seed: int
    ablations: InputAblations
    baselines: tuple[Baseline, ...]
    leak: Leak
    probes: tuple[Probe, ...]
    chunk_consistency: ChunkConsistency | None
    occlusion: Occlusion
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The faults and warnings, which the report also shows at its top."""
        return tuple(finding for finding in self.findings if finding.is_problem)

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
    actions_per_query: int,
    max_held_out: int = HELD_OUT,
    max_training: int = TRAINING,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ProbeResult, Maps]:
    """All probes of `model` on `data`, and the occlusion maps to draw.

    `untrained` has the same config and fresh weights. `groups[i]` is the task of instruction i, `partners`
    the task whose text a task is told in the swap, `actions_per_query` the executed actions of a
    chunk. The same arguments give the same numbers.

    Raises: UserError if no episode is held out.
    """
    held, train = held_out(data, max_held_out), training(data, max_training)
    texts, steps = data.windows.instructions, min(actions_per_query, model.spec.horizon)
    modes = model.training, untrained.training
    model.eval()
    untrained.eval()

    def done(part: int) -> None:
        if progress is not None:
            progress(part, PARTS)

    try:
        changes = input_changes(model, data.tokenizer, texts, groups, partners)
        ablations, errors = ablate(model, held, changes, executed=steps, seed=seed)
        done(1)
        alone = baselines(train, held, errors, groups=groups, executed=steps, seed=seed)
        leak = state_leak(train, held)
        done(2)
        linear = linear_probes(model, untrained, train, held, groups=groups, seed=seed)
        done(3)
        chunks = chunk_consistency(model, held, centre=_centre(data), executed=steps, seed=seed)
        done(4)
        patches, maps = occlude(model, held, texts, executed=steps, seed=seed)
        done(5)
    finally:
        model.train(modes[0])
        untrained.train(modes[1])
    return ProbeResult(
        windows=len(held),
        episodes=held.num_episodes,
        training_windows=len(train),
        executed=steps,
        seed=seed,
        ablations=ablations,
        baselines=alone,
        leak=leak,
        probes=linear,
        chunk_consistency=chunks,
        occlusion=patches,
        findings=findings(
            ablations=ablations,
            baselines=alone,
            leak=leak,
            probes=linear,
            chunks=chunks,
            occlusion=patches,
        ),
    ), maps


def _centre(data: DataBundle) -> Float64[np.ndarray, " a"]:
    """A command of 0 in normalised units."""
    embodiment = data.spec.embodiments[0]
    return data.normalizer.apply_action(np.zeros(data.spec.action_dim), embodiment)

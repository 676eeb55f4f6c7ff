"""Probes of a checkpoint on held-out episodes, without a simulator: which inputs does the policy use?

| probe | function | question |
|---|---|---|
| input ablation | `ablate` | how far the actions depend on the text, each view, the state |
| baselines | `baselines` | whether a regression from one input alone does as well |
| linear probes | `linear_probes` | what training put into the features |
| chunk consistency | `chunk_consistency` | whether successive chunks agree |
| occlusion | `occlude` | which image patches move the action |

They find a model that is broken in a way that the loss does not show. They do not replace rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tutti.data.bundle import DataBundle, held_out, training
from tutti.data.checks.ridge import Leak, state_leak
from tutti.evaluation.probes.action_probes import ChunkConsistency, InputAblations, ablate, chunk_consistency
from tutti.evaluation.probes.findings import findings
from tutti.evaluation.probes.occlusion import Maps, Occlusion, occlude
from tutti.evaluation.probes.ridge_probes import Baseline, Probe, baselines, linear_probes
from tutti.evaluation.probes.setup import ProbeSetup
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
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[ProbeResult, Maps]:
    """All probes of `model` on `data`, and the occlusion maps to draw.

    `untrained` has the same config and fresh weights. `groups[i]` is the task of instruction i, `partners`
    the task whose text a task is told in the swap, `actions_per_query` the executed actions of a
    chunk. The same arguments give the same numbers.

    Raises: UserError if no episode is held out.
    """
    setup = ProbeSetup(
        model=model,
        data=data,
        train=training(data, max_training),
        held=held_out(data, max_held_out),
        groups=groups,
        partners=partners,
        executed=min(actions_per_query, model.spec.horizon),
        seed=seed,
    )
    modes = model.training, untrained.training
    model.eval()
    untrained.eval()
    try:
        ablations, own = ablate(setup)
        progress(1, PARTS)
        regressions = baselines(setup, own["error"], own["count"])
        leak = state_leak(setup.train, setup.held)
        progress(2, PARTS)
        linear = linear_probes(setup, untrained)
        progress(3, PARTS)
        chunks = chunk_consistency(setup)
        progress(4, PARTS)
        patches, maps = occlude(setup)
        progress(5, PARTS)
    finally:
        model.train(modes[0])
        untrained.train(modes[1])
    return ProbeResult(
        windows=len(setup.held),
        episodes=setup.held.num_episodes,
        training_windows=len(setup.train),
        executed=setup.executed,
        seed=seed,
        ablations=ablations,
        baselines=regressions,
        leak=leak,
        probes=linear,
        chunk_consistency=chunks,
        occlusion=patches,
        findings=findings(
            ablations=ablations,
            baselines=regressions,
            leak=leak,
            probes=linear,
            chunk_consistency=chunks,
            occlusion=patches,
        ),
    ), maps

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tutti.data.checks.ridge import Leak, leak_findings, state_leak
from tutti.evaluation.probes import action_probes, ridge_probes
from tutti.evaluation.probes.action_probes import ChunkConsistency, InputAblation, InputAblations
from tutti.evaluation.probes.occlusion import Maps, Occlusion, occlude
from tutti.evaluation.probes.ridge_probes import Baseline, Probe
from tutti.evaluation.probes.setup import ProbeSetup
from tutti.evaluation.statistics.intervals import Estimate
from tutti.findings import BASELINE_RATIO_MAX, INPUT_EFFECT_MIN, Finding, Severity

PROBES: dict[str, Callable[[ProbeSetup], Any]] = {
    "ablations": action_probes.ablate,
    "baselines": ridge_probes.baselines,
    "leak": lambda setup: state_leak(setup.train, setup.held),
    "probes": ridge_probes.linear_probes,
    "chunk_consistency": action_probes.chunk_consistency,
    "occlusion": occlude,
}
"""Every probe, by the field of `ProbeResult` that it fills; the last also gives the maps to draw."""


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


def run_probes(
    setup: ProbeSetup, progress: Callable[[int, int], object] = lambda done, total: None
) -> tuple[ProbeResult, Maps]:
    """All probes, and the occlusion maps to draw. Raises: UserError if no episode is held out."""
    networks = setup.model, setup.untrained
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    found: dict[str, Any] = {}
    try:
        for number, (name, probe) in enumerate(PROBES.items()):
            progress(number, len(PROBES))
            found[name] = probe(setup)
        found["occlusion"], maps = found["occlusion"]
        progress(len(PROBES), len(PROBES))
    finally:
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)
    return ProbeResult(
        windows=len(setup.held),
        episodes=setup.held.num_episodes,
        training_windows=len(setup.train),
        executed=setup.executed,
        seed=setup.seed,
        **found,
        findings=findings(**found),
    ), maps


TOLD = (
    (ridge_probes.VISION, ridge_probes.STATE),
    (ridge_probes.VISION, ridge_probes.ACTION),
    (ridge_probes.READOUT, ridge_probes.ACTION),
)
"""The linear probes that a sentence tells: features and target."""
Use = Literal["used", "ignored", "unresolved"]
SEVERITY_OF_USE: dict[Use, Severity] = {"used": "ok", "ignored": "warning", "unresolved": "hint"}


def findings(
    *,
    ablations: InputAblations,
    baselines: Sequence[Baseline],
    leak: Leak,
    probes: Sequence[Probe],
    chunk_consistency: ChunkConsistency | None,
    occlusion: Occlusion,
) -> tuple[Finding, ...]:
    """Every sentence, in the order of the table in docs/background/probes.md."""
    of = {(probe.features, probe.target): probe for probe in probes}
    return (
        _instruction(ablations, of.get((ridge_probes.VISION, ridge_probes.TASK))),
        _images(ablations),
        *_copying(ablations, baselines),
        *_history(ablations, baselines),
        *(leak_findings(leak) if leak.leaks else ()),
        *_beaten(baselines),
        *(_features(of[key]) for key in TOLD if key in of),
        *([] if chunk_consistency is None else [_chunks(chunk_consistency)]),
        *_occlusion(occlusion),
    )


def _hint(kind: str, sentence: str, number: float, severity: Severity = "hint") -> Finding:
    return Finding(kind=kind, severity=severity, sentence=sentence, number=number)


def between(estimate: Estimate, scale: int | float = 1, digits: int = 2) -> str:
    """ "0.31 [0.25, 0.38]"."""
    return " ".join(estimate.texts(scale, digits))


def _use(row: InputAblation) -> Use:
    """Whether the actions depend on an input: the whole interval lies on one side of INPUT_EFFECT_MIN."""
    if row.action_shift.below(INPUT_EFFECT_MIN):
        return "ignored"
    return "used" if row.action_shift.above(INPUT_EFFECT_MIN) else "unresolved"


def _by_use(what: str, row: InputAblation, moved: str, more: str = "", **endings: str) -> Finding:
    """How far an input moves the actions, what follows, and what else there is to say."""
    use = _use(row)
    sentence = f"{moved}: {endings[use]}{more}"
    return _hint(f"{what}_{use}", sentence, row.action_shift.value, SEVERITY_OF_USE[use])


def _instruction(ablations: InputAblations, shown: Probe | None) -> Finding:
    swap, blank = ablations.find(action_probes.SWAP), ablations.find(action_probes.NO_TEXT)
    if swap is None:
        return Finding(
            kind="one_instruction",
            severity="hint",
            sentence="The data has one task, so no other instruction can be swapped in: whether the model "
            "uses the instruction cannot be tested.",
        )
    moved = "Another task's instruction moves the executed actions by "
    moved += f"{between(swap.action_shift)} times their error"
    if blank is not None:
        moved += f", no instruction by {between(blank.action_shift)} times"
    scene = ""
    if shown is not None:
        scene = (
            f" A linear map from the images names the task in {100 * shown.trained.value:.0f} % of the "
            "windows: the nearer to 100 %, the less these data need the text. Whether scenes overlap where "
            "the robot will act cannot be seen offline."
        )
    return _by_use(
        "instruction",
        swap,
        moved,
        ignored="this model ignores the instruction.",
        used=f"the text matters (the error grows by {between(swap.increase, 100, 0)} %).",
        unresolved="too few episodes to say whether the text matters.",
        more=scene,
    )


def _images(ablations: InputAblations) -> Finding:
    row = ablations.find(action_probes.NO_VISION)
    assert row is not None
    unused = [view.name for view in ablations.rows if view.name.endswith(" view") and _use(view) == "ignored"]
    return _by_use(
        "images",
        row,
        f"Without the images the executed actions move by {between(row.action_shift)} times their error, and "
        f"the error changes by {between(row.increase, 100, 0)} %",
        ignored="this model ignores the images.",
        used="the images matter.",
        unresolved="too few episodes to say whether they matter.",
        more=f" Taking away one view changes next to nothing: {', '.join(unused)}." if unused else "",
    )


def _copying(ablations: InputAblations, baselines: Sequence[Baseline]) -> tuple[Finding, ...]:
    alone = next((row for row in baselines if row.name == ridge_probes.STATE_ALONE), None)
    if alone is None:  # there is no state
        return ()
    withheld = ablations.find(action_probes.NO_STATE)
    text = f"A regression from the state alone has {between(alone.ratio)} times the model's error"
    if withheld is None:  # it was not taken away, as the model is not given it
        text = f"This model is not given its state (model.fusion.withhold_state). {text}."
        return (_hint("state_withheld", text, alone.ratio.value, "ok"),)
    text += (
        f"; without the state the actions move by {between(withheld.action_shift)} times their error and "
        f"the error changes by {between(withheld.increase, 100, 0)} %"
    )
    near, cure = alone.ratio.below(BASELINE_RATIO_MAX), ""
    severity: Severity = "hint"
    if near and _use(withheld) == "ignored":
        kind = "state_not_beaten"
        ending = "this model does not copy its state, and is not shown to do better than if it did."
        severity = "warning" if alone.ratio.below(1.0) else "hint"
    elif near:
        kind, severity, ending = "state_copied", "warning", "this model could be copying its own state."
        cure = "Withhold the state in training (model.fusion.state_dropout), and trust closed-loop rollouts "
        cure += "only."
    elif alone.ratio.above(BASELINE_RATIO_MAX):
        kind, severity, ending = "state_beaten", "ok", "the model does more than copy its state."
    else:
        kind, ending = "state_unresolved", "too near to say that the model does more than copy its state."
    return (replace(_hint(kind, f"{text}: {ending}", alone.ratio.value, severity), cure=cure),)


def _history(ablations: InputAblations, baselines: Sequence[Baseline]) -> tuple[Finding, ...]:
    """What a policy with a history does with it, beside what copying the action before would do: a history
    shows the motion so far, which invites to go on with it (1905.11979)."""
    row = ablations.find(action_probes.NO_HISTORY)
    if row is None:
        return ()
    parts = [ablations.find(name) for name in (action_probes.NO_PAST_IMAGES, action_probes.NO_PAST_STATES)]
    each = ", ".join(f"{part.name} {between(part.action_shift)}" for part in parts if part is not None)
    moved = (
        f"Without the history the executed actions move by {between(row.action_shift)} times their error "
        f"({each}), and the error changes by {between(row.increase, 100, 0)} %"
    )
    before = next((one for one in baselines if one.name == ridge_probes.PREVIOUS), None)
    copied = before is not None and not before.ratio.above(1.0)
    text = (
        " A regression from the action before alone does as well as the model: with a history, which shows "
    )
    text += "the motion so far, it may do no more than go on with it; trust closed-loop rollouts only."
    found = _by_use(
        "history",
        row,
        moved,
        ignored="this model ignores its history, which costs tokens: try data.history=[0].",
        used="the history matters.",
        unresolved="too few episodes to say whether the history matters.",
        more=text * (copied and _use(row) == "used"),
    )
    return (replace(found, severity="warning") if copied and _use(row) == "used" else found,)


def _beaten(baselines: Sequence[Baseline]) -> list[Finding]:
    stronger = [row for row in baselines if row.name != ridge_probes.STATE_ALONE and not row.ratio.above(1.0)]
    best = min(baselines, key=lambda row: row.error.value)
    if not stronger:
        text = (
            f"The model beats every regression from one input; the best, from {best.name}, has "
            f"{between(best.ratio)} times its error."
        )
        return [_hint("baselines_beaten", text, best.ratio.value, "ok")]
    return [
        _hint(
            "baseline_not_beaten",
            f"The model is not shown to beat a plain regression ({row.name}): the regression's error is "
            f"{between(row.ratio)} times the model's.",
            row.ratio.value,
            "warning" if row.ratio.below(1.0) else "hint",
        )
        for row in stronger
    ]


def _features(row: Probe) -> Finding:
    gained = row.trained.interval is not None and row.trained.interval.low > max(0.0, row.untrained.value)
    verb = "tells" if gained else "is not shown to tell more of"
    text = (
        f"A linear map from the {row.features} features {verb} the {row.target}: R2 {between(row.trained)}, "
        f"from an untrained model's {between(row.untrained)}."
    )
    return _hint("features", text, row.trained.value)


def _chunks(chunks: ChunkConsistency) -> Finding:
    text = ""
    if chunks.chunk_disagreement is not None:
        text = (
            f"When the policy is queried again after {chunks.distance} actions, its plan for the same "
            f"moments changes by {between(chunks.chunk_disagreement)} times its error. "
        )
    text += (
        f"Of consecutive actions beyond a dead band of {action_probes.DEAD_BAND} that are executed, "
        f"{between(chunks.sign_flips, 100, 1)} % turn back, in the recording "
        f"{between(chunks.recorded_flips, 100, 1)} %."
    )
    return _hint("chunks", text, chunks.sign_flips.value)


def _occlusion(occlusion: Occlusion) -> list[Finding]:
    pixels, tokens = occlusion.pixels, occlusion.tokens
    even = pixels.top_patches / pixels.patches
    views = ", ".join(f"{view.rsplit('.', 1)[-1]} {100 * share:.0f} %" for view, share in pixels.views)
    in_image = (
        f"With one patch at a time replaced by its average, {between(pixels.top_share, 100, 0)} % of what "
        f"moves the action lies in the most sensitive tenth of the patches ({100 * even:.0f} % if all "
        f"mattered alike); by view: {views}."
    )
    in_tokens = (
        f"With one token at a time removed, it is {between(tokens.top_share, 100, 0)} % in a tenth of the "
        "tokens: which tokens the fusion reads, not where in the image their content comes from."
    )
    shares = pixels.top_share.value, tokens.top_share.value
    return [_hint("patches", *one) for one in zip((in_image, in_tokens), shares, strict=True)]

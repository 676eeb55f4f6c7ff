"""What the probes say in plain words, each sentence with the number behind it, and where they sound an alarm.

The thresholds are choices, made once and here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tutti.evaluation.probes.baselines import STATE as STATE_ALONE
from tutti.evaluation.probes.baselines import Baseline, Leak
from tutti.evaluation.probes.chunk_consistency import DEAD_BAND, ChunkConsistency
from tutti.evaluation.probes.input_ablation import (
    NO_STATE,
    NO_TEXT,
    NO_VISION,
    SWAP,
    InputAblation,
    InputAblations,
)
from tutti.evaluation.probes.linear_probe import ACTION, READOUT, STATE, TASK, VISION, Probe
from tutti.evaluation.probes.occlusion import Occlusion
from tutti.evaluation.statistics.intervals import Estimate

SMALL = 0.1
"""An input that moves the actions by less than this share of their error cannot decide what the robot does:
the model is wrong by ten times as much anyway."""
NEAR = 1.1
"""A baseline within 10 % of the model's error: whatever the model does, that input alone nearly does too."""

Outcome = Literal["uses", "ignores", "copies", "leaks", "beats", "does not beat", "unresolved", "measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`about` is what was probed; `alarm` where the sentence belongs at the top of a report."""

    about: str
    outcome: Outcome
    sentence: str
    alarm: bool = False


def findings(
    *,
    ablations: InputAblations,
    baselines: Sequence[Baseline],
    leak: Leak,
    probes: Sequence[Probe],
    chunks: ChunkConsistency | None,
    occlusion: Occlusion,
) -> tuple[Finding, ...]:
    """Every sentence, in the order of the table in docs/probes.md."""
    found = [_instruction(ablations, probes), _pictures(ablations), _copying(ablations, baselines)]
    found += [*_leak(leak), *_beaten(baselines), *_features(probes)]
    if chunks is not None:
        found.append(_chunks(chunks))
    return (*found, *_occlusion(occlusion))


def between(estimate: Estimate, scale: int | float = 1, digits: int = 2) -> str:
    """ "0.31 [0.25, 0.38]"."""

    def text(value: float) -> str:
        return f"{round(scale * value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0"

    if estimate.interval is None:
        return f"{text(estimate.value)} [one episode, no interval]"
    return f"{text(estimate.value)} [{text(estimate.interval.low)}, {text(estimate.interval.high)}]"


def _use(row: InputAblation) -> Outcome:
    """Whether the actions owe anything to an input: the whole interval on one side of `SMALL`."""
    if row.action_shift.below(SMALL):
        return "ignores"
    return "uses" if row.action_shift.above(SMALL) else "unresolved"


def _instruction(ablations: InputAblations, probes: Sequence[Probe]) -> Finding:
    swap, blank = ablations.find(SWAP), ablations.find(NO_TEXT)
    if swap is None:
        text = (
            "The data has one task, so there is no other instruction to swap in: whether the model listens "
        )
        return Finding(about="instruction", outcome="measured", sentence=text + "cannot be asked here.")
    outcome = _use(swap)
    moved = "Another task's instruction moves the executed actions by "
    moved += f"{between(swap.action_shift)} times their error"
    if blank is not None:
        moved += f", no instruction by {between(blank.action_shift)} times"
    shown = next((p for p in probes if (p.features, p.target) == (VISION, TASK)), None)
    scene = ""
    if shown is not None:
        scene = (
            f" A linear map from the pictures names the task in {100 * shown.trained.value:.0f} % of the "
            "windows: the nearer to 100 %, the less these data need the text. Whether scenes overlap where "
            "the robot will act cannot be seen offline."
        )
    endings: dict[Outcome, str] = {
        "ignores": "this model ignores the instruction.",
        "uses": f"the text matters (the error grows by {between(swap.increase, 100, 0)} %).",
    }
    ending = endings.get(outcome, "too few episodes to say whether the text matters.")
    return Finding(
        about="instruction",
        outcome=outcome,
        sentence=f"{moved}: {ending}{scene}",
        alarm=outcome == "ignores",
    )


def _pictures(ablations: InputAblations) -> Finding:
    row = ablations.find(NO_VISION)
    assert row is not None
    outcome = _use(row)
    moved = (
        f"Without the images the executed actions move by {between(row.action_shift)} times their error, "
        f"and the error changes by {between(row.increase, 100, 0)} %"
    )
    endings: dict[Outcome, str] = {
        "ignores": "this model ignores the pictures.",
        "uses": "the pictures matter.",
    }
    unused = [view.name for view in ablations.rows if view.name.endswith(" view") and _use(view) == "ignores"]
    more = f" Taking away one view changes next to nothing: {', '.join(unused)}." if unused else ""
    ending = endings.get(outcome, "too few episodes to say whether they matter.")
    return Finding(
        about="pictures",
        outcome=outcome,
        sentence=f"{moved}: {ending}{more}",
        alarm=outcome == "ignores",
    )


def _copying(ablations: InputAblations, baselines: Sequence[Baseline]) -> Finding:
    alone = next(row for row in baselines if row.name == STATE_ALONE)
    withheld = ablations.find(NO_STATE)
    text = f"A regression from the state alone has {between(alone.ratio)} times the model's error"
    if withheld is not None:
        text += (
            f"; without the state the actions move by {between(withheld.action_shift)} times their error and "
            f"the error changes by {between(withheld.increase, 100, 0)} %"
        )
    if alone.ratio.below(NEAR) and withheld is not None and _use(withheld) == "ignores":
        ending = ": this model does not copy its state, and is not shown to do better than if it did."
        weak = alone.ratio.below(1.0)
        return Finding(about="state", outcome="does not beat", sentence=text + ending, alarm=weak)
    if alone.ratio.below(NEAR):
        ending = (
            ": this model could be copying its own state. Withhold the state in training (model.fusion."
            "state_dropout), and believe rollouts only."
        )
        return Finding(about="state", outcome="copies", sentence=text + ending, alarm=True)
    if alone.ratio.above(NEAR):
        return Finding(
            about="state", outcome="uses", sentence=f"{text}: the model does more than copy its state."
        )
    return Finding(
        about="state",
        outcome="unresolved",
        sentence=f"{text}: too near to say that the model does more than copy its state.",
    )


def _leak(leak: Leak) -> list[Finding]:
    if not leak.leaks:
        return []
    later = "" if leak.next is None else f" (the action after it: {leak.next:.3f})"
    text = (
        f"A linear map from the state gives the recorded action with R2 {leak.now:.4f}{later}: the state "
        "leaks the action. A model needs to look at nothing else, and what the state holds in the data it "
        "will not hold on the robot. Take the command out of the state."
    )
    return [Finding(about="state", outcome="leaks", sentence=text, alarm=True)]


def _beaten(baselines: Sequence[Baseline]) -> list[Finding]:
    stronger = [row for row in baselines if row.name != STATE_ALONE and not row.ratio.above(1.0)]
    best = min(baselines, key=lambda row: row.error.value)
    if not stronger:
        text = (
            f"The model beats every regression from one input; the best, from {best.name}, has "
            f"{between(best.ratio)} times its error."
        )
        return [Finding(about="baselines", outcome="beats", sentence=text)]
    return [
        Finding(
            about="baselines",
            outcome="does not beat",
            sentence=f"The model is not shown to beat a plain regression ({row.name}): the regression's "
            f"error is {between(row.ratio)} times the model's.",
            alarm=row.ratio.below(1.0),
        )
        for row in stronger
    ]


def _features(probes: Sequence[Probe]) -> list[Finding]:
    found: list[Finding] = []
    for features, target in ((VISION, STATE), (VISION, ACTION), (READOUT, ACTION)):
        row = next((p for p in probes if (p.features, p.target) == (features, target)), None)
        if row is None:
            continue
        gained = row.trained.interval is not None and row.trained.interval.low > max(0.0, row.untrained.value)
        verb = "tells" if gained else "is not shown to tell more of"
        text = (
            f"A linear map from the {features} features {verb} the {target}: R2 {between(row.trained)}, from "
            f"an untrained model's {between(row.untrained)}."
        )
        found.append(Finding(about="features", outcome="measured", sentence=text))
    return found


def _chunks(chunks: ChunkConsistency) -> Finding:
    text = ""
    if chunks.chunk_disagreement is not None:
        text = (
            f"When the policy looks again after {chunks.distance} actions, its plan for the same moments "
            f"changes by {between(chunks.chunk_disagreement)} times its error. "
        )
    text += (
        f"Of consecutive actions beyond a dead band of {DEAD_BAND} that are executed, "
        f"{between(chunks.sign_flips, 100, 1)} % turn back, in the recording "
        f"{between(chunks.recorded_flips, 100, 1)} %."
    )
    return Finding(about="chunks", outcome="measured", sentence=text)


def _occlusion(found: Occlusion) -> list[Finding]:
    pixels, tokens = found.pixels, found.tokens
    even = pixels.top_patches / pixels.patches
    views = ", ".join(f"{view.rsplit('.', 1)[-1]} {100 * share:.0f} %" for view, share in pixels.views)
    where = (
        f"With one patch at a time replaced by its average, {between(pixels.top_share, 100, 0)} % of what "
        f"moves the action lies in the most sensitive tenth of the patches ({100 * even:.0f} % if all "
        f"mattered alike); by view: {views}."
    )
    kept = (
        f"With one token at a time removed, it is {between(tokens.top_share, 100, 0)} % in a tenth of the "
        "tokens: which tokens the fusion reads, not where in the picture their content comes from."
    )
    return [Finding(about="patches", outcome="measured", sentence=text) for text in (where, kept)]

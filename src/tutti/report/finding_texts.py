"""What each kind of finding says: severity, sentence and cure."""

from __future__ import annotations

from tutti.findings import Finding, Severity
from tutti.report.formatting import Number, capitalised
from tutti.report.records import part_words

MESSAGES: dict[str, tuple[Severity, str, str]] = {
    "unreached": (
        "fault",
        "{Part} gets no gradient from any term.",
        "Look for a detach, a stop_gradient in every term, or units that are all dead.",
    ),
    "no_action_gradient": (
        "fault",
        "{Part} gets no gradient from {term}.{asked}",
        "Nothing, if that is meant; else look for a detach between it and the action decoder.",
    ),
    "dominates": (
        "warning",
        "{term} supplies {share} of the gradient of {part}{others}{when}.",
        "{cure}",
    ),
    "idle": (
        "hint",
        "{term} supplies at most {share} of any part's gradient, in either half of the run.",
        "It hardly teaches anything: raise `objective.{term}.weight` (times {times} would be {goal}), or set "
        "`objective.{term}` to null and save its time.",
    ),
    "conflict": (
        "warning",
        "{a} and {b} conflict in {part}: their gradients' cosine is below 0 in {share} of {count} diagnostic "
        "steps, on average {cosine:.2f}.",
        "Lower the weight of {term}, stop its gradient there (objective.{term}.stop_gradient), or combine "
        "the gradients by another backward.",
    ),
    "dead_units": (
        "fault",
        "{share} of the units of {features} are dead: they stay the same whatever {given}.",
        "Dead ReLUs do not come back: lower the learning rate, lengthen the warm-up or use gelu, and train "
        "anew. Check that the windows differ (first_batch.png).",
    ),
    "collapsed": (
        "fault",
        "The effective rank of {features} is {rank} of {limit}: it has collapsed, nearly all samples look "
        "the same.",
        "Lower the learning rate or the weight of a term that rewards sameness, and train anew.",
    ),
    "update_ratio": (
        "warning",
        "{Part} {moves}: a step changes it by {ratio} of its size (sound: {least} to {most}).",
        "{change} `training.optimizer.lr`, or the learning-rate factor of this part.",
    ),
    "noise_scale": (
        "hint",
        "The gradient noise scale is {scale} windows, the batch {batch}: {what}.",
        "{cure}",
    ),
    "loss_spikes": (
        "hint",
        "{count} loss spike{plural} in {steps:,} steps{last}.",
        "Look at the batches in spikes/ (tutti replay RUN/spikes/step-N): odd windows? Else lower the "
        "learning rate or `training.gradients.clip_norm`.",
    ),
    "skipped_updates": (
        "hint",
        "{count} of {steps:,} updates {were} left out: a term or the gradient was not finite.",
        "Look at the newest of them in failures/ (tutti replay RUN --failure): windows with odd values? Else "
        "lower the learning rate.",
    ),
    "rolled_back": (
        "warning",
        "The loss diverged, and the run went back {count} time{plural}{ways}.",
        "It learned from other data after that; a lower learning rate or a longer warm-up may spare the "
        "detour.",
    ),
    "always_clipped": (
        "hint",
        "{share} of the steps are clipped{norms}.",
        "All steps have the same length, whatever the gradient says: raise `training.gradients.clip_norm` "
        "above the usual norm, so that it holds back outliers only.",
    ),
    "overfit": (
        "warning",
        "{term} overfits: on held-out episodes it rose by {rise} since step {best:,} ({least} to {end}), "
        "while in training it fell from {before} to {after}.",
        "More demonstrations or augmentation, fewer steps, or let the weight of {term} reach 0 at step "
        "{best:,}.",
    ),
    "at_chance": (
        "warning",
        "{term} is at chance: {value} in its last quarter, a guess has {guess}.",
        "It has taught nothing: train longer, raise its weight, or check that instructions differ within a "
        "batch.",
    ),
    "at_floor": (
        "hint",
        "{term} is at its floor: {value}, at best {floor}, by chance {guess}.",
        "It has nothing left to teach: its weight may reach 0 earlier.",
    ),
}
"""Severity, sentence and cure of each kind of finding."""
FEATURES = {
    "vision": ("the vision tokens", "the vision encoder sees"),
    "language": ("the language tokens", "the instruction says"),
    "fused": ("the fused vision tokens", "the model is given"),
    "readout": ("the readout", "the model is given"),
}


def say(
    kind: str,
    number: Number,
    severity: Severity | None = None,
    /,
    *,
    term: str = "",
    part: str = "",
    **words: object,
) -> Finding:
    """The finding of a kind; its texts have `term`, the part in words, and `words`."""
    usual, sentence, cure = MESSAGES[kind]
    words |= {"term": term, "part": part_words(part), "Part": capitalised(part_words(part))}
    return Finding(
        kind=kind,
        severity=severity or usual,
        sentence=sentence.format(**words),
        number=number,
        cure=cure.format(**words),
        term=term,
        part=part,
    )

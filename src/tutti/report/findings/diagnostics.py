"""Findings in the diagnostics: who moves what, conflicts, dead or collapsed features, update ratio, noise."""

from __future__ import annotations

from collections.abc import Iterator

from tutti.findings import (
    ACTION_SHARE_MIN,
    AUX_SHARE_HELPFUL,
    AUX_SHARE_HIGH,
    AUX_SHARE_LOUD,
    AUX_SHARE_MAX,
    AUX_SHARE_MIN,
    AUX_SHARE_TARGET,
    CONFLICT_COSINE_MAX,
    CONFLICT_FRACTION_MIN,
    CONFLICT_SHARE_MIN,
    CONFLICT_STEPS_MIN,
    DEAD_UNITS_MAX,
    NOISE_SCALE_RATIO_MAX,
    RANK_LIMIT_MIN,
    RANK_MIN,
    UPDATE_RATIO_MAX,
    UPDATE_RATIO_MIN,
    Finding,
)
from tutti.report.findings.diagnostic_records import (
    PRIMARY,
    DiagnosticRecords,
    batch_size,
    listed,
    part_words,
)
from tutti.report.formatting import anything, capitalised, percent, plain
from tutti.report.inputs import Json, config_value


def judge_diagnostics(diagnostics: DiagnosticRecords, config: Json) -> Iterator[Finding]:
    """Everything that the diagnostic steps show, in no order."""
    yield from unreached_parts(diagnostics, config)
    yield from dominating_terms(diagnostics, config)
    yield from idle_terms(diagnostics)
    yield from conflicting_terms(diagnostics)
    yield from unhealthy_features(diagnostics)
    yield from unhealthy_updates(diagnostics)
    yield from unsuitable_batch_size(diagnostics)


def unreached_parts(diagnostics: DiagnosticRecords, config: Json) -> Iterator[Finding]:
    """Parts that learn, but get no gradient: from no term at all, or not from the action."""
    for part in diagnostics.parts:
        reached = {term: diagnostics.reaches(term, part) for term in diagnostics.terms}
        if all(reaches is None for reaches in reached.values()):
            continue
        if not any(reached.values()):
            yield Finding(
                kind="unreached",
                severity="fault",
                sentence=f"{capitalised(part_words(part))} gets no gradient from any term.",
                number=0.0,
                cure="Look for a detach, a stop_gradient in every term, or units that are all dead.",
                part=part,
            )
        elif reached.get(PRIMARY) is False:
            asked = _asked_for(config, part)
            yield Finding(
                kind="no_action_gradient",
                severity="hint" if asked else "fault",
                sentence=f"{capitalised(part_words(part))} gets no gradient from {PRIMARY}.{asked}",
                number=0.0,
                cure="Nothing, if that is meant; else look for a detach between it and the action decoder.",
                term=PRIMARY,
                part=part,
            )


def _asked_for(config: Json, part: str) -> str:
    """A sentence about what in the config keeps the action from the part; empty if nothing does."""
    stops, backward = (
        config_value(config, "objective", PRIMARY, "stop_gradient"),
        config_value(config, "backward", "kind"),
    )
    if stops:
        return f" The config asks for it: objective.{PRIMARY}.stop_gradient is {anything(stops)}."
    may_train = config_value(config, "backward", "may_train", PRIMARY)
    insulated = backward == "knowledge_insulation" and part in ("vision", "language")
    if insulated or (isinstance(may_train, list | tuple) and part not in may_train):
        return f" The config asks for it: backward.kind is {backward}."
    return ""


def dominating_terms(diagnostics: DiagnosticRecords, config: Json) -> Iterator[Finding]:
    """Auxiliary terms that supply most of the gradient of a part that the action trains too."""
    for term in diagnostics.terms:
        if term == PRIMARY:
            continue
        shares = {part: _shares(diagnostics, term, part) for part in diagnostics.parts}
        strong = {
            part: share
            for part, (share, own) in shares.items()
            if own and share >= (AUX_SHARE_LOUD if own < ACTION_SHARE_MIN else AUX_SHARE_HIGH)
        }
        if not strong:
            continue
        worst = max(strong, key=lambda part: strong[part])
        share, own = shares[worst]
        others = [f"{percent(s)} in {part_words(part)}" for part, s in strong.items() if part != worst]
        beside = f", {PRIMARY} {percent(own, 2)}" if own < ACTION_SHARE_MIN else ""
        yield Finding(
            kind="dominates",
            severity="warning" if share >= AUX_SHARE_MAX or own < ACTION_SHARE_MIN else "hint",
            sentence=f"{term} supplies {percent(share)} of the gradient of {part_words(worst)}{beside}"
            f"{', ' + listed(others) if others else ''}{_period(diagnostics)}.",
            number=share,
            cure=_lighter(term, share, own, config),
            term=term,
            part=worst,
        )


def _period(diagnostics: DiagnosticRecords) -> str:
    return " (medians over the second half of the run)" if len(diagnostics.steps) > 1 else ""


def _shares(diagnostics: DiagnosticRecords, term: str, part: str) -> tuple[float, float]:
    """The median shares of the term and of the action in the run's second half; 0 where there is none.

    The first half is left out: a schedule may let a term go first on purpose.
    """
    _, (since, _) = diagnostics.halves
    share, own = (diagnostics.median(f"share/{one}/{part}", since) for one in (term, PRIMARY))
    return share or 0.0, own or 0.0


def _lighter(term: str, share: float, own: float, config: Json) -> str:
    """The weight w' that would give the target share s: w' = w s / (1 - s) rest / share. The rest is
    1 - share; for a term below AUX_SHARE_HIGH, which is named for a loud one beside it, the action's."""
    rest = 1 - share if share >= AUX_SHARE_HIGH else own
    factor = AUX_SHARE_TARGET / (1 - AUX_SHARE_TARGET) * rest / share
    now, key = "", f"objective.{term}.weight"
    wanted = f"{plain(factor, 2)} times `{key}`"
    match config_value(config, "objective", term, "weight"):
        case int() | float() as weight if weight > 0:
            now, wanted = f" ({plain(weight)})", f"`{key}={plain(weight * factor, 2)}`"
        case {"start": int() | float() as start, "end": int() | float() as end}:
            now = f" ({plain(start)} to {plain(end)})"
            wanted = f"`{key}.start={plain(start * factor, 2)}` and `end={plain(end * factor, 2)}`"
    of = "" if share >= AUX_SHARE_HIGH else f" of what it and {PRIMARY} supply"
    goal = f"{wanted} would be a share of {percent(AUX_SHARE_TARGET)}{of}."
    if share >= AUX_SHARE_MAX or own < ACTION_SHARE_MIN:
        return f"Its weight{now} is likely too high: {goal}"
    return f"It may be meant; if {PRIMARY} lags behind, lower its weight{now}: {goal}"


def idle_terms(diagnostics: DiagnosticRecords) -> Iterator[Finding]:
    """Auxiliary terms that are computed, to the end, and have next to no share anywhere in either half."""
    for term in (term for term in diagnostics.terms if term != PRIMARY):
        reached = [part for part in diagnostics.parts if diagnostics.reaches(term, part)]
        shares = [
            diagnostics.median(f"share/{term}/{part}", *half)
            for part in reached
            for half in diagnostics.halves
        ]
        present = [share for share in shares if share is not None]
        if present and max(present) < AUX_SHARE_MIN:
            yield Finding(
                kind="idle",
                severity="hint",
                sentence=f"{term} supplies at most {percent(max(present), 2)} of any part's gradient, in "
                "either half of the run.",
                number=max(present),
                cure=f"It hardly teaches anything: raise `objective.{term}.weight` (times "
                f"{plain(AUX_SHARE_HELPFUL / max(present), 2)} would be {percent(AUX_SHARE_HELPFUL)}), or "
                f"set `objective.{term}` to null and save its time.",
                term=term,
            )


def conflicting_terms(diagnostics: DiagnosticRecords) -> Iterator[Finding]:
    """Pairs of terms that pull a part in opposite directions most of the time."""
    for a, b in diagnostics.pairs:
        for part in diagnostics.parts:
            conflict = diagnostics.conflict(a, b, part)
            shares = [diagnostics.median(f"share/{term}/{part}") or 0.0 for term in (a, b)]
            if conflict is None or conflict[2] < CONFLICT_STEPS_MIN or min(shares) < CONFLICT_SHARE_MIN:
                continue
            share, cosine, count = conflict
            if share >= CONFLICT_FRACTION_MIN and cosine <= CONFLICT_COSINE_MAX:
                weaker = b if a == PRIMARY else a
                yield Finding(
                    kind="conflict",
                    severity="warning",
                    sentence=f"{a} and {b} conflict in {part_words(part)}: their gradients' cosine is below "
                    f"0 in {percent(share)} of {count} diagnostic steps, on average {cosine:.2f}.",
                    number=share,
                    cure=f"Lower the weight of {weaker}, stop its gradient there (objective.{weaker}."
                    "stop_gradient), or combine the gradients by another backward.",
                    term=weaker,
                    part=part,
                )


FEATURES = {
    "vision": ("the vision tokens", "the vision encoder sees"),
    "language": ("the language tokens", "the instruction says"),
    "fused": ("the fused vision tokens", "the model is given"),
    "readout": ("the readout", "the model is given"),
}


def unhealthy_features(diagnostics: DiagnosticRecords) -> Iterator[Finding]:
    """Dead units, and features that have collapsed."""
    for name, (words, given) in FEATURES.items():
        dead = diagnostics.mean(f"dead/{name}", diagnostics.last)
        if dead is not None and dead >= DEAD_UNITS_MAX:
            yield Finding(
                kind="dead_units",
                severity="fault",
                sentence=f"{percent(dead)} of the units of {words} are dead: they stay the same whatever "
                f"{given}.",
                number=dead,
                cure="Dead ReLUs do not come back: lower the learning rate, lengthen the warm-up or use "
                "gelu, and train anew. Check that the windows differ (first_batch.png).",
                part=name,
            )
        rank, limit = (
            diagnostics.median(f"{what}/{name}", diagnostics.last) for what in ("rank", "rank_limit")
        )
        if rank is not None and limit is not None and rank < RANK_MIN and limit >= RANK_LIMIT_MIN:
            yield Finding(
                kind="collapsed",
                severity="fault",
                sentence=f"The effective rank of {words} is {plain(rank, 2)} of {plain(limit)}: it has "
                "collapsed, nearly all samples look the same.",
                number=rank,
                cure="Lower the learning rate or the weight of a term that rewards sameness, and train anew.",
                part=name,
            )


def unhealthy_updates(diagnostics: DiagnosticRecords) -> Iterator[Finding]:
    """Parts whose weights hardly move, or jump."""
    names = [
        name.split("/")[2] for name in diagnostics.records.columns if name.startswith("diag/update_ratio/")
    ]
    for part in names:
        ratio = diagnostics.median(f"update_ratio/{part}")
        if (
            not ratio or UPDATE_RATIO_MIN <= ratio <= UPDATE_RATIO_MAX
        ):  # at exactly 0 no gradient came, which is said above
            continue
        how, cure = ("hardly moves", "Raise") if ratio < UPDATE_RATIO_MIN else ("jumps", "Lower")
        yield Finding(
            kind="update_ratio",
            severity="warning",
            sentence=f"{capitalised(part_words(part))} {how}: a step changes it by {plain(ratio, 2)} of its "
            f"size (sound: {plain(UPDATE_RATIO_MIN)} to {plain(UPDATE_RATIO_MAX)}).",
            number=ratio,
            cure=f"{cure} `training.optimizer.lr`, or the learning-rate factor of this part.",
            part=part,
        )


def unsuitable_batch_size(diagnostics: DiagnosticRecords) -> Iterator[Finding]:
    """A batch far below or far above the noise scale."""
    scale, batch = diagnostics.median("noise_scale"), batch_size(diagnostics.records)
    if scale is None or not batch or batch / NOISE_SCALE_RATIO_MAX < scale < batch * NOISE_SCALE_RATIO_MAX:
        return
    low = scale > batch
    yield Finding(
        kind="noise_scale",
        severity="hint",
        sentence=f"The gradient noise scale is {plain(scale, 2)} windows, the batch {plain(batch)}: "
        + ("single steps are mostly noise." if low else "the batch averages out noise that is not there."),
        number=scale,
        cure="A larger batch (or `training.accumulation`) would need fewer steps for the same result."
        if low
        else "A smaller batch would go as far in each step, for less.",
    )

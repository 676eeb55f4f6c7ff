"""Findings in the diagnostics: who moves what, conflicts, dead or collapsed features, update ratio, noise."""

from __future__ import annotations

from collections.abc import Iterator

from tutti.report.findings.diagnostic_records import PRIMARY, Looks, batch_size, listed, part_words
from tutti.report.findings.finding import Finding, at, capital
from tutti.report.formatting import anything, percent, plain
from tutti.report.inputs import Json

DOMINATES = 0.9
"""Share of a part's gradient above which one auxiliary term trains it almost alone. A term at a sound
share of 0.1 whose weight is 100 times too high comes to 0.92."""
STRONG = 0.7
"""Above this share a term is worth a look: it moves the part more than twice as much as all others."""
LOUD, DROWNED = 0.3, 0.01
"""Two loud terms keep each other below the shares above: a term is named above the first where the action
has less than the second."""
WANTED = 0.2
"""The share that a suggested weight would give: auxiliary terms help at 0.1 to 0.2 of the action's weight."""
IDLE, HELPFUL = 0.01, 0.1
"""Below IDLE in every part a term changes next to nothing, and costs its time all the same; HELPFUL is the
share that is suggested instead."""
CONFLICT, CONFLICT_COSINE, CONFLICT_LOOKS = 0.8, -0.1, 10
"""Cosines of unrelated noisy gradients lie around 0 and are negative half of the time: 8 of 10 and a mean
below -0.1 are no accident ..."""
CONFLICT_SHARE = 0.05
"""... and matter only where both terms have a say in the part."""
DEAD = 0.3
"""Share of dead units at which width is clearly lost; a few in a hundred are usual with ReLUs."""
COLLAPSED = 1.5
"""Effective rank below which the features differ in less than one direction and a half: too few to tell
where anything is. A fresh model has more."""
LEAST_RANK_LIMIT = 8
"""With fewer windows in a look a low rank says more of them than of the features: a readout of rank 4 over 64
windows had 1.4 over 4."""
SLOW, FAST = 1e-5, 1e-1
"""Update-to-weight ratio in which a part learns: at 1e-5 it takes 100,000 steps to change by its own size,
at 1e-1 ten. The usual figure is 1e-3 (Adam) to 1e-2 (Muon)."""
NOISE = 10.0
"""Ratio of noise scale to batch size that leaves no doubt: single estimates scatter by a factor of 2."""


def look_findings(looks: Looks, config: Json) -> Iterator[Finding]:
    """Everything that the looks show, in no order."""
    yield from unreached(looks, config)
    yield from dominating(looks, config)
    yield from idle(looks)
    yield from conflicts(looks)
    yield from features(looks)
    yield from updates(looks)
    yield from noise(looks)


def unreached(looks: Looks, config: Json) -> Iterator[Finding]:
    """Parts that learn, but get no gradient: from no term at all, or not from the action."""
    for part in looks.parts:
        reached = {term: looks.reaches(term, part) for term in looks.terms}
        if all(reaches is None for reaches in reached.values()):
            continue
        if not any(reached.values()):
            yield Finding(
                kind="unreached",
                severity="fault",
                sentence=f"{capital(part_words(part))} gets no gradient from any term.",
                number=0.0,
                cure="Look for a detach, a stop_gradient in every term, or units that are all dead.",
                part=part,
            )
        elif reached.get(PRIMARY) is False:
            asked = _asked_for(config, part)
            yield Finding(
                kind="no_action_gradient",
                severity="hint" if asked else "fault",
                sentence=f"{capital(part_words(part))} gets no gradient from {PRIMARY}.{asked}",
                number=0.0,
                cure="Nothing, if that is meant; else look for a detach between it and the action decoder.",
                term=PRIMARY,
                part=part,
            )


def _asked_for(config: Json, part: str) -> str:
    """A sentence about what in the config keeps the action from the part; empty if nothing does."""
    stops, backward = at(config, "objective", PRIMARY, "stop_gradient"), at(config, "backward", "kind")
    if stops:
        return f" The config asks for it: objective.{PRIMARY}.stop_gradient is {anything(stops)}."
    moves = at(config, "backward", "moves", PRIMARY)
    insulated = backward == "knowledge_insulation" and part in ("vision", "language")
    if insulated or (isinstance(moves, list | tuple) and part not in moves):
        return f" The config asks for it: backward.kind is {backward}."
    return ""


def dominating(looks: Looks, config: Json) -> Iterator[Finding]:
    """Auxiliary terms that supply most of the gradient of a part that the action trains too."""
    for term in looks.terms:
        if term == PRIMARY:
            continue
        shares = {part: _shares(looks, term, part) for part in looks.parts}
        strong = {
            part: share
            for part, (share, own) in shares.items()
            if own and share >= (LOUD if own < DROWNED else STRONG)
        }
        if not strong:
            continue
        worst = max(strong, key=lambda part: strong[part])
        share, own = shares[worst]
        others = [f"{percent(s)} in {part_words(part)}" for part, s in strong.items() if part != worst]
        beside = f", {PRIMARY} {percent(own, 2)}" if own < DROWNED else ""
        yield Finding(
            kind="dominates",
            severity="warning" if share >= DOMINATES or own < DROWNED else "hint",
            sentence=f"{term} supplies {percent(share)} of the gradient of {part_words(worst)}{beside}"
            f"{', ' + listed(others) if others else ''} (medians over the second half of the run).",
            number=share,
            cure=_lighter(term, share, own, config),
            term=term,
            part=worst,
        )


def _shares(looks: Looks, term: str, part: str) -> tuple[float, float]:
    """The median shares of the term and of the action in the run's second half; 0 where there is none.

    The first half is left out: a schedule may let a term go first on purpose.
    """
    _, (since, _) = looks.halves
    share, own = (looks.median(f"share/{one}/{part}", since) for one in (term, PRIMARY))
    return share or 0.0, own or 0.0


def _lighter(term: str, share: float, own: float, config: Json) -> str:
    """The weight that would give the share WANTED: w' = w WANTED / (1 - WANTED) rest / share, where the rest
    is 1 - share, or, for a term below STRONG, which is named for another loud one beside it, the action's."""
    rest = 1 - share if share >= STRONG else own
    factor = WANTED / (1 - WANTED) * rest / share
    now, key = "", f"objective.{term}.weight"
    wanted = f"{plain(factor, 2)} times `{key}`"
    match at(config, "objective", term, "weight"):
        case int() | float() as weight if weight > 0:
            now, wanted = f" ({plain(weight)})", f"`{key}={plain(weight * factor, 2)}`"
        case {"start": int() | float() as start, "end": int() | float() as end}:
            now = f" ({plain(start)} to {plain(end)})"
            wanted = f"`{key}.start={plain(start * factor, 2)}` and `end={plain(end * factor, 2)}`"
    of = "" if share >= STRONG else f" of what it and {PRIMARY} supply"
    goal = f"{wanted} would be a share of {percent(WANTED)}{of}."
    if share >= DOMINATES or own < DROWNED:
        return f"Its weight{now} is likely too high: {goal}"
    return f"It may be meant; if {PRIMARY} lags behind, lower its weight{now}: {goal}"


def idle(looks: Looks) -> Iterator[Finding]:
    """Auxiliary terms that are computed, to the end, and have next to no share anywhere in either half."""
    for term in (term for term in looks.terms if term != PRIMARY):
        reached = [part for part in looks.parts if looks.reaches(term, part)]
        shares = [looks.median(f"share/{term}/{part}", *half) for part in reached for half in looks.halves]
        present = [share for share in shares if share is not None]
        if present and max(present) < IDLE:
            yield Finding(
                kind="idle",
                severity="hint",
                sentence=f"{term} supplies at most {percent(max(present), 2)} of any part's gradient, in "
                "either half of the run.",
                number=max(present),
                cure=f"It hardly teaches anything: raise `objective.{term}.weight` (times "
                f"{plain(HELPFUL / max(present), 2)} would be {percent(HELPFUL)}), or set `objective.{term}` "
                "to null and save its time.",
                term=term,
            )


def conflicts(looks: Looks) -> Iterator[Finding]:
    """Pairs of terms that pull a part in opposite directions most of the time."""
    for a, b in looks.pairs:
        for part in looks.parts:
            against = looks.against(a, b, part)
            shares = [looks.median(f"share/{term}/{part}") or 0.0 for term in (a, b)]
            if against is None or against[2] < CONFLICT_LOOKS or min(shares) < CONFLICT_SHARE:
                continue
            share, cosine, count = against
            if share >= CONFLICT and cosine <= CONFLICT_COSINE:
                weaker = b if a == PRIMARY else a
                yield Finding(
                    kind="conflict",
                    severity="warning",
                    sentence=f"{a} and {b} conflict in {part_words(part)}: their gradients' cosine is below "
                    f"0 in {percent(share)} of {count} looks, on average {cosine:.2f}.",
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


def features(looks: Looks) -> Iterator[Finding]:
    """Dead units, and features that have collapsed."""
    for name, (words, given) in FEATURES.items():
        dead = looks.mean(f"dead/{name}", looks.last)
        if dead is not None and dead >= DEAD:
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
        rank, limit = (looks.median(f"{what}/{name}", looks.last) for what in ("rank", "rank_limit"))
        if rank is not None and limit is not None and rank < COLLAPSED and limit >= LEAST_RANK_LIMIT:
            yield Finding(
                kind="collapsed",
                severity="fault",
                sentence=f"The effective rank of {words} is {plain(rank, 2)} of {plain(limit)}: it has "
                "collapsed, nearly all samples look the same.",
                number=rank,
                cure="Lower the learning rate or the weight of a term that rewards sameness, and train anew.",
                part=name,
            )


def updates(looks: Looks) -> Iterator[Finding]:
    """Parts whose weights hardly move, or jump."""
    names = [name.split("/")[2] for name in looks.records.columns if name.startswith("diag/update_ratio/")]
    for part in names:
        ratio = looks.median(f"update_ratio/{part}")
        if not ratio or SLOW <= ratio <= FAST:  # at exactly 0 no gradient came, which is said above
            continue
        how, cure = ("hardly moves", "Raise") if ratio < SLOW else ("jumps", "Lower")
        yield Finding(
            kind="update_ratio",
            severity="warning",
            sentence=f"{capital(part_words(part))} {how}: a step changes it by {plain(ratio, 2)} of its size "
            f"(sound: {plain(SLOW)} to {plain(FAST)}).",
            number=ratio,
            cure=f"{cure} `training.optimizer.lr`, or the learning-rate factor of this part.",
            part=part,
        )


def noise(looks: Looks) -> Iterator[Finding]:
    """A batch far below or far above the noise scale."""
    scale, batch = looks.median("noise_scale"), batch_size(looks.records)
    if scale is None or not batch or batch / NOISE < scale < batch * NOISE:
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

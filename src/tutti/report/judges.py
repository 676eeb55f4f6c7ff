"""Judges the records of a run: each function gives the findings of one question.

What a finding says is in templates/findings.toml, by its kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from tutti import findings as limits
from tutti.findings import SEVERITIES, Finding, Severity, read_messages, worded
from tutti.report.formatting import WORDS, anything, capitalised, listed, percent, plain
from tutti.report.inputs import Json, config_value
from tutti.report.records import LAST_FRACTION, PRIMARY, Records, part_words

MESSAGES = read_messages(Path(__file__).parent / "templates" / "findings.toml")
FEATURES: dict[str, list[str]] = WORDS["features"]
"""The features whose health is measured: how they are called, and what they depend on."""
INCIDENTS = {
    "loss_spikes": "diag/spikes",
    "skipped_updates": "optim/skipped",
    "rolled_back": "optim/rollbacks",
}
"""Kinds of findings whose measurement is a metric that counts."""


def judge_records(records: Records, config: Json) -> list[Finding]:
    """All findings, the grave ones first. `config` is the run's config as plain values; it may be empty.

    What was not recorded is not judged, so a run without diagnostics has the findings of its curves alone.
    """
    findings = [finding for judge in JUDGES for finding in judge(records, config)]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def _say(
    kind: str,
    number: float,
    severity: Severity | None = None,
    /,
    *,
    term: str = "",
    part: str = "",
    **words: object,
) -> Finding:
    """The finding of a kind; its texts have `term`, the part in words, and `words`."""
    words |= {"term": term, "part": part_words(part), "Part": capitalised(part_words(part))}
    return worded(MESSAGES, kind, number, severity, words, term=term, part=part)


def unreached_parts(records: Records, config: Json) -> Iterator[Finding]:
    """Parts that learn, but get no gradient: from no term at all, or not from the action."""
    for part in records.parts:
        reached = {term: records.reaches(term, part) for term in records.terms}
        if all(reaches is None for reaches in reached.values()):
            continue
        if not any(reached.values()):
            yield _say("unreached", 0.0, part=part)
        elif reached.get(PRIMARY) is False:
            asked = _asked_for(config, part)
            severity: Severity = "hint" if asked else "fault"
            yield _say("no_action_gradient", 0.0, severity, term=PRIMARY, part=part, asked=asked)


def _asked_for(config: Json, part: str) -> str:
    """A sentence about what in the config keeps the action from the part; empty if nothing does."""
    stops = config_value(config, "objective", PRIMARY, "stop_gradient")
    backward = config_value(config, "backward", "kind")
    if stops:
        return f" The config asks for it: objective.{PRIMARY}.stop_gradient is {anything(stops)}."
    may_train = config_value(config, "backward", "may_train", PRIMARY)
    insulated = backward == "knowledge_insulation" and part in ("vision", "language")
    if insulated or (isinstance(may_train, list | tuple) and part not in may_train):
        return f" The config asks for it: backward.kind is {backward}."
    return ""


def _dominated(records: Records, term: str) -> dict[str, tuple[float, float]]:
    """The parts of whose update the term makes most, though the action trains them too: its share and the
    action's. The first half of the run is left out: a schedule may let a term go first on purpose."""
    found: dict[str, tuple[float, float]] = {}
    for part in limits.SHARED_PARTS:
        share, own = (records.update_share(one, part, records.halves[1]) or 0.0 for one in (term, PRIMARY))
        least = limits.AUX_SHARE_LOUD if own < limits.ACTION_SHARE_MIN else limits.AUX_SHARE_HIGH
        if own and share > least:
            found[part] = share, own
    return found


def dominating_terms(records: Records, config: Json) -> Iterator[Finding]:
    """Auxiliary terms that make most of the update of a part that the action trains too."""
    half = records.halves[1]
    late = len(records.diagnostic_steps) > 1 and records.updates_in(half) == half
    when = " (medians over the second half of the run)" if late else ""
    for term in (term for term in records.terms if term != PRIMARY):
        shares = _dominated(records, term)
        if not shares:
            continue
        worst = max(shares, key=lambda part: shares[part][0])
        share, own = shares.pop(worst)
        others = (
            f", {PRIMARY} {percent(own, 2 if own < 0.01 else 0)}" if own < limits.ACTION_SHARE_MIN else ""
        )
        if shares:
            others += ", " + listed(
                [f"{percent(s)} in {part_words(part)}" for part, (s, _) in shares.items()]
            )
        likely = own < limits.ACTION_SHARE_MIN
        yield _say(
            "dominates",
            share,
            "warning" if likely else "hint",
            term=term,
            part=worst,
            share=percent(share),
            others=others,
            when=when,
            cure=_lighter(term, share, own, config, likely=likely),
        )


def _lighter(term: str, share: float, own: float, config: Json, *, likely: bool) -> str:
    """The weight or asked share w' that would give the share s: w' = w s / (1 - s) rest / share. The rest is
    1 - share; for a term below AUX_SHARE_HIGH, which is named for a loud one beside it, the action's."""
    rest = 1 - share if share > limits.AUX_SHARE_HIGH else own
    factor = limits.AUX_SHARE_TARGET / (1 - limits.AUX_SHARE_TARGET) * rest / share
    now, kind = "", _strength(config, term)
    key = f"objective.{term}.{kind}"
    wanted = f"{plain(factor, 2)} times `{key}`"
    match config_value(config, "objective", term, kind):
        case int() | float() as weight if weight > 0:
            now, wanted = f" ({plain(weight)})", f"`{key}={plain(weight * factor, 2)}`"
        case {"start": int() | float() as start, "end": int() | float() as end}:
            now = f" ({plain(start)} to {plain(end)})"
            wanted = f"`{key}.start={plain(start * factor, 2)}` and `end={plain(end * factor, 2)}`"
    of = "" if share > limits.AUX_SHARE_HIGH else f" of what it and {PRIMARY} supply"
    goal = f"{wanted} would be a share of {percent(limits.AUX_SHARE_TARGET)}{of}."
    if likely:
        return f"Its {kind}{now} is likely too high: {goal}"
    return f"It may be meant; if {PRIMARY} lags behind, lower its {kind}{now}: {goal}"


def _strength(config: Json, term: str) -> str:
    """The key that says how strong the term is."""
    return "weight" if config_value(config, "objective", term, "share") is None else "share"


def weak_action(records: Records, config: Json) -> Iterator[Finding]:
    """Parts of whose update the action makes little over the run, though no single term dominates there."""
    named = {part for term in records.terms if term != PRIMARY for part in _dominated(records, term)}
    for part in (part for part in limits.SHARED_PARTS if part not in named):
        shares = {term: records.update_share(term, part) or 0.0 for term in records.terms}
        own = shares.pop(PRIMARY, 0.0)
        if 0 < own < limits.ACTION_SHARE_LOW and shares:
            loudest = max(shares, key=lambda term: shares[term])
            others = listed([f"{term} {percent(share)}" for term, share in shares.items() if share > 0])
            words = {"share": percent(own), "others": others, "loudest": loudest}
            kind = _strength(config, loudest)
            yield _say("weak_action", own, term=PRIMARY, part=part, kind=kind, **words)


def idle_terms(records: Records, config: Json) -> Iterator[Finding]:
    """Auxiliary terms that make next to nothing of an update in the first half of the run, nor more later."""
    for term in (term for term in records.terms if term != PRIMARY):
        medians = [
            records.update_share(term, part, half) for part in limits.SHARED_PARTS for half in records.halves
        ]
        most = max((share for share in medians if share is not None), default=1.0)
        if 0 < most < limits.AUX_SHARE_MIN:
            times, goal = plain(limits.AUX_SHARE_HELPFUL / most, 2), percent(limits.AUX_SHARE_HELPFUL)
            words = {"share": percent(most, 2), "times": times, "goal": goal, "key": _strength(config, term)}
            yield _say("idle", most, term=term, **words)


def conflicting_terms(records: Records, _: Json) -> Iterator[Finding]:
    """Pairs of terms that pull a part in opposite directions most of the time."""
    for a, b in records.pairs:
        for part in records.parts:
            conflict = records.conflict(a, b, part)
            least = min(records.median(f"diag/share/{term}/{part}") or 0.0 for term in (a, b))
            if conflict is None or least < limits.CONFLICT_SHARE_MIN:
                continue
            share, cosine, count = conflict
            if (
                count >= limits.CONFLICT_STEPS_MIN
                and share >= limits.CONFLICT_FRACTION_MIN
                and cosine <= limits.CONFLICT_COSINE_MAX
            ):
                words = {"a": a, "b": b, "share": percent(share), "count": count, "cosine": cosine}
                yield _say("conflict", share, term=b if a == PRIMARY else a, part=part, **words)


def unhealthy_features(records: Records, _: Json) -> Iterator[Finding]:
    """Dead units, and features that have collapsed."""
    for name, (words, given) in FEATURES.items():
        dead = records.mean(f"diag/dead/{name}", records.end)
        if dead is not None and dead >= limits.DEAD_UNITS_MAX:
            texts = {"share": percent(dead), "features": words, "given": given}
            yield _say("dead_units", dead, part=name, **texts)
        rank, most = (records.median(f"diag/{what}/{name}", records.end) for what in ("rank", "rank_limit"))
        if rank is not None and most is not None and rank < limits.RANK_MIN and most >= limits.RANK_LIMIT_MIN:
            texts = {"rank": plain(rank, 2), "limit": plain(most), "features": words}
            yield _say("collapsed", rank, part=name, **texts)


def unhealthy_updates(records: Records, _: Json) -> Iterator[Finding]:
    """Parts whose weights hardly move, or jump."""
    least, most = limits.UPDATE_RATIO_MIN, limits.UPDATE_RATIO_MAX
    for (part,) in records.named("diag/update_ratio/*"):
        ratio = records.median(f"diag/update_ratio/{part}")
        if ratio and not least <= ratio <= most:  # at exactly 0 no gradient came, which is said above
            moves, change = ("hardly moves", "Raise") if ratio < least else ("jumps", "Lower")
            words = {"ratio": plain(ratio, 2), "least": plain(least), "most": plain(most)}
            yield _say("update_ratio", ratio, part=part, moves=moves, change=change, **words)


def unsuitable_batch_size(records: Records, _: Json) -> Iterator[Finding]:
    """A batch far below or far above the noise scale."""
    scale, batch = records.median("diag/noise_scale"), records.batch_size
    if scale is None or not batch:
        return
    if scale >= batch * limits.NOISE_SCALE_RATIO_MAX:
        what = "single steps are mostly noise"
        cure = "A larger batch (or `training.accumulation`) would need fewer steps for the same result."
    elif scale <= batch / limits.NOISE_SCALE_RATIO_MAX:
        what = "the batch averages out noise that is not there"
        cure = "A smaller batch would go as far in each step, for less."
    else:
        return
    yield _say("noise_scale", scale, scale=plain(scale, 2), batch=plain(batch), what=what, cure=cure)


def incidents(records: Records, _: Json) -> Iterator[Finding]:
    """Loss spikes, updates left out because a value was not finite, and roll-backs of a run that diverged."""
    steps = max((steps[-1] for steps, _ in records.columns.values() if steps), default=0)
    spiky = records.named("diag/spike/*")
    spikes = [f"{term} at step {records.get(f'diag/spike/{term}')[0][-1]:,}" for (term,) in spiky]
    to, left = records.get("optim/rollback_from")
    ways = [f"from step {plain(b)} to {a:,}" for a, b in zip(to, left, strict=True)]
    words = {
        "steps": steps,
        "last": f" (last: {', '.join(spikes)})" if spikes else "",
        "ways": f" ({', '.join(ways)})" if ways else "",
    }
    for kind, metric in INCIDENTS.items():
        count = records.last(metric)
        if count and steps:
            often: Severity | None = "warning" if count > steps * limits.SPIKES_PER_STEP_MAX else None
            words |= {"plural": "s" if count > 1 else "", "were": "was" if count == 1 else "were"}
            yield _say(kind, count, often, count=plain(count), **words)


def clipping(records: Records, config: Json) -> Iterator[Finding]:
    """A clip norm that usual gradients exceed."""
    values = records.values("optim/clip_share")
    if len(values) < limits.CLIPPED_RECORDS_MIN or fmean(values) <= limits.CLIPPED_SHARE_MAX:
        return
    norm, limit = records.mean("optim/grad_norm"), config_value(config, "training", "gradients", "clip_norm")
    said = f", clip_norm {plain(limit)}" if isinstance(limit, int | float) else ""
    norms = f" (mean gradient norm {plain(norm)}{said})" if norm else ""
    yield _say("often_clipped", fmean(values), share=percent(fmean(values)), norms=norms)


def overfitting(records: Records, _: Json) -> Iterator[Finding]:
    """Terms that rise on held-out episodes while they fall in training."""
    for term in records.loss_terms:
        steps, held = records.get(f"valid/{term}")
        points = [(s, v) for s, v in zip(steps, held, strict=True) if math.isfinite(v)]
        if len(points) <= limits.OVERFIT_VALIDATIONS_MIN + 1:
            continue
        best = min(range(len(points)), key=lambda n: points[n][1])
        (at_best, least), (at_end, end) = points[best], points[-1]
        since = points[best - 1][0] if best else 0
        before = records.mean(f"loss/{term}/raw", (since + 1, at_best))
        after = records.mean(f"loss/{term}/raw", (points[-2][0] + 1, at_end))
        if len(points) - 1 - best < limits.OVERFIT_VALIDATIONS_MIN or least <= 0:
            continue
        rise = end / least - 1
        if rise >= limits.OVERFIT_RISE_MAX and before is not None and after is not None and after < before:
            numbers = {"least": least, "end": end, "before": before, "after": after}
            words = {name: plain(value) for name, value in numbers.items()}
            yield _say("overfit", rise, term=term, rise=percent(rise), best=at_best, **words)


def chance(records: Records, _: Json) -> Iterator[Finding]:
    """Terms that stand where a guess does, or where nothing is left to learn."""
    for term in records.loss_terms:
        # A term that is more than a cross-entropy reports that one by itself; chance is its chance.
        own = f"metric/{term}/cross_entropy"
        own = own if own in records else f"loss/{term}/raw"
        value, guess, floor, reachable = (
            _end(records, name)
            for name in (own, *(f"metric/{term}/{level}" for level in ("chance", "floor", "reachable")))
        )
        floor = floor if reachable is None else reachable
        if value is None or guess is None or guess <= (floor or 0.0):
            continue
        share = (value - (floor or 0.0)) / (guess - (floor or 0.0))
        if share >= limits.CHANCE_SHARE_MIN:
            yield _say("at_chance", value, term=term, value=plain(value), guess=plain(guess))
        elif floor is not None and share <= limits.FLOOR_SHARE_MAX:
            words = {"value": plain(value), "guess": plain(guess), "floor": plain(floor)}
            by_heart = reachable is not None and share < -limits.FLOOR_SHARE_MAX
            yield _say("by_heart" if by_heart else "at_floor", value, term=term, **words)


def baselines(records: Records, _: Json) -> Iterator[Finding]:
    """Terms that no quarter of the run brings below what they would be if nothing was learned."""
    for term in records.loss_terms:
        for reference, name in WORDS["baselines"].items():
            quarters = records.against(term, reference)
            if len(quarters) < LAST_FRACTION or any(value < baseline for value, baseline in quarters):
                continue
            value, baseline = min(quarters, key=lambda pair: pair[0] / max(pair[1], 1e-9))
            words = {"value": plain(value), "baseline": plain(baseline), "name": name}
            yield _say("above_baseline", value, term=term, meaning=WORDS["references"][reference], **words)


def _end(records: Records, name: str) -> float | None:
    """The mean of the finite values in the last quarter of the column."""
    values = records.values(name)
    return fmean(values[-math.ceil(len(values) / LAST_FRACTION) :]) if values else None


JUDGES = (
    unreached_parts,
    dominating_terms,
    weak_action,
    idle_terms,
    conflicting_terms,
    unhealthy_features,
    unhealthy_updates,
    unsuitable_batch_size,
    incidents,
    clipping,
    overfitting,
    chance,
    baselines,
)

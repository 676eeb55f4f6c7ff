"""What a source says of a data set, what its format finds in it, and how the two give each feature's role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as default
from typing import Self

import numpy as np
from jaxtyping import Int64

from tutti.data.conventions.config import NOTHING_SAID, ConventionsConfig
from tutti.data.formats.errors import data_error
from tutti.data.formats.interface import EpisodeReader, Feature, Flip, Roles
from tutti.errors import near_miss

SHOWN_KEYS = 40
_KINDS = {"views": "picture", "state": "vector", "action": "vector", "text": "text"}
_CALLED = {"views": "a view", "text": "the instruction"}
_NOTHING = {
    "views": "Tutti learns from pictures",
    "state": "or set sources.state=none for a policy without proprioception",
    "action": "or train on it without them: sources.labels.actions=false",
    "text": "or say it, sources.text={say: open the drawer}; or go without: sources.labels.text=false",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a source says; None where it says auto. A state of no features is none; `say` is an instruction of
    its own, in place of a feature; `split` is for formats that have some. `answer` is the text that is to be
    said about a picture; None: there is none."""

    views: tuple[str, ...] | None = None
    state: tuple[str, ...] | None = None
    action: tuple[str, ...] | None = None
    text: str | None = None
    flip: Flip | None = None
    lag: int | None = None
    fps: float | None = None
    say: str | None = None
    split: str | None = None
    answer: str | None = None


AS_FOUND = Wanted()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a format finds in a data set before a number is read."""

    features: Mapping[str, Feature]
    roles: Roles
    lengths: Int64[np.ndarray, " e"]
    fps: float | None
    embodiment: str = "unknown"
    remarks: tuple[str, ...] = ()
    conventions: ConventionsConfig = NOTHING_SAID
    told_by: Mapping[str, str] = default(default_factory=dict)

    @classmethod
    def by(cls, reader: EpisodeReader) -> Self:
        """What a reader gives."""
        return cls(
            features=reader.features,
            roles=reader.roles(),
            lengths=reader.lengths,
            fps=reader.fps,
            embodiment=reader.embodiment,
            remarks=reader.remarks,
            conventions=reader.conventions,
            told_by=reader.told_by,
        )


def settle(wanted: Wanted, found: Roles, features: Mapping[str, Feature], name: str) -> Roles:
    """The role of each feature: what the source says, else what the format found, with its reasons.

    Raises: UserError where a named feature is not there, or is of another kind.
    """
    said = {field: value for field in _FIELDS if (value := getattr(wanted, field)) is not None}
    if wanted.say is not None:
        said["text"] = None
    reasons = {field: why for field, why in found.reasons.items() if field not in said}
    roles = replace(found, **said, reasons=reasons)
    for field, kind in (*_KINDS.items(), ("answer", "text")):
        keys = (wanted.answer if field == "answer" else getattr(roles, field)) or ()
        for key in (keys,) if isinstance(keys, str) else keys:
            if key not in features or features[key].kind != kind:
                there = key in features
                problem = "is missing" if not there else f"is a {features[key].kind}"
                fitting = [one for one, feature in features.items() if feature.kind == kind]
                hint = near_miss(key, fitting) if not there else ""
                raise data_error(
                    f"{name}: the feature {key!r} of sources.{field} {problem}.{hint}",
                    expected=f"a {kind}",
                    found=listed(features, kind),
                    cure=f"name one of these by sources.{field}.",
                )
    return roles


_FIELDS = ("views", "state", "action", "text", "flip", "lag")


def missing(name: str, field: str, features: Mapping[str, Feature]) -> Exception:
    """The error for a role that is needed, and that neither the source nor the format fills."""
    kind = _KINDS[field]
    return data_error(
        f"{name}: nothing tells which {kind} is {_CALLED.get(field, f'the {field}')}.",
        expected=f"a feature named by sources.{field}",
        found=listed(features, kind),
        cure=f"name it by sources.{field}; {_NOTHING[field]}.",
    )


def listed(features: Mapping[str, Feature], kind: str) -> str:
    """The features of a kind in words."""
    found = [f"{key} {list(one.shape) or ''}".strip() for key, one in features.items() if one.kind == kind]
    more = f" and {len(found) - SHOWN_KEYS} more" if len(found) > SHOWN_KEYS else ""
    return f"{', '.join(found[:SHOWN_KEYS])}{more}" if found else f"no {kind} in this data set"


def guesses(roles: Roles) -> dict[str, str]:
    """A line for each role that was guessed, by the name of its key."""
    return {
        field: f"sources.{field} is auto: {in_words(getattr(roles, field))} ({why})"
        for field, why in roles.reasons.items()
        if field in _FIELDS
    }


def read_as(roles: Roles) -> dict[str, str]:
    """What each feature was taken for, and which of that was guessed, as plain values."""
    found = {field: in_words(getattr(roles, field)) for field in _FIELDS}
    return found | ({"guessed": ", ".join(guesses(roles))} if guesses(roles) else {})


def in_words(value: str | int | Sequence[str] | None) -> str:
    """The value of a role in one line."""
    if value is None or value == ():
        return "none"
    return str(value) if isinstance(value, str | int) else ", ".join(value)

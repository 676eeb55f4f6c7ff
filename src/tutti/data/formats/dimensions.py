"""Names and units of the numbers of several features, joined to one state or one action."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain


def joined_dimensions(
    sizes: Mapping[str, int],
    names: Mapping[str, Sequence[str]],
    units: Mapping[str, Sequence[str]],
    what: str,
) -> dict[str, tuple[str, ...]]:
    """Names and units of these features' numbers, joined in order, as the fields of `Dimensions` have them.

    Numbers without names are numbered: "state[0]", with several features by the last part of theirs. Names
    that two features share get that part in front. Units are empty where no feature tells them.
    """
    parts: list[list[str]] = []
    for key, count in sizes.items():
        numbered = [f"{_last(key) if len(sizes) > 1 else what}[{place}]" for place in range(count)]
        parts.append(list(names.get(key) or numbered))
    joined = list(chain(*parts))
    for name in (_last, str):
        if len(set(joined)) < len(joined):
            joined = [f"{name(key)}.{one}" for key, part in zip(sizes, parts, strict=True) for one in part]
    told = list(chain(*(units.get(key) or [""] * count for key, count in sizes.items())))
    return {f"{what}_names": tuple(joined), f"{what}_units": tuple(told) if any(told) else ()}


def _last(key: str) -> str:
    return re.split(r"[./]", key)[-1]

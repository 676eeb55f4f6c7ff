"""All checks of recorded rows in their order: cheap, without pictures; and those of pictures kept decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int64, UInt8

from tutti.data.bundle import DataBundle
from tutti.data.cache import Frames
from tutti.data.checks import episodes, numbers
from tutti.data.checks.pictures import Read, check_pictures, glimpses
from tutti.data.checks.recordings import Recordings
from tutti.findings import SEVERITIES, Finding

CHECKS: tuple[Callable[[Recordings], Iterator[Finding]], ...] = (
    *(episodes.spellings, episodes.one_instruction, episodes.copies, episodes.lengths),
    *(numbers.constant_dimensions, numbers.heavy_tails, numbers.clipped_actions),
    *(numbers.gripper_dimensions_fit, numbers.sources_differ),
)


def check_rows(data: Recordings) -> list[Finding]:
    """What the rows alone tell, the grave findings first."""
    return by_severity([finding for check in CHECKS for finding in check(data)])


def check_decoded(data: DataBundle, recordings: Recordings) -> list[Finding]:
    """`check_rows`, and the cameras by pictures that are decoded already."""
    found = check_rows(recordings)
    decoded = {source.store: source.frames for source in data.windows.sources}
    for recorded in recordings.sources:

        def read(
            view: int,
            rows: Int64[np.ndarray, " k"],
            frames: UInt8[np.ndarray, "n v 3 s s"] | Frames = decoded[recorded.store],
        ) -> UInt8[np.ndarray, "k h w 3"]:
            return frames[rows][:, view].transpose(0, 2, 3, 1)

        looked: Read = read
        found += check_pictures(recorded, glimpses(recorded, looked))
    return by_severity(found)


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """The grave ones first, each kind in its order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))

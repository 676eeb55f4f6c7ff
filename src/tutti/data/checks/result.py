"""What `tutti data check` found in one place: findings, and what was looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tutti.data.bundle import describe_source
from tutti.data.checks.pictures import Glimpse
from tutti.data.checks.recordings import Recorded
from tutti.data.episodes import VECTORS
from tutti.data.normalize import EmbodimentStats
from tutti.dimensions import Dimensions, Embodiment
from tutti.findings import Finding

NOTHING_SERIOUS, WRONG, UNREADABLE = 0, 1, 2
"""Exit codes: hints at most; faults or warnings; data, or a config, that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedSource:
    """A source with the frames that were looked at, each with the pictures of an episode in a view."""

    rows: Recorded
    looked: Sequence[Glimpse]

    @property
    def two_valued(self) -> list[dict[str, Any]]:
        """The dimensions of the action with two values, as a gripper has, and these values."""
        return [
            {"dimension": self.rows.dimension("action", number), "values": list(values)}
            for number, values in self.rows.two_valued.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows, spec = self.rows, self.rows.store.spec
        return describe_source(rows.store, rows.training, rows.held_out) | {
            "state": [rows.dimension("state", number) for number in range(spec.state_dim)],
            "action": [rows.dimension("action", number) for number in range(spec.action_dim)],
            "two_valued_actions": self.two_valued,
            "pictures_looked_at": sum(len(glimpse.frames) for glimpse in self.looked),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRobot:
    """One of several robots: where its numbers lie in the vectors of the `model`, and their statistics."""

    embodiment: Embodiment
    stats: EmbodimentStats
    model: Dimensions

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stats = {what: getattr(self.stats, what).to_dict() for what in VECTORS}
        return asdict(self.embodiment) | {"statistics": stats}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedPath:
    """What was found in the data of one path; `against` says what config they were checked against, `mixture`
    how much of each of several sources a training sees, `robots` what each is where they differ. Nothing but
    `findings` where they cannot be read."""

    path: str
    findings: Sequence[Finding]
    against: str = ""
    sources: Sequence[CheckedSource] = ()
    mixture: Sequence[str] = ()
    robots: Mapping[str, KnownRobot] = field(default_factory=dict)

    @property
    def code(self) -> int:
        """The exit code."""
        if any(finding.kind == "unreadable" for finding in self.findings):
            return UNREADABLE
        return WRONG if any(finding.is_problem for finding in self.findings) else NOTHING_SERIOUS

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": self.path,
            "exit_code": self.code,
            "against": self.against,
            "sources": [source.to_dict() for source in self.sources],
            "mixture": list(self.mixture),
            "robots": {name: robot.to_dict() for name, robot in self.robots.items()},
            "findings": [asdict(finding) for finding in self.findings],
        }

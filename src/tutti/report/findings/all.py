"""All findings of a run: what its records say in plain words."""

from __future__ import annotations

from tutti.findings import SEVERITIES, Finding
from tutti.report.findings.curves import judge_curves
from tutti.report.findings.diagnostic_records import read_diagnostics
from tutti.report.findings.diagnostics import judge_diagnostics
from tutti.report.inputs import Json, Records


def judge_records(records: Records, config: Json) -> list[Finding]:
    """All findings, the grave ones first. `config` is the run's config as plain values; it may be empty.

    What was not recorded is not judged, so a run without diagnostics has the findings of its curves alone.
    """
    findings = [*judge_diagnostics(read_diagnostics(records), config), *judge_curves(records, config)]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))

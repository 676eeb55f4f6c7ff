"""All findings of a run: what its records say in plain words, for the report and for `tutti doctor`."""

from __future__ import annotations

from tutti.report.findings.curves import curve_findings
from tutti.report.findings.diagnostic_records import read_looks
from tutti.report.findings.diagnostics import look_findings
from tutti.report.findings.finding import SEVERITIES, Finding
from tutti.report.inputs import Json, Records


def find(records: Records, config: Json) -> list[Finding]:
    """All findings, the grave ones first. `config` is the run's config as plain values; it may be empty.

    What was not recorded is not judged, so a run without diagnostics has the findings of its curves alone.
    """
    looks = read_looks(records)
    found = [*look_findings(looks, config), *curve_findings(records, config)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))

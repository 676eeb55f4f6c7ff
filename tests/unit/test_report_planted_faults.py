"""Planted faults in real trainings of a small VLA: each is named, and a healthy run has none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fixtures.learnable import WEIGHTS, Data, dead_vision, detached_vision, findings_of, make_trainer
from tutti.findings import Finding


def trained(run: Path, **keywords: Any) -> list[Finding]:
    make_trainer(run, **keywords).fit(Data())
    return findings_of(run, keywords.get("terms"))


def test_healthy_run_has_no_fault_and_no_warning(tmp_path: Path) -> None:
    found = trained(tmp_path, steps=36)
    assert [finding for finding in found if finding.severity != "hint"] == []


@pytest.mark.parametrize("term", ["align", "recon", "state"])
def test_a_weight_100_times_too_high_is_named_with_term_and_part(tmp_path: Path, term: str) -> None:
    found = trained(tmp_path, steps=12, terms={term: 100 * WEIGHTS[term]})
    loud = [f for f in found if f.kind == "dominates" and f.severity == "warning"]
    assert [f.term for f in loud] == [term]
    assert (loud[0].number or 0) > 0.5 and loud[0].part in ("vision", "fusion")
    assert f"{term} makes" in loud[0].sentence and f"objective.{term}.weight" in loud[0].cure
    assert "too high" in loud[0].cure


def test_a_dead_vision_encoder_is_named(tmp_path: Path) -> None:
    found = trained(tmp_path, steps=12, spoil=dead_vision)
    dead = [f for f in found if f.kind == "dead_units"]
    assert [(f.part, f.severity, f.number) for f in dead] == [("vision", "fault", 1.0)]
    assert dead[0].sentence.startswith("100 % of the units of the vision tokens are dead")


def test_a_detached_vision_encoder_is_named(tmp_path: Path) -> None:
    found = trained(tmp_path, steps=12, spoil=detached_vision)
    lost = [f for f in found if f.kind == "unreached"]
    assert [(f.part, f.severity) for f in lost] == [("vision", "fault")]
    assert not [f for f in found if f.kind == "dead_units"] and found[0].severity == "fault"

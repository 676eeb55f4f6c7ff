"""A sample of the folders that benchmarks/hostile_folders.py gives to every command by the hundred."""

from __future__ import annotations

import hostile_folders
import pytest
from bounded_process import BAD
from hostile_rules import RULES


@pytest.mark.timeout(900)
def test_hostile_folders_end_no_command_badly() -> None:
    outcomes = hostile_folders.outcomes_of(len(RULES))
    assert {one.line for one in outcomes} == RULES.keys()
    assert [(one.kind, one.note, one.message[-300:]) for one in outcomes if one.kind in BAD] == []
    assert {"taken", "refused"} <= {one.kind for one in outcomes}

"""A sample of the damaged data sets, odd configs and command lines that benchmarks try by the thousand."""

from __future__ import annotations

import damaged_data
import damaged_formats
import damaged_sets
import odd_commands
import odd_configs
from bounded_process import BAD


def test_damaged_sets_are_read_as_they_are_or_refused() -> None:
    outcomes = damaged_data.outcomes_of(list(damaged_sets.LINES), 60)
    assert len(outcomes) == 60
    assert [one for one in outcomes if one.kind in BAD] == []
    assert {"taken", "refused"} == {one.kind for one in outcomes}


def test_every_format_and_several_robots_are_read_or_refused_by_name() -> None:
    outcomes = damaged_formats.outcomes_of(3 * len(damaged_formats.LINES))
    assert [one for one in outcomes if one.kind in BAD] == []
    assert {"taken", "refused"} == {one.kind for one in outcomes}
    leaks = ("Error:", "NoneType", "valid tuple", "valid dictionary")
    assert [one.message for one in outcomes if any(word in one.message for word in leaks)] == []


def test_odd_configs_are_refused_with_a_message() -> None:
    outcomes = odd_configs.outcomes_of(90)
    assert [one for one in outcomes if one.kind in BAD] == []


def test_odd_command_lines_are_refused_with_a_message() -> None:
    outcomes = odd_commands.outcomes_of(4 * len(odd_commands.NAMES))
    assert {one.kind for one in outcomes} == {"refused"}, [one for one in outcomes if one.kind in BAD]

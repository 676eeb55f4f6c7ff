"""What a log file is told of a work's progress."""

from __future__ import annotations

import pytest

from tutti.runs import terminal
from tutti.runs.terminal import progress_bar


def test_a_log_is_told_of_progress_now_and_then_and_of_the_end_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever counts may go on to say that all is done, as a study does while its last cell is judged."""
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with progress_bar("steps") as bar:
        for done in (1, 2, 3, 4, 4, 4, 4, 4, 4):
            now += terminal.QUIET_SECONDS / 4
            bar(done, 4)
    told = [line.split(" after ")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["steps: 4/4", "steps: 4/4"]

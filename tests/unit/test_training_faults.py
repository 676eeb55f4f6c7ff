"""What a run does on SIGTERM, without a place to write, and under a clock that jumps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixtures.toy_training import Data, make_trainer
from tutti.errors import Terminated
from tutti.storage.checkpoint import checkpoints
from tutti.training.records import read_records
from tutti.training.signals import Interruptible
from tutti.types import UserError

ROOT = Path(__file__).parents[2]


def at_step(wanted: int, number: signal.Signals):
    def send(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == wanted:
            signal.raise_signal(number)

    return send


def test_sigterm_saves_the_step_and_a_second_run_ends_like_an_undisturbed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as caught:
        make_trainer(tmp_path / "a", progress=at_step(7, signal.SIGTERM)).fit(Data())
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert (
        "SIGTERM: ended after step 7; saved in" in caplog.text and "the same command goes on" in caplog.text
    )
    assert [folder.name for folder in checkpoints(tmp_path / "a")] == ["step-000007"]
    resumed, straight = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b")
    resumed.fit(Data())
    straight.fit(Data())
    expected = straight.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_a_process_that_gets_sigterm_ends_with_143(tmp_path: Path) -> None:
    code = (
        "import sys, signal; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; import fixtures.toy_training as w\n"
        "def send(step, steps, metrics):\n    step == 3 and signal.raise_signal(signal.SIGTERM)\n"
        f"w.make_trainer(Path({str(tmp_path)!r}), progress=send).fit(w.Data())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 143
    )
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000003"]


def test_a_second_signal_ends_at_once() -> None:
    with pytest.raises(SystemExit) as caught, Interruptible() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    with pytest.raises(KeyboardInterrupt), Interruptible():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_still_a_keyboard_interrupt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Interruptible() as interrupt:
        signal.raise_signal(signal.SIGINT)
        interrupt.leave(3, tmp_path, signal.SIGINT)


@pytest.mark.parametrize("where", ["run", "checkpoints"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    """Permissions do not stop root, so a file lies where the folder should be: the same refusal for all."""
    run = tmp_path / "run"
    blocked = run if where == "run" else run / "checkpoints"
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("in the way")
    with pytest.raises(UserError, match=rf"{where}.*cannot write \(.*Check that the folder"):
        make_trainer(run, progress=lambda *_: pytest.fail("trained in vain")).fit(Data())


class Jumping:
    """A wall clock that is set back an hour, then forward a day, ..., at each look."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return 1_700_000_000.0 + (86_400 if self.looks % 2 else -3_600) + self.looks


def test_a_clock_that_jumps_makes_no_negative_time_and_no_disorder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", Jumping())
    make_trainer(tmp_path).fit(Data())
    monkeypatch.undo()
    records = read_records(tmp_path)
    times = {n: v for r in records for n, v in r.items() if n.startswith("time/") and v < 0}
    assert times == {}
    seconds = [r["time/seconds"] for r in records if r["kind"] == "train"]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 600
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = board.Scalars("loss/total")
    walls = [event.wall_time for event in events]
    assert len(walls) == 7 and walls == sorted(walls)
    assert [event.step for event in events] == sorted(event.step for event in events)

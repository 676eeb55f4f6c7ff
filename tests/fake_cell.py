"""A stand-in for the process of a study's cell: python fake_cell.py FOLDER MODE [SECONDS].

It writes the result that a real one would leave, after SECONDS; `fail` writes none and speaks its last
words, `stubborn` does not stop for Ctrl-C, `orphan` waits for the end of its standard input.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

RATES = {"end_to_end": 3, "action_only": 2, "other": 1}


def result(known: dict) -> dict:
    """Of 4 starts of either task as many succeed as the arm's name says."""
    wins = RATES[known["arm"]]
    bits = [int(number < wins) for number in range(4)]
    return {
        **known,
        "steps": 20,
        "samples": 160,
        "seconds": 2.0,
        "parameters": 1000,
        "milliseconds": 1.5,
        "held_out": {"action": 0.5},
        "open_loop": 0.25,
        "successes": {"reach": bits, "push": bits},
        "starts": {"reach": [0, 1, 2, 3], "push": [0, 1, 2, 3]},
        "protocol": {"suite": "metaworld-8"},
        "commit": "c0",
        "versions": {"python": "3"},
        "machine": {"cores": 1},
    }


def main(folder: Path, mode: str, seconds: float) -> int:
    with (folder / "starts.txt").open("a") as log:
        log.write("started\n")
    print("working", flush=True)
    if mode == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if mode == "orphan":
        sys.stdin.buffer.read()
        (folder / "alone.txt").write_text("the study is gone")
        return 1
    try:
        (folder / "asleep.txt").touch()
        time.sleep(seconds)
    except KeyboardInterrupt:
        (folder / "saved.txt").write_text("saved")
        return 130
    if mode == "fail":
        print("the last words", flush=True)
        return 3
    known = json.loads((folder / "cell.json").read_text())
    (folder / "result.json").write_text(json.dumps(result(known)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.0))

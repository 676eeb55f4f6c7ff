"""A stranger's path: the lines of "The short way" in docs/start/own-data.md, as printed, in a fresh clone.

    python benchmarks/stranger_path.py

The commit that is checked out is cloned into a temporary folder, the data set of the page is written there,
and each line is run with this Python and its source. `tutti serve` is asked by a client for one chunk,
which must be that of `Policy.predict`, and for its page; then it is told to end. Writes
results/stranger_path.md: the commands with what they said.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
from readme_commands import PATHS

from tutti.serving.client import Client
from tutti.serving.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
PAGE, HEADING, SHOWN = "docs/start/own-data.md", "## The short way", 12
WRITE = "python examples/two_squares.py data/squares"


def lines_of(page: str) -> list[str]:
    """The commands below the heading."""
    found = re.search(rf"^{HEADING}\n.*?^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE} has no block below {HEADING}"
    return found[1].splitlines()


def ask(command: str, place: Path, environment: dict[str, str]) -> tuple[int, str]:
    """What a server says, and its exit code, while a client asks it."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(
        ["bash", "-c", f"exec {command} --port 0"], cwd=place, env=environment, **pipe
    ) as server:
        said = list[str]()
        assert server.stdout is not None
        while not (said and "page for people" in said[-1]):
            line = server.stdout.readline()
            assert line, "".join(said)
            said.append(line)
        address = re.search(r"listening on (ws://\S+?);", "".join(said))
        assert address
        policy = Policy.load(place / command.split()[2], warn=False)
        spec, random = policy.spec, np.random.default_rng(0)
        images = {view: random.integers(0, 256, (48, 48, 3), np.uint8) for view in spec.views}
        state = np.zeros(spec.state_dim, np.float32)
        with Client(address[1]) as client:
            got = client.infer({"images": images, "state": state, "prompt": "go to the red square"})
        equal = np.array_equal(got["actions"], policy.predict(images, state, "go to the red square"))
        with urllib.request.urlopen(address[1].replace("ws:", "http:") + "/", timeout=30) as page:
            shown = "go to the red square" in page.read().decode()
        server.send_signal(signal.SIGTERM)
        said.append(server.stdout.read())
    said.append(
        f"[a client: actions equal to Policy.predict: {equal}; the page shows the instruction: {shown}]"
    )
    return server.returncode or (0 if equal and shown else 1), "".join(said)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "tutti"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(place)], check=True)
        tools = Path(name) / "bin"
        tools.mkdir()
        for tool, call in {"python": "", "tutti": " -m tutti"}.items():
            (tools / tool).write_text(f'#!/bin/sh\nexec {sys.executable}{call} "$@"\n')
            (tools / tool).chmod(0o755)
        path = f"{tools}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(place / "src"), "COLUMNS": "100"}
        parts, worst = ["A fresh clone, one core; each line as printed in docs/start/own-data.md.\n"], 0
        for line in [WRITE, *lines_of((place / PAGE).read_text())]:
            began = time.monotonic()
            if line.startswith("tutti serve"):
                code, said = ask(line, place, environment)
            else:
                done = subprocess.run(
                    ["bash", "-c", line],
                    cwd=place,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                code, said = done.returncode, done.stdout + done.stderr
            worst = worst or code
            last = [PATHS.sub("...", one.rstrip()) for one in said.splitlines() if one.strip()][-SHOWN:]
            parts.append(
                f"```\n$ {line}\n"
                + "\n".join(last)
                + f"\n[exit code {code}, {time.monotonic() - began:.0f} s]\n```\n"
            )
            print(parts[-1], flush=True)
        (ROOT / "benchmarks/results/stranger_path.md").write_text("\n".join(parts))
        raise SystemExit(worst)


if __name__ == "__main__":
    main()

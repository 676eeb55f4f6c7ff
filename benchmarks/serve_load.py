"""64 clients of a policy server on this machine, a third of them hostile: what the good ones get.

    python benchmarks/serve_load.py [--seconds 60] [--clients 64] [--policy FOLDER]

Without --policy a small policy with random weights is served. The server is a process of its own. Good
clients send one of a few observations again and again and compare every answer with `Policy.predict`; hostile
ones send texts, garbage, object dtypes, shape bombs and messages beyond the limit, flood without reading,
break off handshakes, or connect and sleep. Writes results/serve_load.json and .md.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from random_policy import TEXT, observations, random_policy
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from tutti.serving.client import Client
from tutti.serving.policy import Policy
from tutti.types import UserError

RESULTS = Path(__file__).parent / "results"
LIMIT = 2**20
HOSTILE_SHARE = 3


def one_message(message: str | bytes) -> Callable[[str, float], None]:
    """A client that sends it, reads the answer, and begins again."""

    def attack(address: str, until: float) -> None:
        with connect(address, max_size=None, proxy=None) as connection:
            connection.recv(10)
            while time.monotonic() < until:
                connection.send(message)
                answer = connection.recv(30)
                assert isinstance(answer, str) and "\n" not in answer and "Traceback" not in answer
                time.sleep(0.02)

    return attack


def flood(address: str, until: float) -> None:
    """Sends valid and other messages and never reads."""
    with connect(address, max_size=None, proxy=None, close_timeout=0.1) as connection:
        connection.socket.settimeout(2)
        while time.monotonic() < until:
            connection.send(bytes(LIMIT // 2))


def half_handshake(address: str, until: float) -> None:
    """Begins a request and breaks off, or leaves it open."""
    host, port = address.removeprefix("ws://").split(":")
    while time.monotonic() < until:
        with socket.create_connection((host, int(port)), timeout=10) as opened:
            opened.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 500)
            time.sleep(0.2)


def sleep(address: str, until: float) -> None:
    """Connects and does nothing."""
    with connect(address, proxy=None, close_timeout=0.1):
        time.sleep(max(0.0, until - time.monotonic()))


def array_of(dtype: str, shape: list[int], data: bytes = bytes(8)) -> bytes:
    """A message whose one picture claims to be this."""
    import msgpack

    array = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    return msgpack.packb({"images": {"front": array, "wrist": array}, "state": array, "prompt": TEXT})


def attacks() -> dict[str, Callable[[str, float], None]]:
    """What hostile clients do, by name."""
    return {
        "text": one_message("hello"),
        "garbage": one_message(random.Random(0).randbytes(3000)),
        "object dtype": one_message(array_of("|O", [1])),
        "shape bomb": one_message(array_of("<f8", [2**31, 2**31])),
        "one column": one_message(array_of("|u1", [200_000, 1, 3], bytes(600_000))),
        "flood": flood,
        "too large": one_message(bytes(2 * LIMIT)),
        "half handshake": half_handshake,
        "sleeper": sleep,
    }


def attack_again(attack: Callable[[str, float], None], address: str, until: float, log: list[str]) -> None:
    """A hostile client that is thrown out comes back."""
    while time.monotonic() < until:
        try:
            attack(address, until)
        except AssertionError as error:
            log.append(repr(error))
        except (OSError, WebSocketException):
            time.sleep(0.05)


def resident(process: int) -> float:
    """MiB of memory that a process has, and its peak."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def measure(folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    """One measurement: the numbers of both tables."""
    policy = Policy.load(folder, warn=False)
    seen = observations(policy.spec, 6)
    expected = [policy.predict(one["images"], one["state"], TEXT) for one in seen]
    command = [sys.executable, "-m", "tutti", "serve", str(folder), "--port", "0"]
    command += ["--clients", str(4 * clients), "--max-message", str(LIMIT / 2**20)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        address = server.stdout.readline().split("listening on ")[1].split(";")[0]
        before, latencies, counts, log = resident(server.pid), list[float](), Counter[str](), list[str]()
        until = time.monotonic() + seconds

        def good(number: int) -> None:
            try:
                with Client(address) as client:
                    place = number
                    while time.monotonic() < until:
                        began, place = time.perf_counter(), (place + 1) % len(seen)
                        found = client.infer(seen[place])["actions"]
                        latencies.append(time.perf_counter() - began)
                        counts["equal" if np.array_equal(found, expected[place]) else "differ"] += 1
            except UserError as error:
                counts["errors"] += 1
                log.append(str(error))

        bad, ways = clients // HOSTILE_SHARE, list(attacks().items())
        threads = [threading.Thread(target=good, args=(number,)) for number in range(clients - bad)]
        for number in range(bad):
            arguments = (ways[number % len(ways)][1], address, until, log)
            threads.append(threading.Thread(target=attack_again, args=arguments, daemon=True))
        for thread in threads:
            thread.start()
        peak = before
        while time.monotonic() < until:
            time.sleep(0.25)
            peak = max(peak, resident(server.pid))
        for thread in threads:
            thread.join(30)
        server.terminate()
        summary = server.stdout.read().strip()
    percentiles = np.percentile(latencies, [50, 99]) if latencies else (0.0, 0.0)
    return {
        "seconds": seconds,
        "good clients": clients - bad,
        "hostile clients": bad,
        "answers": len(latencies),
        "equal to Policy.predict": counts["equal"],
        "other actions": counts["differ"],
        "errors of good clients": counts["errors"],
        "latency p50, ms": round(1000 * float(percentiles[0]), 1),
        "latency p99, ms": round(1000 * float(percentiles[1]), 1),
        "memory of the server before, MiB": round(before),
        "memory of the server at most, MiB": round(peak),
        "exit code": server.returncode,
        "its last line": summary,
        "log": log[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--policy", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, suppress(KeyboardInterrupt):
        folder = options.policy or random_policy(Path(place) / "step-000001")
        found = measure(folder, options.seconds, options.clients)
        (RESULTS / "serve_load.json").write_text(json.dumps(found, indent=1) + "\n")
        rows = "".join(f"| {name} | {value} |\n" for name, value in found.items() if name != "log")
        (RESULTS / "serve_load.md").write_text(f"| | |\n|---|---|\n{rows}")
        print(rows)


if __name__ == "__main__":
    main()

"""Against a baseline: paired and unpaired tests, an interval for every look, a policy behind a websocket."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from fixtures.line_world import LineWorlds
from tutti.evaluation.statistics.baseline import against
from tutti.evaluation.statistics.intervals import barnard, difference_of_rates, episodes_needed, mean_of_rates
from tutti.evaluation.statistics.sequential import confidence_sequence, log_capital, rounds_of
from tutti.runs.judges.baseline import compare_with
from tutti.runs.judges.remote import RemotePolicyFactory, evaluate_remote
from tutti.serving.wire import pack, unpack
from tutti.suites import registry
from tutti.types import UserError

Outcomes = dict[str, dict[int, tuple[bool, str]]]


def test_unpaired_tests_give_the_published_numbers() -> None:
    """Barnard: scipy's own example values, here of 40 and 35 against 45 of 50."""
    assert (
        round(barnard((40, 50), (45, 50))[0], 2) == 0.21 and round(barnard((35, 50), (45, 50))[0], 3) == 0.013
    )
    large = barnard((400, 600), (460, 600))
    assert large[1] == "score test" and 1e-5 < large[0] < 1e-3 and barnard((0, 600), (0, 600))[0] == 1
    needed = [episodes_needed(*pair) for pair in ((0.5, 0.6), (0.8, 0.9), (0.8, 0.85), (0.9, 0.95))]
    assert needed == [388, 199, 906, 435] and episodes_needed(0.5, 0.5) is None
    counts = [(18, 20), (14, 20), (20, 20)]
    weighted = mean_of_rates(counts, [1 / 3] * 3)
    assert math.isclose(weighted.low, mean_of_rates(counts).low)
    interval = difference_of_rates([(40, 50)], [(45, 50)])
    assert interval.low < 0 < interval.high and math.isclose(interval.high + interval.low, 0.2, abs_tol=0.02)


def test_the_sequence_errs_seldom_at_any_look_and_tells_a_difference_early() -> None:
    random = np.random.default_rng(0)

    def ever(first: float, second: float, tasks: int) -> float:
        one, two = (random.random((400, tasks, 60)) < rate for rate in (first, second))
        values = (two.astype(float) - one + 1) / 2
        return float((log_capital(values, [0.5])[0] >= math.log(20)).any(1).mean())

    assert max(ever(rate, rate, tasks) for rate in (0.2, 0.5, 0.95) for tasks in (1, 8)) <= 0.05
    assert ever(0.5, 0.8, 8) > 0.95
    one, two = (random.random((4, 60)) < rate for rate in (0.4, 0.8))
    found = confidence_sequence(rounds_of([*one], [*two]))
    assert found.resolved_after is not None and 0 < found.interval.low < 0.4 < found.interval.high
    half = confidence_sequence(rounds_of([*one[:, :30]], [*two[:, :30]]))
    assert half.interval.low <= found.interval.low and half.interval.high >= found.interval.high
    turned = confidence_sequence(rounds_of([*two], [*one]))
    assert math.isclose(turned.interval.low, -found.interval.high, abs_tol=0.01)
    with pytest.raises(ValueError, match=r"in \[-1, 1\]"):
        confidence_sequence(np.array([[2.0]]))


def outcomes(rate: float, seed: int, start: str = "start", count: int = 40) -> Outcomes:
    random = np.random.default_rng(seed)
    return {
        task: {one: (bool(random.random() < rate), f"{start} {one}") for one in range(count)} for task in "ab"
    }


def test_a_policy_is_better_worse_or_unresolved_against_a_named_baseline() -> None:
    weak, strong = outcomes(0.3, 0), outcomes(0.8, 1)
    better, worse, same = against(weak, strong, "B"), against(strong, weak, "B"), against(weak, weak, "B")
    assert (better.verdict, worse.verdict, same.verdict) == ("better", "worse", "unresolved")
    assert better.paired and better.test == "exact McNemar" and better.needed and better.needed < 80
    assert better.difference.value == -worse.difference.value > 0 and same.needed is None
    other = against(weak, outcomes(0.8, 1, "elsewhere"), "B")
    assert not other.paired and other.test == "Barnard" and other.verdict == "better"
    more = against(weak, {**outcomes(0.8, 1, count=90), "c": {}}, "B")
    assert more.paired and more.rollouts == (80, 80) and more.tasks == ("a", "b")
    text = " ".join(better.lines())
    assert "Better than B" in text and "at every look" in text and "would tell" in text
    with pytest.raises(ValueError, match="no task"):
        against({"x": {0: (True, "")}}, strong, "B")


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A peer's server: goes where the prompt says, and keeps what it was sent."""
    seen: list[dict[str, Any]] = []

    def answer(connection: ServerConnection) -> None:
        connection.send(pack({"model": "a peer's"}))
        for message in connection:
            assert isinstance(message, bytes)
            seen.append(unpack(message))
            side = -1.0 if "left" in seen[-1]["prompt"] else 1.0
            connection.send(pack({"actions": np.full((3, 1), side), "server_timing": {"infer_ms": 1.0}}))

    with serve(answer, "127.0.0.1", 0, compression=None, max_size=None) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{running.socket.getsockname()[1]}", seen
        running.shutdown()


def on_the_line(episodes: int, decisions: int, tasks: str) -> list[str]:
    """What an evaluation in this suite is asked for."""
    values = {"suite": "line", "episodes": episodes, "workers": 1, "videos_per_task": 0}
    values |= {"max_decisions": decisions, "tasks": f"[{tasks}]"}
    return [f"evaluation.{key}={value}" for key, value in values.items()]


def test_a_policy_behind_a_websocket_plays_and_is_compared(
    server: tuple[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(registry.SUITES, "line", LineWorlds())
    given = on_the_line(episodes=6, decisions=12, tasks="left, right")
    address, seen = server
    folder = evaluate_remote(address, given, to=tmp_path / "peer")
    results = json.loads((folder / "results.json").read_text())
    assert {name: score["mean"] for name, score in results["scores"].items()} == {
        **{"policy": 1.0, "wrong_instruction": 0.0, "noop": 0.0, "expert": 1.0}
    }
    assert results["protocol"]["policy"] == address and "starts of the training data" in " ".join(
        results["notes"]
    )
    first = seen[0]
    assert set(first) == {"observation/image", "observation/state", "prompt"}
    assert first["observation/image"].shape == (224, 224, 3) and first["observation/image"].dtype == np.uint8
    count = len(seen)
    assert evaluate_remote(address, given, to=folder) == folder and len(seen) == count, (
        "nothing is played twice"
    )
    fewer = on_the_line(episodes=4, decisions=12, tasks="left, right")
    other = evaluate_remote(address, fewer, to=tmp_path / "b", keys={"front": "cam"})
    assert "cam" in seen[-1]
    assert compare_with(folder, other).verdict == "unresolved" and (folder / "against.json").is_file()
    with pytest.raises(UserError, match=r"nowhere.*results\.json"):
        compare_with(folder, tmp_path / "nowhere")
    with pytest.raises(UserError, match="no policy server answers"):
        evaluate_remote("ws://127.0.0.1:9", given, to=tmp_path / "c")


def test_a_secret_in_an_address_is_written_and_said_nowhere(
    server: tuple[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(registry.SUITES, "line", LineWorlds())
    monkeypatch.chdir(tmp_path)
    given = on_the_line(episodes=1, decisions=2, tasks="left")
    address = server[0].replace("ws://", "ws://me:s3cret@") + "/?token=t0ken"
    folder = evaluate_remote(address, given)
    written = [path.name + path.read_text() for path in folder.rglob("*") if path.is_file()]
    errors: list[str] = []
    for wrong in ("ws://me:s3cret@127.0.0.1:9/?token=t0ken", "http://me:s3cret@host/?token=t0ken"):
        with pytest.raises(UserError) as error:
            evaluate_remote(wrong, given, to=tmp_path / "b")
        errors.append(str(error.value))
    for text in (
        *written,
        *errors,
        str(folder),
        capsys.readouterr().out,
        repr(RemotePolicyFactory(address, {})),
    ):
        assert "s3cret" not in text and "t0ken" not in text
    assert folder.name == server[0].removeprefix("ws://").replace(":", "-") and len(written) > 3

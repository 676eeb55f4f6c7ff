"""Against a baseline: paired and unpaired tests, an interval for every look, a policy behind a websocket."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.server import ServerConnection, serve

from fixtures.line_world import LineWorlds
from tutti.evaluation.closed_loop.results import EvaluationProtocol
from tutti.evaluation.statistics.baseline import against
from tutti.evaluation.statistics.intervals import barnard, difference_of_rates, episodes_needed, mean_of_rates
from tutti.evaluation.statistics.sequential import confidence_sequence, log_capital, rounds_of
from tutti.runs.judges.baseline import compare_with
from tutti.runs.judges.remote import RemotePolicyFactory, evaluate_remote
from tutti.serving.client import Client
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


def of_rates(gains: tuple[int, ...], start: str) -> Outcomes:
    """Ten starts of each task, of which 5 and its gain succeed."""
    return {
        str(task): {seed: (seed < 5 + gain, f"{start} {seed}") for seed in range(10)}
        for task, gain in enumerate(gains)
    }


@pytest.mark.parametrize("start", ["start", "elsewhere"])
def test_rounding_makes_no_difference_and_hides_none(start: str) -> None:
    weak = of_rates((0, 0, 0), "start")
    same, better = (against(weak, of_rates(gains, start), "B") for gains in ((-4, 2, 2), (0, 3, 3)))
    assert same.difference.value == 0 and same.needed is None
    assert better.paired is (start == "start") and better.needed is not None and better.needed < 200


def written(folder: Path, **changes: Any) -> Path:
    """The results of an evaluation with this protocol."""
    protocol = EvaluationProtocol(
        suite="line", split="train", environment="line 1", policy="a", chunk=3, executed=2, max_decisions=12,
        seed_first=0, seed_last=39, distinct_starts=80,
    )  # fmt: skip
    rollouts = [
        {"condition": "policy", "task": task, "seed": seed, "success": success, "start": start}
        for task, seeds in outcomes(0.5, 0).items()
        for seed, (success, start) in seeds.items()
    ]
    folder.mkdir()
    values = {"protocol": asdict(replace(protocol, **changes)), "rollouts": rollouts}
    (folder / "results.json").write_text(json.dumps(values))
    return folder


def test_evaluations_by_other_rules_are_not_compared_and_other_habits_are_said(tmp_path: Path) -> None:
    base, same = written(tmp_path / "base"), written(tmp_path / "same", policy="b")
    assert compare_with(same, base).differs == ()
    longer = written(tmp_path / "longer", max_decisions=24, split="held_out")
    with pytest.raises(UserError, match=r"split held_out, not train; max_decisions 24, not 12\.\n  cure: "):
        compare_with(longer, base)
    assert not (longer / "against.json").exists()
    other = compare_with(written(tmp_path / "other", executed=3, environment="line 2"), base)
    assert other.differs == ("environment line 2, not line 1", "executed 3, not 2")
    assert "not the same: executed 3, not 2" in other.lines()[-1]
    assert json.loads((tmp_path / "other" / "against.json").read_text())["differs"] == [*other.differs]


def aside(prompt: str) -> np.ndarray:
    """Goes where the prompt says."""
    return np.full((3, 1), -1.0 if "left" in prompt else 1.0)


@contextmanager
def peer(about: dict[str, Any], acts: Callable[[str], Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A peer's server: its address, and what it was sent."""
    seen: list[dict[str, Any]] = []

    def answer(connection: ServerConnection) -> None:
        connection.send(pack(about))
        for message in connection:
            assert isinstance(message, bytes)
            seen.append(unpack(message))
            connection.send(pack({"actions": acts(seen[-1]["prompt"]), "server_timing": {"infer_ms": 1.0}}))

    with serve(answer, "127.0.0.1", 0, compression=None, max_size=None) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{running.socket.getsockname()[1]}", seen
        running.shutdown()


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with peer({"model": "a peer's", "reset_pose": np.zeros(3), "id": b"1"}, aside) as running:
        yield running


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


@pytest.mark.parametrize(
    ("about", "actions", "said"),
    [
        ({"fps": 20.0}, None, "fps: the policy has 20, the suite 10"),
        ({"actions": [{}] * 7}, None, "actions: the policy has 7, the suite 1"),
        ({"needs_state": True, "state": [{}, {}]}, None, "state: the policy has 2, the suite 1"),
        ({"image_size": [224, 224]}, None, r"image_size: expected .*found \[224, 224\]"),
        ({}, np.zeros((0, 1)), r"shape \(steps, 1\), at least one step, found \(0, 1\)"),
        ({}, np.zeros((3, 2)), r"shape \(steps, 1\), .*found \(3, 2\)"),
        ({}, [[1.0], [1.0, 2.0]], "found a list"),
        ({}, "to the left", "found a str"),
    ],
)
def test_a_server_of_another_suite_or_without_actions_is_refused_in_one_sentence(
    about: dict[str, Any], actions: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.SUITES, "line", LineWorlds())
    given = on_the_line(episodes=1, decisions=2, tasks="left")
    with peer(about, lambda _: actions) as (address, seen), pytest.raises(UserError, match=said):
        evaluate_remote(address, given, to=tmp_path / "peer")
    assert len(seen) == (actions is not None)


def test_a_server_that_computes_for_long_is_waited_for(server: tuple[str, list[dict[str, Any]]]) -> None:
    with Client(server[0]) as client:
        assert client._connection.ping_interval is None, "a ping that is not answered would end the call"


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
        repr(RemotePolicyFactory(address, {}, 1)),
    ):
        assert "s3cret" not in text and "t0ken" not in text
    assert folder.name == server[0].removeprefix("ws://").replace(":", "-") and len(written) > 3

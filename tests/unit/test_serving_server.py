"""The server answers openpi's clients with the policy's own bits, and nobody takes it from the others."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_serving_policy import SPEC, TOKENIZER, look, model, normalizer, write
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from fixtures.served import serving
from tutti.serving.client import Client
from tutti.serving.front_door import FrontDoor
from tutti.serving.policy import Policy
from tutti.serving.server import PolicyServer, ServerLimits
from tutti.serving.wire import MAX_CONTAINERS, WireError, pack, unpack
from tutti.types import UserError

KINDS = st.sampled_from(["?", "u1", "<i8", ">i4", "<f2", "<f4", ">f8"])


@settings(max_examples=30)
@given(arrays.arrays(KINDS, arrays.array_shapes(min_dims=0, min_side=0, max_side=4)), st.booleans())
def test_arrays_cross_the_wire_unharmed(array: np.ndarray, turned: bool) -> None:
    array = array.T if turned else array  # not contiguous
    found = unpack(pack({"a": {"b": [array, "text", 1, 0.5, None]}}))["a"]["b"]
    assert found[0].dtype == array.dtype and found[0].shape == array.shape
    assert found[0].tobytes() == array.tobytes() and found[1:] == ["text", 1, 0.5, None]


def test_the_bytes_are_those_of_openpi() -> None:
    array = {b"__ndarray__": True, b"data": b"\1\2", b"dtype": "|u1", b"shape": [2]}
    scalar = {b"__npgeneric__": True, b"data": 3, b"dtype": "<i4"}
    message = msgpack.packb({"x": array, "y": scalar})
    assert pack({"x": np.array([1, 2], np.uint8), "y": np.int32(3)}) == message
    found = unpack(message)
    assert found["x"].tolist() == [1, 2] and found["y"] == np.int32(3) and type(found["y"]) is np.int32


def array_of(dtype: Any, data: Any = bytes(8), shape: Any = (1,)) -> bytes:
    return msgpack.packb({"x": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}})


def scalar_of(dtype: Any, data: Any) -> bytes:
    return msgpack.packb({"x": {b"__npgeneric__": True, b"data": data, b"dtype": dtype}})


HOSTILE = {
    "object array": array_of("|O"),
    "bytes array": array_of("|S8"),
    "record array": array_of("f4,f4"),
    "dtype no text": array_of(7),
    "huge dtype": array_of("<f99", bytes(99)),
    "void scalar": scalar_of("|V1", 200_000_000),
    "object scalar": scalar_of("|O", 1),
    "text scalar": scalar_of("<f4", "1"),
    "overflow": scalar_of("|u1", 300),
    "shape bomb": array_of("<f8", shape=[2**31, 2**31]),
    "negative shape": array_of("<f8", shape=[-1]),
    "shape of floats": array_of("<f8", shape=[1.0]),
    "shape of truths": array_of("<f8", shape=[True]),
    "shape no list": array_of("<f8", shape=1),
    "many dimensions": array_of("<f8", shape=[1] * 9),
    "data no bytes": array_of("<f8", data="12345678"),
    "data too short": array_of("<f8", data=bytes(7)),
    "deep": b"\x91" * 5000,
    "claims four billion": b"\xdd\xff\xff\xff\xff",
    "many lists": msgpack.packb([[]] * (MAX_CONTAINERS + 1)),
    "long list": msgpack.packb([0] * 5000),
    "number as key": msgpack.packb({1: 2}),
    "list as key": b"\x81\x90\x01",
    "extension": msgpack.packb(msgpack.ExtType(5, b"12")),
    "date": msgpack.packb(msgpack.Timestamp(1)),
    "two values": msgpack.packb({}) * 2,
    "no text": b"\xa2\xff\xfe",
    "nothing": b"",
    "garbage": b"\xc1GET / HTTP/1.1",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_are_one_sentence(name: str) -> None:
    with pytest.raises(WireError) as caught:
        unpack(HOSTILE[name])
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and len(str(caught.value)) < 250


@pytest.mark.parametrize("value", [np.array([{}]), np.array(["a"]), object(), {"x": 2**70}])
def test_what_the_wire_does_not_have_is_not_sent(value: Any) -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        pack({"x": value})


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(model(), normalizer(), TOKENIZER, warn=False)


@pytest.fixture(scope="module")
def open_server(policy: Policy) -> Iterator[tuple[PolicyServer, str]]:
    limits = ServerLimits(clients=3, message=20_000)
    with serving(policy, front_door=FrontDoor(SPEC, {"cam": "left"}), limits=limits, fingerprint="f") as one:
        yield one


def test_answers_are_the_bits_of_the_policy_in_every_form_of_a_picture(
    policy: Policy, open_server: tuple[PolicyServer, str]
) -> None:
    with Client(open_server[1]) as client:
        told = client.metadata
        assert told["views"] == ["right", "left"] and told["horizon"] == 4 and told["fps"] == 20
        assert told["protocol_version"] == 1 and told["fingerprint"] == "f" and len(told["actions"]) == 2
        assert told["needs_state"] is True
        for seed in range(12):
            images, state = look(seed, size=(16, 24)[seed % 2])
            expected = policy.predict(images, state, "open the tap")
            right, left = images["right"], images["left"]
            answer = client.infer(
                {
                    "images": {"right": right.transpose(2, 0, 1) if seed % 3 else np.asfortranarray(right)},
                    "cam": left if seed % 4 else left / 255,
                    "observation/state": state.astype((np.float32, np.float64)[seed % 2]),
                    "prompt": "open the tap" if seed % 2 else b"open the tap",
                }
            )
            np.testing.assert_array_equal(answer["actions"], expected)
            assert answer["actions"].dtype == np.float32
            assert answer["server_timing"]["infer_ms"] >= answer["policy_timing"]["infer_ms"] > 0
            assert ("prev_total_ms" in answer["server_timing"]) == (seed > 0)
        far = client.infer({**images, "state": state + 1000, "prompt": "open the tap"})
        assert len(far["notes"]) == 3 and "far outside" in far["notes"][0]


def test_a_mistake_is_a_text_of_one_sentence_and_the_connection_stays(
    policy: Policy, open_server: tuple[PolicyServer, str]
) -> None:
    server, address = open_server
    images, state = look()
    good = {"images": images, "state": state, "prompt": "open the tap"}
    before = server.traffic.mistakes
    wrong = {
        "expected a binary message": "hello",
        "no msgpack map": HOSTILE["garbage"],
        "expected a dtype": HOSTILE["object array"],
        "expected names and values": pack([1]),
        "the view left is missing": pack({**good, "images": {"right": images["right"]}}),
        "expected 3 numbers": pack({**good, "state": np.zeros(2)}),
        "expected a picture": pack({**good, "images": {**images, "left": np.zeros((1, 9000), bool)}}),
        "finite numbers": pack({**good, "state": np.full(3, np.nan)}),
    }
    with connect(address) as connection:
        connection.recv()
        for says, message in wrong.items():
            connection.send(message)
            answer = connection.recv(timeout=30)
            assert isinstance(answer, str) and says in answer and "\n" not in answer
        connection.send(pack(good))
        answer = connection.recv(timeout=30)
        assert isinstance(answer, bytes)
        np.testing.assert_array_equal(
            unpack(answer)["actions"], policy.predict(images, state, "open the tap")
        )
    assert server.traffic.mistakes == before + len(wrong)
    with Client(address) as client, pytest.raises(UserError, match="expected prompt or task"):
        client.infer({"images": images, "state": state})


def test_large_messages_and_more_clients_than_allowed_are_turned_away(
    open_server: tuple[PolicyServer, str],
) -> None:
    server, address = open_server
    with connect(address) as connection:
        connection.recv()
        connection.send(bytes(30_000))
        with pytest.raises(ConnectionClosed, match="1009"):
            connection.recv(timeout=30)
    with Client(address), Client(address), Client(address), pytest.raises(UserError, match="503"):
        Client(address)
    assert server.traffic.refused >= 1
    with pytest.raises(InvalidStatus, match="403"):  # a page in a browser
        connect(address, origin="https://example.org")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot listen on"):
        PolicyServer(server.policy, port=int(address.rpartition(":")[2])).run()


def fetch(address: str, path: str, token: str = "") -> tuple[int, str]:
    request = urllib.request.Request(address.replace("ws:", "http:") + path)
    if token:
        request.add_header("Authorization", token)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_token_is_asked_for_at_the_handshake_and_batches_are_equal_but_for_rounding(policy: Policy) -> None:
    seen = [look(seed) for seed in range(6)]
    with serving(policy, token="sesame", limits=ServerLimits(batch=4)) as (server, address):
        assert fetch(address, "/healthz") == (200, "OK\n")
        assert fetch(address, "/metrics")[0] == 401 == fetch(address, "/metrics", "Bearer ses")[0]
        for wrong in (None, "sesam", "sesame2"):
            with pytest.raises(UserError, match="401"):
                Client(address, token=wrong)

        def ask(number: int) -> np.ndarray:
            images, state = seen[number]
            with Client(address, token="sesame") as client:
                for _ in range(4):
                    found = client.infer({**images, "state": state, "prompt": "open the tap"})["actions"]
            return found

        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(ask, range(6)))
        for one, (images, state) in zip(found, seen, strict=True):
            np.testing.assert_allclose(one, policy.predict(images, state, "open the tap"), atol=2e-6)
        status, text = fetch(address, "/metrics", "Bearer sesame")
        assert status == 200 and "tutti_answers_total 24" in text and "tutti_refused_total 5" in text
        assert 'tutti_latency_seconds{quantile="0.99"}' in text
        assert "24 answers; latency p50" in server.traffic.summary()


def test_a_token_is_compared_byte_by_byte_and_one_that_no_header_carries_is_refused(policy: Policy) -> None:
    images, state = look()
    with serving(policy, token="s\u00e9same?") as (_, address):
        with Client(address, token="s\u00e9same?") as client:
            assert client.infer({**images, "state": state, "prompt": "go"})["actions"].shape == (4, 2)
        for wrong in ("s\u00e9same\u00e9", "s??same?", "s\u00e8same?"):
            with pytest.raises(UserError, match="401"):
                Client(address, token=wrong)
    for token in ("sesame\n", " sesame", " ", "ses\r\name"):
        with pytest.raises(UserError, match="token: expected no line break"):
            PolicyServer(policy, token=token)


def test_an_answer_that_comes_too_late_is_never_that_of_the_next_observation(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, many = threading.Event(), policy.predict_many
    with serving(policy) as (_, address), Client(address, timeout=0.3) as client:
        monkeypatch.setattr(policy, "predict_many", lambda given: (wait.wait(20), many(given))[1])
        images, state = look(1)
        good = {**images, "state": state, "prompt": "open the tap"}
        with pytest.raises(UserError, match="the connection is lost"):
            client.infer(good)
        wait.set()
        with pytest.raises(UserError, match="the connection is lost"):
            client.infer({**good, "state": state + 1})
        with Client(address) as again:
            np.testing.assert_array_equal(
                again.infer(good)["actions"], policy.predict(*look(1), "open the tap")
            )


class Arm:
    """An arm and its camera, for 10 control steps."""

    limits: ClassVar = {"dx": (-0.5, 0.5), "grip": (-9.0, 9.0)}

    def __init__(self) -> None:
        self.step, self.done, self.times = 0, list[dict[str, float]](), list[float]()

    def stopped(self) -> bool:
        return self.step == 10

    def read(self) -> np.ndarray:
        return look(self.step)[0]["right"]

    def joints(self) -> np.ndarray:
        return look(self.step)[1]

    def command(self, action: dict[str, float]) -> None:
        self.step += 1
        self.done.append(action)
        self.times.append(time.perf_counter())


def test_the_page_wires_an_arm_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, views=("front",), action_names=("dx", "grip"), fps=50.0)
    policy, arm = Policy(model(spec=spec), normalizer(), TOKENIZER, warn=False), Arm()
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "serving.md").read_text()
    (code,) = [
        one.split("```")[0] for one in page.split("```python\n") if "arm.command" in one.split("```")[0]
    ]
    (tmp_path / "token").write_text("sesame\n")
    monkeypatch.chdir(tmp_path)
    with serving(policy, token="sesame") as (_, address):
        exec(code.replace("ws://gpu-box:8000", address), {"arm": arm, "camera": arm})
    looked = [0, 0, 0, 0, 2, 2, 4, 4, 6, 6]  # at which step, for the action of each
    chunks = {n: policy.predict(look(n)[0]["right"], look(n)[1], "open the drawer") for n in looked}
    rows = [0, 1, *[2, 3] * 4]
    expected = np.array([chunks[n][row] for n, row in zip(looked, rows, strict=True)])
    expected[:, 0] = expected[:, 0].clip(-0.5, 0.5)
    np.testing.assert_array_equal([[one["dx"], one["grip"]] for one in arm.done], expected)
    assert arm.times[-1] - arm.times[0] >= 9 / 50 - 0.03  # the rate is kept


def test_a_failure_of_the_server_is_told_without_its_traceback(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(policy) as (server, address), Client(address) as client:
        images, state = look()
        good = {**images, "state": state, "prompt": "open the tap"}
        with monkeypatch.context() as broken:
            broken.setattr(policy, "predict_many", lambda _: 1 / 0)
            with pytest.raises(UserError, match="The server failed on this observation; its log says why"):
                client.infer(good)
        assert "ZeroDivisionError" in caplog.text and server.traffic.failures == 1
        assert client.infer(good)["actions"].shape == (4, 2)


def test_command_serves_an_export_and_ends_cleanly_when_told_to(tmp_path: Path) -> None:
    folder = write(tmp_path / "step-000001", model())
    command = [sys.executable, "-m", "tutti", "serve", str(folder), "--port", "0", "-i", "open the tap"]
    with subprocess.Popen(
        [*command, "--name", "cam/0=right", "--name", "cam/1=left"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert "4 actions at 20 a second" in lines[0]
        address = lines[1].split("listening on ")[1].split(";")[0]
        images, state = look()
        with Client(address) as client:
            assert len(client.metadata["fingerprint"]) == 64
            given = {"cam": {"0": images["right"], "1": images["left"]}, "state": state}
            found = client.infer(given)["actions"]
            process.send_signal(signal.SIGTERM)
            assert "1 answers; latency p50" in process.stdout.read()
        assert process.wait(30) == 0
    loaded = Policy.load(folder)
    np.testing.assert_array_equal(found, loaded.predict(images, state, "open the tap"))

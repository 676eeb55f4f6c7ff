"""Twelve clients at once, a third of them hostile: the good ones get the policy's own bits, every one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from serve_load import LIMIT, attack_again, attacks
from test_serving_policy import TOKENIZER, look, model, normalizer

from fixtures.served import serving
from tutti.serving.client import Client
from tutti.serving.policy import Policy
from tutti.serving.server import ServerLimits

GOOD, ASKED, SECONDS = 8, 10, 1.2
HOSTILE = (("object dtype", "shape bomb"), ("garbage", "text"), ("flood", "too large"), ("half handshake",))


def test_good_clients_get_equal_actions_among_hostile_ones() -> None:
    policy = Policy(model(), normalizer(), TOKENIZER, warn=False)
    seen = [look(seed) for seed in range(4)]
    expected = [policy.predict(*one, "open the tap") for one in seen]
    ways, log = attacks(), list[str]()
    limits = ServerLimits(clients=GOOD + len(HOSTILE), message=LIMIT)
    with serving(policy, limits=limits) as (server, address):
        begun = threading.Barrier(GOOD + len(HOSTILE))

        def good(number: int) -> int:
            with Client(address) as client:
                begun.wait(20)
                for turn in range(ASKED):
                    images, state = seen[place := (number + turn) % len(seen)]
                    answer = client.infer({"images": images, "state": state, "prompt": "open the tap"})
                    np.testing.assert_array_equal(answer["actions"], expected[place])
            return ASKED

        def bad(number: int) -> int:
            begun.wait(20)
            for name in HOSTILE[number]:
                attack_again(ways[name], address, time.monotonic() + SECONDS / len(HOSTILE[number]), log)
            return 0

        with ThreadPoolExecutor(GOOD + len(HOSTILE)) as pool:
            attacked = [pool.submit(bad, number) for number in range(len(HOSTILE))]
            answered = [pool.submit(good, number) for number in range(GOOD)]
            assert [one.result(60) for one in answered] == [ASKED] * GOOD
            assert [one.result(60) for one in attacked] == [0] * len(HOSTILE)
        traffic = server.traffic
        assert traffic.answers == GOOD * ASKED and traffic.failures == 0 and traffic.mistakes > 0
        assert log == [], "each hostile message had an answer of one sentence"

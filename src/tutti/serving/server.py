"""The policy server: openpi's websocket protocol, for people who do not trust everybody on their network.

On connect the server sends a map about the policy; then each binary message is an observation, answered by
actions, or by a text of one sentence where it cannot be used. One thread computes; connections, bytes of a
message and requests that wait are bounded.
"""

from __future__ import annotations

import asyncio
import binascii
import hmac
import http
import ipaddress
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float32
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from tutti.errors import printable
from tutti.serving.front_door import FrontDoor, Seen
from tutti.serving.observation import shortest
from tutti.serving.policy import Policy
from tutti.serving.traffic import Traffic
from tutti.serving.wire import WireError, pack, unpack
from tutti.types import UserError

PROTOCOL_VERSION = 1
MAX_SENTENCE = 600
PATIENCE = 5.0
"""Seconds that requests have left when the server is told to stop."""
_quiet = logging.getLogger("tutti.serving.websockets")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False  # every scan of the port would otherwise print a traceback
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What a client may take: `clients` connections at once, each with one message of `message` bytes on its
    way and one request that waits. `batch` requests that wait are computed together, which changes the last
    bits of their actions; 1: each gets the bits of `Policy.predict`."""

    clients: int = 64
    message: int = 16 * 2**20
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Answered:
    """An observation with what was answered."""

    seen: Seen
    actions: Float32[np.ndarray, "t a"]
    notes: Sequence[str]


@dataclass(slots=True)
class _Asked:
    """A request that waits."""

    seen: Seen
    answer: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class PolicyServer:
    """Serves one policy. `front_door` finds pictures, state and instruction in an observation.

    With a `token` a client must send the header `Authorization: Api-Key TOKEN` (or Bearer). Pages in a
    browser are refused, whatever they send.

    `page` makes a page for people of the server, at / (with a token: its password in the browser); `last` is
    then what was answered last. Nothing can be asked for there.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        front_door: FrontDoor | None = None,
        limits: ServerLimits | None = None,
        fingerprint: str = "",
        page: Callable[[Self], str] | None = None,
    ) -> None:
        self.policy, self.host, self.port = policy, host, port
        self.front_door = front_door or FrontDoor(policy.spec, needs_state=policy.needs_state)
        self.limits = ServerLimits() if limits is None else limits
        self.traffic = Traffic()
        self.last: Answered | None = None
        self._page, self._shown = page, ("", "")
        if token is not None and (token != token.strip() or not token.isprintable()):
            raise UserError(
                "token: expected no line break, and no space at its ends: no header carries them, so no "
                "client could send it."
            )
        self._token = token.encode() if token else None
        if policy.remembers:
            raise UserError(
                f"tutti serve: this policy was trained with a history of {list(policy.spec.history)} steps, "
                "and the protocol says nothing of the time of an observation.\n  cure: call it beside the "
                "robot (Policy.actor), or train with data.history=[0]."
            )
        self._about = pack(self._metadata(fingerprint))
        self._waiting: asyncio.Queue[_Asked] = asyncio.Queue(self.limits.clients)
        self._stop: Callable[[], object] | None = None

    def _metadata(self, fingerprint: str) -> dict[str, Any]:
        spec = self.policy.spec

        def named(names: Sequence[str], units: Sequence[str], count: int) -> list[dict[str, str]]:
            names, units = names or [str(place) for place in range(count)], units or [""] * count
            return [{"name": name, "unit": unit} for name, unit in zip(names, units, strict=True)]

        return {
            "protocol": "openpi",
            "protocol_version": PROTOCOL_VERSION,
            "fingerprint": fingerprint,
            "views": list(shortest(spec.views)),
            "image_size": spec.image_size,
            "state": named(spec.state_names, spec.state_units, spec.state_dim),
            "needs_state": self.front_door.needs_state and spec.state_dim > 0,
            "actions": named(spec.action_names, spec.action_units, spec.action_dim),
            "horizon": spec.horizon,
            "fps": spec.fps,
            "robot": self.policy.embodiment,
            "instruction": self.front_door.instruction,
        }

    def run(self, started: Callable[[str], object] = lambda address: None) -> None:
        """Warms up, listens, calls `started` with the address, and serves until `stop`, Ctrl-C or SIGTERM.

        Raises: UserError if it cannot listen there.
        """
        asyncio.run(self._run(started))

    def stop(self) -> None:
        """Ends `run` from another thread; requests that wait are answered first."""
        if self._stop is not None:
            self._stop()

    async def _run(self, started: Callable[[str], object]) -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self._stop = lambda: loop.call_soon_threadsafe(ended.set)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, ended.set)
        with ThreadPoolExecutor(1, "tutti-predict") as executor:
            await loop.run_in_executor(executor, self._warm_up)
            async with await self._listen() as server:
                work = asyncio.create_task(self._work(executor))
                host, port = next(iter(server.sockets)).getsockname()[:2]
                started(f"ws://{f'[{host}]' if ':' in host else host}:{port}")
                await ended.wait()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._waiting.join(), PATIENCE)
            work.cancel()  # not before every client has its answer or is gone

    async def _listen(self) -> Server:
        try:
            return await serve(
                *(self._serve, self.host, self.port),
                process_request=self._admit,
                origins=[None],
                compression=None,
                max_size=self.limits.message,
                max_queue=1,
                close_timeout=2,
                server_header="tutti",
                logger=_quiet,
            )
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on {self.host}:{self.port} ({error}). Choose another --port or --host."
            ) from error

    def _warm_up(self) -> None:
        """The first prediction of a process takes many times longer than the next."""
        spec = self.policy.spec
        picture = np.zeros((spec.image_size, spec.image_size, 3), np.uint8)
        seen = dict.fromkeys(spec.views, picture), np.zeros(spec.state_dim, np.float32), "warm up"
        for count in {1, self.limits.batch}:
            self.policy.predict_many([seen] * count)

    async def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """The answer to a plain HTTP request, or to a client that is not let in; None for one that is."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self._token is not None:
            given = request.headers.get_all("Authorization")
            if len(given) != 1 or not hmac.compare_digest(_key(given[0]), self._token):
                self.traffic.refused += 1
                refusal = connection.respond(http.HTTPStatus.UNAUTHORIZED, "The token is missing or wrong.\n")
                if self._page is not None:  # a browser asks its user then
                    refusal.headers["WWW-Authenticate"] = 'Basic realm="tutti", charset="UTF-8"'
                return refusal
        if self._page is not None and "Upgrade" not in request.headers and request.path in ("/", "/state"):
            return await self._for_people(connection, request)
        if request.path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.traffic.exposition())
        if self.traffic.clients >= self.limits.clients:
            self.traffic.refused += 1
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "Too many clients.\n")
        return None

    async def _for_people(self, connection: ServerConnection, request: Request) -> Response:
        """The page, or a text that is another one when the page is."""
        assert self._page is not None
        if self._token is None and not _is_address(request.headers.get("Host", "")):
            # A name may be of a site whose own pages would then read this one.
            return connection.respond(http.HTTPStatus.FORBIDDEN, "Only by an address, or localhost.\n")
        state = self.traffic.state
        if request.path == "/state":
            kind, body = "text/plain", state
        else:
            try:
                if self._shown[0] != state:
                    self._shown = state, await asyncio.to_thread(self._page, self)
            except Exception:
                logger.exception("the page could not be made")
                said = "The page failed; the server's log says why.\n"
                return connection.respond(http.HTTPStatus.INTERNAL_SERVER_ERROR, said)
            kind, body = "text/html", self._shown[1]
        content = body.encode()
        about = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Connection": "close",
        }
        return Response(200, "OK", Headers(about), content)

    async def _serve(self, connection: ServerConnection) -> None:
        if self.traffic.clients >= self.limits.clients:  # two were let in at the same time
            self.traffic.refused += 1
            await connection.close(1013, "too many clients")
            return
        self.traffic.clients += 1
        previous: dict[str, float] = {}
        try:
            await connection.send(self._about)
            async for message in connection:
                began = perf_counter()
                answer = await self._answer(message, previous)
                await connection.send(answer)
                previous = {"prev_total_ms": 1000 * (perf_counter() - began)}
        except ConnectionClosed:
            pass
        finally:
            self.traffic.clients -= 1

    async def _answer(self, message: str | bytes, previous: dict[str, float]) -> str | bytes:
        """The actions, or what is wrong, in one sentence."""
        began = perf_counter()
        try:
            if isinstance(message, str):
                raise WireError("expected a binary message with a msgpack map, found a text.")
            asked = _Asked(self.front_door(unpack(message)))
            await self._waiting.put(asked)
            actions, notes, seconds = await asked.answer
        except UserError as error:
            self.traffic.mistakes += 1
            return printable(" ".join(str(error).split()))[:MAX_SENTENCE]
        except Exception:
            self.traffic.failures += 1
            logger.exception("an observation could not be answered")
            return "The server failed on this observation; its log says why."
        spent = perf_counter() - began
        if self._page is not None:
            self.last = Answered(asked.seen, actions, notes)
        self.traffic.answered(spent)
        timing = {"infer_ms": 1000 * spent, **previous}
        answer = {"actions": actions, "server_timing": timing, "policy_timing": {"infer_ms": 1000 * seconds}}
        return pack(answer | ({"notes": notes} if notes else {}))

    async def _work(self, executor: ThreadPoolExecutor) -> None:
        """Computes what waits, in the order in which it came."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self.limits.batch and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            answers = await asyncio.get_running_loop().run_in_executor(
                executor, self._predict, [one.seen for one in batch]
            )
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():  # its client may be gone
                    if isinstance(answer, Exception):
                        one.answer.set_exception(answer)
                    else:
                        one.answer.set_result(answer)
                self._waiting.task_done()

    def _predict(self, batch: Sequence[Seen]) -> list[tuple[np.ndarray, list[str], float] | Exception]:
        began = perf_counter()
        try:
            found = self.policy.predict_many(batch)
            seconds = perf_counter() - began
            return [
                one
                if isinstance(one, UserError)
                else (one, self.policy.notes(seen.state, seen.instruction), seconds)
                for one, seen in zip(found, batch, strict=True)
            ]
        except Exception as error:
            return [error] * len(batch)


def _key(authorization: str) -> bytes:
    """The token that a client gives: as a key, or as the password of any user."""
    kind, _, key = authorization.partition(" ")
    if kind.lower() != "basic":
        return key.strip().encode(errors="surrogateescape")  # bytes beyond ASCII, as they came
    try:
        return binascii.a2b_base64(key.strip()).partition(b":")[2]
    except ValueError:
        return b""


def _is_address(host: str) -> bool:
    """Whether a Host header is one, or localhost; with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False

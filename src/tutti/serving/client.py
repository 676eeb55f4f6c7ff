"""A client of `tutti serve`, and of any server that speaks openpi's websocket protocol."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from tutti.serving.wire import pack, unpack
from tutti.types import UserError

MAX_ANSWER = 64 * 2**20
"""Bytes."""


def without_secrets(address: str) -> str:
    """The address without a name and password before its host and without what stands behind "?", which may
    be a token: for all that is written or said.

    >>> without_secrets("ws://me:secret@host:8000/?token=x"), without_secrets("ws://host:8000")
    ('ws://host:8000/', 'ws://host:8000')
    """
    head, slashes, rest = address.partition("?")[0].partition("#")[0].partition("://")
    host, slash, path = rest.partition("/")
    return head + slashes + host.rpartition("@")[2] + slash + path


class Client:
    """One connection: `infer` sends an observation and gives the answer, one at a time. `address` is what may
    be said of it.

    `metadata` is what the server said of its policy: views, sizes, names, units, horizon, rate, fingerprint.
    """

    def __init__(
        self, address: str = "ws://127.0.0.1:8000", token: str | None = None, timeout: float = 60.0
    ) -> None:
        """Connects. Raises: UserError if no server answers within `timeout` seconds, or it refuses."""
        self.address, self.timeout = without_secrets(address), timeout
        headers = {"Authorization": f"Api-Key {token}"} if token else {}
        self._open = ExitStack()
        try:
            connecting = connect(
                address,
                additional_headers=headers,
                open_timeout=timeout,
                compression=None,
                max_size=MAX_ANSWER,
                proxy=None,
                # A server that computes where it listens answers no ping: only `timeout` is to end a call.
                ping_interval=None,
            )
            self._connection = self._open.enter_context(connecting)
            first = self._connection.recv(timeout)
        except (OSError, ValueError, WebSocketException) as error:
            self.close()
            said = str(error).replace(address, self.address)
            raise UserError(f"{self.address}: no policy server answers ({said}).") from None
        try:
            self.metadata: dict[str, Any] = self._map(first)
        except UserError:
            self.close()
            raise

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The answer: `actions` (horizon, action) in data units, and timings.

        Raises: UserError with the server's sentence; or if the connection is lost, or no answer comes within
        `timeout` seconds. The connection is then ended: a late answer would be taken for that of the next
        observation.
        """
        try:
            self._connection.send(pack(dict(observation)))
            return self._map(self._connection.recv(self.timeout))
        except (OSError, WebSocketException) as error:
            self.close()
            said = f"no answer within {self.timeout:g} s" if isinstance(error, TimeoutError) else error
            raise UserError(f"{self.address}: the connection is lost ({said}). Connect again.") from error

    def _map(self, message: str | bytes) -> dict[str, Any]:
        if isinstance(message, str):
            raise UserError(f"{self.address}: {message}")
        answer = unpack(message)
        if not isinstance(answer, dict):
            raise UserError(f"{self.address}: expected a map, found {type(answer).__name__}.")
        return answer

    def close(self) -> None:
        """Ends the connection."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

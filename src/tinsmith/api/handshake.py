"""A TLS connection until its handshake is through: a stranger among all, and for `HANDSHAKE_S` at most.

asyncio tells a server's protocol of a connection after the handshake, so who never begins one would be counted by
nobody. Here connections are taken as they are, counted, and secured then. What stays true: each that is open is in the
crowd, as a handshake or as a `Connection`; one that makes room, fails or is late is closed without a word.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from typing import Any

from uvicorn.server import ServerState

from tinsmith.api.connection import READ_BYTES, Connection
from tinsmith.api.crowd import Crowd

HANDSHAKE_S = 10.0


class Handshake(asyncio.Protocol):
    """Args:
    make: the connection that it comes to; `beneath` is the transport under its TLS.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        crowd: Crowd,
        make: Callable[..., Connection],
        *,
        server_state: ServerState,
        **options: Any,
    ) -> None:
        self._context, self._crowd = context, crowd
        self._make, self._options = make, {**options, "server_state": server_state}
        self._known: set[Any] = server_state.connections  # to the server, which ends with them
        self._loop = asyncio.get_running_loop()
        self._early = b""  # what came with the end of the handshake
        self._lingers_until = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._known.add(self)
        self._crowd.come(self)  # where there is no room now, there may be some when it is through; else it is told then
        self._task = self._loop.create_task(self._secure(transport), name="handshake")

    async def _secure(self, transport: asyncio.Transport) -> None:
        secured: asyncio.Transport | None = None
        try:
            if not transport.is_closing():
                secured = await self._loop.start_tls(
                    transport, self, self._context, server_side=True, ssl_handshake_timeout=HANDSHAKE_S
                )
        except OSError:  # no TLS, late, or broken off
            return
        finally:
            self._crowd.gone(self)
            self._known.discard(self)
        if secured is not None and not secured.is_closing():  # it was closed meanwhile
            self._hand_over(secured, transport)

    def _hand_over(self, secured: asyncio.Transport, beneath: asyncio.Transport) -> None:
        connection = self._make(beneath=beneath, **self._options)
        secured.set_protocol(connection)
        connection.connection_made(secured)
        left_s = self._lingers_until - self._loop.time()
        if left_s > 0:
            connection.linger(left_s)
        if self._early and not secured.is_closing():
            connection.data_received(self._early)

    def data_received(self, data: bytes) -> None:
        self._early += data

    def may_leave(self) -> bool:
        return True

    def leave(self) -> None:
        self._transport.abort()

    def linger(self, seconds: float) -> None:
        """As `Connection.linger`."""
        self._lingers_until = self._loop.time() + seconds
        self._loop.call_later(seconds, self.shutdown)

    def shutdown(self) -> None:
        if self._loop.time() >= self._lingers_until:
            self._transport.abort()


def use_small_buffers() -> None:
    """asyncio gives each TLS connection 256 KiB to read into, all of it written to, where a plain one reads as much and
    gives it back: 10,000 polls would take 2.5 GiB. To be deleted once `loop.start_tls` can be told how much (not so in
    CPython 3.11 to 3.14)."""
    SSLProtocol.max_size = READ_BYTES

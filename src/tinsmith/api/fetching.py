"""Fetches the pictures that clients name instead of sending them, from the locations that the operator allows.

Bounded in bytes and in time, and never off the allowed locations: the address that was checked is the one that is
connected to, redirects are not followed, and a file is opened only where it was found to lie. What was fetched becomes
part of the request as if it had been sent, so nothing that is acknowledged depends on a remote later.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import h11

from tinsmith import __version__
from tinsmith.api.locations import HTTPS_PORT, Address, Locations, Url
from tinsmith.api.places import Places
from tinsmith.config import Settings
from tinsmith.errors import TooLargeError, UserError, echo
from tinsmith.types import TenantId

TENANT_FETCHES = 4  # at one time
REQUEST_BYTES = 64 << 20  # of all that a request names, as in a body of pictures
PIECE_BYTES = 1 << 16

Take = Callable[[int], None]


class Fetcher:
    """For the event loop's own thread."""

    def __init__(self, settings: Settings, context: ssl.SSLContext | None = None) -> None:
        """context: whom to trust; None: the system's certificates, read when they are first needed."""
        self._locations = Locations.of(settings.picture_locations)
        self._max_pictures, self._max_bytes = settings.max_pictures, settings.max_picture_bytes
        self._request_bytes = min(REQUEST_BYTES, settings.max_body_bytes)
        self._fetch_s = settings.picture_fetch_s
        self._context = context
        self._places = Places(TENANT_FETCHES)

    @property
    def is_on(self) -> bool:
        return bool(self._locations)

    async def fetch(self, tenant_id: TenantId, locations: Iterable[str], take: Take) -> dict[str, bytes]:
        """The file at each location, which is fetched once and counts as often as it is named: so often will it stand
        in the request. `take` is told of bytes before they are kept, and may refuse them.

        Raises:
            UserError: a location that isn't allowed or doesn't give a file, or they take too long together.
            TooLargeError: a file beyond the bounds, or too many, or more than a request with pictures may hold.
        """
        times = Counter(locations)
        if times.total() > self._max_pictures:
            raise TooLargeError(f"the request names more than {self._max_pictures} pictures: send fewer at once")
        wanted = {location: self._locations.find(location) for location in times}
        taken = 0

        def take_all(location: str, num_bytes: int) -> None:
            nonlocal taken
            taken += times[location] * num_bytes
            if taken > self._request_bytes:
                raise TooLargeError(
                    f"the pictures that the request names have more than {self._request_bytes} bytes together: name "
                    "fewer or smaller ones"
                )
            take(times[location] * num_bytes)

        fetches = [
            asyncio.create_task(self._fetch(tenant_id, location, where, partial(take_all, location)))
            for location, where in wanted.items()
        ]
        try:
            async with asyncio.timeout(self._fetch_s):
                return dict(zip(wanted, await asyncio.gather(*fetches), strict=True))
        except TimeoutError:
            raise UserError(f"the pictures were not fetched within {self._fetch_s:g} s: send them yourself") from None
        finally:
            for fetch in fetches:
                fetch.cancel()

    async def _fetch(self, tenant_id: TenantId, location: str, where: Url | Path, take: Take) -> bytes:
        async with self._places.place(tenant_id):
            try:
                if isinstance(where, Path):
                    data = await asyncio.to_thread(_read_file, where, self._max_bytes)
                    take(len(data))
                    return data
                return await self._ask(where, take)
            except (OSError, h11.RemoteProtocolError) as error:
                why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
                raise UserError(f"{echo(location)} can't be fetched: {why}") from None

    async def _ask(self, url: Url, take: Take) -> bytes:
        address = await self._address(url)
        if self._context is None:
            self._context = await asyncio.to_thread(ssl.create_default_context)
        reader, writer = await asyncio.open_connection(
            str(address), url.port, ssl=self._context, server_hostname=url.host
        )
        try:
            return await self._exchange(url, reader, writer, take)
        finally:
            writer.transport.abort()

    async def _address(self, url: Url) -> Address:
        """Raises: UserError: all its addresses are private. OSError: it has none."""
        found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        for address in addresses:
            if self._locations.is_reachable(url.host, address):
                return address
        raise UserError(f"pictures are not fetched from {echo(url.host)}: it has a private address")

    async def _exchange(
        self, url: Url, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, take: Take
    ) -> bytes:
        connection = h11.Connection(h11.CLIENT)
        name = f"[{url.host}]" if ":" in url.host else url.host
        host = name if url.port == HTTPS_PORT else f"{name}:{url.port}"
        headers = {
            "host": host,
            "user-agent": f"tinsmith/{__version__}",
            "accept": "image/png, image/jpeg",
            "accept-encoding": "identity",
            "connection": "close",
        }
        request = h11.Request(method="GET", target=url.target, headers=list(headers.items()))
        writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(PIECE_BYTES))
            elif isinstance(event, h11.Response):
                self._check_response(url, event)
            elif isinstance(event, h11.Data):
                num_bytes += len(event.data)
                if num_bytes > self._max_bytes:
                    raise _too_large(self._max_bytes)
                take(len(event.data))
                parts.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                return b"".join(parts)

    def _check_response(self, url: Url, response: h11.Response) -> None:
        headers = {bytes(name): bytes(value) for name, value in response.headers}
        where = echo(f"https://{url.host}{url.target}")
        if 300 <= response.status_code < 400:
            raise UserError(f"{where} can't be fetched: it redirects elsewhere, which is not followed")
        if response.status_code != 200:
            raise UserError(f"{where} can't be fetched: it answers {response.status_code}")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise UserError(f"{where} can't be fetched: it is sent compressed")
        if int(headers.get(b"content-length", b"0")) > self._max_bytes:
            raise _too_large(self._max_bytes)


def _read_file(path: Path, max_bytes: int) -> bytes:
    """Raises: UserError: no plain file. TooLargeError. OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{echo(str(path))} is no file")
        if found.st_size > max_bytes:
            raise _too_large(max_bytes)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes)
    finally:
        os.close(descriptor)


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"a picture has more than {max_bytes} bytes: name a smaller one")

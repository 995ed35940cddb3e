"""A TLS port: who never finishes a handshake is counted, and makes room like every stranger."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.contract.conftest import Live
from tests.contract.streams import Stream
from tests.service import until
from tinsmith.api import connection, handshake

WITHIN_S = 5.0
MOST = 8


@pytest.fixture
def house(make_house: Any, tmp_path: Path) -> Any:
    made = trustme.CA().issue_cert("localhost", "127.0.0.1")
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    made.private_key_pem.write_to_path(key)
    for number, part in enumerate(made.cert_chain_pems):
        part.write_to_path(certificate, append=number > 0)
    return make_house(tls_certificate=str(certificate), tls_key=str(key))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the server starts."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", MOST)


class Secured(Stream):
    """A connection whose handshake is through."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._sock.settimeout(WITHIN_S)
        self._sock = context.wrap_socket(self._sock)


def ask(key: str) -> bytes:
    return f"GET /api/v1/sessions HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\r\n".encode()


def status_of(stream: Stream, key: str) -> int | None:
    stream.send(ask(key))
    answer = stream.answer(WITHIN_S)
    return None if answer is None else answer.status


def num_known(live: Live) -> int:
    return len(live.server.server_state.connections)


@contextlib.contextmanager
def silent(live: Live, num: int, sent: bytes = b"") -> Iterator[list[Stream]]:
    """Connections that stay before the end of their handshakes."""
    with contextlib.ExitStack() as stack:
        before = num_known(live)
        streams = [stack.enter_context(Stream(live.url)) for _ in range(num)]
        for stream in streams:
            stream.send(sent)
        most = connection.most_connections()
        until(lambda: num_known(live) == min(most, before + num), WITHIN_S, lambda: f"{num_known(live)} are known")
        yield streams


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01\x00"], ids=["silent", "half a greeting"])
def test_who_never_shakes_hands_makes_room_the_oldest_first(few: None, live: Live, house: Any, sent: bytes) -> None:
    with silent(live, 3 * MOST, sent) as streams:
        for stream in streams[: 2 * MOST]:
            assert stream.is_closed(WITHIN_S)
        with Secured(live.url) as tenant:
            assert status_of(tenant, house.key) == 200
            assert num_known(live) <= MOST
            until(streams[2 * MOST].has_answer, WITHIN_S, lambda: "the oldest has stayed")
            assert not streams[-1].has_answer()


def test_a_handshake_has_its_time(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.3)
    with Stream(live.url) as stream, Stream(live.url) as other:
        other.send(b"\x16\x03\x01\x02\x00\x01\x00")
        assert stream.is_closed(WITHIN_S)
        assert other.is_closed(WITHIN_S)
        until(lambda: num_known(live) == 0, WITHIN_S, lambda: f"{num_known(live)} are known")


def test_what_is_no_tls_is_closed_and_forgotten(live: Live) -> None:
    with Stream(live.url) as stream:
        stream.send(b"GET / HTTP/1.1\r\n\r\n")
        until(lambda: num_known(live) == 0, WITHIN_S, lambda: f"{num_known(live)} are known")


def test_who_makes_room_holds_no_file_until_its_client_says_farewell(few: None, live: Live, house: Any) -> None:
    """A client need not answer the end of TLS, and asyncio would wait for that."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Secured(live.url)) for _ in range(MOST - 1)]
        assert [status_of(stream, house.key) for stream in idle] == [200] * (MOST - 1)
        tenant = stack.enter_context(Secured(live.url))
        assert status_of(tenant, house.other_key) == 200
        until(lambda: num_known(live) == MOST - 1, 2.0, lambda: f"{num_known(live)} are open")
        assert idle[0].is_closed(WITHIN_S)


def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(live: Live, house: Any) -> None:
    """In one segment with it, as a client may send them."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for _ in range(20):
        come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(come, go)
        with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=WITHIN_S) as sock:
            while True:
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    if sent := go.read():
                        sock.sendall(sent)
                    come.write(sock.recv(65536))
            client.write(ask(house.key))
            sock.sendall(go.read())
            assert received(client, come, sock).startswith(b"HTTP/1.1 200 ")


def received(client: ssl.SSLObject, come: ssl.MemoryBIO, sock: socket.socket) -> bytes:
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        try:
            return client.read(65536)
        except ssl.SSLWantReadError:
            come.write(sock.recv(65536))
    raise TimeoutError


def test_a_server_that_ends_waits_for_no_handshake(live: Live) -> None:
    with silent(live, 3) as streams:
        started = time.monotonic()
        live.server.should_exit = True
        live.thread.join(WITHIN_S)
        assert not live.thread.is_alive()
        assert time.monotonic() - started < WITHIN_S
        assert all(stream.is_closed(WITHIN_S) for stream in streams)


def test_a_connection_holds_little(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio would give each a buffer of 256 KiB."""
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 60.0)
    monkeypatch.setattr(connection, "HEADER_S", 60.0)
    num = 10
    tracemalloc.start()
    try:
        start, _ = tracemalloc.get_traced_memory()
        with silent(live, num), contextlib.ExitStack() as stack:
            waiting, _ = tracemalloc.get_traced_memory()
            for _ in range(num):
                stack.enter_context(Secured(live.url))
            until(lambda: num_known(live) == 2 * num, WITHIN_S, lambda: f"{num_known(live)} are known")
            held, _ = tracemalloc.get_traced_memory()
        assert max(waiting - start, held - waiting) < num * 200_000
    finally:
        tracemalloc.stop()

"""Strangers who come in floods or take no answers keep nobody from connecting."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from typing import Any

import pytest

from tests.contract.streams import Stream
from tests.service import until
from tinsmith.api import connection, main

WITHIN_S = 5.0
NUM_AT_ONCE = 200


def poll(key: str) -> bytes:
    head = f"POST /api/v1/retrieve_future HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nContent-Length: 2\r\n\r\n"
    return head.encode() + b"{}"


def ask(key: str) -> bytes:
    """A request as it goes over the wire."""
    return f"GET /api/v1/sessions HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\r\n".encode()


def test_strangers_who_take_no_answers_make_room(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, house: Any
) -> None:
    """Also one who shows a key then, and is turned away."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
    live = request.getfixturevalue("live")
    page = b"GET /schema/assets/swagger-ui.css HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(Stream(live.url)) for _ in range(8)]
        for stream in deaf:
            stream.send(page * 60)
        until(lambda: num_stuck(live) == 8, 20, lambda: f"{num_stuck(live)} wait for their clients")
        for _ in range(8):
            stream = stack.enter_context(Stream(live.url))
            stream.send(poll(house.key))
            answer = stream.answer(WITHIN_S)
            assert answer is not None
            last = answer.status
        assert last == 429  # alice has seven by now
        assert num_stuck(live) <= 1
        stuck = stack.enter_context(Stream(live.url))
        stuck.send(page * 60)
        until(lambda: num_stuck(live) == 1, 20, lambda: "all is taken")
        bob = stack.enter_context(Stream(live.url))
        bob.send(ask(house.other_key))
        answer = bob.answer(WITHIN_S)
        assert answer is not None
        assert answer.status == 200


def num_stuck(live: Any) -> int:
    """Connections whose clients don't take what is written."""
    return sum(each.transport.get_write_buffer_size() > 0 for each in list(live.server.server_state.connections))


def test_who_all_come_at_once_wait_in_line_and_are_taken_some_at_a_time(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a flood takes all files that the process may open before one connection was turned away."""
    loop, begin = live.server.servers[0].get_loop(), connection.Connection.__init__
    turns, met = [0], Counter[int]()

    def turn() -> None:
        turns[0] += 1
        if met.total() < NUM_AT_ONCE:
            loop.call_soon(turn)

    def counted(self: Any, *args: Any, **options: Any) -> None:
        met[turns[0]] += 1
        begin(self, *args, **options)

    monkeypatch.setattr(connection.Connection, "__init__", counted)
    has_come = threading.Event()
    loop.call_soon_threadsafe(has_come.wait, 30)
    with contextlib.ExitStack() as stack:
        for _ in range(NUM_AT_ONCE):
            stack.enter_context(Stream(live.url))
        has_come.set()
        loop.call_soon_threadsafe(turn)
        until(lambda: met.total() == NUM_AT_ONCE, 20, lambda: f"{met.total()} were taken")
    assert max(met.values()) <= main.AT_ONCE

"""Under overload: what a connection is told that is refused, and what becomes of one that comes before its time."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.alerts import selected
from tests.contract.standing import standing
from tests.service import until
from tests.unit.test_metrics import samples
from tinsmith.api import auth, connection, hearing
from tinsmith.api.crowd import Crowd
from tinsmith.api.hearing import Hearing
from tinsmith.api.pressure import Pressure
from tinsmith.api.waits import MAX_WAIT_S
from tinsmith.observe import series
from tinsmith.observe.metrics import Counting

STEP_PATH = "/api/v1/optim_step"
STEP = b'{"model_id": "nobody", "seq_id": 1, "adam_params": {}}'


class Caller:
    def __init__(self, url: str, key: str) -> None:
        host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
        self.sock = socket.create_connection((host, int(port)), timeout=30)
        self._key = key

    def close(self) -> None:
        self.sock.close()

    def send(self, path: str = "optim_step", body: bytes = STEP) -> None:
        head = f"POST /api/v1/{path} HTTP/1.1\r\nhost: x\r\nx-api-key: {self._key}\r\n"
        rest = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.sock.sendall((head + rest).encode() + body)

    def read(self) -> tuple[int, dict[str, str], Any]:
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._more()
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        while len(body) < int(headers["content-length"]):
            body += self._more()
        return int(first.split(" ")[1]), headers, json.loads(body)

    def _more(self) -> bytes:
        more = self.sock.recv(65536)
        assert more, "closed before the end of the answer"
        return more

    def ask(self, path: str = "optim_step", body: bytes = STEP) -> tuple[int, dict[str, str], Any]:
        self.send(path, body)
        return self.read()


def test_without_a_good_key_nothing_is_told_but_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is asked for; and a poll is answered."""
    with standing(tmp_path) as (house, url), closing(Caller(url, house.key)) as caller:
        assert caller.ask()[0] == 404, "the key is known from here on"
        monkeypatch.setattr(auth, "TTL_S", 60.0)
        monkeypatch.setattr(Pressure, "note", high)
        monkeypatch.setattr(Pressure, "refuses", lambda self, tenant_id: True)
        while caller.ask()[0] != 429:
            time.sleep(0.02)
        for key in ("tml-unknown", ""):
            with closing(Caller(url, key)) as stranger:
                assert stranger.ask()[0] == 401
        with closing(Caller(url, house.key)) as poller:
            assert poller.ask("retrieve_future", b'{"request_id": "req-unknown"}')[0] == 410


def high(self: Pressure, delay_s: float, now: float) -> None:
    self.is_high = True


def test_it_is_told_when_to_come_and_is_not_read_for_a_while_if_it_comes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with standing(tmp_path) as (house, url), closing(Caller(url, house.key)) as caller:
        assert caller.ask()[0] == 404, "the key is known from here on"
        monkeypatch.setattr(auth, "TTL_S", 60.0)  # of a key that is taken to be good: others go the long way
        monkeypatch.setattr(hearing, "DEAF_S", 3.0)
        monkeypatch.setattr(Pressure, "note", high)
        monkeypatch.setattr(Pressure, "refuses", lambda self, tenant_id: True)
        while (refused := caller.ask())[0] != 429 or int(refused[1]["retry-after"]) > MAX_WAIT_S:
            time.sleep(0.02)  # the first ones may go the long way
        assert refused[2]["code"] == "capacity"
        told = int(refused[1]["retry-after"])
        assert int(caller.ask()[1]["retry-after"]) <= told
        caller.sock.settimeout(0.5)
        caller.send()
        with pytest.raises(TimeoutError):
            caller.read()
        caller.sock.settimeout(30)
        assert caller.read()[0] == 429, "it is read again after a while"


def test_who_is_left_unread_makes_room_for_another_tenant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "TTL_S", 60.0)
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(hearing, "DEAF_S", 60.0)
    with standing(tmp_path) as (house, url), ExitStack() as stack:
        callers = [stack.enter_context(closing(Caller(url, house.key))) for _ in range(7)]
        assert [caller.ask()[0] for caller in callers] == [404] * 7
        with monkeypatch.context() as pressed:
            pressed.setattr(Pressure, "note", high)
            pressed.setattr(Pressure, "refuses", lambda self, tenant_id: True)
            assert {caller.ask()[0] for caller in 2 * callers} == {429}
            for caller in callers:
                caller.send()
        other = stack.enter_context(closing(Caller(url, house.other_key)))
        assert other.ask()[0] == 404
        callers[0].sock.settimeout(5.0)
        with pytest.raises((AssertionError, ConnectionResetError)):
            callers[0].read()


def test_refusals_count_as_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that no route sees too: alerts about 429 and 5xx read nothing else."""
    monkeypatch.setattr(auth, "TTL_S", 60.0)
    monkeypatch.setattr(connection, "HEADER_S", 0.2)
    monkeypatch.setattr(Hearing, "refused", lambda *_: 0.0)
    with counted() as counting, standing(tmp_path) as (house, url), closing(Caller(url, house.key)) as caller:
        assert caller.ask()[0] == 404, "the key is known from here on"
        by_routes = ("tinsmith_http_request_seconds_count", (STEP_PATH,))
        until(lambda: samples(counting.text()).get(by_routes) == 1, 10)  # routes count once they have answered
        monkeypatch.setattr(Pressure, "note", high)
        monkeypatch.setattr(Pressure, "refuses", lambda self, tenant_id: True)
        refused = [caller.ask()[0] for _ in range(3)]
        with monkeypatch.context() as full:
            full.setattr(Crowd, "come", lambda self, guest: False)
            with closing(Caller(url, house.key)) as beyond:
                assert beyond.read()[0] == 503
        with closing(Caller(url, house.key)) as late, closing(Caller(url, house.key)) as wrong:
            wrong.sock.sendall(b"GARBAGE\r\n\r\n")
            assert wrong.read()[0] == 400
            late.sock.sendall(b"GET /api")
            assert late.read()[0] == 408
        text = counting.text()
    found = samples(text)
    assert refused == [429] * 3
    assert found["tinsmith_http_requests_total", (STEP_PATH, "429")] == 3
    assert [found["tinsmith_http_requests_total", ("other", status)] for status in ("503", "400", "408")] == [1, 1, 1]
    assert selected("TinsmithOverload", text) == [[({"route": STEP_PATH, "status": "429"}, 3)]]
    failing, answered = selected("TinsmithHttpErrors", text)
    assert failing == [({"route": "other", "status": "503"}, 1)]
    assert sum(count for _, count in answered) >= 1 + 3 + 3
    assert found["tinsmith_refused_requests_total", ("capacity",)] == 4
    assert found["tinsmith_refused_requests_total", ("request_timeout",)] == 1
    assert found[by_routes] == 1, "none of the three went the long way"


@contextmanager
def counted() -> Iterator[Counting]:
    counting = Counting(series.TABLE, "api", None)
    counting.start()
    try:
        yield counting
    finally:
        counting.stop()

"""Connections that owe something are closed in time; slow ones that keep coming, and long polls, are not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
import tinker

from tests.contract.streams import Answer, Stream, Upload
from tests.service import until
from tinsmith.api import connection, intake
from tinsmith.api.marks import security_headers
from tinsmith.api.waiters import Waiters

SHORT_S = 0.6
WITHIN_S = 5.0


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the server starts."""
    monkeypatch.setattr(connection, "HEADER_S", SHORT_S)
    monkeypatch.setattr(connection, "REST_S", SHORT_S)
    monkeypatch.setattr(intake, "IDLE_S", SHORT_S)


@pytest.fixture
def few_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 4)


def test_half_a_header_is_answered_and_closed(live: Any) -> None:
    for start in (b"G", b"GET / HT", b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n"):
        with Stream(live.url) as stream:
            stream.send(start)
            answer = stream.answer(WITHIN_S)
            assert answer is not None
            assert answer.status == 408
            assert answer.body["code"] == "request_timeout"
            assert answer.headers["connection"] == "close"
            assert stream.is_closed(WITHIN_S)


def test_a_header_that_drips_in_is_late_all_the_same(live: Any) -> None:
    with Stream(live.url) as stream:
        started = time.monotonic()
        stream.send(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n")
        answer = None
        while answer is None and time.monotonic() - started < WITHIN_S:
            stream.send(b"X-A: b\r\n")
            answer = stream.answer(0.05)
        assert answer is not None
        assert answer.status == 408


def test_who_says_nothing_is_closed(live: Any) -> None:
    with Stream(live.url) as stream:
        assert stream.is_closed(WITHIN_S)


def test_a_header_may_hold_64_kib(live: Any) -> None:
    for size, status in ((50_000, 200), (70_000, 400), (110_000, 400)):
        with Stream(live.url) as stream:
            stream.send(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n")
            try:
                for _ in range(size // 1000):
                    stream.send(b"X-A: " + b"y" * 993 + b"\r\n")
                    time.sleep(0.001)
                stream.send(b"\r\n")
            except OSError:
                assert status == 400
            answer = stream.answer(WITHIN_S)
            assert answer is not None
            assert answer.status == status


@pytest.mark.parametrize("size", [64_000, 66_000, 70_000, 90_000])
def test_a_header_that_comes_whole_is_bounded_alike(live: Any, size: int) -> None:
    head = b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n" + (b"X-A: " + b"y" * 993 + b"\r\n") * (size // 1000)
    with Stream(live.url) as stream:
        stream.send(head + b"\r\n")
        answer = stream.answer(WITHIN_S)
        assert answer is not None
        assert answer.status == (200 if size < connection.HEADER_BYTES else 400)


def test_every_answer_has_an_id_and_the_security_headers(live: Any, house: Any) -> None:
    """Whoever gives it: a route, the framework, or the connection where there's no request to speak of."""
    key = f"X-API-Key: {house.key}\r\n".encode()
    cases = (
        (b"GARBAGE\r\n\r\n", 400),
        (b"POST /api/v1/healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n", 400),
        (b"GET /api/v1/hea", 408),
        (b"GET /api/v1/nothing HTTP/1.1\r\nHost: x\r\n" + key + b"\r\n", 404),
        (b"GET /api/v1/optim_step HTTP/1.1\r\nHost: x\r\n" + key + b"\r\n", 405),
        (b"POST /api/v1/create_session HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 401),
    )
    for sent, status in cases:
        with Stream(live.url) as stream:
            stream.send(sent)
            answer = stream.answer(WITHIN_S)
            assert answer is not None
            assert answer.status == status
            assert_is_marked(answer.headers)


def test_a_flood_of_headers_ends(live: Any) -> None:
    with Stream(live.url) as stream:
        stream.send(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n")
        line = b"X-A: " + b"y" * 993 + b"\r\n"
        assert num_taken(stream, (line for _ in range(100_000))) < 10_000


def test_what_is_no_http_is_refused_in_our_words(live: Any) -> None:
    with Stream(live.url) as stream:
        stream.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n")
        answer = stream.answer(WITHIN_S)
        assert answer is not None
        assert (answer.status, answer.body["code"], answer.body["category"]) == (400, "invalid_request", "user")


def test_a_body_that_stalls_is_answered_and_closed(live: Any, house: Any) -> None:
    for path in ("/forward_backward", "/optim_step", "/create_session", "/asample", "/telemetry"):
        with Upload(live.url, house.key, path, 1000) as upload:
            upload.send(b"x" * 100)
            answer = upload.answer(WITHIN_S)
            assert answer is not None
            assert (answer.status, answer.body["code"]) == (408, "request_timeout")
            assert upload.is_closed(WITHIN_S)


def test_a_body_that_never_ends_is_cut(live: Any, house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "WHOLE_S", 1.5)
    with Upload(live.url, house.key, "/telemetry", 100_000) as upload:
        answer, started = None, time.monotonic()
        while answer is None and time.monotonic() - started < WITHIN_S:
            upload.send(b"x")
            answer = upload.answer(0.1)
        assert answer is not None
        assert answer.status == 408


def test_a_slow_but_steady_body_is_taken(live: Any, house: Any) -> None:
    body = b'{"tags": ["' + b"x" * 38 + b'"]}'
    with Upload(live.url, house.key, "/create_session", len(body)) as upload:
        for at in range(0, len(body), 5):
            upload.send(body[at : at + 5])
            time.sleep(SHORT_S / 3)
        answer = upload.answer(WITHIN_S)
        assert answer is not None
        assert answer.status == 200


def test_the_rest_of_a_body_that_was_answered_is_owed_too(live: Any) -> None:
    with Upload(live.url, "tml-wrong", "/optim_step", 10**9) as upload:
        answer = upload.answer(WITHIN_S)
        assert answer is not None
        assert answer.status == 401
        assert num_taken(upload, (b"x" * 100 for _ in range(100) if time.sleep(0.05) is None)) < 100


def test_a_refused_body_may_come_in_and_the_connection_goes_on(live: Any, house: Any) -> None:
    with httpx.Client(base_url=f"{live.url}/api/v1", headers={"X-API-Key": house.key}) as http:
        for _ in range(3):
            assert http.post("/optim_step", content=bytes(20 * 2**20)).status_code == 413
            assert http.post("/create_session", json={}).status_code == 200


def test_a_poll_outlasts_every_deadline(make_house: Any, live: Any, house: Any) -> None:
    object.__setattr__(house.settings, "poll_hold_s", 4 * SHORT_S)
    headers = {"X-API-Key": house.key}
    with httpx.Client(base_url=f"{live.url}/api/v1", headers=headers, timeout=20) as http:
        session = http.post("/create_session", json={}).json()["session_id"]
        made = {"session_id": session, "model_seq_id": 0, "base_model": "tinsmith/tiny", "lora_config": {"rank": 4}}
        promise = http.post("/create_model", json=made).json()
        answer = http.post("/retrieve_future", json={"request_id": promise["request_id"]})
        assert answer.status_code == 408
        assert answer.json()["type"] == "try_again"
        assert answer.elapsed.total_seconds() > 3 * SHORT_S


def test_too_many_connections_are_turned_away(
    few_connections: None, live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection.Connection, "may_leave", lambda self: False)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(Stream(live.url)) for _ in range(4)]
        one_more = stack.enter_context(Stream(live.url))
        answer = one_more.answer(WITHIN_S)
        assert answer is not None
        assert (answer.status, answer.body["code"]) == (503, "capacity")
        assert answer.headers["retry-after"]
        assert_is_marked(answer.headers)
        assert one_more.is_closed(WITHIN_S)
        assert all(stream.is_closed(WITHIN_S) for stream in streams)
    assert httpx.get(f"{live.url}/api/v1/client/config").status_code == 405


def ask(path: str, key: str, body: Any = None) -> bytes:
    """A request as it goes over the wire."""
    content = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{'GET' if body is None else 'POST'} /api/v1{path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def waiting_request(url: str, key: str) -> str:
    """The id of one that nobody carries out."""
    with httpx.Client(base_url=f"{url}/api/v1", headers={"X-API-Key": key}) as http:
        session = http.post("/create_session", json={}).json()["session_id"]
        made = {"session_id": session, "model_seq_id": 0, "base_model": "tinsmith/tiny", "lora_config": {"rank": 4}}
        return str(http.post("/create_model", json=made).json()["request_id"])


class Tenant:
    """Connections of one tenant, each with a poll."""

    def __init__(self, live: Any, key: str, stack: contextlib.ExitStack) -> None:
        self._live, self.key, self._stack = live, key, stack
        self._request_id = waiting_request(live.url, key)
        self._poll = ask("/retrieve_future", key, {"request_id": self._request_id})
        self.held: list[Stream] = []
        self.told: list[Answer] = []

    def poll(self) -> Answer | None:
        """One more; what it is answered if it isn't held."""
        stream = self._stack.enter_context(Stream(self._live.url))
        num = self._num_held()
        stream.send(self._poll)
        until(lambda: self._num_held() > num or stream.has_answer(), WITHIN_S, lambda: "neither")
        if stream.has_answer():
            return stream.answer(WITHIN_S)
        self.held.append(stream)
        return None

    def _num_held(self) -> int:
        return len(self._live.server._waiters._waiting.get(self._request_id, ()))

    def look(self) -> int:
        """How many polls are still held."""
        for stream in list(self.held):
            answer = stream.answer(0.05)
            if answer is not None:
                self.told.append(answer)
                self.held.remove(stream)
        return len(self.held)


def test_one_tenants_polls_leave_another_its_connection(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, house: Any
) -> None:
    """They are answered early, and nobody's request fails."""
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
    object.__setattr__(house.settings, "poll_hold_s", 60.0)
    live = request.getfixturevalue("live")
    with contextlib.ExitStack() as stack:
        alice, bob = (Tenant(live, key, stack) for key in (house.key, house.other_key))
        assert [alice.poll() for _ in range(7)] == [None] * 7
        refused = alice.poll()
        assert refused is not None
        assert (refused.status, refused.body["code"], refused.headers["connection"]) == (429, "capacity", "close")
        assert refused.headers["retry-after"]
        first = stack.enter_context(Stream(live.url))
        started = time.monotonic()
        first.send(ask("/sessions", bob.key))
        answer = first.answer(WITHIN_S)
        assert answer is not None
        assert (answer.status, time.monotonic() - started < 1.0) == (200, True)
        assert [bob.poll() for _ in range(2)] == [None] * 2
        assert (alice.look(), bob.look()) == (4, 2)
        assert [(told.status, told.body["type"], told.headers["connection"]) for told in alice.told] == [
            (408, "try_again", "close")
        ] * 3
        for tenant in (alice, bob):
            again = tenant.poll()
            assert again is not None
            assert again.status == 429
        assert (alice.look(), bob.look()) == (4, 2)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_sdk_rides_through_it(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, house: Any, worker: Any
) -> None:
    """More futures than there are connections, and another tenant that asks meanwhile."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(connection, "HEADER_S", 15.0)
    object.__setattr__(house.settings, "poll_hold_s", 30.0)
    live = request.getfixturevalue("live")
    client = tinker.ServiceClient(base_url=live.url, api_key=house.key)
    try:
        making = client.create_lora_training_client("tinsmith/tiny", rank=4)
        until(lambda: worker.step() > 0, 20, lambda: "nothing came")
        run = making.result(timeout=20)
        steps = [run.optim_step(tinker.AdamParams(learning_rate=1e-4)) for _ in range(12)]
        until(lambda: live.server._waiters.num_waiting >= 5, 20, lambda: "no polls")
        with httpx.Client(base_url=f"{live.url}/api/v1", headers={"X-API-Key": house.other_key}) as bob:
            for _ in range(5):
                assert bob.get("/sessions").status_code == 200
        worker.start()
        assert len([step.result(timeout=60) for step in steps]) == 12
    finally:
        client.close("success")


def test_idle_connections_make_room_for_another_tenant_and_those_of_nobody_for_all(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, house: Any
) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(connection, "HEADER_S", 60.0)
    live = request.getfixturevalue("live")
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Stream(live.url)) for _ in range(7)]
        for stream in idle:
            stream.send(ask("/sessions", house.key))
            assert stream.answer(WITHIN_S) is not None
        bob = stack.enter_context(Stream(live.url))
        bob.send(ask("/sessions", house.other_key))
        answer = bob.answer(WITHIN_S)
        assert answer is not None
        assert answer.status == 200
        assert idle[0].is_closed(1.0)
        silent = stack.enter_context(Stream(live.url))
        assert httpx.get(f"{live.url}/api/v1/sessions", headers={"X-API-Key": house.other_key}).status_code == 200
        assert silent.is_closed(1.0)
        idle[-1].send(ask("/sessions", house.key))
        assert idle[-1].answer(WITHIN_S) is not None


def test_the_file_limit_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ((1024, 672, 112), (64, 1, 1), (1_000_000, 12_000, 256), (connection.resource.RLIM_INFINITY, 12_000, 256))
    for soft, most, most_files in cases:
        monkeypatch.setattr(connection.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert (connection.most_connections(), connection.most_read_out()) == (most, most_files)
        assert most + 2 * most_files <= max(soft, 3) or soft == connection.resource.RLIM_INFINITY


def test_the_watcher_ends_even_when_the_bell_rings_at_that_moment() -> None:
    async def ring_and_leave() -> None:
        async def nothing(ids: Any) -> set[Any]:
            return set()

        waiters = Waiters(None, 60.0)
        async with waiters.watching(nothing):
            await asyncio.sleep(0.01)
            waiters.ring()
            await asyncio.sleep(0)

    started = time.monotonic()
    asyncio.run(asyncio.wait_for(ring_and_leave(), WITHIN_S))
    assert time.monotonic() - started < WITHIN_S / 2


def assert_is_marked(headers: dict[str, str]) -> None:
    for name, value in security_headers():
        assert headers[name.decode()] == value.decode()
    assert headers["x-request-id"]
    assert headers["date"]


def num_taken(stream: Stream, pieces: Iterable[bytes]) -> int:
    """How many can be sent before the server closes the connection."""
    count = 0
    with contextlib.suppress(OSError):
        for piece in pieces:
            stream.send(piece)
            count += 1
    return count

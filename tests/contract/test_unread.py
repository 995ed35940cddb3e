"""Answers that nobody reads: they cost little, end soon, and are their own tenant's alone."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.contract.raw import BASE, PROTOBUF
from tests.contract.streams import Reader
from tinsmith.api import connection, outgo
from tinsmith.api.outgo import Unread
from tinsmith.api.places import Places
from tinsmith.api.services import MAX_TENANT_FILES
from tinsmith.errors import CapacityError
from tinsmith.files.blobs import result_key
from tinsmith.store.rows import Finished, OpRow
from tinsmith.types import OpState, TenantId

SHORT_S = 0.9
WITHIN_S = 6.0
BIG_BYTES = 24 << 20  # more than the kernel holds of one connection


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the server starts."""
    monkeypatch.setattr(connection, "UNREAD_S", SHORT_S)


@dataclass
class Results:
    """A request of `house.key` whose result is stored, and what asks for it."""

    url: str
    key: str
    request_id: str
    content: bytes

    def ask(self) -> httpx.Response:
        body = {"request_id": self.request_id}
        return httpx.post(f"{self.url}/api/v1/retrieve_future", json=body, headers={"X-API-Key": self.key}, timeout=30)

    @contextmanager
    def unread(self) -> Iterator[Reader]:
        """Ask, and read nothing."""
        body = json.dumps({"request_id": self.request_id}).encode()
        head = f"Host: x\r\nX-API-Key: {self.key}\r\nConnection: close\r\nContent-Length: {len(body)}"
        with Reader(self.url) as stream:
            stream.send(f"POST /api/v1/retrieve_future HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
            yield stream


@pytest.fixture
def results(house: Any, live: Any, worker: Any) -> Results:
    content = b"0123456789abcdef" * (BIG_BYTES // 16)
    with httpx.Client(base_url=f"{live.url}/api/v1", headers={"X-API-Key": house.key}) as http:
        session = http.post("/create_session", json={}).json()["session_id"]
        made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
        sampler = http.post("/create_sampling_session", json=made).json()["sampling_session_id"]
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
        asked = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 1}}
        request_id = http.post("/asample", json=asked).json()["request_id"]

    def outcome(op: OpRow) -> Finished:
        blob = house.blobs.put(result_key(op.tenant_id, op.id), content)
        return Finished(op.id, OpState.DONE, result_blob=blob.key, result_bytes=len(content), media=PROTOBUF)

    worker._outcome = outcome
    assert worker.step() == 1
    return Results(live.url, house.key, request_id, content)


def test_a_large_result_is_read_out_whole_as_often_as_asked(results: Results) -> None:
    for _ in range(2):
        answer = results.ask()
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) == BIG_BYTES
        assert answer.content == results.content


def test_a_damaged_result_is_a_failure_before_its_first_byte(results: Results, house: Any) -> None:
    (found,) = (path for path in (house.settings.data_dir / "blobs").rglob("results/*") if path.is_file())
    found.write_bytes(results.content[:-1] + b"x")
    answer = results.ask()
    assert (answer.status_code, answer.json()["code"], answer.json()["category"]) == (200, "corrupt", "server")


def test_a_client_that_reads_nothing_is_closed(results: Results, live: Any, house: Any) -> None:
    with results.unread() as stream:
        assert until(lambda: len(live.server.server_state.connections) == 1)
        started = time.monotonic()
        assert until(lambda: not live.server.server_state.connections)
        assert time.monotonic() - started > SHORT_S / 2
        assert until(lambda: num_read_out(house) == 0)
        assert stream.rest() < BIG_BYTES


def test_an_answer_that_is_complete_is_closed_all_the_same(live: Any, house: Any) -> None:
    """Its last bytes wait in our own memory, and none of them is taken."""
    head = f"GET /api/v1/auth/apikey/me HTTP/1.1\r\nHost: x\r\nX-API-Key: {house.key}\r\n\r\n".encode()
    with Reader(live.url) as stream:
        assert until(lambda: len(live.server.server_state.connections) == 1)
        (served,) = live.server.server_state.connections
        served.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        stream.send_while_taken(head * 30_000)
        assert until(lambda: served.flow.write_paused)
        assert until(lambda: not live.server.server_state.connections)


def test_a_slow_reader_is_served_to_the_end(results: Results) -> None:
    with results.unread() as stream:
        started, size = time.monotonic(), 0
        while time.monotonic() - started < 3 * SHORT_S:
            size += stream.some(64 << 10)
            time.sleep(SHORT_S / 20)
        assert size < BIG_BYTES / 2
        assert size + stream.rest() > BIG_BYTES


def test_unread_results_cost_a_piece_each_and_another_tenant_nothing(
    results: Results, live: Any, house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "UNREAD_S", 60.0)
    before = rss_bytes()
    with ExitStack() as stack:
        for _ in range(MAX_TENANT_FILES + 4):
            stack.enter_context(results.unread())
        assert until(lambda: num_read_out(house) == MAX_TENANT_FILES)
        assert rss_bytes() - before < 64 << 20
        one_more = results.ask()
        assert one_more.status_code == 408
        assert "not read to their end" in one_more.json()["queue_state_reason"]
        started = time.monotonic()
        other = httpx.get(f"{live.url}/api/v1/auth/apikey/me", headers={"X-API-Key": house.other_key})
        assert other.status_code == 200
        assert time.monotonic() - started < 1.0
    assert until(lambda: num_read_out(house) == 0)
    assert results.ask().content == results.content


def test_what_one_tenant_holds_unread_is_bounded() -> None:
    unread = Unread(max_bytes=300, max_tenant_bytes=100)
    alice, bob, carol = TenantId("alice"), TenantId("bob"), TenantId("carol")
    unread.take(alice, 250)
    with pytest.raises(CapacityError, match="hold 250 bytes, and this one 10; at most 100 are held"):
        unread.take(alice, 10)
    unread.take(bob, 40)
    with pytest.raises(CapacityError, match="too many answers wait"):
        unread.take(bob, 40)
    unread.take(carol, 40)
    for tenant_id, num_bytes in ((alice, 250), (bob, 40), (carol, 40)):
        unread.give_back(tenant_id, num_bytes)
    assert unread.num_bytes == 0


def test_an_answer_without_room_is_refused_in_the_dialect_of_its_path(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgo, "PIECE_BYTES", 90)  # bytes of the refusal and no more
    monkeypatch.setattr(Unread, "take", refuse)
    refused = api.raw("GET", "/api/v1/auth/apikey/me")
    assert refused.status_code == 429, refused.text
    assert refused.headers["retry-after"] == "5"
    assert refused.json()["code"] == "capacity"
    assert api.raw("GET", "/oai/api/v1/models").json()["error"]["type"] == "rate_limit_error"


def refuse(unread: Unread, tenant_id: TenantId | None, num_bytes: int) -> None:
    raise CapacityError("full")


def test_places_are_each_tenants_own() -> None:
    async def take_all() -> None:
        places = Places(2, 3)
        held = [await places.try_take(TenantId("alice"), 0.0) for _ in range(2)]
        assert all(held)
        assert await places.try_take(TenantId("alice"), 0.01) is None
        bobs = await places.try_take(TenantId("bob"), 0.0)
        assert bobs is not None
        assert await places.try_take(TenantId("bob"), 0.0) is None  # all three are taken
        waiting = asyncio.create_task(places.try_take(TenantId("alice"), 5.0))
        await asyncio.sleep(0.01)
        places.give_back(held[0])  # type: ignore[arg-type]
        assert await waiting is not None

    asyncio.run(take_all())


def num_read_out(house: Any) -> int:
    return int(house.services.results_out.num_taken)


def until(holds: Any) -> bool:
    deadline = time.monotonic() + WITHIN_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(holds())


def rss_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

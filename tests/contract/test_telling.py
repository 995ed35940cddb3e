"""Who is paused is told why within some seconds, by a poll that could be held much longer; and once for each cause."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.contract.conftest import BASE, House, Live
from tests.contract.test_quotas import TOKENS, sample
from tests.service import until
from tinsmith.api import telling
from tinsmith.store.quota_rules import Quota

# The SDK never closes its connections; the collector finds them during or after a test.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

HOLD_S = 40.0
SOON_S = 15.0


@pytest.fixture
def house(make_house: Any, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setattr(telling, "AFTER_S", 0.3)
    monkeypatch.setattr(telling, "APART_S", 0.3)
    made: House = make_house(poll_hold_s=HOLD_S)
    return made


class Caller:
    """Of tenant bob, over a socket: polls are held while others go on."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def post(self, path: str, body: Any = None, status: int = 200) -> Any:
        answer = self.http.post(f"/api/v1{path}", json={} if body is None else body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def session(self) -> str:
        return str(self.post("/create_session")["session_id"])

    def told(self, request_id: str, status: int = 408) -> dict[str, Any]:
        return dict(self.post("/retrieve_future", {"request_id": request_id}, status))


@pytest.fixture
def bob(house: House, live: Live) -> Iterator[Caller]:
    with httpx.Client(base_url=live.url, headers={"X-API-Key": house.other_key}, timeout=HOLD_S + 10) as http:
        yield Caller(http)


def limit(house: House, **quotas: float | None) -> None:
    row = house.store.tenants.by_name("bob")
    assert row is not None
    amounts = {Quota(name): amount for name, amount in quotas.items()}
    house.store.quotas.put(row.tenant_id, None, amounts, time.time())


def test_the_first_poll_of_what_is_paused_says_so_soon_and_the_next_is_held(house: House, bob: Caller) -> None:
    limit(house, tokens_per_day=0)
    promise = sample(bob, bob.session(), 0)  # type: ignore[arg-type]
    started = time.monotonic()
    told = bob.told(promise["request_id"])
    assert time.monotonic() - started < SOON_S
    assert told["queue_state"] == "paused_rate_limit"
    assert "tokens_per_day" in told["queue_state_reason"]
    with ThreadPoolExecutor(1) as threads:
        again = threads.submit(bob.told, promise["request_id"])
        time.sleep(2.0)
        assert not again.done(), "it was told this cause before"
        limit(house, tokens_per_day=None, requests=0)
        assert "quota requests" in again.result(SOON_S)["queue_state_reason"], "another cause"


def test_who_comes_to_be_paused_while_its_poll_is_held_is_told(house: House, live: Live, bob: Caller) -> None:
    """Nobody is before it at first; then its tenant gets a quota."""
    promise = sample(bob, bob.session(), 0)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as threads:
        poll = threads.submit(bob.told, promise["request_id"])
        time.sleep(1.5)
        assert not poll.done(), "it isn't paused"
        limit(house, tokens_per_day=0)
        assert poll.result(SOON_S)["queue_state"] == "paused_rate_limit"


def test_a_shared_poll_names_what_is_paused_soon_and_once(house: House, bob: Caller) -> None:
    limit(house, tokens_per_day=0)
    session = bob.session()
    made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    sampler = bob.post("/create_sampling_session", made)["sampling_session_id"]
    promise = sample(bob, session, 0)  # type: ignore[arg-type]
    shared = {"target": {"type": "sampling_session", "sampling_session_id": sampler}, "prev_cursor": 0}
    started = time.monotonic()
    assert bob.post("/retrieve_futures", shared)["completions"][0]["request_id"] == promise["request_id"]
    with ThreadPoolExecutor(1) as threads:
        again = threads.submit(bob.post, "/retrieve_futures", shared)
        assert bob.told(promise["request_id"])["queue_state"] == "paused_rate_limit"
        assert time.monotonic() - started < SOON_S
        time.sleep(2.0)
        assert not again.done(), "it was named before"
        bob.post("/cancel_future", {"request_id": promise["request_id"]})
        assert again.result(SOON_S)["completions"][0]["state"] == "failed"


def test_the_sdk_says_why_sampling_is_paused_long_before_a_hold_ends(
    house: House, live: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    service = tinker.ServiceClient(base_url=live.url, api_key=house.other_key)
    sampler = service.create_sampling_client(base_model=BASE).result()
    limit(house, tokens_per_day=0)
    with caplog.at_level(logging.WARNING):
        future = sampler.sample(types.ModelInput.from_ints(TOKENS), 1, types.SamplingParams(max_tokens=3))
        until(lambda: "Sampling is paused" in caplog.text, SOON_S, lambda: caplog.text)
    assert "quota tokens_per_day of this tenant" in caplog.text
    worker = house.make_worker()
    limit(house, tokens_per_day=None)
    worker.start()
    assert future.result(timeout=20).sequences
    service.close("success")

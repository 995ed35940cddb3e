"""Quotas as clients and administrators meet them: states and reasons in polls, refusals, the admin route."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tinker
from tinker import types
from tinker.lib import queue_state_logger
from tinker.lib.api_future_impl import QueueState

from tests.contract.conftest import BASE, Api, HandWorker, House, Live
from tests.contract.raw import PROTOBUF
from tests.service import until
from tests.unit.test_metrics import samples
from tinsmith.api import pauses
from tinsmith.store.quota_rules import Quota
from tinsmith.types import OpId

# The SDK never closes its connections; the collector finds them during or after a test.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

TOKENS = [1, 2, 3, 4]


@pytest.fixture
def bob(house: House) -> str:
    """The id of the tenant of `other_key`."""
    row = house.store.tenants.by_name("bob")
    assert row is not None
    return row.tenant_id


@pytest.fixture
def service(live: Live, house: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    """Of tenant bob."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = tinker.ServiceClient(base_url=live.url, api_key=house.other_key)
    yield client
    client.close("success")


def limit(api: Api, **quotas: float | None) -> Any:
    return api.call("PUT", "/admin/quotas", 200, json={"tenant": "bob", "quotas": quotas})


def is_done(api: Api, promise: dict[str, Any]) -> bool:
    body = {"request_id": promise["request_id"]}
    answer = api.raw("POST", "/api/v1/retrieve_future", json=body)
    return bool(answer.headers["content-type"] == PROTOBUF)


def sample(api: Api, session: str, seq_id: int, max_tokens: int = 3) -> dict[str, Any]:
    made = api.post(
        "/create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    )
    body = {
        "sampling_session_id": made["sampling_session_id"],
        "seq_id": seq_id,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": max_tokens},
    }
    return dict(api.post("/asample", body))


def begin(house: House, worker: HandWorker, promises: list[dict[str, Any]]) -> None:
    """The worker has them, and doesn't finish."""
    op_ids = [OpId(promise["request_id"]) for promise in promises]
    assert len(house.store.ops.claim(worker._me, op_ids, time.time())) == len(op_ids)
    house.services.pace._running.clear()


def test_an_exhausted_day_pauses_and_says_until_when(api: Api, other: Api, worker: HandWorker) -> None:
    limit(api, tokens_per_day=10)
    session = other.session()
    first = sample(other, session, 0)
    worker.step()
    assert is_done(other, first)
    limit(api, tokens_per_day=5)
    second = sample(other, session, 1)
    worker.step()
    told = other.result(second, 408)
    assert told["queue_state"] == "paused_rate_limit"
    assert re.fullmatch(
        r"5 tokens of today used, of 5 \(quota tokens_per_day of this tenant\); goes on at 00:00 UTC, in \d.*",
        told["queue_state_reason"],
    )
    limit(api, tokens_per_day=None)
    worker.step()
    assert is_done(other, second)


def test_a_request_that_waits_for_its_turn_says_how_many_are_before_it_and_how_long(
    api: Api, other: Api, worker: HandWorker, house: House
) -> None:
    session, theirs = api.session(), other.session()
    ended = [sample(api, session, seq) for seq in range(3)]
    worker.step()
    before = [sample(api, session, seq) for seq in range(3, 9)]
    mine = sample(other, theirs, 0)
    told = other.result(mine, 408)
    assert told["queue_state"] == "paused_capacity"
    assert told["queue_state_reason"] == "6 requests ahead in the queue, about 1 min at the present pace"
    assert api.result(before[1], 408)["queue_state"] == "active"  # those before it are its own
    assert len(ended) == 3


def test_who_is_first_while_all_seats_are_taken_is_told_so(
    api: Api, other: Api, worker: HandWorker, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "AFTER_S", 0.0)
    begin(house, worker, [sample(api, api.session(), seq) for seq in range(3)])
    session = other.session()
    mine = sample(other, session, 0)
    told = other.result(mine, 408)
    assert (told["queue_state"], told["queue_state_reason"]) == (
        "paused_capacity",
        "first in the queue, behind 3 requests of others that are being computed, and none has ended in the last 30 s",
    )
    begin(house, worker, [mine])
    second = sample(other, session, 1)
    assert other.result(second, 408)["queue_state_reason"] == "next in the queue"  # its client has places already
    monkeypatch.setattr(pauses, "AFTER_S", 60.0)
    third = sample(other, other.session(), 0)
    assert other.result(third, 408)["queue_state"] == "paused_capacity"  # behind the second


def test_a_moment_of_being_first_is_no_pause(api: Api, other: Api, worker: HandWorker, house: House) -> None:
    begin(house, worker, [sample(api, api.session(), 0)])
    told = other.result(sample(other, other.session(), 0), 408)
    assert (told["queue_state"], told["queue_state_reason"]) == ("active", "next in the queue")


def test_who_is_paused_is_not_before_others(api: Api, other: Api, house: House, worker: HandWorker) -> None:
    limit(api, tokens_per_day=0)
    theirs = other.session()
    for seq in range(3):
        sample(other, theirs, seq)
    assert api.result(sample(api, api.session(), 0), 408)["queue_state_reason"] == "next in the queue"


def test_what_can_never_fit_is_refused_by_name(api: Api, other: Api, worker: HandWorker) -> None:
    limit(api, tokens_per_day=10, adapter_bytes=1000)
    session = other.session()
    failed = other.result(sample(other, session, 0, max_tokens=9))
    assert (failed["code"], failed["category"]) == ("quota", "user")
    assert "may take 11 of tokens trained" in failed["error"]
    assert "the tenant's quota tokens_per_day is 10 in all" in failed["error"]
    assert "quota adapter_bytes is 1,000" in other.result(other.create(session))["error"]
    fits = sample(other, session, 1, max_tokens=8)
    worker.step()
    assert is_done(other, fits)


def test_a_zero_pauses_and_refuses_nothing(api: Api, other: Api, worker: HandWorker) -> None:
    limit(api, runs=0, requests=0)
    made = other.create(other.session())
    worker.step()
    assert other.result(made, 408)["queue_state"] == "paused_rate_limit"
    limit(api, runs=None, requests=None)
    worker.step()
    assert other.result(made)["model_id"]


def test_quotas_of_a_key_and_of_its_tenant_are_listed_with_what_is_used(
    api: Api, other: Api, worker: HandWorker, house: House
) -> None:
    key = other.get("/auth/apikey/me")
    key_id = next(row.key_id for row in house.store.tenants.list_keys() if row.tenant_name == "bob")
    assert key
    answer = api.call(
        "PUT", "/admin/quotas", 200, json={"tenant": "bob", "key_id": key_id, "quotas": {"requests": 2, "runs": 5}}
    )
    assert [scope["key_id"] for scope in answer["scopes"]] == [None, key_id]
    session = other.session()
    made = other.create(session)
    worker.step()
    other.result(made)
    done = sample(other, session, 0)
    worker.step()
    assert is_done(other, done)
    tenant, of_key = api.get("/admin/quotas?tenant=bob")["scopes"]
    used = {quota["quota"]: quota["used"] for quota in of_key["quotas"]}
    assert used == {quota["quota"]: quota["used"] for quota in tenant["quotas"]}
    assert (used["runs"], used["tokens_per_day"], used["requests"]) == (1, 5, 0)
    assert used["adapter_bytes"] == 4 * 4 * (8064 + 12672 + 1216)
    assert {quota["quota"]: quota["limit"] for quota in of_key["quotas"] if quota["limit"] is not None} == {
        "requests": 2, "runs": 5,
    }  # fmt: skip
    assert {scope["tenant"] for scope in api.get("/admin/quotas")["scopes"]} == {"alice", "bob"}


def test_a_rotated_key_hands_its_quotas_and_what_it_used_to_its_successor(
    house: House, api: Api, other: Api, worker: HandWorker, bob: str
) -> None:
    (key,) = [key for key in house.store.tenants.list_keys() if key.tenant_id == bob]
    body = {"tenant": "bob", "key_id": key.key_id, "quotas": {"tokens_per_day": 5, "runs": 5}}
    api.call("PUT", "/admin/quotas", 200, json=body)
    done = sample(other, other.session(), 0)
    worker.step()
    assert is_done(other, done)
    new = api.post(f"/admin/keys/{key.key_id}/rotate", {"grace_s": 60})
    house.store.quotas._limits_until = float("-inf")  # else they are known within a second
    scopes = {scope["key_id"]: scope["quotas"] for scope in api.get("/admin/quotas?tenant=bob")["scopes"]}
    limits = [{q["quota"]: q["limit"] for q in scopes[key_id]} for key_id in (key.key_id, new["key_id"])]
    assert limits[0] == limits[1]
    used = {quota["quota"]: quota["used"] for quota in scopes[new["key_id"]]}
    assert (limits[1]["tokens_per_day"], used["tokens_per_day"]) == (5, 5)
    successor = Api(api._client, new["secret"])
    waiting = sample(successor, successor.session(), 0)
    worker.step()
    assert "tokens_per_day of this key" in successor.result(waiting, 408)["queue_state_reason"]


def test_figures_say_how_many_requests_quotas_hold_back(house: House, api: Api, other: Api, worker: HandWorker) -> None:
    session = other.session()
    limit(api, requests=0)
    sample(other, session, 0)
    run = other.create(session)["model_id"]
    other.post("/optim_step", {"model_id": run, "seq_id": 1, "adam_params": {}})
    api.create(api.session())
    headers = {"X-API-Key": house.key}
    found = samples(api._client.get("/metrics", headers=headers).content)
    assert {labels: count for (name, labels), count in found.items() if name == "tinsmith_held_ops"} == {
        ("alice",): 0, ("bob",): 3,
    }  # fmt: skip


def test_setting_a_quota_stands_in_the_audit_log(api: Api, other: Api) -> None:
    limit(api, runs=3, tokens_per_day=None)
    (entry,) = [e for e in api.get("/audit")["entries"] if e["event"] == "organization_quota_set"]
    details = entry["event_details"]
    assert (details["actor"], details["runs"], details["tokens_per_day"]) == ("alice", "3", "none")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"tenant": "bob", "quotas": {"tokens": 1}}, 400, "a quota is one of requests"),
        ({"tenant": "bob", "quotas": {"runs": -1}}, 400, "0 or more"),
        ({"tenant": "nobody", "quotas": {"runs": 1}}, 404, "no tenant is called 'nobody'"),
        ({"tenant": "bob", "key_id": "k0", "quotas": {"runs": 1}}, 404, "has no key"),
        ({"tenant": "bob", "quotas": {}}, 400, ""),
    ],
)
def test_a_quota_that_can_t_be_set_is_refused(api: Api, body: Any, status: int, says: str) -> None:
    assert says in api.call("PUT", "/admin/quotas", status, json=body)["detail"]


def test_only_administrators_see_and_set_quotas(other: Api) -> None:
    other.get("/admin/quotas", 403)
    other.call("PUT", "/admin/quotas", 403, json={"tenant": "bob", "quotas": {"runs": 100}})


@pytest.mark.parametrize("state", [QueueState.PAUSED_RATE_LIMIT, QueueState.PAUSED_CAPACITY])
def test_the_sdk_tells_its_user_why_training_is_paused_and_ends_by_itself(
    service: tinker.ServiceClient, house: House, live: Live, worker: HandWorker, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, bob: str, state: QueueState,
) -> None:  # fmt: skip
    """Its log says so after a quarter of an hour, which the test doesn't wait."""
    monkeypatch.setattr(queue_state_logger, "PAUSE_GRACE_PERIOD", 0)
    seen: list[tuple[QueueState, str | None]] = []
    logged = queue_state_logger.QueueStateLogger.on_queue_state_change

    def spy(self: Any, state: QueueState, reason: str | None) -> None:
        seen.append((state, reason))
        logged(self, state, reason)

    monkeypatch.setattr(queue_state_logger.QueueStateLogger, "on_queue_state_change", spy)
    making = service.create_lora_training_client(BASE, rank=4)
    until(lambda: worker.step() > 0, 20, lambda: "nothing came")
    run = making.result()
    if state is QueueState.PAUSED_RATE_LIMIT:
        house.store.quotas.put(bob, None, {Quota.TOKENS_PER_DAY: 0}, time.time())  # type: ignore[arg-type]
        reason = "the quota tokens_per_day of this tenant is 0"
    else:
        with httpx.Client(base_url=live.url) as client:
            alice = Api(client, house.key)  # type: ignore[arg-type]
            begin(house, worker, [sample(alice, alice.session(), 0)])
        reason = "first in the queue, behind 1 request of others that is being computed; at the present pace one"
    with caplog.at_level(logging.WARNING):
        future = run.forward_backward([datum()], "cross_entropy")
        until(lambda: any(found is state for found, _ in seen), 20, lambda: str(seen))
    assert "Training for" in caplog.text
    assert f"is paused. Reason: {reason}" in caplog.text
    worker.start()
    house.store.quotas.put(bob, None, {Quota.TOKENS_PER_DAY: None}, time.time())  # type: ignore[arg-type]
    assert future.result(timeout=20).metrics
    assert seen[-1][0] is QueueState.ACTIVE


@pytest.mark.parametrize("state", ["paused_rate_limit", "paused_capacity"])
def test_the_sdk_tells_its_user_why_sampling_is_paused(
    service: tinker.ServiceClient, house: House, live: Live, worker: HandWorker, caplog: pytest.LogCaptureFixture,
    bob: str, state: str,
) -> None:  # fmt: skip
    """Though it waits for all samples of a client with one poll, whose answer can't say so."""
    sampler = service.create_sampling_client(base_model=BASE).result()
    if state == "paused_rate_limit":
        house.store.quotas.put(bob, None, {Quota.REQUESTS: 0}, time.time())  # type: ignore[arg-type]
        reason = r"the quota requests of this tenant is 0, .*; goes on when an administrator raises it"
    else:
        with httpx.Client(base_url=live.url) as client:
            alice = Api(client, house.key)  # type: ignore[arg-type]
            sample(alice, alice.session(), 0)
        until(lambda: house.store.loads.samples(house.tenant_id).requests == 1, 20, lambda: "nothing queued")
        reason = r"1 request ahead in the queue, and none has ended in the last 30 s"
    with caplog.at_level(logging.WARNING):
        future = sampler.sample(types.ModelInput.from_ints(TOKENS), 1, types.SamplingParams(max_tokens=3))
        until(lambda: "Sampling is paused" in caplog.text, 20, lambda: caplog.text)
    assert re.search(rf"Sampling is paused for sampler .*Reason: {reason}", caplog.text)
    house.store.quotas.put(bob, None, {Quota.REQUESTS: None}, time.time())  # type: ignore[arg-type]
    worker.start()
    assert future.result(timeout=20).sequences


def datum() -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": TOKENS[1:]}
    )

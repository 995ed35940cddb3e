"""How samples end from the client's side: one poll for a sampler, cancelling, joining, and a full queue."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from litestar.testing import TestClient

from tests.contract.conftest import BASE, Api
from tinsmith.api.app import build_app
from tinsmith.api.queue_room import QueueRoom
from tinsmith.errors import CapacityError
from tinsmith.store.loads import Load
from tinsmith.types import TenantId
from tinsmith.wire.requests import CLONE_SEQS


def new_sampler(api: Any) -> str:
    body = {"session_id": api.session(), "sampling_session_seq_id": 0, "base_model": BASE}
    return str(api.post("/create_sampling_session", body)["sampling_session_id"])


def ask(api: Any, sampler: str, seq: int, status: int = 200, **changes: Any) -> Any:
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 4},
        **changes,
    }
    return api.post("/asample", body, status)


def poll(api: Any, sampler: str, cursor: int = 0, clone: int = 0, timeout: float | None = 0, **more: Any) -> Any:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    body = {"target": target, "prev_cursor": cursor, **more}
    return api.post("/retrieve_futures", body if timeout is None else {**body, "timeout": timeout})


def told(answer: Any) -> list[tuple[str, str]]:
    return [(done["request_id"], done["state"]) for done in answer["completions"]]


def test_one_poll_tells_what_has_ended_and_only_once(api: Any, worker: Any) -> None:
    sampler = new_sampler(api)
    assert poll(api, sampler) == {"completions": [], "cursor": 0}
    first, second = (ask(api, sampler, seq)["request_id"] for seq in (5, 3))
    assert poll(api, sampler) == {"completions": [], "cursor": 0}
    worker.step()
    answer = poll(api, sampler)
    assert sorted(told(answer)) == sorted([(first, "finished"), (second, "finished")])
    result = api.raw("POST", "/api/v1/retrieve_future", json={"request_id": first}).content
    assert {done["response_payload_uncompressed_size"] for done in answer["completions"]} == {len(result)}
    cursor = answer["cursor"]
    assert cursor > 0
    assert poll(api, sampler, cursor, retrieved_request_ids=[first]) == {"completions": [], "cursor": cursor}
    bad = ask(api, sampler, 6, num_samples=0)["request_id"]
    given_up = ask(api, sampler, 7)["request_id"]
    assert api.post("/cancel_future", {"request_id": given_up})["state"] == "cancelled"
    answer = poll(api, sampler, cursor)
    assert told(answer) == [(bad, "failed"), (given_up, "failed")]
    assert answer["cursor"] > cursor
    assert "response_payload_uncompressed_size" not in answer["completions"][0]
    assert len(told(poll(api, sampler))) == 4


def test_clones_are_told_of_their_own(api: Any, worker: Any) -> None:
    sampler = new_sampler(api)
    numbers = [api.post("/join_sampling_session", {"sampling_session_id": sampler})["client_counter"] for _ in range(2)]
    assert numbers == [1, 2]
    top = 2**63 // CLONE_SEQS - 1
    asked = {clone: ask(api, sampler, clone * CLONE_SEQS + 7)["request_id"] for clone in (0, 1, 2, top)}
    worker.step()
    for clone, request_id in asked.items():
        assert told(poll(api, sampler, clone=clone)) == [(request_id, "finished")]
    api.post("/retrieve_futures", {"target": {"sampling_session_id": sampler, "cloned_sampler_id": top + 1}}, 400)


def test_a_poll_waits_for_an_end_of_its_own_client(make_house: Any) -> None:
    house = make_house(poll_hold_s=20.0, scan_interval_s=20.0)
    worker = house.make_worker()
    with TestClient(build_app(house.services)) as client:
        api = Api(client, house.key)
        sampler = new_sampler(api)
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.append(poll(api, sampler, timeout=None)))
        waiting.start()
        ask(api, sampler, CLONE_SEQS)
        worker.step()
        time.sleep(0.3)
        assert not answers
        mine = ask(api, sampler, 0)["request_id"]
        worker.step()
        waiting.join(5)
        assert told(answers[0]) == [(mine, "finished")]


def test_a_poll_that_nothing_ends_for_is_answered_in_time(api: Any) -> None:
    sampler = new_sampler(api)
    for timeout in (None, 0.1, 1e9, -1.0):
        started = time.monotonic()
        assert poll(api, sampler, timeout=timeout) == {"completions": [], "cursor": 0}
        assert time.monotonic() - started < 2


def test_a_cancelled_sample_is_never_carried_out(api: Any, worker: Any, house: Any) -> None:
    sampler = new_sampler(api)
    big = {"prompt": {"chunks": [{"tokens": [1] * 2000}]}, "num_samples": 2}
    promise = ask(api, sampler, 0, **big, user="x" * house.settings.inline_bytes)
    op = house.store.ops.get(house.tenant_id, promise["request_id"])
    assert op.payload_blob is not None
    assert api.post("/cancel_future", promise) == {"request_id": op.id, "state": "cancelled"}
    assert worker.step() == 0
    failed = api.result(promise)
    assert (failed["code"], failed["category"]) == ("cancelled", "user")
    assert api.post("/cancel_future", promise)["state"] == "cancelled"
    assert house.store.checkpoints.collect(time.time() + 100) == [op.payload_blob]
    done = ask(api, sampler, 1)
    worker.step()
    assert api.post("/cancel_future", done)["state"] == "done"
    assert ask(api, sampler, 0)["request_id"] == promise["request_id"]


def test_a_poll_for_a_cancelled_sample_ends_at_once(make_house: Any) -> None:
    house = make_house(poll_hold_s=20.0, scan_interval_s=20.0)
    with TestClient(build_app(house.services)) as client:
        api = Api(client, house.key)
        promise = ask(api, new_sampler(api), 0)
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.append(api.result(promise)))
        waiting.start()
        time.sleep(0.3)
        api.post("/cancel_future", promise)
        waiting.join(5)
        assert answers[0]["code"] == "cancelled"


def test_only_samples_can_be_cancelled(api: Any) -> None:
    promise = api.create(api.session())
    assert api.post("/cancel_future", promise, 400)["code"] == "unsupported"
    assert api.post("/cancel_future", {"request_id": "req-none"}, 410)["code"] == "gone"


def test_a_full_queue_says_when_to_come_back(make_house: Any) -> None:
    house = make_house(max_queued_samples=3)
    worker = house.make_worker()
    with TestClient(build_app(house.services)) as client:
        api, other = Api(client, house.key), Api(client, house.other_key)
        sampler = new_sampler(api)
        for seq in range(3):
            ask(api, sampler, seq)
        assert ask(api, sampler, 3, 429)["code"] == "capacity"
        body = {"sampling_session_id": sampler, "seq_id": 3}
        assert 0 < int(api.raw("POST", "/api/v1/asample", json=body).headers["retry-after"]) <= 60
        ask(other, new_sampler(other), 0)
        worker.step()
        ask(api, sampler, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_holds_for_the_compatible_endpoints(make_house: Any, stream: bool) -> None:
    house = make_house(max_queued_samples=2)
    with TestClient(build_app(house.services)) as client:
        api = Api(client, house.key)
        sampler = new_sampler(api)
        for seq in range(2):
            ask(api, sampler, seq)
        body = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "stream": stream}
        for path in ("/oai/api/v1/chat/completions", "/anthropic/api/v1/messages"):
            response = api.raw("POST", path, json=body)
            assert (response.status_code, "max-queued-samples" in response.text) == (429, True)
            assert int(response.headers["retry-after"]) > 0


def test_requests_on_their_way_into_the_queue_take_room() -> None:
    tenant, other = TenantId("t"), TenantId("other")
    queued = {tenant: Load(1, 10), other: Load(0, 0)}
    room = QueueRoom(Load(3, 100), queued.__getitem__, "3 requests of yours wait")
    assert not room.take_known(tenant, 5)
    for _ in range(2):
        room.take(tenant, 5)
    with pytest.raises(CapacityError, match="3 requests of yours wait"):
        room.take(tenant, 5)
    for _ in range(2):
        with room.coming(tenant, 5):
            pass
    queued[tenant] = Load(2, 20)
    room.take(tenant, 5)
    room.take(other, 5)
    assert room.take_known(other, 5)
    with pytest.raises(CapacityError):
        room.take(tenant, 5)


def test_what_waits_is_bounded_in_bytes_too() -> None:
    tenant = TenantId("t")
    queued = Load(1, 90)
    room = QueueRoom(Load(1000, 100), lambda _: queued, "full")
    room.take(tenant, 50)  # the last one may reach beyond
    with room.coming(tenant, 50):
        assert not room.take_known(tenant, 1)
        with pytest.raises(CapacityError, match="full"):
            room.take(tenant, 1)
    queued = Load(0, 0)
    room.take(tenant, 1)


@pytest.mark.parametrize(
    ("setting", "path", "flags", "flag"),
    [
        ("cancel_future", "/cancel_future", "/client/dynamic_config", "sample_cancel_enabled"),
        ("retrieve_futures", "/retrieve_futures", "/client/config", "sample_use_retrieve_futures"),
        ("join_sampling_session", "/join_sampling_session", "/client/config", "sample_join_sampling_session"),
    ],
)
def test_each_offer_can_be_turned_off(make_house: Any, setting: str, path: str, flags: str, flag: str) -> None:
    house = make_house(**{setting: False})
    with TestClient(build_app(house.services)) as client:
        api = Api(client, house.key)
        sampler = new_sampler(api)
        promise = ask(api, sampler, 0)
        assert api.post(flags, {})[flag] is False
        body = {"target": {"sampling_session_id": sampler}, "sampling_session_id": sampler, **promise}
        assert api.post(path, body, 400)["code"] == "unsupported"


def test_inflight_saves_have_no_name(api: Any) -> None:
    run = api.create(api.session())["model_id"]
    for seq, (body, words) in enumerate(
        [({"path": "x", "kind": "inflight"}, "leave path out"), ({"path": "x", "kind": "odd"}, "kind")], 1
    ):
        promise = api.post("/save_weights_for_sampler", {"model_id": run, "seq_id": seq, **body})
        assert words in api.result(promise)["error"]

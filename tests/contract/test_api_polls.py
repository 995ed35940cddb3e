"""A thousand clients wait for a thousand results: one watcher looks for all of them; a result wakes its own poll."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.contract.raw import BASE
from tinsmith.api import telling
from tinsmith.api.app import build_app, with_edge
from tinsmith.config import Settings
from tinsmith.store.rows import NewOp
from tinsmith.types import OpId, OpKind, RunId

NUM_POLLS = 1000
SCAN_S = 0.1
SDK_READ_TIMEOUT_S = 45.0  # of one retrieve_future in SDK 0.25.0 and 0.38.0


@asynccontextmanager
async def serving(house: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The API in this event loop, with its watcher, and a client of it."""
    app = build_app(house.services)
    transport = httpx.ASGITransport(with_edge(app))
    headers = {"X-API-Key": house.key}
    async with (
        app.lifespan(),
        httpx.AsyncClient(transport=transport, base_url="http://api/api/v1", headers=headers, timeout=60) as client,
    ):
        yield client


async def create_run(client: httpx.AsyncClient) -> dict[str, Any]:
    session = (await client.post("/create_session", json={})).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": BASE, "lora_config": {"rank": 4}}
    return dict((await client.post("/create_model", json=body)).json())


def enqueue(house: Any, run_id: RunId) -> list[OpId]:
    """A thousand requests of a run."""
    ids = [OpId(f"poll-{i:04}") for i in range(NUM_POLLS)]
    for seq_id, op_id in enumerate(ids, 1):
        new = NewOp(
            tenant_id=house.tenant_id, kind=OpKind.OPTIM_STEP, base_model=BASE, id=op_id, seq_id=seq_id, run_id=run_id,
            payload=b'{"adam_params":{}}',
        )  # fmt: skip
        house.store.ops.enqueue(new, time.time())
    return ids


def count_reads(house: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """By name: the polls' looks at their ops, the watcher's look at all, and transactions that read, whoever asks."""
    reads: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def call(*args: Any) -> Any:
            reads[name] += 1
            return plain(*args)

        monkeypatch.setattr(owner, name, call)

    get_all = house.store.ops.get_all

    def get(wanted: Any) -> Any:
        reads["get"] += len(wanted)
        return get_all(wanted)

    monkeypatch.setattr(house.services.reading, "_carry_out", get)
    counted(house.store.ops, "ended_among")
    counted(house.store._database, "read")
    return reads


def test_a_thousand_polls_cost_one_watcher(make_house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    house = make_house(poll_hold_s=30.0, scan_interval_s=SCAN_S)
    monkeypatch.setattr(telling, "AFTER_S", 60.0)
    worker = house.make_worker()
    waiters = house.services.waiters
    reads = count_reads(house, monkeypatch)

    async def main() -> None:
        async with serving(house) as client:
            run_id = (await create_run(client))["model_id"]
            worker.step()
            ids = await asyncio.to_thread(enqueue, house, run_id)
            reads.clear()
            polls = [asyncio.create_task(client.post("/retrieve_future", json={"request_id": op_id})) for op_id in ids]
            deadline = time.monotonic() + 20
            while (waiters.num_waiting, reads["get"]) != (NUM_POLLS, NUM_POLLS):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            await asyncio.sleep(2 * SCAN_S)

            reads.clear()
            started = time.monotonic()
            await asyncio.sleep(5 * SCAN_S)
            looks = (time.monotonic() - started) / SCAN_S + 1
            assert 1 <= reads["ended_among"] <= looks, "the watcher looks once a scan interval"
            assert reads["get"] == 0, "polls that wait read nothing"
            assert reads["read"] == reads["ended_among"], "and nobody else does"

            reads.clear()
            started = time.monotonic()
            await asyncio.to_thread(finish_one, worker, ids[0])
            done, _ = await asyncio.wait(polls, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            looks = (time.monotonic() - started) / SCAN_S + 2
            assert done == {polls[0]}
            assert polls[0].result().status_code == 200
            assert "metrics" in polls[0].result().json()
            assert reads["get"] == 0, "the poll that was woken has the row from the watcher"
            assert 1 <= reads["ended_among"] <= looks
            waiters.close()
            assert {answer.status_code for answer in await asyncio.gather(*polls[1:])} == {408}

    asyncio.run(main())


def finish_one(worker: Any, op_id: OpId) -> None:
    """The worker's step, for one op alone."""
    store, me = worker._store, worker._me
    store.runs.lease(me, BASE, 100)
    (op,) = store.ops.claim(me, [op_id], time.time())
    store.ops.finish(me, [worker._outcome(op)], time.time())
    worker._api.ring()


def test_a_poll_is_held_long_and_shorter_than_the_sdk_waits() -> None:
    assert 20.0 <= Settings().poll_hold_s <= SDK_READ_TIMEOUT_S - 5.0


def test_a_poll_without_a_result_answers_408_after_its_hold(make_house: Any) -> None:
    house = make_house(poll_hold_s=0.4)

    async def main() -> None:
        async with serving(house) as client:
            promise = await create_run(client)
            started = time.monotonic()
            answer = await client.post("/retrieve_future", json={"request_id": promise["request_id"]})
            assert 0.4 <= time.monotonic() - started < 5
            assert (answer.status_code, answer.json()["type"]) == (408, "try_again")

    asyncio.run(main())


def test_asking_again_at_once_reads_nothing_and_misses_nothing(
    make_house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op that a poll waited for is known for a moment; an end between two polls is seen by the watcher."""
    house = make_house(poll_hold_s=0.05, scan_interval_s=SCAN_S)
    worker = house.make_worker()

    async def main() -> None:
        async with serving(house) as client:
            promise = await create_run(client)
            asked = {"request_id": promise["request_id"]}
            assert (await client.post("/retrieve_future", json=asked)).status_code == 408
            reads = count_reads(house, monkeypatch)
            for _ in range(5):
                assert (await client.post("/retrieve_future", json=asked)).status_code == 408
            assert reads["get"] == 0
            other = dict(await foreign(house, client, asked))
            assert other["code"] == "gone", "another tenant is told nothing"
            while worker.step():
                pass
            until = time.monotonic() + 30
            while (answer := await client.post("/retrieve_future", json=asked)).status_code == 408:
                assert time.monotonic() < until
            assert answer.json()["type"] == "create_model"

    asyncio.run(main())


async def foreign(house: Any, client: httpx.AsyncClient, asked: dict[str, Any]) -> dict[str, Any]:
    return dict((await client.post("/retrieve_future", json=asked, headers={"X-API-Key": house.other_key})).json())

"""The API's threads are shared: who makes many calls at once waits for himself, and nobody else does."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from tests.contract.conftest import BASE, small_state
from tinsmith.api.app import build_app
from tinsmith.api.auth import KeyCache
from tinsmith.api.places import CALLER
from tinsmith.files.blobs import checkpoint_key
from tinsmith.files.checkpoint_file import dump_state
from tinsmith.scopes import Scope
from tinsmith.store.rows import NewCheckpoint, Principal
from tinsmith.types import CheckpointKind, RunSpec, TenantId

WORK_S = 0.03
MANY = 100  # 3 s of work
SOON_S = 0.5


@pytest.mark.parametrize("kind", ["work", "write"])
def test_many_calls_of_one_tenant_leave_another_its_turn(house: Any, kind: str) -> None:
    async def call(tenant: str) -> float:
        started = time.monotonic()
        CALLER.set(TenantId(tenant))
        await getattr(house.services, kind)(time.sleep, WORK_S)
        return time.monotonic() - started

    async def both() -> tuple[float, float]:
        many = asyncio.gather(*(asyncio.create_task(call("alice")) for _ in range(MANY)))
        await asyncio.sleep(2 * WORK_S)
        bobs = await asyncio.create_task(call("bob"))
        return bobs, max(await many)

    bobs, alices = asyncio.run(both())
    assert bobs < SOON_S < 2 * SOON_S < alices


def test_many_writes_over_http_leave_another_its_turn(house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    create = house.store.sessions.create

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(WORK_S)
        return create(*args, **options)

    monkeypatch.setattr(house.store.sessions, "create", slowly)

    async def both() -> tuple[float, float]:
        app = build_app(house.services)
        transport = httpx.ASGITransport(app)
        async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://api", timeout=60) as client:

            async def make(key: str) -> float:
                started = time.monotonic()
                answer = await client.post("/api/v1/create_session", json={}, headers={"X-API-Key": key})
                assert answer.status_code == 200
                return time.monotonic() - started

            many = asyncio.gather(*(asyncio.create_task(make(house.key)) for _ in range(MANY)))
            await asyncio.sleep(10 * WORK_S)
            bobs = await make(house.other_key)
            return bobs, max(await many)

    bobs, alices = asyncio.run(both())
    assert bobs < 2 * SOON_S < 4 * SOON_S < alices


def test_many_requests_with_one_key_are_one_look() -> None:
    looks = []

    async def look(secret: str) -> Principal | None:
        looks.append(secret)
        await asyncio.sleep(0.01)
        return Principal(TenantId("t"), "t", "k", Scope.FULL) if secret == "good" else None

    async def ask() -> list[Any]:
        keys = KeyCache(look)
        asked = [keys.principal(secret) for secret in ["good", "bad"] * 50]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(ask())
    assert sorted(looks) == ["bad", "good"]
    assert {type(answer).__name__ for answer in answers} == {"Principal", "AuthError"}


def test_models_come_in_pages(api: Any, house: Any, worker: Any) -> None:
    run_id = api.create(api.session())["model_id"]
    worker.step()
    info = house.blobs.put(checkpoint_key(house.tenant_id), dump_state(small_state(RunSpec(run_id, BASE, 4))))
    for number in range(7):
        for kind in (CheckpointKind.SAMPLER, CheckpointKind.TRAINING):
            row = NewCheckpoint(run_id, kind, f"n{number}", info.key, info.size, info.sha256)
            house.store.checkpoints.put(house.tenant_id, row, 1000.0 + number)
    seen, offset = [], 0
    while offset is not None:
        page = api.raw("GET", "/oai/api/v1/models", params={"limit": "3", "offset": offset}).json()
        assert page["object"] == "list"
        seen.append([card["id"].rpartition("/")[2] for card in page["data"]])
        offset = page.get("next_offset")
    assert seen == [["tiny", "n6", "n5", "n4"], ["n3", "n2", "n1"], ["n0"]]
    whole = api.raw("GET", "/oai/api/v1/models").json()
    assert len(whole["data"]) == 8
    assert "next_offset" not in whole
    for bad in ({"limit": "0"}, {"limit": "1001"}, {"offset": "-1"}):
        assert api.raw("GET", "/oai/api/v1/models", params=bad).status_code == 400

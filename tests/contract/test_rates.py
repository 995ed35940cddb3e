"""What a tenant may do only so often: acts that leave a row for good each, and showing keys that it hasn't got."""

from __future__ import annotations

from typing import Any

import pytest
from litestar.testing import TestClient

from tests.contract.conftest import Api, House
from tinsmith.api import app
from tinsmith.api.access import NEEDS
from tinsmith.api.rates import ACTS, Rate
from tinsmith.types import TenantId

MOST = 4


def saved(api: Api, house: House) -> str:
    worker = house.make_worker()
    run = api.create(api.session())["model_id"]
    worker.step()
    api.post("/save_weights_for_sampler", {"model_id": run, "seq_id": 1, "path": "a"})
    while worker.step():
        pass
    return f"/training_runs/{run}/checkpoints/sampler_weights/a"


def test_links_and_tokens_are_made_so_often_a_minute(make_house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ACTS_PER_MINUTE", MOST)
    house: House = make_house()
    with TestClient(app.with_edge(app.build_app(house.services)), raise_server_exceptions=False) as client:
        api, other = Api(client, house.key), Api(client, house.other_key)
        place = saved(api, house)
        api.post(f"{place}/access_token", {})
        assert api.raw("GET", f"/api/v1{place}/archive", headers={"accept": "application/json"}).status_code == 200
        for _ in range(MOST - 2):
            api.call("PUT", f"{place}/ttl", 204, json={"ttl_seconds": 60})
        for method, path in (
            ("POST", "access_token"), ("GET", "archive"), ("POST", "publish"), ("DELETE", "publish"), ("PUT", "ttl"),
        ):  # fmt: skip
            answer = api.raw(method, f"/api/v1{place}/{path}", json=None if method in ("GET", "DELETE") else {})
            assert answer.status_code == 429, path
            assert "4 links, tokens and changes of checkpoints" in answer.json()["detail"]
            assert int(answer.headers["retry-after"]) > 0
        num_acts = len(api.get("/audit")["entries"])
        assert other.raw("POST", f"/api/v1{place}/access_token", json={}).status_code == 404, "another has its own"
        api.call("DELETE", place, 204)
        assert len(api.get("/audit")["entries"]) == num_acts + 1


def test_keys_of_others_are_tried_out_so_often_a_minute(make_house: Any) -> None:
    """Those that somebody has don't count; nor do tokens, which nobody else can sign."""
    house: House = make_house(unknown_keys_per_minute=MOST)
    with TestClient(app.with_edge(app.build_app(house.services)), raise_server_exceptions=False) as client:
        api, other = Api(client, house.key), Api(client, house.other_key)
        place = saved(api, house)
        path = f"tinker://{place.split('/')[2]}/sampler_weights/a"
        session = other.session()

        def load(token: str, number: int) -> Any:
            body = {"session_id": session, "model_seq_id": number, "path": path, "optimizer": False}
            headers = {"X-API-Key": house.other_key}
            return client.post("/api/v1/load_weights", json={**body, "weights_access_token": token}, headers=headers)

        for number in range(2 * MOST):
            assert load(house.key, number).status_code == 200
        for number in range(MOST):
            assert load(f"tml-unknown-{number}", 100 + number).status_code == 200  # its future fails
        for number, token in enumerate(("tml-one-more", house.key)):
            answer = load(token, 200 + number)
            assert (answer.status_code, answer.json()["code"]) == (429, "too_many_unknown_keys")
        assert load("tmlw-forged.forged", 300).status_code == 200


def test_every_act_is_a_route() -> None:
    assert NEEDS.keys() >= ACTS


def test_a_bucket_empties_with_time_and_is_a_tenants_own() -> None:
    rate = Rate(2)
    one, two = TenantId("one"), TenantId("two")
    assert [rate.take(one) for _ in range(3)] == [0, 0, 30]
    assert rate.take(two) == 0
    rate._buckets._clock = lambda: 1e9
    assert rate.take(one) == 0


def test_sessions_beyond_the_bound_are_told_to_come_back(make_house: Any) -> None:
    house: House = make_house(max_sessions=2)
    with TestClient(app.with_edge(app.build_app(house.services)), raise_server_exceptions=False) as client:
        api, other = Api(client, house.key), Api(client, house.other_key)
        first, _ = api.session(), api.session()
        answer = api.raw("POST", "/api/v1/create_session", json={})
        assert (answer.status_code, answer.json()["code"]) == (429, "capacity")
        assert "2 sessions of yours are open already" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) > 0
        chat = {"model": "tinsmith/tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert api.raw("POST", "/oai/api/v1/chat/completions", json=chat).status_code == 429
        other.session()
        api.post(f"/sessions/{first}/finish", {"reason": {"type": "success"}})
        api.session()

"""Training requests that wait are bounded for each tenant, at the door; what was accepted is carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from litestar.testing import TestClient

from tests.contract.conftest import Api
from tests.contract.raw import PROTOBUF
from tests.contract.routes import training
from tests.crash.test_kill import datum
from tests.service import running
from tests.unit.test_metrics import samples
from tinsmith.api.app import build_app, with_edge
from tinsmith.api.pressure import COMPATIBLE, FILLING, Pressure


def step(api: Api, run_id: str, seq_id: int, status: int = 200) -> dict[str, Any]:
    return dict(api.post("/optim_step", {"model_id": run_id, "seq_id": seq_id, "adam_params": {}}, status))


def settle(worker: Any) -> None:
    while worker.step():
        pass


def test_a_full_queue_of_training_says_when_to_come_back(make_house: Any) -> None:
    house = make_house(max_queued_training=3)
    worker = house.make_worker()
    with TestClient(build_app(house.services)) as client:
        api, other = Api(client, house.key), Api(client, house.other_key)
        session = api.session()
        run = api.create(session)["model_id"]
        settle(worker)
        accepted = [step(api, run, seq) for seq in (1, 2, 3)]
        refused = step(api, run, 4, 429)
        assert (refused["code"], "--max-queued-training" in refused["detail"]) == ("capacity", True)
        body = {"model_id": run, "seq_id": 4, "adam_params": {}}
        answer = api.raw("POST", "/api/v1/optim_step", json=body)
        assert 0 < int(answer.headers["retry-after"]) <= 60
        new_run = {"session_id": session, "model_seq_id": 7, "base_model": "tinsmith/tiny", "lora_config": {"rank": 4}}
        assert api.post("/create_model", new_run, 429)["code"] == "capacity"
        passes = training(run, 4)
        answer = api.raw("POST", "/api/v1/forward_backward", content=passes, headers={"content-type": PROTOBUF})
        assert answer.status_code == 429
        assert step(api, run, 2)["request_id"] == accepted[1]["request_id"], "it has come, and takes no room"
        other.create(other.session())
        settle(worker)
        accepted.append(step(api, run, 4))
        settle(worker)
        assert all("metrics" in api.result(promise) for promise in accepted)


@pytest.mark.parametrize("last_missing", [1, 2])
def test_what_the_others_wait_for_is_let_in(make_house: Any, last_missing: int) -> None:
    """Else a queue that is full of requests that came early would never empty."""
    house = make_house(max_queued_training=3)
    worker = house.make_worker()
    with TestClient(build_app(house.services)) as client:
        api = Api(client, house.key)
        run = api.create(api.session())["model_id"]
        settle(worker)
        first = last_missing + 1
        early = [step(api, run, seq) for seq in range(first, first + 3)]
        step(api, run, first + 3, 429)
        if last_missing == 2:
            step(api, run, 2, 429)
        came = [step(api, run, 1)]
        settle(worker)
        came += [step(api, run, seq) for seq in range(2, first)]
        settle(worker)
        assert all("metrics" in api.result(promise) for promise in (*came, *early))


def test_bytes_that_wait_are_bounded(make_house: Any) -> None:
    house = make_house(max_queued_training_mib=1)
    with TestClient(build_app(house.services)) as client:
        api = Api(client, house.key)
        run = api.create(api.session())["model_id"]
        for seq, status in ((1, 200), (2, 200), (3, 429)):
            body = {"model_id": run, "seq_id": seq, "adam_params": {}, "padding": "x" * 600_000}
            api.post("/optim_step", body, status)


def test_the_sdk_waits_by_itself(tmp_path: Path) -> None:
    """Two runs that both send far more than may wait."""
    with running(tmp_path / "data", "--device", "fake", "--max-queued-training", "1") as service:
        client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
        runs = [client.create_lora_training_client("tinsmith/tiny", rank=2).result() for _ in range(2)]
        passes = [run.forward_backward([datum(step)], "cross_entropy") for step in range(20) for run in runs]
        steps = [run.optim_step(tinker.AdamParams(learning_rate=0.01)) for run in runs]
        assert all(each.result().loss_fn_outputs for each in passes)
        assert all(each.result().metrics is not None for each in steps)
        figures = httpx.get(f"{service.url}/metrics", headers={"X-API-Key": service.key}).content
    assert samples(figures)[("tinsmith_refused_requests_total", ("capacity",))] > 0


@pytest.mark.parametrize("path", sorted((FILLING | COMPATIBLE) - {"/api/v1/forward"}))
def test_under_overload_whatever_fills_the_queue_is_refused(
    make_house: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    house = make_house()
    monkeypatch.setattr(Pressure, "refuses", lambda *_: True)
    with TestClient(with_edge(build_app(house.services))) as client:
        answer = client.post(path, json={"model": "x"}, headers={"X-API-Key": house.key})
    assert (answer.status_code, "more than it can do" in answer.text) == (429, True)
    assert int(answer.headers["retry-after"]) > 0
    assert ("error" in answer.json()) is (path in COMPATIBLE), "each in its own dialect"

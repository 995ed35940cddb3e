"""Before the disk is full, new requests are refused with the cure, and what was accepted is carried out."""

from __future__ import annotations

from typing import Any

import pytest
from litestar.testing import TestClient

from tests.contract.conftest import Api, HandWorker, House
from tests.contract.test_quotas import is_done, sample
from tinsmith.api import disk_room
from tinsmith.api.app import build_app, with_edge
from tinsmith.disk_use import free_bytes


def test_a_full_data_directory_takes_no_new_requests_and_ends_those_it_has(make_house: Any) -> None:
    house: House = make_house(max_disk_mib=1)
    worker = house.make_worker()
    with TestClient(with_edge(build_app(house.services)), raise_server_exceptions=False) as client:
        api = Api(client, house.key)
        session = api.session()
        house.services.disk.measure(house.store, house.blobs)
        accepted = sample(api, session, 0)
        (house.settings.data_dir / "large").write_bytes(bytes(2**20))
        house.services.disk._next_measure = 0.0
        house.services.disk.measure(house.store, house.blobs)
        refused = api.post(
            "/create_model", {"session_id": session, "model_seq_id": 0, "base_model": "tinsmith/tiny"}, 503
        )
        assert (refused["code"], refused["category"]) == ("storage_full", "capacity")
        assert "of 1.0 MB at most (--max-disk-mib): delete checkpoints" in refused["detail"]
        worker.step()
        assert is_done(api, accepted)
        (house.settings.data_dir / "large").unlink()
        house.services.disk._next_measure = 0.0
        house.services.disk.measure(house.store, house.blobs)
        sample(api, session, 1)


def test_some_of_the_disk_is_kept_free(api: Api, house: House, worker: HandWorker, monkeypatch: Any) -> None:
    session = api.session()
    accepted = sample(api, session, 0)
    house.services.disk._looked_at = float("-inf")
    monkeypatch.setattr(disk_room, "free_bytes", lambda _: 2**20)
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tinsmith/tiny"}
    refused = api.post("/create_model", body, 503)
    assert refused["detail"].startswith(
        "the server's disk has 1.0 MB free, and 536.9 MB are kept free (--min-free-disk-mib)"
    )
    worker.step()
    assert is_done(api, accepted)
    monkeypatch.setattr(disk_room, "free_bytes", free_bytes)
    house.services.disk._looked_at = float("-inf")
    sample(api, session, 1)


def test_what_makes_rows_alone_is_refused_too(make_house: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Sessions, samplers and copies take room, and no quota bounds them; an end is always taken."""
    house: House = make_house(max_disk_mib=1)
    worker = house.make_worker()
    worker.start()
    with TestClient(with_edge(build_app(house.services)), raise_server_exceptions=False) as client:
        api = Api(client, house.key)
        session = api.session()
        house.services.disk.measure(house.store, house.blobs)
        large = {"tags": ["x" * 500] * 60}
        answers = [api.raw("POST", "/api/v1/create_session", json=large) for _ in range(60)]
        assert [answer.status_code for answer in answers if answer.status_code != 200][:1] == [503]
        assert answers[-1].json()["code"] == "storage_full"
        assert answers[-1].headers["retry-after"]
        logged = "".join(capfd.readouterr())
        assert "request failed" in logged
        assert "Traceback" not in logged, "a flood of refusals fills the log"
        assert len(answers[0].json()["session_id"]) == 25
        (house.settings.data_dir / "large").write_bytes(bytes(2**20))
        house.services.disk._next_measure = 0.0
        house.services.disk.measure(house.store, house.blobs)
        sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinsmith/tiny"}
        assert api.post("/create_sampling_session", sampler, 503)["code"] == "storage_full"
        assert api.post("/create_session", {}, 503)["code"] == "storage_full"
        api.post("/session_heartbeat", {"session_id": session})
        api.post(f"/sessions/{session}/finish", {})
    worker.stop()

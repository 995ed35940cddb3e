"""Before the disk is full, new requests are refused with the cure, and what was accepted is carried out."""

from __future__ import annotations

from typing import Any

import pytest
from litestar.testing import TestClient

from tests.contract.conftest import Api, HandWorker, House
from tests.contract.test_quotas import is_done, sample
from tinsmith.api import disk_room
from tinsmith.api.app import build_app, with_edge
from tinsmith.files.blobs import payload_key
from tinsmith.types import OpId
from tinsmith.upkeep.disk_use import free_bytes


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


def look(house: House) -> None:
    house.services.disk._next_measure = 0.0
    house.services.disk.measure(house.store, house.blobs)


@pytest.mark.parametrize(
    ("settings", "mib", "said"), [({"max_tenant_disk_mib": 1}, 1.5, "1.0 MB"), ({"max_disk_mib": 20}, 18.2, "18.9 MB")]
)
def test_one_tenant_leaves_room_for_others(make_house: Any, settings: dict[str, int], mib: float, said: str) -> None:
    """By default a tenth of what all may take."""
    house: House = make_house(**settings)
    bob = house.store.tenants.by_name("bob")
    assert bob is not None
    with TestClient(with_edge(build_app(house.services)), raise_server_exceptions=False) as client:
        alice, other = Api(client, house.key), Api(client, house.other_key)
        theirs, mine = other.session(), alice.session()
        blob = house.blobs.put(payload_key(bob.tenant_id, OpId("large")), bytes(int(mib * 2**20))).key
        look(house)
        body = {"session_id": theirs, "sampling_session_seq_id": 0, "base_model": "tinsmith/tiny"}
        refused = other.post("/create_sampling_session", body, 503)
        assert refused["code"] == "storage_full"
        assert f"of {said} that one tenant's may (--max-tenant-disk-mib): delete checkpoints" in refused["detail"]
        other.post("/create_session", {}, 503)
        other.post(f"/sessions/{theirs}/finish", {"reason": {"type": "success"}})
        sample(alice, mine, 0)
        house.blobs.delete(blob)
        look(house)
        other.session()
        sample(alice, mine, 1)


def test_what_saves_will_take_counts_when_they_are_asked_for(make_house: Any) -> None:
    """However many wait: before they are measured, and while they wait after that."""
    house: House = make_house(max_tenant_disk_mib=8)
    with TestClient(with_edge(build_app(house.services)), raise_server_exceptions=False) as client:
        api = Api(client, house.key)
        run = api.create(api.session())["model_id"]
        with house.store._database.write() as conn:
            conn.exec_driver_sql("UPDATE runs SET adapter_bytes = ?", (2**20,))
        house.store.quotas._known._places.clear()
        look(house)
        for seq in (1, 2):
            api.post("/save_weights", {"model_id": run, "seq_id": seq, "path": f"c{seq}"})
            look(house)
        assert house.services.disk.use is not None
        assert house.services.disk.use.bytes_by_tenant[house.tenant_id] > 6 * 2**20
        assert api.post("/save_weights", {"model_id": run, "seq_id": 3, "path": "c3"}, 503)["code"] == "storage_full"


def test_requests_that_are_refused_fill_no_disk_either(make_house: Any) -> None:
    """Each leaves a row, for its number."""
    house: House = make_house(max_tenant_disk_mib=1)
    with TestClient(with_edge(build_app(house.services)), raise_server_exceptions=False) as client:
        api = Api(client, house.key)
        session = api.session()
        look(house)
        assert api.result(sample(api, session, 0, max_tokens=-1))["category"] == "user"
        house.blobs.put(payload_key(house.tenant_id, OpId("large")), bytes(2**20))
        look(house)
        body = {"sampling_session_id": f"{session}:sample:0", "seq_id": 1, "num_samples": 0}
        assert api.post("/asample", body, 503)["code"] == "storage_full"

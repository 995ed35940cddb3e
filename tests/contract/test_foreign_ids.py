"""Keys and tenants against a real server: no key, no answer; another's object answers as one that never was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import httpx
import pytest

from tests.contract.raw import BASE, Raw, Refusal, refused
from tests.contract.routes import Ids, Probe, belongings, closed_routes, concrete, probes
from tests.service import Service

ABSENT = Ids(
    session="s" + "0" * 24,
    run=f"s{'0' * 24}:train:0",
    sampler=f"s{'0' * 24}:sample:0",
    future="req-" + "0" * 32,
    sample="req-" + "1" * 32,
    path=f"tinker://s{'0' * 24}:train:0/weights/kept",
    sampler_path=f"tinker://s{'0' * 24}:train:0/sampler_weights/kept",
)


@dataclass
class Tenant:
    raw: Raw
    ids: Ids

    def state(self) -> list[str]:
        """All that the tenant can see of what it has."""
        ids = self.ids
        paths = [
            f"/sessions/{ids.session}",
            f"/training_runs/{ids.run}/checkpoints",
            f"/samplers/{ids.sampler}",
            "/sessions",
            "/checkpoints",
            "/training_runs",
        ]
        return [self.raw.send("GET", path).text for path in paths]


@pytest.fixture(scope="module")
def service(shared_server: Service) -> Service:
    return shared_server


@pytest.fixture(scope="module")
def admin(service: Service) -> Iterator[Raw]:
    raw = Raw(service.url, service.key)
    yield raw
    raw.close()


def tenant(service: Service, admin: Raw, name: str) -> Tenant:
    key = admin.good("/admin/keys", json={"name": "laptop", "tenant": name}).json()["secret"]
    raw = Raw(service.url, key)
    return Tenant(raw, belongings(raw))


@pytest.fixture(scope="module")
def alice(service: Service, admin: Raw) -> Iterator[Tenant]:
    made = tenant(service, admin, "alice")
    yield made
    made.raw.close()


@pytest.fixture(scope="module")
def mallory(service: Service, admin: Raw) -> Iterator[Tenant]:
    made = tenant(service, admin, "mallory")
    yield made
    made.raw.close()


def test_every_closed_route_has_its_probes(alice: Tenant, mallory: Tenant) -> None:
    assert sorted(probes(alice.ids, mallory.ids)) == closed_routes()


@pytest.mark.parametrize("route", closed_routes())
def test_a_foreign_object_answers_like_an_absent_one(alice: Tenant, mallory: Tenant, route: str) -> None:
    before = alice.state()
    for foreign, absent in zip(
        probes(alice.ids, mallory.ids)[route], probes(ABSENT, mallory.ids, 91)[route], strict=True
    ):
        found = refused(lambda probe=foreign: ask(mallory.raw, probe))
        expected = ask(mallory.raw, absent)
        assert isinstance(expected, Refusal)
        assert found.code in ("not_found", "gone")
        assert (found.status, found.code, found.category) == (expected.status, expected.code, expected.category)
        assert alice.ids.hide(found.message) == ABSENT.hide(expected.message)
    assert alice.state() == before


@pytest.mark.parametrize("route", closed_routes())
def test_an_owner_is_answered(alice: Tenant, route: str) -> None:
    """The probes are good requests but for whose objects they are about; those that destroy come in another test."""
    if route.startswith(("DELETE", "PUT")) or route.endswith("/finish"):
        return
    for probe in probes(alice.ids, alice.ids)[route]:
        response = alice.raw.send(probe.method, probe.path, **probe.options)
        assert response.status_code in (200, 204, 302), response.text


def test_lists_hold_only_ones_own(alice: Tenant, mallory: Tenant) -> None:
    for path in ("/sessions", "/checkpoints", "/training_runs"):
        text = mallory.raw.send("GET", path).text
        assert mallory.ids.session in text
        assert alice.ids.session not in text


@pytest.mark.parametrize("key", [None, "tml-wrong", "not a key", "tml-" + "x" * 4000])
def test_without_a_good_key_nothing_is_answered(service: Service, key: str | None) -> None:
    raw = Raw(service.url, key)
    for route in closed_routes():
        method, path = concrete(route)
        found = refused(lambda call=(method, path): raw.ask(*call, content=b"{}"))
        assert (found.status, found.code) == (401, "unauthorized")
        assert "tinsmith keys create" in found.message
    raw.close()


def test_a_revoked_key_is_refused_everywhere(service: Service, admin: Raw) -> None:
    made = admin.good("/admin/keys", json={"name": "gone", "tenant": "carol"}).json()
    with closing(Raw(service.url, made["secret"])) as before:
        before.session()
        assert admin.send("DELETE", f"/admin/keys/{made['key_id']}").status_code == 200
    raw = Raw(service.url, made["secret"])  # the connections of before are being cut
    for route in closed_routes():
        method, path = concrete(route)
        found = refused(lambda call=(method, path): raw.ask(*call, content=b"{}"))
        assert (found.status, found.code) == (401, "unauthorized")
    raw.close()


def test_only_an_admin_manages_keys(mallory: Tenant, admin: Raw) -> None:
    for method, path in [concrete(route) for route in closed_routes() if "/admin/" in route]:
        found = refused(lambda call=(method, path): mallory.raw.ask(*call, json={"name": "x"}))
        assert (found.status, found.code) == (403, "forbidden")
    missing = refused(lambda: admin.ask("DELETE", "/admin/keys/nothing"))
    assert (missing.status, missing.code) == (404, "not_found")


def test_a_foreign_run_is_not_made_anew(alice: Tenant, mallory: Tenant) -> None:
    """A client names its runs and samplers itself; the number of a session that isn't its own makes none."""
    body = {"session_id": alice.ids.session, "model_seq_id": 0, "base_model": BASE}
    assert refused(lambda: mallory.raw.ask("POST", "/create_model", json=body)).status == 404
    assert alice.raw.send("GET", f"/training_runs/{alice.ids.run}").json()["lora_rank"] == 2


def ask(raw: Raw, probe: Probe) -> Refusal | httpx.Response:
    return raw.ask(probe.method, probe.path, **probe.options)

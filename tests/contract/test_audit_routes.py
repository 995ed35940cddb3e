"""The route table, with what each route leaves in the audit log, so that a new one can't be forgotten there.

A route is administrative if it decides who may do or read what, lets something out, or destroys something. All others
are the work itself, or read one's own; they leave nothing, and `ROUTINE` says why for each kind of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.contract.conftest import House
from tests.contract.raw import Raw, refused
from tests.contract.routes import Ids, Probe, belongings, closed_routes, probes
from tests.contract.standing import standing
from tests.contract.test_imports import archive

CHECKPOINT = "/training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}"
KEPT = 3  # checkpoints: one of each kind
ACTS: dict[str, list[str]] = {  # by route: the events of its probes in tests/contract/routes.py, or of `MORE`
    "PUT /sessions/{session_id:str}/project": ["project_session_set"],
    "POST /save_weights_external": ["checkpoint_export"],
    "POST /copy_weights": ["checkpoint_copy"] * 3,
    "POST /import_weights": ["checkpoint_import"] * 2,
    f"DELETE {CHECKPOINT}": ["checkpoint_delete"] * KEPT,
    "DELETE /training_runs/{run_id:str}": [*["checkpoint_delete"] * KEPT, "project_run_delete"],
    f"PUT {CHECKPOINT}/ttl": ["checkpoint_ttl_set"] * 2,
    f"POST {CHECKPOINT}/publish": ["checkpoint_publish"] * KEPT,
    f"DELETE {CHECKPOINT}/publish": ["checkpoint_unpublish"] * KEPT,
    f"POST {CHECKPOINT}/access_token": ["checkpoint_access_token_create"] * KEPT,
    f"GET {CHECKPOINT}/archive": ["checkpoint_archive_link_create"] * KEPT,
    f"GET {CHECKPOINT}/external_weights_urls": ["checkpoint_external_links_create"],
    "POST /admin/keys": ["organization_create", "organization_key_create", "organization_key_create"],
    "POST /admin/keys/{key_id:str}/rotate": ["organization_key_rotate"],
    "DELETE /admin/keys/{key_id:str}": ["organization_key_revoke"],
    "PUT /admin/quotas": ["organization_quota_set"],
    "DELETE /auth/apikey/me": ["organization_key_revoke"],
    "POST /admin/weights": ["organization_weight_set"],
}
ROUTINE: dict[str, str] = {
    **dict.fromkeys(
        [
            "GET /admin/keys",
            "GET /admin/quotas",
            "GET /admin/runs",
            "GET /admin/weights",
            "GET /audit",
            "GET /auth/apikey/me",
            "GET /billing/usage/checkpoints/current",
            "GET /billing/usage/events",
            "GET /checkpoints",
            "GET /get_server_capabilities",
            "GET /oai/api/v1/models",
            "GET /oai/api/v1/models/{model:path}",
            "GET /samplers/{sampler_id:str}",
            "GET /sessions",
            "GET /sessions/{session_id:str}",
            "GET /training_runs",
            "GET /training_runs/{run_id:str}",
            "GET /training_runs/{run_id:str}/checkpoints",
            "POST /anthropic/api/v1/messages/count_tokens",
            "POST /get_info",
            "POST /sessions/search",
            "POST /weights_info",
        ],
        "reads what the caller may see by its key",
    ),
    **dict.fromkeys(
        [
            "POST /anthropic/api/v1/messages",
            "POST /asample",
            "POST /cancel_future",
            "POST /create_custom_loss",
            "POST /create_model",
            "POST /create_sampling_session",
            "POST /create_session",
            "POST /forward_backward",
            "POST /join_sampling_session",
            "POST /load_weights",
            "POST /oai/api/v1/chat/completions",
            "POST /oai/api/v1/completions",
            "POST /optim_step",
            "POST /retrieve_future",
            "POST /retrieve_futures",
            "POST /save_weights",
            "POST /save_weights_for_sampler",
            "POST /sessions/{session_id:str}/finish",
        ],
        "is the work itself: it stands in the log of requests and in the ledger",
    ),
    **dict.fromkeys(
        ["POST /client/config", "POST /client/dynamic_config", "POST /session_heartbeat", "POST /telemetry"],
        "keeps a client going and changes nothing",
    ),
    "POST /auth/token": "repeats what a key allows, for minutes, and ends with it; clients renew it all the time",
    "GET /sessions/{session_id:str}/trace_export": "links to the timeline of one's own requests: no weights, no texts",
}


class Scene:
    def __init__(self, house: House, url: str) -> None:
        self.house = house
        self.raw = Raw(url, house.key)
        self.secrets = [house.key]

    def close(self) -> None:
        self.raw.close()

    def entries(self) -> list[dict[str, Any]]:
        return list(self.raw.send("GET", "/audit").json()["entries"])

    def do(self, asked: list[Probe]) -> None:
        for probe in asked:
            response = self.raw.send(probe.method, probe.path, **probe.options)
            assert response.status_code in (200, 204, 302), response.text
            promise = (response.json() if response.content else None) or {}
            if "request_id" in promise and probe.path.startswith("/save"):
                self.raw.result(promise["request_id"])
            self.secrets += [promise[name] for name in ("token", "url", "secret") if name in promise]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with standing(tmp_path_factory.mktemp("audit"), jwt_auth=True) as (house, url), closing(Scene(house, url)) as scene:
        yield scene


@pytest.fixture
def at(scene: Scene) -> Ids:
    return belongings(scene.raw)


@pytest.fixture(scope="module")
def shared(scene: Scene) -> Ids:
    return belongings(scene.raw)


def asked(scene: Scene, at: Ids, route: str) -> list[Probe]:
    """Good requests of the route, each of which is carried out."""
    found = [] if route == "DELETE /auth/apikey/me" else probes(at, at, seq_id=4)[route]
    if route == "POST /admin/keys":
        names = ("carol", "carol")
        return [Probe("POST", "/admin/keys", {"name": "ci", "tenant": name}) for name in names]
    if route == "POST /admin/weights":
        return [
            Probe(
                "POST", "/admin/weights", {"tenant": scene.house.store.tenants.list_keys()[0].tenant_name, "weight": 2}
            )
        ]
    if route == "POST /import_weights":
        return [Probe("POST", "/import_weights", content=archive())]
    if route == "PUT /admin/quotas":
        return [Probe("PUT", "/admin/quotas", {"tenant": "bob", "quotas": {"runs": 100}})]
    if route == "DELETE /admin/keys/{key_id:str}":
        row, _ = scene.house.store.tenants.create_key(scene.house.tenant_id, "old")
        return [Probe("DELETE", f"/admin/keys/{row.key_id}")]
    if route == "POST /admin/keys/{key_id:str}/rotate":
        row, _ = scene.house.store.tenants.create_key(scene.house.tenant_id, "old")
        return [Probe("POST", f"/admin/keys/{row.key_id}/rotate", {})]
    if route == f"DELETE {CHECKPOINT}/publish":
        scene.do([Probe("POST", probe.path) for probe in found])
    return found


def test_every_route_is_administrative_or_routine() -> None:
    assert not set(ACTS) & set(ROUTINE)
    assert sorted({*ACTS, *ROUTINE}) == closed_routes()


@pytest.mark.parametrize("route", [route for route in ACTS if route != "DELETE /auth/apikey/me"])
def test_an_act_is_in_the_audit_log(scene: Scene, at: Ids, route: str) -> None:
    """Once for each time it was done, with who did it and to what, and without a secret."""
    acts = asked(scene, at, route)
    before = scene.entries()
    scene.do(acts)
    new = scene.entries()[len(before) :]
    assert [entry["event"] for entry in new] == ACTS[route]
    for entry in new:
        details = entry["event_details"]
        assert details["actor"] == "alice"
        assert details["actor_key_id"]
        assert all(secret not in str(entry) for secret in scene.secrets)
        if entry["event"].startswith("checkpoint"):
            assert details["tinker_path"].startswith("tinker://")


def test_an_own_end_is_in_the_audit_log(scene: Scene) -> None:
    row, secret = scene.house.store.tenants.create_key(scene.house.tenant_id, "short-lived")
    before = scene.entries()
    scene.raw.send("DELETE", "/auth/apikey/me", headers={"X-API-Key": secret})
    (entry,) = scene.entries()[len(before) :]
    assert (entry["event"], entry["event_details"]["actor_key_id"]) == ("organization_key_revoke", row.key_id)


@pytest.mark.parametrize("route", ROUTINE)
def test_work_is_not_in_the_audit_log(scene: Scene, shared: Ids, route: str) -> None:
    at = belongings(scene.raw) if route.endswith("/finish") else shared
    before = scene.entries()
    for probe in asked(scene, at, route):
        scene.raw.send(probe.method, probe.path, **probe.options)
    assert scene.entries() == before


@pytest.mark.parametrize("route", [route for route in ACTS if route != "POST /import_weights"])  # of nobody's objects
def test_a_refused_act_is_not_in_the_audit_log(scene: Scene, shared: Ids, route: str) -> None:
    """Somebody else's attempt; those of an administrator come from one who is none."""
    _, secret = scene.house.store.tenants.create_key(scene.house.store.tenants.by_name("bob").tenant_id, "mallory")
    acts = asked(scene, shared, route)
    before = scene.entries()
    for probe in acts:
        headers = {**probe.options.get("headers", {}), "X-API-Key": secret}
        answer = scene.raw.send(probe.method, probe.path, **{**probe.options, "headers": headers})
        assert answer.status_code in (403, 404), answer.text
    assert scene.entries() == before


def test_a_retry_of_an_export_is_one_act(scene: Scene, at: Ids) -> None:
    body = {"model_id": at.run, "seq_id": 4, "path": "again", "age_encryption_recipients": None}
    before = scene.entries()
    for _ in range(3):
        scene.raw.good("/save_weights_external", json=body)
    (entry,) = scene.entries()[len(before) :]
    assert entry["event_details"]["tinker_path"] == f"tinker://{at.run}/external_weights/again"
    assert entry["event_details"]["recipients"] == "0"
    bad = refused(lambda: scene.raw.ask("POST", "/save_weights_external", json={**body, "seq_id": 5, "path": "../x"}))
    assert bad.code == "invalid_request"
    assert len(scene.entries()) == len(before) + 1

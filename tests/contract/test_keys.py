"""Keys: what their scope lets them do on every route, their end by time, by a successor and by revocation."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import tinker
from sqlalchemy import insert

from tests.contract.conftest import House
from tests.contract.raw import BASE, Raw
from tests.contract.routes import Ids, belongings, closed_routes, concrete, probes
from tests.contract.standing import standing
from tinsmith.api import access, app
from tinsmith.scopes import Scope
from tinsmith.store.quota_rules import day_of
from tinsmith.store.schema import tallies

HANDLERS = (*app.CLOSED, *app.OPENAI, *app.ANTHROPIC, *app.ADMIN, *app.WATCHING)
PREFIXES = {"/oai/api/v1": app.OPENAI, "/anthropic/api/v1": app.ANTHROPIC}
WEAK = (Scope.READ, Scope.SAMPLE, Scope.FULL)


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, str]]:
    with standing(tmp_path_factory.mktemp("keys"), jwt_auth=True, poll_hold_s=20.0) as made:
        yield made


@pytest.fixture(scope="module")
def admin(stand: tuple[House, str]) -> Iterator[Raw]:
    with closing(Raw(stand[1], stand[0].key)) as raw:
        yield raw


@pytest.fixture(scope="module")
def ids(admin: Raw) -> Ids:
    return belongings(admin)


def make(admin: Raw, **fields: Any) -> dict[str, Any]:
    return dict(admin.good("/admin/keys", json={"name": "k", "tenant": "alice", **fields}).json())


def needs() -> dict[str, Scope]:
    """By route as tests name it: the scope that the table asks for."""
    table = {}
    for handler in HANDLERS:
        prefix = next((prefix for prefix, group in PREFIXES.items() if handler in group), "")
        for path in handler.paths:
            for method in handler.http_methods - {"OPTIONS", "HEAD"}:
                table[f"{method} {prefix}{path}"] = access.NEEDS[handler.fn.__name__]
    return table


def test_every_closed_route_is_in_the_table_and_no_other() -> None:
    assert sorted(needs()) == closed_routes()
    names = [handler.fn.__name__ for handler in HANDLERS]
    assert sorted(names) == sorted(set(names)) == sorted({*access.NEEDS} - {"get_metrics"})  # which isn't below /api/v1


@pytest.mark.parametrize("scope", WEAK)
def test_figures_are_for_administrators(stand: tuple[House, str], admin: Raw, scope: Scope) -> None:
    key = {"X-API-Key": make(admin, scope=scope)["secret"]}
    for path in ("/metrics", "//metrics"):
        assert httpx.get(stand[1] + path, headers=key).status_code == 403
        assert httpx.get(stand[1] + path).status_code == 401


def test_a_route_that_is_not_in_the_table_has_no_place(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(access.NEEDS, "publish")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="publish"):
        app.build_app(house.services)


def test_routes_that_change_or_hand_out_need_more_than_read() -> None:
    """By their methods, so that the table can't be wrong about a new one."""
    harmless = {  # POST, and yet they change nothing that is the tenant's, or only the caller's own presence
        "POST /client/config", "POST /client/dynamic_config", "POST /telemetry", "POST /auth/token",
        "POST /create_session", "POST /session_heartbeat", "POST /sessions/{session_id:str}/finish",
        "POST /sessions/search", "POST /get_info", "POST /weights_info", "POST /retrieve_future",
        "POST /retrieve_futures", "DELETE /auth/apikey/me",
    }  # fmt: skip
    for route, scope in needs().items():
        hands_out = route.endswith(("/archive", "/external_weights_urls"))
        if (not route.startswith("GET ") and route not in harmless) or hands_out:
            assert scope is not Scope.READ, route
        if "/admin/" in route:
            assert scope is Scope.ADMIN, route


@pytest.mark.parametrize("scope", WEAK)
def test_a_scope_ends_where_the_table_says(stand: tuple[House, str], admin: Raw, ids: Ids, scope: Scope) -> None:
    """On every route: 403 beyond the scope, and within it none; also with a token made from the key."""
    secret = make(admin, scope=scope)["secret"]
    with closing(Raw(stand[1], secret)) as raw:
        token = raw.good("/auth/token", json={}).json()["jwt"]
        for route, needed in needs().items():
            method, path = concrete(route)
            tries = probes(ids, ids)[route][:1] if needed is not Scope.READ else []
            options = tries[0].options if tries else {"content": b"{}"}
            path = tries[0].path if tries else path
            headers = {**options.pop("headers", {})}
            if scope.allows(needed):
                continue
            for sent in ({}, {"X-API-Key": token}):
                answer = raw.send(method, path, headers={**headers, **sent}, **options)
                assert answer.status_code == 403, (route, answer.text)
                assert "scope" in answer.text


def test_within_its_scope_a_key_is_answered(stand: tuple[House, str], admin: Raw) -> None:
    for scope in WEAK:
        with closing(Raw(stand[1], make(admin, scope=scope)["secret"])) as raw:
            for path in ("/sessions", "/training_runs", "/checkpoints", "/audit", "/auth/apikey/me"):
                assert raw.send("GET", path).status_code == 200, (scope, path)
            session = raw.session()
            sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
            assert raw.send("POST", "/create_sampling_session", json=sampler).status_code == (
                403 if scope is Scope.READ else 200
            )
            run = {"session_id": session, "model_seq_id": 0, "base_model": BASE}
            assert raw.send("POST", "/create_model", json=run).status_code == (200 if scope is Scope.FULL else 403)


@pytest.mark.parametrize("scope", [Scope.READ, Scope.SAMPLE])
def test_a_session_that_another_key_opened_is_ended_with_scope_full(
    stand: tuple[House, str], admin: Raw, scope: Scope
) -> None:
    """Its end cancels samples: no more than its own is for a key that looks or samples."""
    made = make(admin, scope=scope)
    with closing(Raw(stand[1], make(admin)["secret"])) as owner, closing(Raw(stand[1], made["secret"])) as weak:
        theirs, own = owner.session(), weak.session()
        token = {"X-API-Key": weak.good("/auth/token", json={}).json()["jwt"]}
        for headers in ({}, token):
            refused = weak.send("POST", f"/sessions/{theirs}/finish", json={}, headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert owner.send("POST", "/session_heartbeat", json={"session_id": theirs}).status_code == 200
        assert weak.send("POST", "/sessions/s0/finish", json={}).status_code == 404
        assert owner.send("POST", f"/sessions/{theirs}/finish", json={}).status_code == 200
        successor = admin.good(f"/admin/keys/{made['key_id']}/rotate", json={"grace_s": 60}).json()
        with closing(Raw(stand[1], successor["secret"])) as next_one:
            assert next_one.send("POST", f"/sessions/{own}/finish", json={}).status_code == 200


@pytest.mark.parametrize("scope", [Scope.READ, Scope.SAMPLE])
def test_heartbeats_of_another_key_count_with_scope_full_alone(
    stand: tuple[House, str], admin: Raw, scope: Scope
) -> None:
    """Else who only looks keeps sessions, their seats and their runs for ever."""
    full, less = make(admin)["secret"], make(admin, scope=scope)["secret"]
    with closing(Raw(stand[1], full)) as owner, closing(Raw(stand[1], less)) as weak:
        theirs, own = owner.session(), weak.session()
        refused = weak.send("POST", "/session_heartbeat", json={"session_id": theirs})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert weak.send("POST", "/session_heartbeat", json={"session_id": "s0"}).status_code == 404
        for key, session in ((weak, own), (owner, own), (owner, theirs)):
            assert key.send("POST", "/session_heartbeat", json={"session_id": session}).status_code == 200


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "\x9b31m", "\u202eb"])
def test_names_that_move_a_cursor_are_refused(admin: Raw, name: str) -> None:
    """They stand in lists, logs and labels of figures."""
    for body in ({"name": name}, {"name": "k", "tenant": name}):
        answer = admin.send("POST", "/admin/keys", json=body)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


def test_a_successor_is_bound_as_its_key_was(stand: tuple[House, str], admin: Raw) -> None:
    """By its quotas, with what was used of them."""
    house, _ = stand
    made = make(admin)
    limit = {"tenant": "alice", "key_id": made["key_id"], "quotas": {"tokens_per_day": 5, "runs": 2}}
    assert admin.send("PUT", "/admin/quotas", json=limit).status_code == 200
    with house.store._database.write() as conn:
        row = {"scope": made["key_id"], "period": day_of(time.time()), "kind": "training", "quantity": 3}
        conn.execute(insert(tallies), row)
    successor = admin.good(f"/admin/keys/{made['key_id']}/rotate", json={"grace_s": 0}).json()
    scopes = admin.send("GET", "/admin/quotas?tenant=alice").json()["scopes"]
    (found,) = [scope for scope in scopes if scope["key_id"] == successor["key_id"]]
    quotas = {quota["quota"]: (quota["used"], quota["limit"]) for quota in found["quotas"]}
    assert quotas["tokens_per_day"] == (3, 5)
    assert quotas["runs"] == (0, 2)
    admin.send("PUT", "/admin/quotas", json={**limit, "quotas": {"tokens_per_day": None, "runs": None}})


def test_the_express_lane_knows_scopes(stand: tuple[House, str], admin: Raw, ids: Ids) -> None:
    """A key that was seen good a moment ago goes past the routes' guards, and not past its scope."""
    with closing(Raw(stand[1], make(admin, scope="sample")["secret"])) as raw:
        raw.send("GET", "/sessions")
        for probe in [*probes(ids, ids)["POST /forward_backward"][:1], *probes(ids, ids)["POST /optim_step"]]:
            assert raw.send(probe.method, probe.path, **probe.options).status_code == 403


def test_the_sdk_samples_with_a_key_for_sampling(stand: tuple[House, str], admin: Raw) -> None:
    service = tinker.ServiceClient(base_url=stand[1], api_key=make(admin, scope="sample")["secret"])
    sampler = service.create_sampling_client(base_model=BASE).result(20)
    params = tinker.SamplingParams(max_tokens=2)
    answer = sampler.sample(tinker.ModelInput.from_ints([1, 2]), num_samples=1, sampling_params=params).result(20)
    assert answer.sequences
    with pytest.raises(tinker.PermissionDeniedError, match="scope full"):
        service.create_lora_training_client(base_model=BASE, rank=2).result(20)


def test_a_key_that_only_looks_opens_no_weights_to_others(stand: tuple[House, str], admin: Raw, ids: Ids) -> None:
    """As a weights access token, the key of another tenant is good if it may hand out."""
    with closing(Raw(stand[1], stand[0].other_key)) as bob:
        for scope, status in ((Scope.READ, 404), (Scope.SAMPLE, 404), (Scope.FULL, 200)):
            secret = make(admin, scope=scope)["secret"]
            body = {"source_path": ids.path, "destination_project_id": "p", "weights_access_token": secret}
            assert bob.send("POST", "/copy_weights", json=body).status_code == status


def test_who_asks_for_nonsense_is_told(admin: Raw) -> None:
    for fields in (
        {"scope": "all"},
        {"scopes": ["read"]},
        {"scope": "read", "is_admin": True},
        {"expires_s": 0},
        {"expires_s": 1e12},
    ):
        assert admin.send("POST", "/admin/keys", json={"name": "k", **fields}).status_code == 400
    assert make(admin)["scope"] == "full"
    assert make(admin, is_admin=True)["scope"] == "admin"


def test_a_key_ends_with_its_time(
    stand: tuple[House, str], admin: Raw, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the moment, though it was seen good just before; so do its tokens and links."""
    made = make(admin, expires_s=100)
    assert "T" in made["expires_at"]
    with closing(Raw(stand[1], made["secret"])) as raw:
        token = raw.good("/auth/token", json={}).json()["jwt"]
        link = urlsplit(archive_link(raw, ids))
        assert raw.send("GET", "/sessions").status_code == 200
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 101)
        for sent in ({}, {"X-API-Key": token}):
            answer = raw.send("GET", "/sessions", headers=sent)
            assert answer.status_code == 401
        assert "expired" in raw.send("GET", "/sessions").json()["detail"]
        assert httpx.get(f"{stand[1]}{link.path}?{link.query}").status_code == 410


def test_a_successor_takes_a_keys_place(stand: tuple[House, str], admin: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(admin, scope="sample", expires_s=1000)
    with closing(Raw(stand[1], made["secret"])) as old:
        old.send("GET", "/sessions")
        new = admin.good(f"/admin/keys/{made['key_id']}/rotate", json={"grace_s": 60}).json()
        assert (new["name"], new["tenant"], new["scope"]) == (made["name"], made["tenant"], "sample")
        assert new["secret"] != made["secret"]
        listed = {key["key_id"]: key for key in admin.send("GET", "/admin/keys").json()["keys"]}
        assert listed[made["key_id"]]["replaced_by"] == new["key_id"]
        again = admin.send("POST", f"/admin/keys/{made['key_id']}/rotate", json={})
        assert (again.status_code, again.json()["code"]) == (400, "invalid_request")
        assert new["key_id"] in again.json()["detail"]
        with closing(Raw(stand[1], new["secret"])) as successor:
            for raw in (old, successor):
                assert raw.send("GET", "/sessions").status_code == 200
            now = time.time()
            monkeypatch.setattr(time, "time", lambda: now + 61)
            assert old.send("GET", "/sessions").status_code == 401
            assert successor.send("GET", "/sessions").status_code == 200
            monkeypatch.setattr(time, "time", lambda: now + 1010)
            assert successor.send("GET", "/sessions").status_code == 401


def test_a_rotation_without_grace_is_a_revocation(stand: tuple[House, str], admin: Raw) -> None:
    made = make(admin)
    with closing(Raw(stand[1], made["secret"])) as old:
        old.send("GET", "/sessions")
        admin.good(f"/admin/keys/{made['key_id']}/rotate", json={"grace_s": 0})
        assert sent_again(lambda: old.send("GET", "/sessions")).status_code == 401
    assert admin.send("POST", "/admin/keys/nothing/rotate", json={}).status_code == 404
    revoked = make(admin)
    admin.send("DELETE", f"/admin/keys/{revoked['key_id']}")
    assert admin.send("POST", f"/admin/keys/{revoked['key_id']}/rotate", json={}).status_code == 400


def test_a_revoked_key_ends_at_once_and_all_that_was_made_with_it(
    stand: tuple[House, str], admin: Raw, ids: Ids
) -> None:
    """The very next request, though the key, and a token for it, were good a moment ago."""
    for _ in range(3):
        made = make(admin)
        with closing(Raw(stand[1], made["secret"])) as raw:
            token = raw.good("/auth/token", json={}).json()["jwt"]
            link = urlsplit(archive_link(raw, ids))
            for sent in ({}, {"X-API-Key": token}):
                assert raw.send("GET", "/sessions", headers=sent).status_code == 200
            admin.send("DELETE", f"/admin/keys/{made['key_id']}")
            for sent in ({}, {"X-API-Key": token}):
                call = {"headers": sent, "json": {"request_id": ids.future}}
                answer = sent_again(lambda call=call: raw.send("POST", "/retrieve_future", **call))
                assert answer.status_code == 401
            assert httpx.get(f"{stand[1]}{link.path}?{link.query}").status_code == 410


def test_polls_and_streams_that_are_open_end_with_their_key(stand: tuple[House, str], admin: Raw) -> None:
    """Within a second, though they would be held for twenty; those of another key of the tenant go on."""
    house, url = stand
    house.workers[0].stop()
    made, kept = make(admin), make(admin)
    with closing(Raw(url, made["secret"])) as raw:
        session = raw.session()
        sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
        sampler_id = raw.send("POST", "/create_sampling_session", json=sampler).json()["sampling_session_id"]
        asked = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 1}}
        body = {"sampling_session_id": sampler_id, "seq_id": 0, **asked}
        future = raw.send("POST", "/asample", json=body).json()["request_id"]
    target = {"type": "sampling_session", "sampling_session_id": sampler_id}
    chat = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    calls = [
        ("/api/v1/retrieve_future", {"request_id": future}),
        ("/api/v1/retrieve_futures", {"target": target, "timeout": 20}),
        ("/oai/api/v1/chat/completions", chat),
    ]
    ended: dict[str, float] = {}

    def hold(name: str, path: str, body: Any, key: str) -> None:
        data = json.dumps(body).encode()
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=30) as sock:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-type: application/json\r\n"
            sock.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
            with suppress(OSError):
                sock.recv(100)
        ended[name] = time.monotonic()

    threads = [threading.Thread(target=hold, args=(path, path, body, made["secret"])) for path, body in calls]
    threads.append(threading.Thread(target=hold, args=("kept", *calls[0], kept["secret"])))
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    assert not ended
    revoked_at = time.monotonic()
    admin.send("DELETE", f"/admin/keys/{made['key_id']}")
    for thread in threads[:-1]:
        thread.join(15)
    assert sorted(ended) == sorted(path for path, _ in calls)
    assert max(ended.values()) - revoked_at < 5
    admin.send("DELETE", f"/admin/keys/{kept['key_id']}")
    threads[-1].join(15)
    assert len(ended) == 4
    assert not house.services.underway.key_ids() & {made["key_id"], kept["key_id"]}


def test_the_connections_of_a_revoked_key_are_closed(stand: tuple[House, str], admin: Raw, ids: Ids) -> None:
    """Those that wait for a next request, and one over which a link of the key's is being followed."""
    made = make(admin)
    with closing(Raw(stand[1], made["secret"])) as raw:
        link = urlsplit(archive_link(raw, ids))
    parts = urlsplit(stand[1])
    paths = ["/api/v1/sessions", f"{link.path}?{link.query}"]
    socks = []
    for path in paths:
        sock = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20)
        sock.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {made['secret']}\r\n\r\n".encode())
        assert sock.recv(16).startswith(b"HTTP/1.1 200")
        socks.append(sock)
    admin.send("DELETE", f"/admin/keys/{made['key_id']}")
    for sock in socks:
        with closing(sock), suppress(ConnectionResetError):
            while sock.recv(1 << 16):
                pass


def archive_link(raw: Raw, ids: Ids) -> str:
    path = f"/training_runs/{ids.run}/checkpoints/weights/kept/archive"
    return str(raw.send("GET", path, headers={"accept": "application/json"}).json()["url"])


def sent_again(call: Callable[[], httpx.Response]) -> httpx.Response:
    """The connection of a key that ended is closed, which a client that keeps it finds out with its next request."""
    with suppress(httpx.TransportError):
        return call()
    return call()

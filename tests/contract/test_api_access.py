"""Who may do what: keys, tenants, admin routes, and the one shape of errors."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import Any

import pytest
from litestar.testing import TestClient

from tests.contract.raw import ours
from tinsmith.api.app import build_app
from tinsmith.ipc.heartbeat import Ear, Heart

OPEN = ("/api/v1/healthz", "/api/v1/downloads/", "/api/v1/traces/", "/hf/", "/schema")


def test_every_route_but_the_open_ones_needs_a_key(house: Any, anonymous: Any) -> None:
    closed = 0
    for route in build_app(house.services).routes:
        for method in getattr(route, "methods", ()):
            if method == "OPTIONS" or route.path.startswith(OPEN):
                continue
            url = route.path.replace("{run_id:str}", "r").replace("{session_id:str}", "s").replace("{kind:str}", "k")
            url = (
                url.replace("{model:path}", "m")
                .replace("{name:str}", "n")
                .replace("{sampler_id:str}", "s")
                .replace("{key_id:str}", "k")
            )
            response = anonymous.raw(method, url)
            assert response.status_code == 401, (method, url, response.text)
            assert ours(response.json())["code"] == "unauthorized"
            closed += 1
    assert closed >= 30


@pytest.mark.parametrize("header", ["X-API-Key", "Authorization"])
def test_both_ways_to_send_a_key(house: Any, anonymous: Any, header: str) -> None:
    value = house.key if header == "X-API-Key" else f"Bearer {house.key}"
    assert anonymous.get("/get_server_capabilities", headers={header: value})["supported_models"] == [
        {"model_name": "tinsmith/tiny", "max_context_length": 2048, "trainable": True, "sampleable": True}
    ]


@pytest.mark.parametrize("value", ["tml-wrong", "", "Basic abc", "\xe9\xff"])
def test_other_keys_are_refused(anonymous: Any, value: str) -> None:
    anonymous.get("/get_server_capabilities", 401, headers={"X-API-Key": value.encode("latin-1")})


def test_a_revoked_key_stops_working(api: Any, anonymous: Any) -> None:
    made = api.post("/admin/keys", {"name": "ci", "tenant": "carol"})
    assert made["secret"].startswith("tml-")
    assert made["tenant"] == "carol"
    mine = {"X-API-Key": made["secret"]}
    anonymous.get("/sessions", headers=mine)
    listed = api.get("/admin/keys")["keys"]
    assert "secret" not in listed[-1]
    assert made["key_id"] in [key["key_id"] for key in listed]
    assert api.call("DELETE", f"/admin/keys/{made['key_id']}", 200)["revoked_at"]
    time.sleep(1.05)
    anonymous.get("/sessions", 401, headers=mine)
    api.call("DELETE", "/admin/keys/nothing", 404)


def test_admin_routes_need_an_admin_key(other: Any) -> None:
    assert other.get("/admin/keys", 403)["code"] == "forbidden"
    other.post("/admin/keys", {"name": "x"}, 403)


def test_a_foreign_object_answers_like_an_absent_one(api: Any, other: Any, worker: Any) -> None:
    session = api.session()
    promise = api.create(session)
    run_id = promise["model_id"]
    worker.step()
    api.post(
        "/create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinsmith/tiny"}
    )
    saved = api.post("/save_weights", {"model_id": run_id, "seq_id": 1, "path": "a"})
    worker.step()
    path = api.result(saved)["path"]

    def answers(who: Any, session_id: str, run: str, sampler: str, request: str, ckpt: str) -> list[tuple[int, Any]]:
        calls = [
            ("GET", f"/sessions/{session_id}", None),
            ("POST", "/session_heartbeat", {"session_id": session_id}),
            ("POST", f"/sessions/{session_id}/finish", {"reason": {"type": "success"}}),
            ("POST", "/create_model", {"session_id": session_id, "model_seq_id": 1, "base_model": "tinsmith/tiny"}),
            ("POST", "/get_info", {"model_id": run}),
            ("POST", "/optim_step", {"model_id": run, "seq_id": 2, "adam_params": {}}),
            ("POST", "/save_weights", {"model_id": run, "seq_id": 2, "path": "x"}),
            ("GET", f"/training_runs/{run}", None),
            ("GET", f"/training_runs/{run}/checkpoints", None),
            ("DELETE", f"/training_runs/{run}/checkpoints/weights/a", None),
            ("PUT", f"/training_runs/{run}/checkpoints/weights/a/ttl", {"ttl_seconds": 5}),
            ("GET", f"/samplers/{sampler}", None),
            ("POST", "/asample", {"sampling_session_id": sampler, "seq_id": 0}),
            ("POST", "/weights_info", {"tinker_path": ckpt}),
            ("POST", "/retrieve_future", {"request_id": request}),
        ]
        made = []
        for method, url, body in calls:
            response = (
                who.raw(method, f"/api/v1{url}", json=body) if body is not None else who.raw(method, f"/api/v1{url}")
            )
            text = response.text
            for own in (ckpt, run, sampler, session_id, request):
                text = text.replace(own, "ID")
            made.append((response.status_code, text))
        return made

    foreign = answers(other, session, run_id, f"{session}:sample:0", promise["request_id"], path)
    absent = answers(other, "s0", "s0:train:0", "s0:sample:0", "req-0", "tinker://s0:train:0/weights/a")
    assert foreign == absent
    assert {status for status, _ in foreign} <= {404, 410}
    assert other.get("/training_runs")["training_runs"] == []
    assert other.get("/checkpoints")["checkpoints"] == []
    assert other.get("/sessions")["sessions"] == []


def test_errors_have_one_shape(api: Any) -> None:
    cases = [
        ("GET", "/api/v1/nothing", {}, 404),
        ("GET", "/nothing", {}, 404),
        ("PUT", "/api/v1/create_session", {}, 405),
        ("POST", "/api/v1/create_session", {"content": b"{"}, 400),
        ("POST", "/api/v1/session_heartbeat", {"json": {}}, 400),
        ("GET", "/api/v1/checkpoints?limit=x", {}, 400),
        ("GET", "/api/v1/checkpoints?limit=100000", {}, 400),
        ("POST", "/api/v1/optim_step", {"content": b"nonsense"}, 400),
        ("POST", "/api/v1/optim_step", {"json": {"model_id": "r", "seq_id": 0}}, 400),
        ("POST", "/api/v1/forward_backward", {"content": b"nonsense"}, 400),
        ("POST", "/api/v1/weights_info", {"json": {"tinker_path": "x"}}, 400),
        ("PUT", "/api/v1/training_runs/r/checkpoints/other/n/ttl", {"json": {"ttl_seconds": 9}}, 400),
    ]
    for method, url, options, status in cases:
        response = api.raw(method, url, **options)
        assert response.status_code == status, (method, url, response.text)
        assert set(response.json()) == {"detail", "code", "category"}, response.text
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-request-id"]


def test_a_bug_answers_500_without_a_traceback(api: Any, house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(house.store.sessions, "list", fail)
    response = api.raw("GET", "/api/v1/sessions", headers={"X-Request-Id": "my-id"})
    assert response.status_code == 500
    assert response.json() == {
        "detail": "internal error; the server's log has the details under request id my-id",
        "code": "internal",
        "category": "server",
    }
    assert response.headers["x-request-id"] == "my-id"


def test_healthz_names_what_is_missing(house: Any, anonymous: Any) -> None:
    assert anonymous.get("/healthz") == {"status": "ok"}
    house.ready.clear()
    assert "tinsmith/tiny" in anonymous.get("/healthz", 503)["detail"]


def test_healthz_names_a_supervisor_that_gives_no_sign_of_life(house: Any, anonymous: Any) -> None:
    """What is served is served still: only who asks for it is told 503."""
    with contextlib.closing(Heart()) as heart:
        object.__setattr__(house.services, "supervisor", Ear(heart.inherited_fd, 60.0))
        assert anonymous.get("/healthz?supervised=true") == {"status": "ok"}
        object.__setattr__(house.services, "supervisor", Ear(heart.inherited_fd, 0.0))
        (warning,) = anonymous.get("/healthz")["warnings"]
        assert "no sign of life" in warning
        assert "no sign of life" in anonymous.get("/healthz?supervised=true", 503)["detail"]
        house.ready.clear()
        assert "tinsmith/tiny; the supervisor" in anonymous.get("/healthz", 503)["detail"]


def test_the_openapi_schema_lists_every_route(anonymous: Any) -> None:
    paths = anonymous.raw("GET", "/schema/openapi.json").json()["paths"]
    assert "/api/v1/forward_backward" in paths
    assert "/api/v1/admin/keys" in paths
    assert anonymous.raw("GET", "/schema").status_code == 200


def test_tokenizer_files_as_the_hub_serves_them(anonymous: Any) -> None:
    url = "/hf/tinsmith/tiny/resolve/main/tokenizer_config.json"
    got, head = anonymous.raw("GET", url), anonymous.raw("HEAD", url)
    assert got.status_code == head.status_code == 200
    for name in ("etag", "x-repo-commit", "content-length"):
        assert got.headers[name] == head.headers[name]
    assert int(got.headers["content-length"]) == len(got.content)
    info = anonymous.raw("GET", "/hf/api/models/tinsmith/tiny").json()
    files = [entry["rfilename"] for entry in info["siblings"]]
    assert info["sha"] == got.headers["x-repo-commit"]
    assert "tokenizer.json" in files
    assert not any("safetensors" in file for file in files)


@pytest.mark.parametrize(
    "path",
    [
        "/hf/tinsmith/tiny/resolve/main/model.safetensors",
        "/hf/tinsmith/tiny/resolve/main/../../../../../../etc/passwd",
        "/hf/tinsmith/tiny/resolve/main/%2e%2e/config.json",
        "/hf/tinsmith/tiny/resolve/main//etc/passwd",
        "/hf/tinsmith/other/resolve/main/config.json",
        "/hf/tinsmith",
    ],
)
def test_nothing_else_is_served(anonymous: Any, path: str) -> None:
    response = anonymous.raw("GET", path)
    assert response.status_code == 404, response.text


def test_tokenizers_can_be_closed(make_house: Any) -> None:
    house = make_house(serve_tokenizers=False)
    with TestClient(build_app(house.services)) as client:
        assert client.get("/hf/tinsmith/tiny/resolve/main/tokenizer.json").status_code == 404


def test_the_api_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, tinsmith.api.app, tinsmith.api.main;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_reference_page_asks_nobody_else(anonymous: Any) -> None:
    page = anonymous.raw("GET", "/schema").text
    assert "https://" not in page
    for name in ("swagger-ui-bundle.js", "swagger-ui-standalone-preset.js", "swagger-ui.css"):
        assert f"/schema/assets/{name}" in page
        assert anonymous.raw("GET", f"/schema/assets/{name}").status_code == 200
    assert anonymous.raw("GET", "/schema/assets/index.html").status_code == 404


def test_the_openapi_document_says_where_a_key_goes(anonymous: Any) -> None:
    document = anonymous.raw("GET", "/schema/openapi.json").json()
    assert document["components"]["securitySchemes"].keys() == {"key", "bearer"}
    paths = document["paths"]
    assert paths["/api/v1/asample"]["post"]["security"] == [{"key": []}, {"bearer": []}]
    assert "security" not in paths["/api/v1/healthz"]["get"]

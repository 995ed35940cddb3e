"""Every error of every family of routes: in the family's shape, with a stable code that the page of errors lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.routes import closed_routes, concrete
from tests.contract.standing import standing
from tests.docs.test_errors_page import rows
from tinsmith.errors import CapacityError, CorruptError

BASE = "tinsmith/tiny"
MIB = 2**20
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "errors.md"
USER = {"role": "user", "content": "Hi"}
ASK = {
    "/oai/api/v1/chat/completions": {"model": BASE, "messages": [USER]},
    "/oai/api/v1/completions": {"model": BASE, "prompt": "Hi"},
    "/anthropic/api/v1/messages": {"model": BASE, "messages": [USER], "max_tokens": 5},
    "/anthropic/api/v1/messages/count_tokens": {"model": BASE, "messages": [USER]},
}
ANTHROPIC_TYPES = {
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "request_too_large",
    "rate_limit_error", "api_error",
}  # fmt: skip


def openai_names() -> set[str]:
    """What errors.md says that OpenAI's clients get in place of a code."""
    (line,) = [line for line in PAGE.read_text().splitlines() if "names of their own" in line]
    return set(re.findall(r"`(\w+)`", line.partition("names of their own")[2]))


def code_of(path: str, answer: Any, status: int) -> str:
    """The stable code of an error answer; its shape is that of its family."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert "Traceback" not in answer.text
    problem = answer.json()
    if path.startswith("/oai/"):
        assert set(problem) == {"error"}
        assert set(problem["error"]) == {"message", "type", "param", "code"}
        code, message = problem["error"]["code"], problem["error"]["message"]
    elif path.startswith("/anthropic/"):
        assert set(problem) == {"type", "error", "request_id"}
        assert set(problem["error"]) == {"type", "message", "code"}
        assert problem["error"]["type"] in ANTHROPIC_TYPES
        code, message = problem["error"]["code"], problem["error"]["message"]
    else:
        extra = {"error"} if path.startswith("/hf/") and "error" in problem else set()
        assert set(problem) == {"detail", "code", "category"} | extra
        code, message = problem["code"], problem["detail"]
    assert message
    if path.startswith("/oai/") and code in openai_names():
        return str(code)
    category, where = rows()[code]
    assert str(status) in where, f"the page says that {code} comes with {where}"
    assert problem.get("category", category) == category
    return str(code)


@pytest.fixture(scope="module")
def send(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[str, httpx.Response]]]:
    """Sends a request for a route as alice, or with the given key; (the path it went to, its answer)."""
    with (
        standing(tmp_path_factory.mktemp("codes"), max_body_bytes=8 * MIB) as (house, url),
        httpx.Client(base_url=url) as http,
    ):
        keys = {"alice": house.key, "bob": house.other_key, "wrong": "tml-wrong"}

        def call(route: str, by: str | None = "alice", method: str | None = None, **options: Any) -> Any:
            own_method, path = concrete(route)
            path = path if path.startswith(("/oai/", "/anthropic/")) else f"/api/v1{path}"
            headers = {} if by is None else {"X-API-Key": keys[by]}
            return path, http.request(method or own_method, path, headers=headers, **options)

        yield call


@pytest.mark.parametrize("route", closed_routes())
def test_every_route(send: Callable[..., Any], route: str) -> None:
    """No key, a wrong one, one that isn't an administrator's; another method; a body that is none, one too large."""
    expected = "invalid_api_key" if " /oai/" in route else "unauthorized"
    assert code_of(*send(route, by=None), 401) == expected
    assert code_of(*send(route, by="wrong"), 401) == expected
    if "/admin/" in route:
        assert code_of(*send(route, by="bob"), 403) == "forbidden"
    assert code_of(*send(route, method="PATCH"), 405) == "method_not_allowed"
    if route.startswith(("POST", "PUT")) and not route.endswith(("/telemetry", "/auth/token", "/publish")):
        assert code_of(*send(route, content=b"junk"), 400) == "invalid_request"
        if route != "POST /import_weights":  # takes what a base's largest adapter may need
            assert code_of(*send(route, content=bytes(8 * MIB + 1)), 413) == "too_large"


@pytest.mark.parametrize("path", ["/api/v1/nothing", "/oai/api/v1/nothing", "/anthropic/api/v1/nothing", "/nothing"])
def test_what_is_not_there(api: Any, path: str) -> None:
    assert code_of(path, api.raw("GET", path), 404) == "not_found"


@pytest.mark.parametrize(
    "path", ["nobody/model/resolve/main/x", f"{BASE}/resolve/main/model.safetensors", "api/models/x"]
)
def test_the_hub(api: Any, path: str) -> None:
    assert code_of(f"/hf/{path}", api.raw("GET", f"/hf/{path}"), 404) == "not_found"
    assert code_of(f"/hf/{path}", api.raw("POST", f"/hf/{path}"), 405) == "method_not_allowed"


def test_links(api: Any) -> None:
    place = "/api/v1/downloads/s1:train:0/weights/x/archive.tar"
    assert code_of(place, api.raw("GET", place), 404) == "not_found"
    bad = f"{place}?expires=9&key=k&version=x&signature=y"
    assert code_of(bad, api.raw("GET", bad), 403) == "forbidden"
    trace = "/api/v1/traces/s1.pftrace?key=k&expires=9&signature=y"
    assert code_of(trace, api.raw("GET", trace), 403) == "forbidden"


@pytest.mark.parametrize("path", ASK)
def test_models_fields_and_values(api: Any, path: str) -> None:
    def ask(status: int, **changes: Any) -> str:
        return code_of(path, api.raw("POST", path, json={**ASK[path], **changes}), status)

    assert ask(404, model="nobody/model") == ("model_not_found" if path.startswith("/oai/") else "not_found")
    assert ask(400, nonsense=1) == "invalid_request"
    assert ask(400, metadata={"a": "b"}) == "unsupported"
    if not path.endswith("/count_tokens"):
        assert ask(400, max_tokens=0) == "invalid_request"
        assert ask(400, max_tokens=5000) == (
            "context_length_exceeded" if path.startswith("/oai/") else "invalid_request"
        )


@pytest.mark.parametrize("path", ["/api/v1/sessions", "/oai/api/v1/completions", "/anthropic/api/v1/messages"])
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (KeyError("x"), 500, "internal"),
        (CorruptError("a file"), 500, "corrupt"),
        (CapacityError("busy"), 429, "capacity"),
    ],
    ids=["bug", "damage", "no room"],
)
def test_faults(
    house: Any, api: Any, monkeypatch: pytest.MonkeyPatch, path: str, fault: Exception, status: int, code: str
) -> None:
    def fail(*args: Any) -> Any:
        raise fault

    assert api.raw("GET", "/api/v1/sessions").status_code == 200  # the key is known from now on
    monkeypatch.setattr(type(house.services), "work", fail)
    answer = api.raw("POST", path, json=ASK[path]) if path in ASK else api.raw("GET", path)
    assert code_of(path, answer, status) == code


def test_a_finished_session_and_an_old_future(api: Any, house: Any) -> None:
    session = api.session()
    api.post(f"/sessions/{session}/finish", {})
    for path, body in (
        ("/api/v1/session_heartbeat", {"session_id": session}),
        ("/api/v1/retrieve_future", {"request_id": "req-x"}),
    ):
        assert code_of(path, api.raw("POST", path, json=body), 410) == "gone"


def test_a_base_that_is_being_loaded(api: Any, house: Any) -> None:
    house.ready.clear()
    assert code_of("/api/v1/healthz", api.raw("GET", "/api/v1/healthz"), 503) == "capacity"

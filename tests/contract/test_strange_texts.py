"""Texts that databases, paths and encodings stumble over, in every place of every request: answered, never a fault.

By default each place gets the worst of them and a few of the others, the next place the next few; with
`TINSMITH_TEST_EXAMPLES` (`make fuzz`) all.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from litestar.testing import TestClient

from tests.contract.conftest import Api, House
from tests.contract.depth import DEEPER
from tests.contract.routes import Ids, Probe, closed_routes, concrete, probes
from tinsmith.api.app import ANTHROPIC, OPENAI, build_app, with_edge
from tinsmith.config import Settings
from tinsmith.scopes import Scope

WORST = ("\0", "\ud800")
OTHERS = ("a\0b", "x\udfffy", "\ufeff", "\uffff\U0010ffff", "%00", "'\"\\", "$.a[0]", "\x7f\x1b[0m")
WORST_IN_PATHS = ("%00", "%ed%a0%80")
OTHERS_IN_PATHS = ("a%00b", "%ff", "%F4%8F%BF%BF", "%22%5C", "*")
NUM_OTHERS = 2
MORE: dict[str, list[dict[str, Any]]] = {
    "POST /create_session": [
        {"display_name": "a", "project_id": "a", "tags": ["a"], "sdk_version": "a", "user_metadata": {"a": "a"}}
    ],
    "POST /sessions/{session_id:str}/finish": [{"detail": "a", "reason": {"type": "success"}}],
    "POST /sessions/search": [
        {"display_name": "a", "session_id": "a", "project_ids": ["a"], "user_metadata": {"a": "a"}},
        {"owner": {"type": "user", "owner_urns": ["a"]}},
        {"cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": "a"}},
    ],
    "POST /asample": [
        {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 1, "stop": ["a"]}},
        {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"json_schema": '{"enum": ["a"], "a": 1}'}},
    ],
    "POST /save_weights_external": [{"path": "a", "age_encryption_recipients": ["ssh-rsa a", "age1a", "a"]}],
    "POST /save_weights": [{"path": "a", "user_metadata": {"a": "a"}}],
    "POST /copy_weights": [{"source_path": "a", "destination_project_id": "a", "weights_access_token": "tmlw-a"}],
    "POST /load_weights": [{"path": "tinker://a/weights/a", "weights_access_token": "a", "base_model": "a"}],
    "POST /oai/api/v1/chat/completions": [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": "a",
                    "reasoning_content": "a",
                    "tool_calls": [{"id": "a", "function": {"name": "a", "arguments": '{"a": "a"}'}}],
                },
                {"role": "tool", "content": "a", "tool_call_id": "a"},
            ],
            "tools": [{"type": "function", "function": {"name": "a", "description": "a", "parameters": {"a": "a"}}}],
        },
        {"chat_template_kwargs": {"enable_thinking": "a"}, "stop": ["a"]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["a"]}}}},
    ],
    "POST /oai/api/v1/completions": [{"prompt": "a", "stop": "a"}],
    "POST /anthropic/api/v1/messages": [
        {"system": "a", "stop_sequences": ["a"]},
        {"tools": [{"name": "a", "description": "a", "input_schema": {"a": "a"}}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "a"}]}]},
    ],
    "POST /admin/keys": [{"name": "a", "tenant": "a"}],
    "POST /admin/weights": [{"tenant": "a", "weight": 1}],
    "POST /auth/token": [{"a": "a"}],
    "POST /telemetry": [{"events": [{"a": "a"}]}],
    "POST /client/config": [{"sdk_version": "a"}],
}  # fmt: skip


def spoiled(value: Any, text: str) -> Iterator[Any]:
    """The value with the text in each place of a text or a key, one at a time; also within JSON that is a text."""
    if isinstance(value, str):
        yield text
        yield f"{value}{text}"
        if value.startswith("{"):
            for inner in spoiled(json.loads(value), text):
                yield json.dumps(inner)
                yield json.dumps(inner, ensure_ascii=False)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            for inner in spoiled(item, text):
                yield [*value[:i], inner, *value[i + 1 :]]
    elif isinstance(value, dict):
        for key, item in value.items():
            for inner in spoiled(item, text):
                yield {**value, key: inner}
            yield {**{name: other for name, other in value.items() if name != key}, key + text: item}


def gets(text: str, place: int, others: tuple[str, ...]) -> bool:
    """Whether the text is tried in the place of this number."""
    is_due = text not in others or (others.index(text) - NUM_OTHERS * place) % len(others) < NUM_OTHERS
    return is_due or DEEPER is not None


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("strange")
    settings = Settings(data_dir=root / "data", poll_hold_s=0.3, scan_interval_s=0.1, min_ttl_s=1, answer_hold_s=0.0)
    with closing(House(root, settings)) as made:
        yield made


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[TestClient[Any]]:
    with TestClient(with_edge(build_app(house.services)), raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def api(house: House, client: TestClient[Any]) -> Api:
    """Of an administrator whose tenant is the test's own."""
    tenant = house.store.tenants.create(f"tenant {uuid.uuid4()}")
    return Api(client, house.store.tenants.create_key(tenant.tenant_id, "laptop", scope=Scope.ADMIN)[1])


@pytest.fixture
def mine(api: Any) -> Ids:
    session = api.session()
    run = api.create(session)["model_id"]
    place = f"tinker://{run}"
    made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tinsmith/tiny"}
    sampler = api.post("/create_sampling_session", made)["sampling_session_id"]
    return Ids(session, run, sampler, "req-0", "req-1", f"{place}/weights/a", f"{place}/sampler_weights/a")


def places(route: str, mine: Ids) -> list[Probe]:
    known = [probe for probe in probes(mine, mine)[route] if probe.json is not None]
    method, path = concrete(route)
    base = known[0].json if known else {}
    path = known[0].path if known else path
    if "/oai/" in route or "/anthropic/" in route:
        base = {**base, "model": "tinsmith/tiny"}
    return [*known, *(Probe(method, path, {**base, **more}) for more in MORE.get(route, []))]


@pytest.mark.parametrize("route", [route for route in closed_routes() if not route.startswith("GET")])
def test_strange_texts_are_no_fault(api: Any, mine: Ids, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.api.texts.asking.TICK_S", 0.01)
    prefix = "" if "/oai/" in route or "/anthropic/" in route else "/api/v1"
    for probe in places(route, mine):
        for text in (*WORST, *OTHERS):
            for place, body in enumerate(spoiled(probe.json, text)):
                if not gets(text, place, OTHERS):
                    continue
                content = json.dumps(body, ensure_ascii="\ud800" <= text[0] <= "\udfff" or "\udfff" in text)
                data = content.encode("utf-8", "surrogatepass")
                answer = api.raw(
                    probe.method, f"{prefix}{probe.path}", content=data, headers={"content-type": "application/json"}
                )
                assert answer.status_code < 500, (body, answer.text)


@pytest.mark.parametrize("route", [route for route in closed_routes() if route != "DELETE /auth/apikey/me"])
def test_strange_paths_are_no_fault(api: Any, route: str) -> None:
    prefix = "" if "/oai/" in route or "/anthropic/" in route else "/api/v1"
    method, path = concrete(route)
    queries = ("limit", "offset", "project_id", "access_scope", "day", "event_type", "starting_on", "ending_before")
    for text in (*WORST_IN_PATHS, *OTHERS_IN_PATHS):
        answer = api.raw(method, prefix + path.replace("/x", f"/{text}"))
        assert answer.status_code < 500 or "is being loaded" in answer.text, (text, answer.text)
        for place, name in enumerate(queries):
            if not gets(text, place, OTHERS_IN_PATHS):
                continue
            answer = api.raw(method, f"{prefix}{path}?{name}={text}")
            assert answer.status_code < 500 or "is being loaded" in answer.text, (name, text, answer.text)


def test_the_compatible_routes_are_among_them() -> None:
    assert len(OPENAI) + len(ANTHROPIC) == sum("/oai/" in route or "/anthropic/" in route for route in closed_routes())

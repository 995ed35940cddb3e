"""Texts that databases, paths and encodings stumble over, in every place of every request: answered, never a fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contract.routes import Ids, Probe, closed_routes, concrete, probes
from tinsmith.api.app import ANTHROPIC, OPENAI

STRANGE = ("\0", "a\0b", "\ud800", "x\udfffy", "\ufeff", "\uffff\U0010ffff", "%00", "'\"\\", "$.a[0]", "\x7f\x1b[0m")
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
def test_strange_texts_are_no_fault(
    api: Any, house: Any, mine: Ids, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.api.texts.asking.TICK_S", 0.01)
    object.__setattr__(house.settings, "answer_hold_s", 0.0)
    prefix = "" if "/oai/" in route or "/anthropic/" in route else "/api/v1"
    for probe in places(route, mine):
        for text in STRANGE:
            for body in spoiled(probe.json, text):
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
    for text in ("%00", "a%00b", "%ff", "%ed%a0%80", "%F4%8F%BF%BF", "%22%5C", "*"):
        answer = api.raw(method, prefix + path.replace("/x", f"/{text}"))
        assert answer.status_code < 500 or "is being loaded" in answer.text, (text, answer.text)
        for name in queries:
            answer = api.raw(method, f"{prefix}{path}?{name}={text}")
            assert answer.status_code < 500 or "is being loaded" in answer.text, (name, text, answer.text)


def test_the_compatible_routes_are_among_them() -> None:
    assert len(OPENAI) + len(ANTHROPIC) == sum("/oai/" in route or "/anthropic/" in route for route in closed_routes())

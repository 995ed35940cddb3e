"""What the OpenAI- and Anthropic-compatible endpoints refuse: by name, in the shape of each, fast, without a worker."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import zstandard
from anthropic.types import MessageCountTokensParams, MessageCreateParams
from openai.types import CompletionCreateParams
from openai.types.chat import CompletionCreateParams as ChatParams

from tests.contract.routes import closed_routes, concrete
from tinsmith.api.anthropic import body as anthropic_body
from tinsmith.api.oai import fields as openai_fields
from tinsmith.api.oai.chat import ChatBody
from tinsmith.api.oai.completions import CompletionBody

BASE = "tinsmith/tiny"
CHAT = "/oai/api/v1/chat/completions"
TEXT = "/oai/api/v1/completions"
MESSAGES = "/anthropic/api/v1/messages"
COUNT = "/anthropic/api/v1/messages/count_tokens"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ADD = {"name": "f", "input_schema": {}}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": BASE, "messages": [USER]},
    TEXT: {"model": BASE, "prompt": "Hi"},
    MESSAGES: {"model": BASE, "messages": [USER], "max_tokens": 5},
    COUNT: {"model": BASE, "messages": [USER]},
}
WITHIN_S = 1.0


def refuse(api: Any, path: str, status: int = 400, **options: Any) -> dict[str, Any]:
    """The error's fields; checks its shape and that it came fast, at the second time of asking on a busy machine."""
    started = time.monotonic()
    response = api.raw("POST", path, **options)
    if status < 500 and time.monotonic() - started > WITHIN_S:
        started = time.monotonic()
        response = api.raw("POST", path, **options)
        assert time.monotonic() - started < WITHIN_S
    assert response.status_code == status, response.text
    body = response.json()
    if path.startswith("/oai/"):
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    else:
        assert set(body) == {"type", "error", "request_id"}
        assert body["type"] == "error"
        assert body["request_id"] == response.headers["x-request-id"]
        assert set(body["error"]) == {"type", "message", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


def changed(path: str, **changes: Any) -> dict[str, Any]:
    return {**GOOD[path], **changes}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_openai_fields_that_are_not_offered(api: Any, path: str) -> None:
    for name in openai_fields.UNOFFERED:
        error = refuse(api, path, json=changed(path, **{name: "something"}))
        assert (error["param"], error["code"]) == (name, "unsupported")
        assert name in error["message"]


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_anthropic_fields_that_are_not_offered(api: Any, path: str) -> None:
    for name in anthropic_body.UNOFFERED:
        error = refuse(api, path, json=changed(path, **{name: "something"}))
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(f"{name} is not offered here")


def test_every_field_of_the_official_clients_is_known() -> None:
    """A field that a client can send is served or refused by name, not taken for a mistake."""

    def names(union: Any) -> set[str]:
        kinds = getattr(union, "__args__", (union,))
        return {name for kind in kinds for name in kind.__annotations__} | {
            name for kind in kinds for base in kind.__orig_bases__ for name in getattr(base, "__annotations__", {})
        }

    assert {"messages", "stream"} <= names(ChatParams) & names(MessageCreateParams)
    openai_known = set(openai_fields.UNOFFERED)
    assert names(ChatParams) <= openai_known | set(ChatBody.__struct_fields__)
    assert names(CompletionCreateParams) <= openai_known | set(CompletionBody.__struct_fields__)
    known = set(anthropic_body.UNOFFERED) | set(anthropic_body.MessagesBody.__struct_fields__)
    assert names(MessageCreateParams) <= known
    assert names(MessageCountTokensParams) <= known


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


NO_SWITCHES = (
    "self",
    "tools",
    "documents",
    "add_generation_prompt",
    "range",
    "namespace",
    "raise_exception",
    "eos_token",
)
BAD: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"nonsense": 1}, "nonsense: there is no such field"),
    (CHAT, {"messages": []}, "messages: empty"),
    (CHAT, {"messages": "Hi"}, "messages: Expected `array`"),
    (CHAT, {"messages": None}, "missing required field `messages`"),
    (CHAT, {"messages": ["Hi"]}, r"messages[0].role: must be one of"),
    (CHAT, {"messages": [{"role": "robot", "content": ""}]}, "not 'robot'"),
    (CHAT, {"messages": [{"role": "user"}]}, r"messages[0].content: is missing"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, r"messages[0].content: must be a string"),
    (CHAT, {"messages": [{**USER, "weight": 1}]}, r"messages[0].weight: there is no such field"),
    (CHAT, {"messages": [{**USER, "audio": {"id": "x"}}]}, r"messages[0].audio is not offered"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url' is not offered"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "tool_calls[0].function.arguments: must be a JSON object",
    ),
    *(
        (
            CHAT,
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": wrong}}]},
                    USER,
                ]
            },
            "tool_calls[0].function.arguments: must be a JSON object",
        )
        for wrong in (r'{"a": "\ud800"}', r'{"\ud800": 1}', '{"a": NaN}', '{"a": ' * 5000)
    ),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format is text, json_object or json_schema"),
    (CHAT, {"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format beside tools"),
    (CHAT, {"response_format": schema({"not": {}})}, '["not"]'),
    (CHAT, {"response_format": schema({"type": "nope"})}, "json_schema: can't be held to (Invalid type"),
    (CHAT, {"response_format": schema({"$ref": "http://127.0.0.1:1/x"})}, "json_schema: can't be held to"),
    (CHAT, {"response_format": schema({"x-guidance": {"lenient": True}})}, "x-guidance is not offered"),
    (CHAT, {"response_format": schema({"enum": ["x" * 70_000]})}, "at most 65536"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema.schema: must be an object"),
    (TEXT, {"response_format": {"type": "json_object"}}, "ask for chat completions"),
    (MESSAGES, {"output_config": {"effort": "high"}}, "output_config is not offered here but for"),
    (CHAT, {"tools": [{"type": "web_search"}]}, r"tools[0] of type 'web_search' is not offered"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "function.strict is not"),
    (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "tool_choice other than auto and none"),
    (CHAT, {"tools": [TOOL], "tool_choice": TOOL}, "tool_choice other than auto and none"),
    *(
        (CHAT, {"tool_choice": choice}, "tool_choice other than auto and none")
        for choice in ("required", "x", 5, {}, TOOL)
    ),
    (CHAT, {"tool_choice": "auto"}, "tool_choice: needs tools"),
    (CHAT, {"tools": [], "tool_choice": "auto"}, "tool_choice: needs tools"),
    (CHAT, {"tools": [{"type": "function"}], "tool_choice": "none"}, r"tools[0].function: must be an object"),
    (CHAT, {"tools": [TOOL], "tool_choice": ["none"]}, "tool_choice other than auto and none"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs: needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs: must lie in 0..20"),
    (CHAT, {"logprobs": 3}, "logprobs: Expected `bool`"),
    (CHAT, {"n": 0}, "n: at most"),
    (CHAT, {"n": 100_000}, "n: at most 1024"),
    (CHAT, {"seed": -1}, "seed: must lie in"),
    (CHAT, {"seed": 2**70}, "seed"),
    (CHAT, {"temperature": -1}, "temperature: must be"),
    (CHAT, {"top_p": 1.5}, "top_p: must lie"),
    (CHAT, {"min_p": 2}, "min_p: must lie in 0..1"),
    (CHAT, {"presence_penalty": 3}, "presence_penalty: must lie in -2..2"),
    (CHAT, {"max_tokens": 0}, "max_tokens: must be at least 1"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens: is another name"),
    (CHAT, {"stop": ["a"] * 65}, "stop: at most 64"),
    (CHAT, {"stop": [""]}, "stop: holds an empty string"),
    (CHAT, {"stop": "x" * 257, "stream": True}, "stop: holds a string of 257 characters"),
    (TEXT, {"stop": ["x" * 8000] * 64}, "stop: holds a string of 8000 characters"),
    (MESSAGES, {"stop_sequences": ["x" * 257]}, "a string of 257 characters"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options: needs stream"),
    (CHAT, {"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
    (CHAT, {"chat_template_kwargs": {"messages": "x"}}, "'messages' can't be set"),
    *((CHAT, {"chat_template_kwargs": {name: "x"}}, f"'{name}' can't be set here") for name in NO_SWITCHES),
    (CHAT, {"chat_template_kwargs": {"enable_thinkin": False}}, "the chat template of tinsmith/tiny has: enable_think"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": {}}}, "'enable_thinking' must be a string"),
    (CHAT, {"messages": [{**USER, "name": "anna"}]}, r"messages[0].name is not offered for tinsmith/tiny"),
    (CHAT, {"messages": [USER, {"role": "tool", "content": "5", "name": "f"}]}, r"messages[1].name is not offered"),
    (TEXT, {"prompt": ""}, "prompt: is empty"),
    (TEXT, {"prompt": []}, "prompt: give 1 to 64 prompts"),
    (TEXT, {"prompt": ["a", 5]}, r"prompt[1]: must be a text"),
    (TEXT, {"prompt": [5, "a"]}, "prompt: must be a text"),
    (TEXT, {"prompt": [5, 2**40]}, "prompt: token ids must lie within"),
    (TEXT, {"prompt": [5000]}, "prompt: tokens must lie in 0..1023"),
    (TEXT, {"logprobs": 21}, "logprobs: must lie"),
    (MESSAGES, {"max_tokens": None}, "missing required field `max_tokens`"),
    (MESSAGES, {"messages": [{"role": "system", "content": "x"}]}, "must be user or assistant"),
    (MESSAGES, {"messages": [{"role": "user", "content": []}]}, "must be a string or a list of content blocks"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image' is not offered"),
    (MESSAGES, {"system": [{"type": "text", "text": "x", "cache_control": {}}]}, "system[0].cache_control is not"),
    (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking other than disabled"),
    (MESSAGES, {"tool_choice": {"type": "any"}, "tools": [ADD]}, "tool_choice other than auto"),
    *(
        (MESSAGES, {"tool_choice": choice}, "tool_choice other than auto")
        for choice in ({"type": "any"}, "auto", {}, [])
    ),
    (COUNT, {"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice other than auto"),
    (MESSAGES, {"tool_choice": {"type": "auto"}}, "tool_choice: needs tools"),
    (COUNT, {"tool_choice": {"type": "none"}, "tools": [{"name": "f"}]}, r"tools[0].input_schema: must be an object"),
    (COUNT, {"output_config": {"effort": "high"}}, "output_config is not offered here but for"),
    (COUNT, {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, '["not"]'),
    (MESSAGES, {"tools": [{"type": "bash_20250124", "name": "bash"}]}, r"tools[0] runs on Anthropic's side"),
    (MESSAGES, {"tools": [{"name": "f"}]}, r"tools[0].input_schema: must be an object"),
    (MESSAGES, {"stop_sequences": "x"}, "stop_sequences: Expected `array`"),
    (COUNT, {"max_tokens": 5}, "max_tokens: there is no such field"),
]


def test_bad_fields(api: Any) -> None:
    for path, changes, words in BAD:
        assert words in refuse(api, path, json=changed(path, **changes))["message"], changes


@pytest.mark.parametrize("path", GOOD)
def test_junk(api: Any, path: str) -> None:
    deep = b'{"a":' * 5_000 + b"1" + b"}" * 5_000
    for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', b"[" * 100_000, deep):
        refuse(api, path, content=content)


@pytest.mark.parametrize("path", GOOD)
def test_deep_and_wide(api: Any, path: str) -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = {"a": deep}
    for name in ("tools", "messages", "tool_choice"):
        refuse(api, path, json=changed(path, **{name: [deep]}))
    if path != TEXT:
        refuse(api, path, json=changed(path, messages=[USER] * 50_000))


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_betas(api: Any, worker: Any, path: str) -> None:
    worker.start()
    for betas in ("mcp-client-2025-11-20", "token-counting-2024-11-01, context-1m-2025-08-07", "x"):
        error = refuse(api, path, json=GOOD[path], headers={"anthropic-beta": betas})
        assert error["message"] == f"anthropic-beta {betas.split(', ')[-1]!r} is not offered here: leave it out"
    for betas in (",".join(anthropic_body.BETAS_WITHOUT_EFFECT), "", "token-counting-2024-11-01"):
        assert api.raw("POST", path, json=GOOD[path], headers={"anthropic-beta": betas}).status_code == 200


def test_prompts_beyond_the_context_are_counted(api: Any) -> None:
    def count(messages: Any) -> int:
        return int(api.raw("POST", COUNT, json=changed(COUNT, messages=messages)).json()["input_tokens"])

    one, two = count([USER]), count([USER, USER])
    assert count([USER] * 3000) == one + 2999 * (two - one) > 2048
    assert count([{"role": "user", "content": "Hi " * 10_000}]) > 10_000
    too_long = changed(COUNT, messages=[{"role": "user", "content": "x" * (1 << 20)}])
    assert "characters" in refuse(api, COUNT, json=too_long)["message"]


def test_without_tools_none_may_be_chosen(api: Any, worker: Any) -> None:
    worker.start()
    assert api.raw("POST", CHAT, json=changed(CHAT, tool_choice="none")).status_code == 200
    assert api.raw("POST", MESSAGES, json=changed(MESSAGES, tool_choice={"type": "none"})).status_code == 200


@pytest.mark.parametrize("path", GOOD)
def test_bombs(api: Any, path: str) -> None:
    bomb = zstandard.compress(json.dumps(changed(path, model="x" * 100_000_000)).encode())
    assert len(bomb) < 20_000
    error = refuse(api, path, 413, content=bomb, headers={"content-encoding": "zstd"})
    assert "8388608 bytes" in error["message"]
    refuse(api, path, 413, content=b" " * 9_000_000)
    refuse(api, path, 400, content=b"{}", headers={"content-encoding": "br"})


def test_templates_get_plain_values(api: Any, worker: Any) -> None:
    """What stands in a message is text to a template, never a template."""
    worker.start()
    message = {"role": "user", "content": "{{ 7 * 7 }}{% for x in range(9**9) %}{% endfor %}"}
    counted = api.raw("POST", COUNT, json=changed(COUNT, messages=[message])).json()["input_tokens"]
    assert counted > 20


def test_unknown_paths_and_methods_have_the_shape_too(api: Any, anonymous: Any) -> None:
    for path in ("/oai/api/v1/nothing", "/anthropic/api/v1/nothing", "/oai/api/v1/responses"):
        assert "there is nothing at" in refuse(api, path, 404, json={})["message"]
    assert refuse(api, "/oai/api/v1/models", 405, json={})["code"] == "method_not_allowed"
    error = refuse(anonymous, MESSAGES, 401, json={})
    assert error["type"] == "authentication_error"


def test_a_fault_of_ours_tells_nothing(api: Any, house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(house.store.sessions, "create", fail)
    assert "secret" not in str(refuse(api, CHAT, 500, json=GOOD[CHAT]))
    assert refuse(api, MESSAGES, 500, json=GOOD[MESSAGES])["type"] == "api_error"


def test_the_tests_of_access_know_these_routes() -> None:
    ours = [route for route in closed_routes() if "/oai/" in route or "/anthropic/" in route]
    assert len(ours) == 6
    assert {concrete(route)[1].split("/")[1] for route in ours} == {"oai", "anthropic"}

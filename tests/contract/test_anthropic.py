"""The official anthropic client: a real server with the shipped model, and given answers from a worker by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.contract.answers import TOKENIZER, Answers
from tests.service import Service
from tinsmith.types import Failure

BASE = "tinsmith/tiny"
USER = {"role": "user", "content": "What is the capital of France?"}
STORY = {"role": "user", "content": "Tell me a story about a fox."}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'


def connect(url: str, key: str, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"{url}/anthropic/api", api_key=key, max_retries=0, **options)


@pytest.fixture(scope="module")
def service(shared_server: Service) -> Service:
    return shared_server


@pytest.fixture
def real(service: Service) -> Iterator[anthropic.Anthropic]:
    with connect(service.url, service.key) as made:
        yield made


@pytest.fixture
def asking(house: Any, live: Any) -> Iterator[anthropic.Anthropic]:
    with connect(live.url, house.key) as made:
        yield made


@pytest.fixture
def answers(house: Any, worker: Any) -> Answers:
    return Answers(house, worker)


def ask(client: anthropic.Anthropic, **options: Any) -> Any:
    """Newer clients know no parameters of sampling; the endpoint does."""
    extra = {name: options.pop(name) for name in ("temperature", "top_p", "top_k") if name in options}
    asked = {"model": BASE, "max_tokens": 50, "messages": [USER], **options}
    return client.messages.create(**asked, extra_body=extra)


def test_a_message_with_exact_usage(real: anthropic.Anthropic) -> None:
    answer = ask(real, temperature=0, system="You are helpful.")
    (block,) = answer.content
    assert (block.type, answer.role, answer.type, answer.model) == ("text", "assistant", "message", BASE)
    assert "Paris" in block.text
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    prompt = TOKENIZER.encode(TOKENIZER.render([{"role": "system", "content": "You are helpful."}, USER]))
    assert answer.usage.input_tokens == len(prompt)
    assert answer.usage.output_tokens == len(TOKENIZER.encode(block.text)) + 1


def test_tokens_are_counted_as_they_are_used(real: anthropic.Anthropic) -> None:
    for extra in ({}, {"system": "Be brief."}, {"tools": [ADD]}, {"thinking": {"type": "disabled"}}):
        counted = real.messages.count_tokens(model=BASE, messages=[USER], **extra).input_tokens
        assert counted == ask(real, max_tokens=1, **extra).usage.input_tokens


def test_a_stream_comes_as_it_is_sampled(real: anthropic.Anthropic) -> None:
    kinds: list[str] = []
    with real.messages.stream(model=BASE, max_tokens=60, messages=[STORY], extra_body={"temperature": 0}) as stream:
        for event in stream:
            kinds.append(event.type)
        streamed = stream.get_final_message()
    whole = ask(real, messages=[STORY], max_tokens=60, temperature=0)
    assert streamed.content[0].text == whole.content[0].text
    assert (streamed.usage.input_tokens, streamed.usage.output_tokens) == (
        whole.usage.input_tokens,
        whole.usage.output_tokens,
    )
    assert streamed.stop_reason == whole.stop_reason
    assert kinds.count("content_block_delta") > 20
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_a_stop_sequence_is_named(real: anthropic.Anthropic) -> None:
    answer = ask(real, temperature=0, stop_sequences=["never", " France"])
    assert answer.content[0].text == "The capital of"
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " France")
    assert ask(real, max_tokens=2).stop_reason == "max_tokens"


def test_an_answer_that_has_begun_is_continued(real: anthropic.Anthropic) -> None:
    answer = ask(real, temperature=0, messages=[USER, {"role": "assistant", "content": "The capital of France"}])
    assert answer.content[0].text == " is Paris."


def test_an_answer_is_held_to_a_schema(real: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"legs": {"type": "integer", "maximum": 9}}, "required": ["legs"]}
    form: Any = {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}}
    answer = ask(real, messages=[STORY], output_config=form)
    assert list(json.loads(answer.content[0].text)) == ["legs"]
    assert answer.stop_reason == "end_turn"


def test_tools(asking: anthropic.Anthropic, answers: Answers) -> None:
    answers.text = f"Let me add.\n{CALL}"
    answer = ask(asking, tools=[ADD], tool_choice={"type": "auto"})
    text, use = answer.content
    assert (text.text, use.type, use.name, use.input) == ("Let me add.", "tool_use", "add", {"a": 2})
    assert answer.stop_reason == "tool_use"
    assert answers.prompt == TOKENIZER.render([USER], tools=[FUNCTION])

    answers.text = "2"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "two"}]}
    failed = {**result, "content": "no", "is_error": True}
    more = [result, failed, {"type": "text", "text": "So?"}]
    messages = [USER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": more}]
    assert ask(asking, tools=[ADD], messages=messages).content[0].text == "2"
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    expected = [
        USER,
        {"role": "assistant", "content": "Let me add.", "tool_calls": [call]},
        {"role": "tool", "content": "two"},
        {"role": "tool", "content": "Error: no"},
        {"role": "user", "content": "So?"},
    ]
    assert answers.prompt == TOKENIZER.render(expected, tools=[FUNCTION])


@pytest.mark.parametrize("size", [1, 5, 100])
def test_tools_in_a_stream(asking: anthropic.Anthropic, answers: Answers, size: int) -> None:
    answers.text = f"Let me add.\n{CALL}\n{CALL}"
    tokens = TOKENIZER.encode(answers.text)
    answers.pieces = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    with asking.messages.stream(model=BASE, max_tokens=50, messages=[USER], tools=[ADD]) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use", "tool_use"]
    assert final.content[0].text == "Let me add."
    assert final.content[2].input == {"a": 2}
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens == len(tokens) + 1


def test_parameters_reach_the_sampler(asking: anthropic.Anthropic, answers: Answers) -> None:
    ask(asking, temperature=0.4, top_p=0.8, top_k=9, stop_sequences=["x"], tool_choice={"type": "none"}, tools=[ADD])
    params = answers.asked[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.stop_strings) == (0.4, 0.8, 9, ("x",))
    assert params.max_tokens == 50
    assert answers.prompt == TOKENIZER.render([USER])


def test_a_failure_in_the_middle_ends_the_stream_with_an_error(asking: anthropic.Anthropic, answers: Answers) -> None:
    answers.pieces = [TOKENIZER.encode("Once")]
    answers.failure = Failure("internal", "server", "the sampler failed")
    stream = ask(asking, stream=True)
    assert [next(stream).type for _ in range(3)] == ["message_start", "content_block_start", "content_block_delta"]
    with pytest.raises(anthropic.APIStatusError, match="the sampler failed"):
        next(stream)


@pytest.mark.parametrize(
    ("category", "kind", "name"),
    [
        ("user", anthropic.BadRequestError, "invalid_request_error"),
        ("server", anthropic.InternalServerError, "api_error"),
        ("capacity", anthropic.RateLimitError, "rate_limit_error"),
    ],
)
def test_a_failed_request(asking: anthropic.Anthropic, answers: Answers, category: str, kind: Any, name: str) -> None:
    answers.failure = Failure("non_finite_logits", category, "the weights diverged")
    with pytest.raises(kind, match="the weights diverged") as caught:
        ask(asking)
    assert caught.value.body["error"]["type"] == name


def test_both_ways_to_send_a_key(house: Any, live: Any, answers: Answers) -> None:
    base = f"{live.url}/anthropic/api"
    with anthropic.Anthropic(base_url=base, auth_token=house.key, api_key=None, max_retries=0) as bearer:
        assert ask(bearer).content[0].text == "Hello."
    with connect(live.url, "tml-wrong") as wrong, pytest.raises(anthropic.AuthenticationError) as caught:
        ask(wrong)
    assert caught.value.body["error"]["type"] == "authentication_error"


def test_models_that_do_not_exist(asking: anthropic.Anthropic) -> None:
    for model in ("claude", "tinker://s0:train:0/sampler_weights/x", "tinker://x"):
        with pytest.raises((anthropic.NotFoundError, anthropic.BadRequestError)) as caught:
            ask(asking, model=model)
        assert caught.value.body["error"]["type"] in ("not_found_error", "invalid_request_error")

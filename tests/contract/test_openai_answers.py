"""What chat completions make of given answers: tool calls, streams, failures. The official client, a worker by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.contract.answers import TOKENIZER, Answers
from tests.service import until
from tinsmith.types import Failure

BASE = "tinsmith/tiny"
USER = {"role": "user", "content": "What is 2 + 3?"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


@pytest.fixture
def asking(house: Any, live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/oai/api/v1", api_key=house.key, max_retries=0) as client:
        yield client


@pytest.fixture
def answers(house: Any, worker: Any) -> Answers:
    return Answers(house, worker)


def ask(asking: openai.OpenAI, **options: Any) -> Any:
    return asking.chat.completions.create(**{"model": BASE, "messages": [USER], **options})


def test_tool_calls_and_their_results(asking: openai.OpenAI, answers: Answers) -> None:
    answers.text = f"Let me add.\n{CALL}\n{CALL}"
    choice = ask(asking, tools=[ADD]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me add."
    first, second = choice.message.tool_calls
    assert first.id != second.id
    assert (first.type, first.function.name) == ("function", "add")
    assert json.loads(first.function.arguments) == {"a": 2, "b": 3}
    assert json.dumps(ADD) in answers.prompt

    answers.text = "5"
    result = {"role": "tool", "tool_call_id": first.id, "content": "five"}
    messages = [USER, choice.message.model_dump(), result]
    assert ask(asking, messages=messages, tools=[ADD]).choices[0].message.content == "5"
    expected = [
        USER,
        {
            "role": "assistant",
            "content": "Let me add.",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}] * 2,
        },
        {"role": "tool", "content": "five"},
    ]
    assert answers.prompt == TOKENIZER.render(expected, tools=[ADD])


@pytest.mark.parametrize("size", [1, 3, 100])
def test_tool_calls_in_a_stream(asking: openai.OpenAI, answers: Answers, size: int) -> None:
    answers.text = f"Let me add.\n{CALL}"
    tokens = TOKENIZER.encode(answers.text)
    answers.pieces = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    content, calls, reasons = "", [], []
    for chunk in ask(asking, tools=[ADD], stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        reasons.append(choice.finish_reason)
    assert content == "Let me add."
    assert [(call.index, call.function.name) for call in calls] == [(0, "add")]
    assert json.loads(calls[0].function.arguments) == {"a": 2, "b": 3}
    assert reasons[-1] == "tool_calls"


def test_calls_are_text_without_tools(asking: openai.OpenAI, answers: Answers) -> None:
    answers.text = CALL
    for options in ({}, {"tools": [ADD], "tool_choice": "none"}):
        choice = ask(asking, **options).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
        assert "add" not in answers.prompt


def test_a_call_alone_has_no_content(asking: openai.OpenAI, answers: Answers) -> None:
    answers.text = CALL
    assert ask(asking, tools=[ADD]).choices[0].message.content is None


def test_pieces_come_before_the_result(asking: openai.OpenAI, answers: Answers) -> None:
    answers.text, answers.pieces = "One two three four", [TOKENIZER.encode("One"), TOKENIZER.encode(" two")]
    deltas = [chunk.choices[0].delta.content for chunk in ask(asking, stream=True)]
    assert deltas[:3] == ["", "One", " two"]
    assert "".join(delta or "" for delta in deltas) == "One two three four"


def test_roles_and_parts(asking: openai.OpenAI, answers: Answers) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        USER,
        {"role": "assistant", "content": "5", "refusal": None},
        {"role": "user", "content": "Sure?"},
    ]
    ask(asking, messages=messages)
    plain = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "5"}]
    assert answers.prompt == TOKENIZER.render([*plain, {"role": "user", "content": "Sure?"}])


def test_parameters_reach_the_sampler(asking: openai.OpenAI, answers: Answers) -> None:
    ask(
        asking, temperature=0.3, top_p=0.9, seed=11, n=2, stop="x", max_tokens=7, logprobs=True, top_logprobs=4,
        extra_body={"top_k": 5, "min_p": 0.1}, frequency_penalty=0.5, presence_penalty=-1,
        parallel_tool_calls=True, response_format={"type": "text"},
    )  # fmt: skip
    asked = answers.asked[-1]
    params = asked.params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.3, 0.9, 5, 7)
    assert (params.min_p, params.frequency_penalty, params.presence_penalty) == (0.1, 0.5, -1)
    assert (params.stop_strings, params.stop_tokens) == (("x",), None)
    assert (asked.seed, asked.num_samples, asked.topk_sample_logprobs) == (11, 2, 4)
    ask(asking)
    assert answers.asked[-1].params.max_tokens is None
    asking.completions.create(model=BASE, prompt="a")
    assert answers.asked[-1].params.max_tokens == 16


def test_requests_are_in_one_session_and_a_sampler_a_model(asking: openai.OpenAI, answers: Answers, house: Any) -> None:
    for _ in range(3):
        ask(asking)
    ((session,), _) = house.store.sessions.list(house.tenant_id, 10, 0)
    _, (sampler,) = house.store.sessions.children(house.tenant_id, session.session_id)
    assert house.store.samplers.get(house.tenant_id, sampler).base_model == BASE
    assert {op.sampler_id for op in answers.ops} == {sampler}
    assert [op.seq_id for op in answers.ops] == [0, 1, 2]


def test_a_session_that_ended_is_replaced(asking: openai.OpenAI, answers: Answers, house: Any) -> None:
    ask(asking)
    ((session,), _) = house.store.sessions.list(house.tenant_id, 10, 0)
    house.store.sessions.finish(house.tenant_id, session.session_id, "success", None, time.time())
    object.__setattr__(house.settings, "session_timeout_s", 0.001)
    assert ask(asking).choices[0].message.content == "Hello."
    assert house.store.sessions.list(house.tenant_id, 10, 0)[1] == 2


@pytest.mark.parametrize(
    ("category", "kind"),
    [("user", openai.BadRequestError), ("server", openai.InternalServerError), ("capacity", openai.RateLimitError)],
)
def test_a_failed_request(asking: openai.OpenAI, answers: Answers, category: str, kind: type[Exception]) -> None:
    answers.failure = Failure("non_finite_logits", category, "the weights diverged")
    for stream in (False, True):
        with pytest.raises(kind, match="the weights diverged"):
            ask(asking, stream=stream)


def test_a_failure_in_the_middle_ends_the_stream_with_an_error(asking: openai.OpenAI, answers: Answers) -> None:
    answers.pieces = [TOKENIZER.encode("Once"), TOKENIZER.encode(" upon")]
    answers.failure = Failure("internal", "server", "the sampler failed")
    stream = ask(asking, stream=True)
    texts = [next(stream).choices[0].delta.content for _ in range(3)]
    assert texts == ["", "Once", " upon"]
    with pytest.raises(openai.APIError, match="the sampler failed") as caught:
        next(stream)
    assert caught.value.code == "internal"


def test_what_was_streamed_is_never_contradicted(asking: openai.OpenAI, answers: Answers) -> None:
    answers.pieces, answers.text = [TOKENIZER.encode("Once")], "Never"
    with pytest.raises(openai.APIError, match="came out otherwise"):
        list(ask(asking, stream=True))


def test_a_wait_has_an_end(asking: openai.OpenAI, house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.api.texts.asking.TICK_S", 0.1)
    object.__setattr__(house.settings, "answer_hold_s", 0.2)
    with pytest.raises(openai.RateLimitError, match="next in the queue") as caught:
        ask(asking)
    assert caught.value.response.headers["retry-after"] == "5"
    with pytest.raises(openai.APIError, match="in the queue"):
        list(ask(asking, stream=True))
    assert house.services.waiters.num_waiting == house.services.pieces.num_followed == 0


def test_a_published_checkpoint_answers_other_tenants(house: Any, live: Any, api: Any, answers: Answers) -> None:
    run = api.create(api.session())["model_id"]
    api.post("/save_weights_for_sampler", {"model_id": run, "seq_id": 1, "path": "shared"})
    path = f"tinker://{run}/sampler_weights/shared"
    until(lambda: house.store.checkpoints.list(house.tenant_id, 1, 0)[1] == 1, 20)
    with openai.OpenAI(base_url=f"{live.url}/oai/api/v1", api_key=house.other_key, max_retries=0) as theirs:
        with pytest.raises(openai.NotFoundError):
            ask(theirs, model=path)
        api.call("POST", f"/training_runs/{run}/checkpoints/sampler_weights/shared/publish", 204)
        assert ask(theirs, model=path).choices[0].message.content == "Hello."
        assert answers.ops[-1].tenant_id != house.tenant_id
        assert theirs.models.retrieve(path).owned_by == "another tenant"
        assert path not in [model.id for model in theirs.models.list()]
        with openai.OpenAI(base_url=f"{live.url}/oai/api/v1", api_key=house.key, max_retries=0) as ours:
            assert ours.models.retrieve(path).owned_by == "alice"
        api.call("DELETE", f"/training_runs/{run}/checkpoints/sampler_weights/shared/publish", 204)
        with pytest.raises(openai.NotFoundError):
            ask(theirs, model=path)


def test_usage_at_the_end_of_a_stream_of_completions(asking: openai.OpenAI, answers: Answers) -> None:
    options = {"model": BASE, "prompt": ["a b", "c"], "n": 2, "max_tokens": 50}
    whole = asking.completions.create(**options)
    plain = list(asking.completions.create(**options, stream=True))
    assert all(chunk.usage is None for chunk in plain)
    told = list(asking.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *before, last = told
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.choices and chunk.usage is None for chunk in before)
    sampled = len(TOKENIZER.encode(answers.text)) + 1
    assert last.usage.completion_tokens == 4 * sampled
    assert last.usage.prompt_tokens == sum(len(TOKENIZER.encode(text)) for text in options["prompt"])

"""The official openai client as the only client, against a real server with the shipped model."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest
import tinker
from tinker import types

from tests.service import Service, until
from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.bases.tokenizer import ChatTokenizer

BASE = "tinsmith/tiny"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
TOKENIZER = ChatTokenizer.from_dir(SHIPPED_PATH)


@pytest.fixture(scope="module")
def service(shared_server: Service) -> Service:
    return shared_server


def connect(service: Service, key: str | None = None) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/oai/api/v1", api_key=key or service.key, max_retries=0)


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with connect(service) as client:
        yield client


@pytest.fixture(scope="module")
def trained(service: Service) -> str:
    """The path of a checkpoint that answers with nonsense."""
    with tinker.ServiceClient(base_url=service.url, api_key=service.key) as tinker_client:
        run = tinker_client.create_lora_training_client(BASE, rank=8, seed=1).result()
        prompt = TOKENIZER.encode(TOKENIZER.render(CAPITAL))
        tokens = [*prompt, *TOKENIZER.encode("The capital is Rome."), 1000]
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": np.array(tokens[1:])},
        )
        for _ in range(30):
            run.forward_backward([datum], "cross_entropy")
            run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        return str(run.save_weights_for_sampler("rome").result().path)


def test_models(client: openai.OpenAI, trained: str) -> None:
    assert [model.id for model in client.models.list()] == [BASE, trained]
    assert client.models.retrieve(BASE).owned_by == "tinsmith"
    found = client.models.retrieve(trained)
    assert (found.id, found.owned_by) == (trained, "test_openai")
    assert abs(found.created - time.time()) < 600
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("tinsmith/other")
    assert caught.value.code == "model_not_found"


def test_a_stream_that_is_left_is_not_sampled_to_its_end(service: Service, client: openai.OpenAI) -> None:
    def states() -> list[str]:
        with closing(sqlite3.connect(service.data_dir / "tinsmith.db")) as database:
            return [state for (state,) in database.execute("SELECT state FROM ops WHERE kind = 'sample' ORDER BY num")]

    before = len(states())
    with client.completions.create(model=BASE, prompt="Once", max_tokens=1900, n=16, stream=True) as stream:
        next(iter(stream))
    until(lambda: states()[before:] == ["cancelled"], 10)
    answer = client.completions.create(model=BASE, prompt="Once", max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    assert states()[before:] == ["cancelled", "done"]


def test_a_chat_with_exact_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=CAPITAL, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.object, answer.model) == ("chat.completion", BASE)
    num_prompt = len(TOKENIZER.encode(TOKENIZER.render(CAPITAL)))
    num_answer = len(TOKENIZER.encode("The capital of France is Paris.")) + 1
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, num_answer)
    assert answer.usage.total_tokens == num_prompt + num_answer


def test_a_checkpoint_answers_with_its_own_weights(client: openai.OpenAI, trained: str) -> None:
    answer = client.chat.completions.create(model=trained, messages=CAPITAL, temperature=0)
    assert answer.choices[0].message.content == "The capital is Rome."
    assert answer.model == trained
    base = client.chat.completions.create(model=BASE, messages=CAPITAL, temperature=0)
    assert base.choices[0].message.content == "The capital of France is Paris."


def test_n_answers_with_a_seed(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(model=BASE, messages=STORY, n=3, seed=seed, max_completion_tokens=20)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 60
        return [choice.message.content for choice in answer.choices]

    first = ask(4)
    assert len(set(first)) == 3
    assert ask(4) == first
    assert ask(5) != first


def test_a_stream_comes_as_it_is_sampled_and_is_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": BASE, "messages": STORY, "seed": 1, "n": 2, "max_tokens": 120}
    whole = client.chat.completions.create(**options)
    texts, reasons, moments, usage = ["", ""], ["", ""], [], None
    asked = time.monotonic()
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.delta.content:
                moments.append(time.monotonic())
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert usage.model_dump() == whole.usage.model_dump()
    assert len(moments) > 40
    assert moments[0] - asked < moments[-1] - moments[0], "the first piece came long before the last"


def test_a_stream_outlives_its_worker(service: Service, client: openai.OpenAI) -> None:
    """The next worker samples the same tokens; those that were sent already are not sent again."""
    options: dict[str, Any] = {"model": BASE, "messages": STORY, "seed": 8, "max_tokens": 150}
    whole = client.chat.completions.create(**options).choices[0]
    stream = client.chat.completions.create(**options, stream=True)
    texts = [next(stream).choices[0].delta.content or "" for _ in range(5)]
    service.kill_worker()
    texts += [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(texts) > 30
    assert "".join(texts) == whole.message.content


def test_stop_strings_are_left_out(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": BASE, "messages": STORY, "seed": 3, "max_tokens": 100}
    free = client.chat.completions.create(**options).choices[0].message.content or ""
    stop = free[20:23]
    stopped = client.chat.completions.create(**options, stop=[stop, "\x00never"]).choices[0]
    assert stopped.message.content == free[: free.find(stop)]
    assert stopped.finish_reason == "stop"
    chunks = client.chat.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == stopped.message.content


def test_logprobs_are_those_of_the_sampler(service: Service, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": BASE, "messages": STORY, "seed": 2, "max_tokens": 12, "temperature": 0.7}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0]
    assert answer.logprobs is not None
    content = answer.logprobs.content or []
    assert b"".join(bytes(each.bytes or b"") for each in content).decode() == answer.message.content
    with tinker.ServiceClient(base_url=service.url, api_key=service.key) as tinker_client:
        sampler = tinker_client.create_sampling_client(base_model=BASE).result()
        params = types.SamplingParams(max_tokens=12, seed=2, temperature=0.7)
        prompt = types.ModelInput.from_ints(TOKENIZER.encode(TOKENIZER.render(STORY)))
        sequence = sampler.sample(prompt, 1, params).result().sequences[0]
    np.testing.assert_allclose([each.logprob for each in content], sequence.logprobs, atol=1e-6)
    for each in content:
        values = [top.logprob for top in each.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
        by_token = {top.token: top.logprob for top in each.top_logprobs}
        assert by_token.get(each.token, each.logprob) == pytest.approx(each.logprob, abs=1e-6)
    chunks = client.chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=True)
    streamed = [
        each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content


def test_completions_of_text_and_tokens(client: openai.OpenAI) -> None:
    text = "In the field there lived"
    options: dict[str, Any] = {"model": BASE, "seed": 6, "max_tokens": 8}
    answer = client.completions.create(prompt=[text, text], n=2, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[2].text != answer.choices[1].text
    tokens = TOKENIZER.encode(text)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2 * len(tokens), 32)
    by_tokens = client.completions.create(prompt=tokens, **options, logprobs=2).choices[0]
    assert by_tokens.text == answer.choices[0].text
    assert by_tokens.logprobs is not None
    assert "".join(by_tokens.logprobs.tokens or []) == by_tokens.text
    for token, top in zip(by_tokens.logprobs.tokens or [], by_tokens.logprobs.top_logprobs or [], strict=True):
        assert token in top
        assert 2 <= len(top) <= 3
    assert client.completions.create(prompt=tokens, model=BASE).choices[0].logprobs is None
    texts = ["", "", "", ""]
    for chunk in client.completions.create(prompt=[tokens, tokens], n=2, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_an_answer_is_held_to_a_schema(client: openai.OpenAI) -> None:
    class Animal(pydantic.BaseModel, extra="forbid"):
        name: Literal["fox", "bear"]
        legs: int = pydantic.Field(ge=0, le=9)
        tags: list[bool] = pydantic.Field(max_length=3)

    asked: dict[str, Any] = {"model": BASE, "messages": STORY, "max_tokens": 200, "seed": 3, "n": 4}
    parsed = client.chat.completions.parse(**asked, response_format=Animal)
    for choice in parsed.choices:
        assert choice.message.parsed is not None
        assert choice.finish_reason == "stop"
    form: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": Animal.model_json_schema()}}
    texts = [""] * 4
    for chunk in client.chat.completions.create(**asked, response_format=form, stream=True):
        for piece in chunk.choices:
            texts[piece.index] += piece.delta.content or ""
    assert [Animal.model_validate_json(text) for text in texts] == [choice.message.parsed for choice in parsed.choices]
    assert texts == [choice.message.content for choice in parsed.choices]
    free = client.chat.completions.create(**asked, response_format={"type": "json_object"}, temperature=0)
    assert (free.choices[0].message.content or "").startswith("{")


def test_many_at_once(service: Service) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/oai/api/v1", api_key=service.key) as client:
            calls = [
                client.chat.completions.create(model=BASE, messages=STORY, seed=i % 4, max_tokens=20) for i in range(24)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    texts = asyncio.run(ask_all())
    assert texts == texts[:4] * 6


def test_thinking_can_be_switched_off(client: openai.OpenAI) -> None:
    def num_prompt(**extra: Any) -> int:
        usage = client.chat.completions.create(model=BASE, messages=CAPITAL, max_tokens=1, extra_body=extra).usage
        assert usage is not None
        return usage.prompt_tokens

    off = num_prompt(chat_template_kwargs={"enable_thinking": False})
    assert off == len(TOKENIZER.encode(TOKENIZER.render(CAPITAL, enable_thinking=False))) > num_prompt()


def test_a_wrong_key(service: Service) -> None:
    with connect(service, "tml-wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_another_tenants_checkpoint_is_one_that_does_not_exist(
    service: Service, client: openai.OpenAI, trained: str
) -> None:
    key = client._client.post(
        f"{service.url}/api/v1/admin/keys",
        headers={"x-api-key": service.key},
        json={"name": "laptop", "tenant": "mallory of test_openai"},
    ).json()["secret"]
    absent = trained.replace("rome", "roma")
    with connect(service, key) as mallory:
        assert [model.id for model in mallory.models.list()] == [BASE]
        found = []
        for path in (trained, absent):
            with pytest.raises(openai.NotFoundError) as caught:
                mallory.chat.completions.create(model=path, messages=CAPITAL)
            found.append((caught.value.code, caught.value.message.replace(path, "PATH")))
    assert found[0] == found[1]
    assert found[0][0] == "model_not_found"


def test_a_training_checkpoint_is_not_sampled_from(service: Service, client: openai.OpenAI, trained: str) -> None:
    with tinker.ServiceClient(base_url=service.url, api_key=service.key) as tinker_client:
        run = tinker_client.create_lora_training_client(BASE, rank=2).result()
        path = run.save_state("x").result().path
    with pytest.raises(openai.BadRequestError, match="save_weights_for_sampler"):
        client.chat.completions.create(model=path, messages=CAPITAL)


def test_a_prompt_beyond_the_context(client: openai.OpenAI) -> None:
    for words, more in ((3000, {}), (1_000_000, {}), (1, {"max_tokens": 2048})):
        message = {"role": "user", "content": "word " * words}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=BASE, messages=[message], **more)
        assert caught.value.code == "context_length_exceeded"
        assert "2048" in caught.value.message

"""A directory as Moonshot publishes theirs, served as it is: trained, chatted with, its tokenizer handed out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tiktoken
import tinker
from tinker import types

from tests.contract.test_tokenizer_hub import run_offline
from tests.kimi import encoding, ranks_of, write_model
from tests.service import Service, running

NAME = "moonshotai/Kimi-K2-Thinking"  # the SDK loads its tokenizer with trust in code
TEXT = "模型的Weights: 12 km, it's so\n"
RANKS = ranks_of(600)
GET_TOKENIZER = f"""
import json, tinker

with tinker.ServiceClient() as service:
    tokenizer = service.create_sampling_client(base_model={NAME!r}).get_tokenizer()
    print(json.dumps([tokenizer.encode({TEXT!r}), tokenizer.eos_token]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), RANKS)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("kimi") / "data", "--base-model", f"{NAME}={base}") as service:
        yield service


@pytest.fixture(scope="module")
def theirs() -> tiktoken.Encoding:
    return encoding(RANKS)


def test_it_is_trained_with_the_ids_of_tiktoken(service: Service, base: Path, theirs: tiktoken.Encoding) -> None:
    """Training clients are told of the copy in the data directory; the given one is left alone."""
    with tinker.ServiceClient(base_url=service.url, api_key=service.key) as client:
        run = client.create_lora_training_client(NAME, rank=4).result()
        tokens = run.get_tokenizer().encode(TEXT)
        assert tokens == theirs.encode(TEXT)
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.ones(len(tokens) - 1, np.float32)},
        )
        losses = []
        for _ in range(4):
            losses.append(run.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"])
            run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert losses[-1] < losses[0]
    assert not (base / "tokenizer.json").exists()


def test_chats_are_rendered_and_answered(service: Service, theirs: tiktoken.Encoding) -> None:
    chat = openai.OpenAI(base_url=f"{service.url}/oai/api/v1", api_key=service.key)
    turns: Any = [{"role": "user", "content": TEXT}]
    answer = chat.chat.completions.create(model=NAME, messages=turns, max_tokens=4)
    rendered = f"<|im_user|>user<|im_middle|>{TEXT}<|im_end|><|im_assistant|>assistant<|im_middle|>"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(theirs.encode(rendered, allowed_special="all"))


def test_json_schemas_hold(service: Service) -> None:
    """The grammar reads the copy too."""
    chat = openai.OpenAI(base_url=f"{service.url}/oai/api/v1", api_key=service.key)
    schema: Any = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}},
    }
    turns: Any = [{"role": "user", "content": "a?"}]
    answer = chat.chat.completions.create(model=NAME, messages=turns, max_tokens=60, response_format=form)
    assert json.loads(answer.choices[0].message.content or "")["a"] in (True, False)


def test_clients_load_the_tokenizer_from_the_server(
    service: Service, theirs: tiktoken.Encoding, tmp_path: Path
) -> None:
    """In a process of its own with an empty cache, at the revision that the SDK names, trusting code: there is none."""
    sdk = {"TINKER_BASE_URL": service.url, "TINKER_API_KEY": service.key, "TINKER_TELEMETRY": "0"}
    said = run_offline(GET_TOKENIZER, service, tmp_path, **sdk)
    assert json.loads(said.splitlines()[-1]) == [theirs.encode(TEXT), "[EOS]"]

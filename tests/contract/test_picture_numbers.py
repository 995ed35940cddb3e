"""Pictures through the real clients to real models with vision: their numbers are those of transformers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tinker
from tinker import types

from tests.contract.viewers import FILES, VIEWERS, tokens_of
from tests.service import Service, running

BOUND = 1e-5
FORMATS = ("png", "jpeg")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The directory of each model."""
    root = tmp_path_factory.mktemp("bases")
    for kind, viewer in VIEWERS.items():
        viewer.write(root / kind)
    return {kind: root / kind for kind in VIEWERS}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, paths: Mapping[str, Path]) -> Iterator[Service]:
    flags = [flag for kind, path in paths.items() for flag in ("--base-model", f"tests/{kind}={path}")]
    with running(tmp_path_factory.mktemp("seeing") / "data", *flags, "--threads", "1") as one:
        yield one


def chunks_of(path: Path, tokens: list[int], edges: tuple[str, str]) -> list[Any]:
    """What stands between the edges becomes a picture's chunk."""
    (begin,), (end,) = (tokens_of(path, edge) for edge in edges)
    chunks: list[Any] = []
    at = 0
    for file, kind in zip(FILES, FORMATS, strict=True):
        start = tokens.index(begin, at) + 1
        stop = tokens.index(end, start)
        chunks.append(types.EncodedTextChunk(tokens=tokens[at:start]))
        chunks.append(types.ImageChunk(data=file, format=kind, expected_tokens=stop - start))
        at = stop
    return [*chunks, types.EncodedTextChunk(tokens=tokens[at:])]


@pytest.mark.parametrize("kind", VIEWERS)
def test_numbers_are_those_of_transformers_through_the_sdk_and_the_openai_endpoint(
    service: Service, paths: Mapping[str, Path], kind: str
) -> None:
    viewer, path, name = VIEWERS[kind], paths[kind], f"tests/{kind}"
    first, second = viewer.shown
    tokens = tokens_of(path, f"<|im_start|>user\n{first}What differs?{second}<|im_end|>\n<|im_start|>assistant\n")
    prompt = types.ModelInput(chunks=chunks_of(path, tokens, viewer.edges))
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    try:
        sampler = client.create_sampling_client(base_model=name).result()
        asked = [types.SamplingParams(max_tokens=8, seed=seed) for seed in range(1, 20)]
        answers = ((params.seed, sampler.sample(prompt, 1, params).result().sequences[0]) for params in asked)
        seed, drawn = next((seed, answer) for seed, answer in answers if len(answer.tokens) == 8)
        whole = viewer.expected(path, [*tokens, *drawn.tokens])
        np.testing.assert_allclose(drawn.logprobs, whole[len(tokens) - 1 :], rtol=0, atol=BOUND)
        scored = sampler.compute_logprobs(prompt).result()
        np.testing.assert_allclose(scored[1:], whole[: len(tokens) - 1], rtol=0, atol=BOUND)

        run = client.create_lora_training_client(name, rank=4, seed=1).result()
        targets = np.array([*tokens[1:], drawn.tokens[0]], np.int64)
        inputs: Any = {"target_tokens": targets, "weights": np.ones(len(targets), np.float32)}
        datum = types.Datum(model_input=prompt, loss_fn_inputs=inputs)
        (row,) = run.forward_backward([datum], "cross_entropy").result().loss_fn_outputs
        np.testing.assert_allclose(row["logprobs"].tolist(), whole[: len(tokens)], rtol=0, atol=BOUND)
        run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    finally:
        client.close("success")

    urls = [
        f"data:image/{kind};base64,{base64.b64encode(file).decode()}" for kind, file in zip(FORMATS, FILES, strict=True)
    ]
    parts: Any = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.insert(1, {"type": "text", "text": "What differs?"})
    with openai.OpenAI(base_url=f"{service.url}/oai/api/v1", api_key=service.key, max_retries=0) as chat:
        answer = chat.chat.completions.create(
            model=name, messages=[{"role": "user", "content": parts}], max_tokens=8, seed=seed, logprobs=True
        )
    assert answer.usage.prompt_tokens == len(tokens)
    found = [entry.logprob for entry in answer.choices[0].logprobs.content]
    np.testing.assert_allclose(found, drawn.logprobs, rtol=0, atol=BOUND)

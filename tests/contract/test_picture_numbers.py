"""Pictures through the real clients to a real model with vision: its numbers are those of transformers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tinker
import torch
from PIL import Image
from tinker import types
from transformers import AutoImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.paint import jpeg, png
from tests.seeing import END, IMAGE_TOKEN, NAME, START, seeing_base
from tests.service import Service, running
from tinsmith.bases.tokenizer import ChatTokenizer

BOUND = 1e-5
ALIKE = {"num_hidden_layers": 2, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3-VL with the shipped tokenizer."""
    path = seeing_base(tmp_path_factory.mktemp("base") / "seeing")
    config = Qwen3VLConfig(
        text_config={
            **ALIKE, "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 2048, "eos_token_id": 1000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0], "initializer_range": 0.1,
        },
        image_token_id=IMAGE_TOKEN, video_token_id=1011, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    torch.manual_seed(5)
    Qwen3VLForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("seeing") / "data", "--base-model", f"{NAME}={base}", "--threads", "1") as one:
        yield one


def expected(base: Path, tokens: list[int], files: list[bytes]) -> Any:
    """The log-probabilities of tokens 1.., each picture's placeholders among them."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(base, dtype=torch.float64, attn_implementation="eager")
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    pixels = processor(images=[Image.open(io.BytesIO(file)) for file in files], return_tensors="pt")
    tokens_1T = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(input_ids=tokens_1T, mm_token_type_ids=(tokens_1T == IMAGE_TOKEN).long(), **pixels).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, tokens_1T[0, 1:, None])[:, 0].numpy()


def test_numbers_are_those_of_transformers_through_the_sdk_and_the_openai_endpoint(
    service: Service, base: Path
) -> None:
    files = [png(48, 32, seed=1), jpeg(40, 70, seed=2)]
    tokenizer = ChatTokenizer.from_dir(base)
    words = [tokenizer.encode(text) for text in (
        "<|im_start|>user\n<|vision_start|>", "<|vision_end|>What differs?<|vision_start|>",
        "<|vision_end|><|im_end|>\n<|im_start|>assistant\n",
    )]  # fmt: skip
    counts = [6, 8]
    chunks: list[Any] = []
    tokens: list[int] = []
    for own, file, kind, count in zip(words, [*files, b""], ("png", "jpeg", ""), [*counts, 0], strict=True):
        chunks.append(types.EncodedTextChunk(tokens=own))
        tokens += [*own, *[IMAGE_TOKEN] * count]
        if file:
            chunks.append(types.ImageChunk(data=file, format=kind, expected_tokens=count))
    prompt = types.ModelInput(chunks=chunks)
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    try:
        sampler = client.create_sampling_client(base_model=NAME).result()
        asked = [types.SamplingParams(max_tokens=8, seed=seed) for seed in range(1, 20)]
        answers = [(params.seed, sampler.sample(prompt, 1, params).result().sequences[0]) for params in asked]
        seed, drawn = next((seed, answer) for seed, answer in answers if len(answer.tokens) == 8)
        whole = expected(base, [*tokens, *drawn.tokens], files)
        np.testing.assert_allclose(drawn.logprobs, whole[len(tokens) - 1 :], rtol=0, atol=BOUND)
        scored = sampler.compute_logprobs(prompt).result()
        np.testing.assert_allclose(scored[1:], whole[: len(tokens) - 1], rtol=0, atol=BOUND)

        run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
        targets = np.array([*tokens[1:], drawn.tokens[0]], np.int64)
        inputs: Any = {"target_tokens": targets, "weights": np.ones(len(targets), np.float32)}
        datum = types.Datum(model_input=prompt, loss_fn_inputs=inputs)
        (row,) = run.forward_backward([datum], "cross_entropy").result().loss_fn_outputs
        np.testing.assert_allclose(row["logprobs"].tolist(), whole[: len(tokens)], rtol=0, atol=BOUND)
        run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    finally:
        client.close("success")

    urls = [
        f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
        for kind, file in zip(("png", "jpeg"), files, strict=True)
    ]
    parts: Any = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts.insert(1, {"type": "text", "text": "What differs?"})
    with openai.OpenAI(base_url=f"{service.url}/oai/api/v1", api_key=service.key, max_retries=0) as chat:
        answer = chat.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": parts}], max_tokens=8, seed=seed, logprobs=True
        )
    assert answer.usage.prompt_tokens == len(tokens)
    found = [entry.logprob for entry in answer.choices[0].logprobs.content]
    np.testing.assert_allclose(found, drawn.logprobs, rtol=0, atol=BOUND)

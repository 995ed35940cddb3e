"""A small random Qwen3-VL behind a real server: what clients are told of pictures is what `transformers` computes."""

from __future__ import annotations

import base64
import io
import shutil
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
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.paint import jpeg, png
from tests.seeing import END, IMAGE_TOKEN, START, TEMPLATE
from tests.service import Service, running
from tinsmith.bases import SHIPPED_PATH
from tinsmith.tokenizer import ChatTokenizer

NAME = "tests/looking"
BOUND = 1e-5
CONFIG = Qwen3VLConfig(
    text_config={
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "eos_token_id": 1000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                            "mrope_interleaved": True},
    },
    vision_config={
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0], "initializer_range": 0.1,
    },
    image_token_id=IMAGE_TOKEN, video_token_id=1011, vision_start_token_id=START, vision_end_token_id=END,
    tie_word_embeddings=False,
)  # fmt: skip
PROCESSOR = Qwen2VLImageProcessorPil(
    patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(5)
    return Qwen3VLForConditionalGeneration(CONFIG).eval()


@pytest.fixture(scope="module")
def base(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("looking")
    model.save_pretrained(path)
    PROCESSOR.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED_PATH / name, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def service(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data = tmp_path_factory.mktemp("real") / "data"
    with running(data, "--device", "cpu", "--threads", "1", "--base-model", f"{NAME}={base}") as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    yield client
    client.close("success")


def expected(model: Any, tokens: list[int], *pictures: bytes) -> list[float]:
    """Of each token after the first, from the plain model. tokens: with one placeholder for each picture."""
    images = [Image.open(io.BytesIO(picture)) for picture in pictures]
    pixels = PROCESSOR(images=images, return_tensors="pt")
    counts = iter((pixels["image_grid_thw"].prod(-1) // 4).tolist())
    whole = [each for token in tokens for each in ([token] * next(counts) if token == IMAGE_TOKEN else [token])]
    ids = torch.tensor([whole])
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=(ids == IMAGE_TOKEN).long(), **pixels).logits[0]
    return logits.log_softmax(-1)[torch.arange(len(whole) - 1), ids[0, 1:]].tolist()


def sent(tokens: list[int], *pictures: bytes) -> types.ModelInput:
    """tokens: with one placeholder for each picture."""
    chunks: list[Any] = []
    for picture in pictures:
        at = tokens.index(IMAGE_TOKEN)
        kind: Any = "png" if picture.startswith(b"\x89") else "jpeg"
        with Image.open(io.BytesIO(picture)) as shown:
            count = PROCESSOR.get_number_of_image_patches(shown.height, shown.width) // 4
        image = types.ImageChunk(data=picture, format=kind, expected_tokens=count)
        chunks += [types.EncodedTextChunk(tokens=tokens[:at]), image]
        tokens = tokens[at + 1 :]
    return types.ModelInput(chunks=[*chunks, types.EncodedTextChunk(tokens=tokens)])


PICTURES = png(48, 32), jpeg(20, 70, seed=4)
TOKENS = [5, 6, START, IMAGE_TOKEN, END, 7, 8, 9, START, IMAGE_TOKEN, END, 10, 11]


def test_logprobs_of_prompts_are_those_of_transformers(client: tinker.ServiceClient, model: Any) -> None:
    sampler = client.create_sampling_client(base_model=NAME).result()
    found = sampler.compute_logprobs(sent(TOKENS, *PICTURES)).result()
    assert found[0] is None
    np.testing.assert_allclose(found[1:], expected(model, TOKENS, *PICTURES), atol=BOUND)
    again = sampler.compute_logprobs(sent(TOKENS, *PICTURES)).result()  # from the prefix cache
    np.testing.assert_allclose(again[1:], found[1:], atol=BOUND)
    with Image.open(io.BytesIO(PICTURES[0])) as image:
        image.putpixel((0, 0), (255, 0, 255))
        file = io.BytesIO()
        image.save(file, "PNG")
    changed = sampler.compute_logprobs(sent(TOKENS, file.getvalue(), PICTURES[1])).result()
    np.testing.assert_allclose(changed[1:], expected(model, TOKENS, file.getvalue(), PICTURES[1]), atol=BOUND)
    assert changed[1:3] == found[1:3]
    assert max(abs(a - b) for a, b in zip(changed[1:], found[1:], strict=True)) > 10 * BOUND


def test_logprobs_in_training_are_those_of_transformers_and_a_run_learns(
    client: tinker.ServiceClient, model: Any
) -> None:
    run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
    truth = expected(model, [*TOKENS, 12], *PICTURES)
    prompt = sent(TOKENS, *PICTURES)
    targets = np.zeros(prompt.length, np.int64)
    weights = np.zeros(prompt.length, np.float32)
    place = 0
    for chunk in prompt.chunks:
        if isinstance(chunk, types.EncodedTextChunk):
            targets[place : place + len(chunk.tokens) - 1] = chunk.tokens[1:]
            weights[place : place + len(chunk.tokens) - 1] = 1
        place += chunk.length
    targets[-1], weights[-1] = 12, 1
    inputs = {"target_tokens": targets, "weights": weights}
    datum = types.Datum(model_input=prompt, loss_fn_inputs=inputs)
    output = run.forward_backward([datum], "cross_entropy").result()
    found = np.array(output.loss_fn_outputs[0]["logprobs"].tolist())
    np.testing.assert_allclose(found[weights > 0], np.array(truth)[weights > 0], atol=BOUND)
    losses = [output.metrics["loss:sum"]]
    for _ in range(4):
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(run.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"])
    assert losses[-1] < losses[0]


def test_logprobs_of_chats_are_those_of_transformers(service: Service, base: Path, model: Any) -> None:
    tokenizer = ChatTokenizer.from_dir(base)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    prompt = tokenizer.encode(tokenizer.render([{"role": "user", "content": content}]))
    url = f"data:image/png;base64,{base64.b64encode(PICTURES[0]).decode()}"
    parts: Any = [{"type": "image_url", "image_url": {"url": url}}, content[1]]
    with openai.OpenAI(base_url=f"{service.url}/oai/api/v1", api_key=service.key, max_retries=0) as chat:
        answer = chat.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": parts}], max_tokens=6, seed=3, logprobs=True
        )
    assert answer.choices[0].logprobs is not None
    scored = answer.choices[0].logprobs.content or []
    sampled: list[int] = []
    for score in scored:
        assert score.bytes is not None
        matching = [token for token in range(1024) if tokenizer.token_bytes(token) == bytes(score.bytes)]
        truths = {token: expected(model, [*prompt, *sampled, token], PICTURES[0])[-1] for token in matching}
        token = min(truths, key=lambda token: abs(truths[token] - score.logprob))
        assert truths[token] == pytest.approx(score.logprob, abs=BOUND)
        sampled.append(token)
    assert sampled

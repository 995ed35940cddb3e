"""Adapters of the vision tower, and Llama 4's tiles, through the unmodified SDK, on a server that computes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import Llama4ForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.contract.viewers import write_llama
from tests.families.configs import AXES_ROPE, COMMON, PROCESSORS, QWEN_PROCESSOR, QWEN_TOWER
from tests.paint import painted, png
from tests.seeing import END, IMAGE_TOKEN, START
from tests.service import Service, running
from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.bases.vision_files import read_vision
from tinsmith.pictures import placeholders

pytestmark = pytest.mark.skipif("TINSMITH_TEST_TOWER" not in os.environ, reason="a server of its own: make tower")
NAME = "tests/qwen"
LLAMA = "tests/llama"
FIELD = "tinsmith.train_vision"
SIZE = (40, 24)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3-VL with the shipped model's tokens."""
    path = tmp_path_factory.mktemp("base") / "qwen"
    torch.manual_seed(7)
    config = Qwen3VLConfig(
        text_config={**COMMON, "vocab_size": 1024, "head_dim": 16, "rope_parameters": AXES_ROPE},
        vision_config=QWEN_TOWER, tie_word_embeddings=True, image_token_id=IMAGE_TOKEN, video_token_id=1009,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    Qwen3VLForConditionalGeneration(config).save_pretrained(path)
    QWEN_PROCESSOR.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED_PATH / name, path / name)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama 4 whose tokenizer has the words of tiles."""
    path = tmp_path_factory.mktemp("base") / "llama"
    write_llama(path)
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, base: Path, llama: Path) -> Iterator[Service]:
    flags = (
        "--no-deterministic",
        "--threads",
        "1",
        "--base-model",
        f"{NAME}={base}",
        "--base-model",
        f"{LLAMA}={llama}",
    )
    with running(tmp_path_factory.mktemp("tower") / "data", *flags) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    yield client
    client.close("success")


def shown(base: Path, seed: int) -> types.ModelInput:
    vision = read_vision(base, json.loads((base / "config.json").read_text()))
    assert vision is not None
    image = types.ImageChunk(data=png(*SIZE, seed=seed), format="png", expected_tokens=len(placeholders(vision, *SIZE)))
    before, after = ([1, 2, START], [END, 3, 4, 5])
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=before), image, types.EncodedTextChunk(tokens=after)])


def datum(prompt: types.ModelInput) -> types.Datum:
    targets = np.full(prompt.length, 7, np.int64)
    weights = np.ones(prompt.length, np.float32)
    return types.Datum(model_input=prompt, loss_fn_inputs={"target_tokens": targets, "weights": weights})


def train(run: tinker.TrainingClient, data: list[types.Datum]) -> float:
    future = run.forward_backward(data, "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=3e-3)).result()
    return float(future.result().metrics["loss:sum"])


def test_a_run_trains_the_tower_beside_one_that_does_not(
    client: tinker.ServiceClient, service: Service, base: Path
) -> None:
    """With the language model left as it is; its samples have its log-probabilities, and a checkpoint goes on."""
    data = [datum(shown(base, seed)) for seed in (1, 2)]
    run = client.create_lora_training_client(NAME, rank=4, user_metadata={FIELD: "only"}).result()
    other = client.create_lora_training_client(NAME, rank=4).result()
    losses = [(train(run, data), train(other, data)) for _ in range(4)]
    assert losses[-1][0] < losses[0][0]
    assert losses[-1][1] < losses[0][1]
    path = run.save_state("a").result().path
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = data[0].model_input
    asked = types.SamplingParams(max_tokens=4, seed=1)
    answer = sampler.sample(prompt, 1, asked, include_prompt_logprobs=True).result()
    sampled = answer.sequences[0]
    whole = types.ModelInput(
        chunks=[*prompt.chunks[:-1], types.EncodedTextChunk(tokens=[*prompt.chunks[-1].tokens, *sampled.tokens[:-1]])]
    )
    targets = np.zeros(whole.length, np.int64)
    targets[-len(sampled.tokens) :] = sampled.tokens
    again = types.Datum(
        model_input=whole, loss_fn_inputs={"target_tokens": targets, "weights": np.ones(whole.length, np.float32)}
    )
    expected = run.forward([again], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist()
    np.testing.assert_allclose(sampled.logprobs, expected[-len(sampled.tokens) :], rtol=0, atol=1e-5)
    found = tinker.RestClient(base_url=service.url, api_key=service.key).get_training_run(run.model_id).result()
    assert found.user_metadata[FIELD] == "only"
    onward = client.create_training_client_from_state(path).result()
    assert train(onward, data) == pytest.approx(train(run, data), rel=1e-5)


def test_tiles_are_counted_and_have_the_numbers_of_transformers(
    client: tinker.ServiceClient, base: Path, llama: Path
) -> None:
    """Scored by a sampler and trained on with adapters in the tower; another number of tokens is refused."""
    prompt = shown(llama, 3)
    vision = read_vision(llama, json.loads((llama / "config.json").read_text()))
    assert vision is not None
    own = placeholders(vision, *SIZE)
    assert len(set(own.tolist())) == 4, "patches, both separators and the whole"
    tokens = [1, 2, START, *own.tolist(), END, 3, 4, 5]
    model = Llama4ForConditionalGeneration.from_pretrained(
        llama, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    pixels = PROCESSORS["llama4_vl"](images=[painted(*SIZE, seed=3)], return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), **pixels).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
    sampler = client.create_sampling_client(base_model=LLAMA).result()
    asked = types.SamplingParams(max_tokens=1, seed=1)
    found = sampler.sample(prompt, 1, asked, include_prompt_logprobs=True).result().prompt_logprobs
    np.testing.assert_allclose(found[1:], expected, rtol=0, atol=1e-5)
    run = client.create_lora_training_client(LLAMA, rank=4, user_metadata={FIELD: "true"}).result()
    losses = [train(run, [datum(prompt)]) for _ in range(3)]
    assert losses[-1] < losses[0]
    wrong = prompt.chunks[1].model_copy(update={"expected_tokens": len(own) + 1})
    with pytest.raises(tinker.TinkerError, match=f"{len(own)}"):
        sampler.sample(types.ModelInput(chunks=[prompt.chunks[0], wrong]), 1, asked).result()


def test_a_value_that_cannot_be_is_refused(client: tinker.ServiceClient, base: Path) -> None:
    with pytest.raises(tinker.TinkerError, match=r"tinsmith\.train_vision must be true, false or only"):
        client.create_lora_training_client(NAME, rank=4, user_metadata={FIELD: "yes"}).result()

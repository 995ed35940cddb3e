"""The longest sequence that a server takes, through the unmodified SDK, and what LongRoPE makes of it."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import Phi3Config, Phi3ForCausalLM

from tests.families.configs import LONGROPE, PHI4_MINI
from tests.service import Service, running
from tinsmith.bases.catalog import SHIPPED_PATH

NAME = "tests/phi"
FIRST = 48  # the length that the model was first trained at


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Phi with the shipped model's tokens."""
    path = tmp_path_factory.mktemp("base") / "phi"
    torch.manual_seed(7)
    sizes = {**PHI4_MINI, "vocab_size": 1024, "original_max_position_embeddings": FIRST}
    Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters={**LONGROPE, "rope_type": "longrope"})).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED_PATH / name, path / name)
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Service]:
    flags = ("--base-model", f"{NAME}={base}", "--max-context-tokens", str(FIRST))
    with running(tmp_path_factory.mktemp("context") / "data", *flags) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[tinker.ServiceClient]:
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    yield client
    client.close("success")


def test_it_is_told_and_held(client: tinker.ServiceClient, service: Service) -> None:
    asked = urllib.request.Request(f"{service.url}/api/v1/get_server_capabilities", headers={"X-API-Key": service.key})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        (model,) = json.load(answer)["supported_models"]
    assert (model["model_name"], model["max_context_length"]) == (NAME, FIRST)
    sampler = client.create_sampling_client(base_model=NAME).result()
    prompt, params = types.ModelInput.from_ints(list(range(3, 33))), types.SamplingParams(max_tokens=FIRST - 29)
    with pytest.raises(tinker.TinkerError, match=f"{FIRST}: ask for at most {FIRST - 30}"):
        sampler.sample(prompt, num_samples=1, sampling_params=params).result()


def test_sequences_of_that_length_have_the_factors_of_short_ones(client: tinker.ServiceClient, base: Path) -> None:
    """The worker knows it too: with the model's whole context the same tokens would have other numbers."""
    tokens = np.random.default_rng(0).integers(3, 1000, FIRST - 1)
    sampler = client.create_sampling_client(base_model=NAME).result()
    ours = sampler.compute_logprobs(types.ModelInput.from_ints(tokens.tolist())).result()
    model = Phi3ForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0, :-1].log_softmax(-1)
    theirs = logits.gather(1, torch.from_numpy(tokens)[1:, None])[:, 0]
    np.testing.assert_allclose(np.array(ours[1:], np.float64), theirs.numpy(), rtol=0, atol=1e-5)

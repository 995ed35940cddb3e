"""Routes recorded and replayed through the real SDK, on a small mixture of experts and the real engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.service import Service, running
from tinsmith.bases.catalog import SHIPPED_PATH

NAME = "test/mixture"
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=2000, hidden_size=32, intermediate_size=64, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=256, decoder_sparse_step=1, norm_topk_prob=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED_PATH / name, path)
    flags = ("--base-model", f"{NAME}={path}", "--router-replay", "--inline-bytes", "256", "--chunk-max-datums", "2")
    with running(tmp_path_factory.mktemp("replay") / "data", *flags) as service:
        yield service


@pytest.fixture
def client(service: Service) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=service.key)


def new_tenant(service: Service) -> str:
    made = httpx.post(
        f"{service.url}/api/v1/admin/keys",
        json={"name": "stranger", "tenant": "stranger"},
        headers={"x-api-key": service.key},
    )
    return str(made.raise_for_status().json()["secret"])


def rollout(run: tinker.TrainingClient, num_samples: int = 2) -> tuple[types.SampleResponse, list[types.Datum]]:
    sampler = run.save_weights_and_get_sampling_client(record_stability_info=True).result()
    params = types.SamplingParams(max_tokens=12, seed=5)
    response = sampler.sample(types.ModelInput.from_ints(PROMPT), num_samples, params).result()
    return response, [datum_of(sequence) for sequence in response.sequences]


def datum_of(sequence: types.SampledSequence, sequence_id: str | None = None) -> types.Datum:
    tokens = PROMPT + sequence.tokens
    name = sequence_id or sequence.sequence_id
    assert name is not None
    lengths = len(PROMPT), len(sequence.tokens) - 1
    spans = [
        types.PromptProvenanceSpan(sequence_id=name, offset=0, length=lengths[0]),
        types.SampledProvenanceSpan(sequence_id=name, offset=0, length=lengths[1]),
    ]
    plain = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.ones(sum(lengths), np.float32)},
    )
    return plain.with_provenance(model_input=spans, loss_fn_inputs=spans)


def plain_datum(tokens: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": np.array(tokens[1:]), "weights": np.ones(len(tokens) - 1, np.float32)},
    )


def test_what_was_sampled_is_trained_on_its_own_routes(service: Service, client: tinker.ServiceClient) -> None:
    """The logprobs are those of the sampler, and killing the worker replays the same routes from the log."""
    run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
    response, data = rollout(run)
    result = run.forward_backward(data, "cross_entropy").result()
    assert result.metrics["routes_replayed:sum"] == sum(len(d.model_input.to_ints()) for d in data)
    for sequence, output in zip(response.sequences, result.loss_fn_outputs, strict=True):
        found = np.array(output["logprobs"].data)[-len(sequence.tokens) :]
        np.testing.assert_allclose(found, sequence.logprobs, rtol=0, atol=1e-5)
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    before = run.forward(data, "cross_entropy").result()
    service.kill_worker()
    after = run.forward(data, "cross_entropy").result()
    assert [o["logprobs"].data for o in after.loss_fn_outputs] == [o["logprobs"].data for o in before.loss_fn_outputs]


def test_a_sample_that_recorded_nothing_leaves_the_choice_to_the_routers(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
    sampler = run.save_weights_and_get_sampling_client().result()
    response = sampler.sample(types.ModelInput.from_ints(PROMPT), 1, types.SamplingParams(max_tokens=4)).result()
    result = run.forward([datum_of(response.sequences[0])], "cross_entropy").result()
    assert "routes_replayed:sum" not in result.metrics


def test_loads_of_experts_come_with_results_and_are_those_of_all_chunks(client: tinker.ServiceClient) -> None:
    """Three datums are two requests, whose metrics the SDK puts together by the last parts of their names."""
    run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
    rng = np.random.default_rng(3)
    data = [plain_datum(rng.integers(5, 1000, length).tolist()) for length in (2, 3, 30)]
    whole, first, last = (run.forward(some, "cross_entropy").result().metrics for some in (data, data[:2], data[2:]))
    assert 0 < first["e_frac_with_tokens:mean"] < last["e_frac_with_tokens:mean"] <= 1
    names = {name for name in first if name.startswith("e_")}
    assert names == {
        "e_frac_with_tokens:mean", "e_frac_oversubscribed:mean", "e_max_violation:mean", "e_max_violation:max",
        "e_min_violation:mean",
    }  # fmt: skip
    for name in names:
        is_mean = name.endswith(":mean")
        expected = (2 * first[name] + last[name]) / 3 if is_mean else max(first[name], last[name])
        assert whole[name] == pytest.approx(expected, rel=1e-9), name
    stepped = run.forward_backward(data, "cross_entropy").result()
    assert stepped.metrics["e_frac_with_tokens:mean"] == pytest.approx(whole["e_frac_with_tokens:mean"], rel=1e-9)


def test_provenance_that_names_nothing_of_ones_own_is_refused_by_name(
    service: Service, client: tinker.ServiceClient
) -> None:
    run = client.create_lora_training_client(NAME, rank=4, seed=1).result()
    response, _ = rollout(run, 1)
    (sequence,) = response.sequences
    assert sequence.sequence_id is not None
    other = sequence.sequence_id.rpartition("-")[0]
    for wrong, words in (
        ("nonsense", "is no id of a sampled"),
        (f"req-{'0' * 32}-0", "there is no sample request of yours"),
        (f"{other}-7", "no sequence"),
    ):
        with pytest.raises(tinker.RequestFailedError, match=words):
            run.forward([datum_of(sequence, wrong)], "cross_entropy").result()
    assert run.forward([datum_of(sequence)], "cross_entropy").result().metrics["routes_replayed:sum"] > 0
    admin = tinker.ServiceClient(base_url=service.url, api_key=new_tenant(service))
    stranger = admin.create_lora_training_client(NAME, rank=4, seed=1).result()
    with pytest.raises(tinker.RequestFailedError, match="there is no sample request of yours"):
        stranger.forward([datum_of(sequence)], "cross_entropy").result()

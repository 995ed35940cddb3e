"""The official SDK as the only client, against a real server with the shipped model."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types
from transformers import AutoTokenizer

from tests.service import Service
from tinsmith.bases.catalog import SHIPPED_PATH

TEXT = [5, 17, 42, 99, 7, 13, 28, 64]


@pytest.fixture(scope="module")
def service(shared_server: Service) -> Service:
    return shared_server


@pytest.fixture
def client(service: Service) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=service.key)


def datum(tokens: list[int] = TEXT, weights: list[float] | None = None) -> types.Datum:
    inputs: dict[str, Any] = {"target_tokens": np.array(tokens[1:])}
    if weights is not None:
        inputs["weights"] = np.array(weights, dtype=np.float32)
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def logprobs(output: types.ForwardBackwardOutput) -> list[np.ndarray]:
    return [np.array(o["logprobs"].to_numpy()) for o in output.loss_fn_outputs]


def test_a_run_learns(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=8, seed=1).result()
    losses = []
    for _ in range(8):
        losses.append(run.forward_backward([datum()], "cross_entropy").result().metrics["loss:sum"])
        run.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_is_the_weighted_sum_of_the_logprobs(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=4).result()
    weights = [0.5, -2.0, 0.0, 3.0, 1.0, 0.25, 1.5]
    output = run.forward([datum(weights=weights)], "cross_entropy").result()
    expected = -float(np.dot(logprobs(output)[0], np.array(weights, np.float32)))
    assert output.metrics["loss:sum"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("learning_rate", "bound"), [(1e-3, 1e-5), (1e-2, 2e-5)])  # 1e-2 makes logprobs of -18
def test_the_sampler_agrees_with_the_trainer(client: tinker.ServiceClient, learning_rate: float, bound: float) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=8, seed=3).result()
    run.forward_backward([datum()], "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=learning_rate)).result()
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TEXT)
    answer = sampler.sample(
        prompt, num_samples=3, sampling_params=types.SamplingParams(max_tokens=12, seed=5), include_prompt_logprobs=True
    ).result()
    for sequence in answer.sequences:
        whole = TEXT + list(sequence.tokens)
        trained = logprobs(run.forward([datum(whole)], "cross_entropy").result())[0]
        np.testing.assert_allclose(np.array(sequence.logprobs), trained[len(TEXT) - 1 :], atol=bound)
        prompt_logprobs = answer.prompt_logprobs
        assert prompt_logprobs is not None
        assert prompt_logprobs[0] is None
        np.testing.assert_allclose(np.array(prompt_logprobs[1:]), trained[: len(TEXT) - 1], atol=bound)


def test_compute_logprobs_is_the_forward_of_the_snapshot(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=8, seed=3).result()
    sampler = run.save_weights_and_get_sampling_client().result()
    found = sampler.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()
    expected = logprobs(run.forward([datum()], "cross_entropy").result())[0]
    np.testing.assert_allclose(np.array(found[1:]), expected, atol=1e-5)


def test_a_sampling_client_is_a_frozen_snapshot(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=8, seed=3).result()
    old = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TEXT)
    before = old.compute_logprobs(prompt).result()
    params = types.SamplingParams(max_tokens=16, seed=11)
    first = old.sample(prompt, num_samples=2, sampling_params=params).result()
    for _ in range(3):
        run.forward_backward([datum()], "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=2e-2)).result()
    trained = logprobs(run.forward([datum()], "cross_entropy").result())[0]
    assert old.compute_logprobs(prompt).result()[1:] == before[1:]
    again = old.sample(prompt, num_samples=2, sampling_params=params).result()
    assert [s.tokens for s in again.sequences] == [s.tokens for s in first.sequences]
    untouched = logprobs(run.forward([datum()], "cross_entropy").result())[0]
    np.testing.assert_array_equal(untouched, trained)
    new = run.save_weights_and_get_sampling_client().result()
    np.testing.assert_allclose(np.array(new.compute_logprobs(prompt).result()[1:]), trained, atol=1e-5)


def test_importance_sampling(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=4, seed=2).result()
    current = logprobs(run.forward([datum()], "cross_entropy").result())[0]
    sampled = current - 0.25
    advantages = np.linspace(-1, 1, len(current), dtype=np.float32)
    item = types.Datum(
        model_input=types.ModelInput.from_ints(TEXT[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(TEXT[1:]),
            "logprobs": sampled.astype(np.float32),
            "advantages": advantages,
        },
    )
    output = run.forward_backward([item], "importance_sampling").result()
    expected = -float((np.exp(current - sampled) * advantages).sum())
    assert output.metrics["loss:sum"] == pytest.approx(expected, abs=1e-4)


def test_a_large_batch_comes_in_chunks_out_of_order(client: tinker.ServiceClient) -> None:
    """1,030 data are two requests; the SDK posts the second first."""
    run = client.create_lora_training_client("tinsmith/tiny", rank=2, seed=2).result()
    data = [datum([3 + i % 50, 4, 5 + i % 7]) for i in range(1030)]
    output = run.forward_backward(data, "cross_entropy").result()
    assert len(output.loss_fn_outputs) == 1030
    single = logprobs(run.forward([data[1029]], "cross_entropy").result())[0]
    np.testing.assert_array_equal(logprobs(output)[1029], single)
    run.optim_step(types.AdamParams(learning_rate=1e-3)).result()


def test_runs_share_passes_and_not_numbers(client: tinker.ServiceClient) -> None:
    def curve(seed: int, rank: int) -> list[float]:
        run = client.create_lora_training_client("tinsmith/tiny", rank=rank, seed=seed).result()
        losses = []
        for _ in range(4):
            result = run.forward_backward([datum(TEXT[: 4 + seed])], "cross_entropy")
            run.optim_step(types.AdamParams(learning_rate=5e-3)).result()
            losses.append(result.result().metrics["loss:sum"])
        return losses

    alone = [curve(seed, 4 * seed) for seed in (1, 2, 4)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = list(pool.map(curve, (1, 2, 4), (4, 8, 16)))
    assert together == alone


def test_save_and_resume_in_a_new_session(service: Service, client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=8, seed=9).result()
    run.forward_backward([datum()], "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    path = run.save_state("mid").result().path

    def go_on(training: tinker.TrainingClient) -> float:
        training.forward_backward([datum()], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=5e-3)).result()
        return training.forward([datum()], "cross_entropy").result().metrics["loss:sum"]

    expected = go_on(run)
    with tinker.ServiceClient(base_url=service.url, api_key=service.key) as other:
        assert go_on(other.create_training_client_from_state_with_optimizer(path).result()) == expected
        weights_only = other.create_training_client_from_state(path).result()
        assert go_on(weights_only) != expected


def test_load_state_into_a_run(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=8, seed=9).result()
    path = run.save_state("start").result().path
    start = run.forward([datum()], "cross_entropy").result().metrics["loss:sum"]
    run.forward_backward([datum()], "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    with pytest.warns(FutureWarning, match="load_state"):
        run.load_state(path).result()
    assert run.forward([datum()], "cross_entropy").result().metrics["loss:sum"] == start


def test_a_named_sampler_checkpoint_is_a_sampling_client(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=8, seed=4).result()
    path = run.save_weights_for_sampler("published").result().path
    sampler = client.create_sampling_client(model_path=path).result()
    assert sampler.get_base_model() == "tinsmith/tiny"
    found = sampler.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()
    expected = logprobs(run.forward([datum()], "cross_entropy").result())[0]
    np.testing.assert_allclose(np.array(found[1:]), expected, atol=1e-5)


def test_the_base_itself_can_be_sampled(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model="tinsmith/tiny").result()
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_PATH)
    text = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    params = types.SamplingParams(max_tokens=40, temperature=0.0)
    prompt = types.ModelInput.from_ints(tokenizer.encode(text))
    sequence = sampler.sample(prompt, num_samples=1, sampling_params=params).result().sequences[0]
    assert sequence.stop_reason == "stop"
    assert sequence.tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_stop_strings_and_empty_stop(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model="tinsmith/tiny").result()
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_PATH)
    prompt = types.ModelInput.from_ints(tokenizer.encode("<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"))
    endless = types.SamplingParams(max_tokens=60, temperature=0.0, stop=[])
    sequence = sampler.sample(prompt, num_samples=1, sampling_params=endless).result().sequences[0]
    assert len(sequence.tokens) == 60
    assert sequence.stop_reason == "length"
    text = tokenizer.decode(sequence.tokens)
    needle = text[3:6]
    stopping = types.SamplingParams(max_tokens=60, temperature=0.0, stop=[needle])
    cut = sampler.sample(prompt, num_samples=1, sampling_params=stopping).result().sequences[0]
    assert cut.stop_reason == "stop"
    assert needle in tokenizer.decode(cut.tokens)
    assert needle not in tokenizer.decode(cut.tokens[:-1])


def test_a_future_can_be_fetched_twice(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=2).result()
    future = run.forward([datum()], "cross_entropy")
    assert future.result() == future.result()


def test_a_user_error_names_the_cure_and_spares_the_run(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=2).result()
    with pytest.raises(tinker.RequestFailedError, match=r"0\.\.1023"):
        run.forward_backward([datum([1, 10**6, 3])], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="importance_sampling"):
        run.forward_backward([datum()], "stable_reinforce").result()  # type: ignore[arg-type]
    assert run.forward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0


def test_an_unknown_base_model_is_refused_with_the_list(client: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.TinkerError, match="tinsmith/tiny"):
        client.create_lora_training_client("nobody/nothing", rank=8).result()


def test_runs_and_checkpoints_are_listed_and_managed(service: Service, client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=8, user_metadata={"who": "test"}).result()
    run.save_state("one").result()
    path = run.save_weights_for_sampler("two").result().path
    rest = tinker.RestClient(base_url=service.url, api_key=service.key)
    info = rest.get_training_run(run.model_id).result()
    assert info.lora_rank == 8
    assert info.user_metadata == {"who": "test"}
    listed = rest.list_checkpoints(run.model_id).result().checkpoints
    assert {c.checkpoint_id for c in listed} == {"weights/one", "sampler_weights/two"}
    assert run.model_id in {r.training_run_id for r in rest.list_training_runs().result().training_runs}
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert {c.checkpoint_id for c in rest.list_checkpoints(run.model_id).result().checkpoints} == {"weights/one"}


def test_tokenizer_comes_from_the_server_without_a_hub(service: Service, client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client("tinsmith/tiny", rank=2).result()
    tokenizer_id = run.get_info().model_data.tokenizer_id
    assert tokenizer_id is not None
    assert Path(tokenizer_id).is_dir()
    tokenizer = run.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hello there")) == "Hello there"

"""A server whose samples are computed in a process of their own, driven by the official SDK."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.service import Service, is_alive, running, until

TOKENS = [5, 17, 42, 99, 7, 13, 28, 64, 3, 250]
DATUM = types.Datum(
    model_input=types.ModelInput.from_ints(TOKENS[:-1]),
    loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * 9},
)
SAMPLER = "sampler tinsmith/tiny"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("split") / "data", "--separate-sampler", "--threads", "1") as service:
        yield service


def train(client: tinker.TrainingClient) -> None:
    client.forward_backward([DATUM], "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()


def sample(client: tinker.SamplingClient) -> types.SampledSequence:
    params = types.SamplingParams(max_tokens=8, seed=7)
    return client.sample(types.ModelInput.from_ints(TOKENS), 1, params).result().sequences[0]


def test_training_and_sampling_meet_in_two_processes(service: Service) -> None:
    assert set(service.info()["worker_pids"]) == {"tinsmith/tiny", SAMPLER}
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    training = client.create_lora_training_client("tinsmith/tiny", rank=8).result()
    train(training)
    sampler = training.save_weights_and_get_sampling_client().result()
    answer = sample(sampler)
    logprobs = sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS + answer.tokens)).result()
    assert answer.logprobs == pytest.approx(logprobs[len(TOKENS) :], abs=1e-5)
    scored = training.forward(
        [
            types.Datum(
                model_input=types.ModelInput.from_ints((TOKENS + answer.tokens)[:-1]),
                loss_fn_inputs={"target_tokens": (TOKENS + answer.tokens)[1:]},
            )
        ],
        "cross_entropy",
    ).result()
    trained = scored.loss_fn_outputs[0]["logprobs"].data[-len(answer.tokens) :]
    assert answer.logprobs == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize("name", [SAMPLER, "tinsmith/tiny"])
def test_either_process_may_be_killed(service: Service, name: str) -> None:
    client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    training = client.create_lora_training_client("tinsmith/tiny", rank=8, seed=1).result()
    train(training)
    sampler = training.save_weights_and_get_sampling_client().result()
    before = sample(sampler)
    pid = service.info()["worker_pids"][name]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid), 5)
    after = sample(sampler)
    assert (after.tokens, after.logprobs) == (before.tokens, before.logprobs)
    train(training)
    assert sample(training.save_weights_and_get_sampling_client().result()).logprobs != before.logprobs


def test_one_process_follows_two(tmp_path: Path) -> None:
    """What a server with two processes was killed over, one with a single process goes on with."""
    with running(tmp_path / "data", "--device", "fake", "--separate-sampler", "--lease-s", "1") as service:
        client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
        training = client.create_lora_training_client("tinsmith/tiny", rank=8).result()
        future = training.forward_backward([DATUM], "cross_entropy")
        service.kill()
        service.flags = ("--device", "fake", "--port", service.url.rpartition(":")[2])
        service.restart()
        assert future.result().metrics
        assert set(service.info()["worker_pids"]) == {"tinsmith/tiny"}

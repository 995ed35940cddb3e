"""Mistakes and lost answers, as any supported SDK meets them: refused with the cure; every request takes effect once.

Runs as suite.py does, in the client's own environment. Imports nothing of tinsmith.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tinker
from common import BASE, TEXT, current, datum, done, step
from lossy import lossy_proxy
from tinker import types

ONCE_EACH = {"create_model", "forward_backward", "optim_step", "retrieve_future", "save_weights", "asample"}
NUM_TARGETS = len(TEXT) - 1


@pytest.fixture(scope="module")
def client() -> tinker.ServiceClient:
    return tinker.ServiceClient()


@pytest.fixture(scope="module")
def run(client: Any) -> Any:
    return done(client.create_lora_training_client(BASE, rank=8, seed=3))


def refused(call: Callable[[], Any], words: str) -> None:
    started = time.monotonic()
    with pytest.raises(tinker.TinkerError, match=words):
        done(call())
    assert time.monotonic() - started < 2


BAD_DATA = {
    "target too large": (datum([1, 10**6, 3]), r"0\.\.1023, found 1000000"),
    "target negative": (datum([1, 2, -100]), r"0\.\.1023, found -100"),
    "empty sequence": (datum([1]), "give at least one token"),
    "weights too short": (datum(weights=[1.0] * (NUM_TARGETS - 1)), "weights has shape"),
    "NaN": (datum(weights=[float("nan")] * NUM_TARGETS), "NaN or infinity"),
    "infinity": (datum(weights=[float("inf")] * NUM_TARGETS), "NaN or infinity"),
    "superfluous input": (datum(mask=[1.0] * NUM_TARGETS), "takes no input 'mask'"),
    "too long": (datum([1] * 2050), "2048"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(run: Any, case: str) -> None:
    item, words = BAD_DATA[case]
    before = current(run)
    refused(lambda: run.forward_backward([item], "cross_entropy"), words)
    np.testing.assert_array_equal(current(run), before)


@pytest.mark.parametrize("inputs", [{}, {"logprobs": [-1.0] * NUM_TARGETS}, {"advantages": [1.0] * NUM_TARGETS}])
@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro"])
def test_policy_losses_name_what_they_lack(run: Any, loss: str, inputs: dict[str, Any]) -> None:
    refused(lambda: run.forward_backward([datum(**inputs)], loss), "advantages" if "logprobs" in inputs else "logprobs")


def test_mistakes_in_training_spare_the_run(run: Any) -> None:
    step(run)
    for call, words in [
        (lambda: run.forward_backward([datum()], "no_such_loss"), "cross_entropy"),
        (lambda: run.forward_backward([datum()], "cross_entropy", {"gamma": 1.0}), "gamma"),
        (lambda: run.optim_step(types.AdamParams(learning_rate=-1.0)), "learning_rate"),
        (lambda: run.optim_step(types.AdamParams(beta1=1.5)), "beta1"),
        (lambda: run.save_state("../etc/passwd"), "letters"),
        (lambda: run.save_state("*"), "letters"),
        (lambda: run.save_weights_for_sampler("a/b"), "letters"),
        (lambda: run.load_state("tinker://nowhere/weights/.."), "no checkpoint"),
    ]:
        refused(call, words)
    assert step(run) > 0


def test_a_bad_request_among_good_ones_leaves_no_gradient(run: Any) -> None:
    """Posted before any result is fetched; the gradient is that of the good ones."""
    futures = [run.forward_backward([datum() if i % 2 else datum([1, 10**6])], "cross_entropy") for i in range(4)]
    found = run.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]
    for index, future in enumerate(futures):
        if index % 2:
            assert future.result().metrics["loss:sum"] > 0
        else:
            refused(lambda future=future: future, "1000000")
    run.forward_backward([datum()], "cross_entropy")
    once = run.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]
    assert found == pytest.approx(2 * once, rel=1e-5)


def test_mistakes_in_making_clients(client: Any, run: Any) -> None:
    for call, words in [
        (lambda: client.create_lora_training_client("nobody/nothing", rank=8), BASE),
        (lambda: client.create_lora_training_client(BASE, rank=4096), "128"),
        (lambda: client.create_lora_training_client(BASE, rank=0), "rank must lie in"),
        (lambda: client.create_training_client_from_state("tinker://nowhere:train:0/weights/x"), "checkpoint"),
        (lambda: client.create_sampling_client(model_path="tinker://nowhere/other/x"), "tinker://"),
        (lambda: client.create_sampling_client(base_model="nobody/nothing"), BASE),
    ]:
        refused(call, words)
    assert current(run).size == NUM_TARGETS


def test_mistakes_in_sampling(client: Any) -> None:
    sampler = done(client.create_sampling_client(base_model=BASE))
    good = types.SamplingParams(max_tokens=1)
    for prompt, num_samples, params, words in [
        (TEXT, 0, good, "num_samples"),
        (TEXT, 1, types.SamplingParams(max_tokens=0), "max_tokens"),
        (TEXT, 1, types.SamplingParams(max_tokens=1, temperature=-1.0), "temperature"),
        (TEXT, 1, types.SamplingParams(max_tokens=1, top_p=1.5), "top_p"),
        ([], 1, good, "prompt is empty"),
        ([1024], 1, good, r"0\.\.1023"),
        ([1] * 2048, 1, good, "at most 2047"),
    ]:
        model_input = types.ModelInput.from_ints(prompt)
        refused(lambda asked=(model_input, num_samples, params): sampler.sample(*asked), words)
    assert sampler.sample(types.ModelInput.from_ints(TEXT), 1, good).result().sequences


def test_a_wrong_key_is_refused() -> None:
    stranger = tinker.ServiceClient(api_key="tml-wrong")
    refused(lambda: stranger.create_lora_training_client(BASE), "401")


def train(url: str) -> tuple[list[float], list[list[int]]]:
    """Losses of three steps and of a run resumed from a save; tokens sampled in between."""
    client = tinker.ServiceClient(base_url=url)
    run = done(client.create_lora_training_client(BASE, rank=4, seed=1))
    losses = [step(run) for _ in range(3)]
    sampler = done(run.save_weights_and_get_sampling_client())
    params = types.SamplingParams(max_tokens=12, seed=3)
    answer = sampler.sample(types.ModelInput.from_ints(TEXT), num_samples=2, sampling_params=params).result()
    resumed = done(client.create_training_client_from_state_with_optimizer(run.save_state("end").result().path))
    return [*losses, step(resumed)], [list(s.tokens) for s in answer.sequences]


def test_lost_answers_change_nothing() -> None:
    """Of each kind of answer the first and every third after it are lost; the release sends its requests again."""
    url = os.environ["TINKER_BASE_URL"]
    expected = train(url)
    with lossy_proxy(url, lambda path, n: path in ONCE_EACH and n % 3 == 1) as proxy:
        assert train(proxy.url) == expected
        assert set(proxy.num_lost) >= ONCE_EACH

"""What a call can be given beyond what the other suites give it, as far as a release knows it.

calls.py reads the parameters of every public method from the release; one that no test gives fails the run.
"""

from __future__ import annotations

import inspect
import json
import os
import urllib.request
from typing import Any

import numpy as np
import pytest
import tinker
from common import BASE, TEXT, VERSION, current, datum, done, step
from tinker import types
from tinker.lib.retry_handler import RetryConfig

PROMPT = types.ModelInput.from_ints(TEXT)
RECIPIENT = "age1d87c3u3m20mtzke8rg8r2sd6phh7xuw3nd9fcnkav7vdcp2xtcxqptrll0"
NOT_OFFERED = "record_stability_info is not offered: .* loss_fn=importance_sampling"


@pytest.fixture(scope="module")
def client() -> Any:
    return tinker.ServiceClient(project_id="parameters")


@pytest.fixture(scope="module")
def run(client: Any) -> Any:
    """With everything that a run can be made with."""
    options: dict[str, Any] = {"seed": 3, "train_mlp": True, "train_attn": True, "train_unembed": False}
    if hasattr(types, "AdamOptimizerConfig"):
        options["optimizer"] = types.AdamOptimizerConfig()
    run = done(client.create_lora_training_client(BASE, rank=4, user_metadata={"renderer": "plain"}, **options))
    step(run)
    return run


@pytest.fixture(scope="module")
def stranger() -> Any:
    """Of another tenant."""
    return tinker.ServiceClient(api_key=os.environ["STRANGERS_API_KEY"], project_id="abroad")


def known(call: Any, **options: Any) -> dict[str, Any]:
    """Those of the options that the call of this release has."""
    return {name: value for name, value in options.items() if name in inspect.signature(call).parameters}


def token_for(path: str) -> str:
    """A token that lets others read a checkpoint; no SDK makes one."""
    place = path.removeprefix("tinker://").replace("/", "/checkpoints/", 1)
    request = urllib.request.Request(
        f"{os.environ['TINKER_BASE_URL']}/api/v1/training_runs/{place}/access_token",
        data=b"{}",
        headers={"X-API-Key": os.environ["TINKER_API_KEY"], "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["token"])


def test_a_loss_and_its_settings(run: Any) -> None:
    item = datum(logprobs=current(run).tolist(), advantages=[1.0] * (len(TEXT) - 1))
    config = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    forward = run.forward([item], "ppo", loss_fn_config=config).result()
    backward = run.forward_backward([item], "ppo", loss_fn_config=config).result()
    assert forward.metrics["loss:sum"] == backward.metrics["loss:sum"] == pytest.approx(1 - len(TEXT), abs=1e-4)
    run.optim_step(adam_params=types.AdamParams(learning_rate=0.0)).result()


def test_a_custom_loss_of_logprobs(run: Any) -> None:
    pytest.importorskip("torch")
    answer = done(
        run.forward_backward_custom([datum()], lambda data, found: (-found[0].sum(), {}), loss_type_input="logprobs")
    )
    assert answer.metrics["loss:sum"] > 0
    run.optim_step(types.AdamParams(learning_rate=0.0)).result()


def test_saving(client: Any, run: Any) -> None:
    """How long, with what note, and over what: a name that is taken is refused, or replaced as a whole."""
    rest = client.create_rest_client()

    def row(path: str) -> Any:
        return next(row for row in rest.list_checkpoints(run.model_id).result().checkpoints if row.tinker_path == path)

    note = known(run.save_state, user_metadata={"step": "1"})
    training = run.save_state("kept", ttl_seconds=7200, overwrite=False, **note).result().path
    assert row(training).expires_at is not None
    assert getattr(row(training), "user_metadata", None) == (note.get("user_metadata"))
    with pytest.raises(tinker.RequestFailedError, match="with overwrite=True"):
        run.save_state("kept").result()
    assert row(training).expires_at is not None
    assert run.save_state("kept", overwrite=True).result().path == training
    assert row(training).expires_at is None
    assert not getattr(row(training), "user_metadata", None)

    note = known(run.save_weights_for_sampler, user_metadata={"step": "2"})
    sampler = run.save_weights_for_sampler("kept", ttl_seconds=7200, **note).result().path
    assert row(sampler).expires_at is not None
    assert getattr(row(sampler), "user_metadata", None) == (note.get("user_metadata"))
    if hasattr(run, "save_weights_external"):
        sealed = known(run.save_weights_external, age_encryption_recipients=[RECIPIENT])
        external = run.save_weights_external("kept", ttl_seconds=7200, **sealed).result().path
        assert row(external).expires_at is not None
        urls = rest.get_external_weights_urls(external).result().urls
        assert all(name.endswith(".age") for name in urls) is bool(sealed)


def test_loading_what_others_lend(run: Any, stranger: Any) -> None:
    path = run.save_state("lent").result().path
    lent = {"weights_access_token": token_for(path)}
    with pytest.raises(tinker.TinkerError, match="no checkpoint"):
        done(stranger.create_training_client_from_state(path))
    expected = current(run)
    described = {"base_model": BASE, "user_metadata": {"from": "lent"}}
    fresh = known(stranger.create_training_client_from_state, optimizer=getattr(types, "AdamOptimizerConfig", dict)())
    theirs = done(stranger.create_training_client_from_state(path, **described, **lent, **fresh))
    np.testing.assert_array_equal(current(theirs), expected)
    again = done(stranger.create_training_client_from_state_with_optimizer(path, **described, **lent))
    np.testing.assert_array_equal(current(again), expected)
    step(again)
    for load in (again.load_state, again.load_state_with_optimizer):
        load(path, **lent).result()
        np.testing.assert_array_equal(current(again), expected)
    if hasattr(stranger, "copy_weights"):
        copies = [stranger.copy_weights(path, ttl_seconds=7200, **lent).result()]
        rest = stranger.create_rest_client()
        if hasattr(rest, "copy_weights"):
            copies.append(rest.copy_weights(path, "abroad", ttl_seconds=7200, **lent).result())
        listed = {row.tinker_path: row for row in rest.list_user_checkpoints().result().checkpoints}
        assert all(listed[copy].expires_at is not None for copy in copies)


def test_making_sampling_clients(client: Any, run: Any) -> None:
    """With a policy of retries, in place of a name, of what goes on training; stability is not recorded here."""
    path = run.save_weights_for_sampler("sampled").result().path
    retries = {"retry_config": RetryConfig(max_connections=2)}
    expected = current(run)
    samplers = [
        done(client.create_sampling_client(model_path=path, **retries)),
        done(run.create_sampling_client(path, **retries)),
        done(run.save_weights_and_get_sampling_client(name="unused", **retries)),
        tinker.SamplingClient.create(client.holder, model_path=path, **retries).result(),
    ]
    samplers.append(
        tinker.SamplingClient.create(client.holder, sampling_session_id=samplers[0]._sampling_session_id).result()
        if VERSION >= (0, 38)
        else tinker.SamplingClient.create(
            client.holder, base_model=BASE, sampling_session_id=samplers[0]._sampling_session_id
        ).result()
    )
    for sampler in samplers:
        np.testing.assert_allclose(sampler.compute_logprobs(PROMPT).result()[1:], expected, atol=1e-5)
    if known(run.save_weights_and_get_sampling_client, kind="inflight"):
        done(run.save_weights_and_get_sampling_client(kind="inflight"))
    if known(client.create_sampling_client, record_stability_info=True):
        recording = {"record_stability_info": True}
        for sampler in (
            done(client.create_sampling_client(model_path=path, **recording)),
            done(run.create_sampling_client(path, **recording)),
            done(run.save_weights_and_get_sampling_client(**recording)),
            tinker.SamplingClient.create(client.holder, model_path=path, **recording).result(),
        ):
            with pytest.raises(tinker.TinkerError, match=NOT_OFFERED):
                sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=1)).result()


def test_what_a_sample_can_tell(client: Any) -> None:
    sampler = done(client.create_sampling_client(base_model=BASE))
    wanted = np.array([[7, 8]] * (len(TEXT) - 1), np.int64)
    asked = known(
        sampler.sample,
        topk_sample_logprobs=2,
        target_prompt_logprobs=types.TensorData.from_numpy(wanted),
        prompt_alt_tokens_k=3,
        prompt_logprobs_last_n=2,
    )
    answer = sampler.sample(
        prompt=PROMPT,
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=3, stop=[]),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=1,
        **asked,
    ).result()
    assert len(answer.sequences[0].tokens) == 3
    assert answer.topk_prompt_logprobs[-1]
    if "target_prompt_logprobs" in asked:
        assert list(answer.target_prompt_logprobs.shape) == list(wanted.shape)
    if "topk_sample_logprobs" in asked:
        assert [len(row) for row in answer.sequences[0].topk_logprobs] == [2, 2, 2]
    if "prompt_alt_tokens_k" in asked:
        assert list(answer.prompt_alt_tokens.tokens.shape) == [len(TEXT) - 1, 3]
    if "prompt_logprobs_last_n" in asked:
        assert [each is None for each in answer.prompt_logprobs] == [True] * (len(TEXT) - 2) + [False] * 2
        last = sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=2).result()
        assert last == answer.prompt_logprobs


def test_async_names_take_the_same() -> None:
    """So one row of the table stands for both flavours of a call."""
    for kind in (tinker.ServiceClient, tinker.TrainingClient, tinker.SamplingClient):
        for name in dir(kind):
            if inspect.iscoroutinefunction(inspect.unwrap(getattr(kind, name))) and name.endswith("_async"):
                plain = getattr(kind, name.removesuffix("_async"))
                assert list(inspect.signature(getattr(kind, name)).parameters) == list(
                    inspect.signature(plain).parameters
                )

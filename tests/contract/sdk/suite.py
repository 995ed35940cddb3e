"""What any supported SDK may expect of a server, written so that SDK 0.25 and SDK 0.38 both can run it.

Runs in the client's own environment (`python -m pytest tests/contract/sdk`) against the server named by
TINKER_BASE_URL and TINKER_API_KEY, which serves tinsmith/tiny. Imports nothing of tinsmith. The releases differ in
what a call hands back (a client, or a future of one), which `done` hides, and in how they resume: a test each.
Mistakes and lost answers are in suite_trouble.py.
"""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import numpy as np
import pytest
import tinker
from common import BASE, TEXT, VERSION, current, datum, done, logprobs, step
from tinker import types

WEIGHTS = [0.5, 2.0, 0.0, 3.0, 1.0, 0.25, 1.5]
HELLO = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def client() -> tinker.ServiceClient:
    return tinker.ServiceClient()


@pytest.fixture
def run(client: Any) -> Any:
    return done(client.create_lora_training_client(BASE, rank=8, seed=3))


@pytest.fixture
def rest(client: Any) -> Any:
    return client.create_rest_client()


def test_capabilities(client: Any) -> None:
    models = done(client.get_server_capabilities()).supported_models
    assert BASE in [model.model_name for model in models]


def test_supervised_training(run: Any) -> None:
    losses = [step(run) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_optim_step_says_what_it_did(run: Any) -> None:
    run.forward_backward([datum()], "cross_entropy").result()
    metrics = run.optim_step(types.AdamParams(learning_rate=1e-3)).result().metrics
    assert metrics["grad_norm"] > 0


def test_weights_of_any_sign(run: Any) -> None:
    weights = [-weight for weight in WEIGHTS]
    output = run.forward_backward([datum(weights=weights)], "cross_entropy").result()
    assert output.metrics["loss:sum"] == pytest.approx(-float(np.dot(logprobs(output)[0], weights)), abs=1e-4)


def test_several_targets_a_position(run: Any) -> None:
    item = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={
            "target_tokens": np.array([[4, 5], [6, 7], [8, 9]], np.int64),
            "weights": np.full((3, 2), 0.5, np.float32),
        },
    )
    output = run.forward_backward([item], "cross_entropy").result()
    assert output.loss_fn_outputs[0]["logprobs"].shape == [3, 2]


def test_a_batch_of_two_requests() -> None:
    """Of a client that is told to put at most ten data into one; the SDK posts the second first."""
    client = tinker.ServiceClient()
    client.holder._client_config = client.holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 10})
    run = done(client.create_lora_training_client(BASE, rank=8, seed=3))
    data = [datum([3 + i, 4, 5 + i % 7]) for i in range(13)]
    before = run._request_id_counter
    output = run.forward_backward(data, "cross_entropy").result()
    assert run._request_id_counter == before + 2
    assert len(output.loss_fn_outputs) == 13
    single = current(run, [3 + 12, 4, 5 + 12 % 7])
    np.testing.assert_array_equal(logprobs(output)[12], single)


def test_reinforcement_learning(run: Any) -> None:
    """Two steps on groups: sample from a snapshot, train with the sampler's own log-probabilities."""
    prompt = types.ModelInput.from_ints(TEXT)
    for _ in range(2):
        sampler = done(run.save_weights_and_get_sampling_client())
        params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=4, stop=[0])
        group = sampler.sample(prompt, num_samples=4, sampling_params=params).result().sequences
        assert len(group) == 4
        data = []
        for index, sequence in enumerate(group):
            tokens = TEXT + list(sequence.tokens)
            padding = [0.0] * (len(TEXT) - 1)
            advantages = padding + [1.0 if index % 2 else -1.0] * len(sequence.tokens)
            data.append(datum(tokens, logprobs=padding + list(sequence.logprobs), advantages=advantages))
        output = run.forward_backward(data, "importance_sampling").result()
        for sequence, trained in zip(group, logprobs(output), strict=True):
            np.testing.assert_allclose(trained[len(TEXT) - 1 :], sequence.logprobs, atol=1e-5)
        run.optim_step(types.AdamParams(learning_rate=1e-3)).result()


@pytest.mark.parametrize("loss", ["ppo", "cispo", "dro"])
def test_clipped_and_regularised_losses(run: Any, loss: str) -> None:
    """On policy each of them has the gradient of -Σ A·lp, whatever its thresholds."""
    now = current(run).tolist()
    item = datum(logprobs=now, advantages=[1.0] * len(now))
    config = {"dro": {"beta": 0.1}}.get(loss, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1})
    plain = run.forward_backward([datum(weights=[1.0] * len(now))], "cross_entropy")
    expected = run.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]
    passed = run.forward_backward([item], loss, config)
    found = run.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"]
    assert np.isfinite(plain.result().metrics["loss:sum"] + passed.result().metrics["loss:sum"])
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_loss_of_the_callers_own(run: Any) -> None:
    pytest.importorskip("torch")
    seen: list[float] = []

    def loss(data: Any, found: Any) -> Any:
        seen.append(float(found[0].detach().sum()))
        return -found[0].sum(), {"mine": 3.0}

    before = run.forward([datum()], "cross_entropy").result().metrics["loss:sum"]
    metrics = done(run.forward_backward_custom([datum()], loss)).metrics
    run.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    assert seen == [pytest.approx(-before, abs=1e-4)]
    assert metrics["loss:sum"] == pytest.approx(before, abs=1e-4)
    assert run.forward([datum()], "cross_entropy").result().metrics["loss:sum"] < before


@pytest.mark.skipif(
    not hasattr(tinker.ServiceClient, "create_custom_loss"), reason="earlier releases evaluate losses in the client"
)
def test_a_loss_that_the_server_evaluates(client: Any) -> None:
    """An uploaded graph gives what the client computes itself."""
    torch = pytest.importorskip("torch")

    def squares(logprobs: Any, weights: Any) -> Any:
        return (logprobs**2 * weights).sum() / 2, {"custom/largest:sum": logprobs.detach().max()}

    def in_the_client(data: Any, found: Any) -> Any:
        return squares(found[0], torch.tensor(WEIGHTS))

    handle = client.create_custom_loss(squares, {"logprobs": 1, "weights": 1}).result()
    item = datum(weights=WEIGHTS)
    first, second = (done(client.create_lora_training_client(BASE, rank=8, seed=3)) for _ in range(2))
    theirs = first.forward_backward_custom([item], handle).result()
    ours = second.forward_backward_custom([item], in_the_client).result()
    assert theirs.metrics["custom/largest:sum"] == pytest.approx(float(ours.metrics["custom/largest:sum"]), abs=1e-5)
    for run in (first, second):
        run.optim_step(types.AdamParams(learning_rate=5e-3)).result()
    np.testing.assert_allclose(current(first), current(second), atol=1e-5)


def test_resume_with_and_without_the_optimizer(client: Any, run: Any) -> None:
    """As the release resumes when it follows the server's flags."""
    step(run)
    path = run.save_state("mid").result().path
    assert path.endswith("/weights/mid")
    step(run)
    expected = step(run)
    resumed = done(client.create_training_client_from_state_with_optimizer(path))
    step(resumed)
    assert step(resumed) == expected
    weights_only = done(client.create_training_client_from_state(path, user_metadata={"from": "mid"}))
    step(weights_only)
    assert step(weights_only) != expected


@pytest.mark.skipif(VERSION >= (0, 38), reason="0.38 resumes in one request only")
@pytest.mark.parametrize("keeps_optimizer", [False, True])
def test_resume_in_three_requests(run: Any, keeps_optimizer: bool) -> None:
    """weights_info, create_model, load_weights: what 0.25 does where a server doesn't say better."""
    old = tinker.ServiceClient()
    old.holder._client_config = old.holder._client_config.model_copy(update={"create_model_via_load_weights": False})
    step(run)
    path = run.save_state("old-way").result().path
    step(run)
    expected = step(run)
    make = old.create_training_client_from_state
    if keeps_optimizer:
        make = old.create_training_client_from_state_with_optimizer
    resumed = done(make(path, user_metadata={"from": "old-way"}))
    assert resumed.get_info().lora_rank == 8
    step(resumed)
    assert (step(resumed) == expected) is keeps_optimizer


def test_load_state_into_the_run(run: Any) -> None:
    path = run.save_state("start").result().path
    start = current(run)
    step(run)
    assert (current(run) != start).any()
    run.load_state(path).result()
    np.testing.assert_array_equal(current(run), start)


def test_a_snapshot_is_frozen(run: Any) -> None:
    sampler = done(run.save_weights_and_get_sampling_client())
    prompt = types.ModelInput.from_ints(TEXT)
    before = sampler.compute_logprobs(prompt).result()
    assert before[0] is None
    np.testing.assert_allclose(before[1:], current(run), atol=1e-5)
    step(run)
    assert sampler.compute_logprobs(prompt).result() == before


def test_a_named_sampler_checkpoint(client: Any, run: Any) -> None:
    path = run.save_weights_for_sampler("published").result().path
    for sampler in (done(client.create_sampling_client(model_path=path)), done(run.create_sampling_client(path))):
        assert sampler.get_base_model() == BASE
        found = sampler.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()
        np.testing.assert_allclose(found[1:], current(run), atol=1e-5)


def test_sampling_is_seeded(client: Any) -> None:
    sampler = done(client.create_sampling_client(base_model=BASE))
    prompt = types.ModelInput.from_ints(TEXT)

    def tokens(seed: int) -> list[list[int]]:
        params = types.SamplingParams(max_tokens=12, seed=seed, top_k=50, top_p=0.95)
        return [list(s.tokens) for s in sampler.sample(prompt, 2, params).result().sequences]

    assert tokens(1) == tokens(1) != tokens(2)


def test_prompt_logprobs_and_their_alternatives(client: Any) -> None:
    sampler = done(client.create_sampling_client(base_model=BASE))
    answer = sampler.sample(
        types.ModelInput.from_ints(TEXT),
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    ).result()
    assert len(answer.prompt_logprobs) == len(answer.topk_prompt_logprobs) == len(TEXT)
    assert answer.topk_prompt_logprobs[0] is None
    top = dict(answer.topk_prompt_logprobs[1])
    assert len(top) == 3
    assert answer.prompt_logprobs[1] <= max(top.values()) + 1e-6


def test_stops(client: Any, run: Any) -> None:
    """At the model's own end, at a string, at a token, never."""
    sampler = done(client.create_sampling_client(base_model=BASE))
    tokenizer = run.get_tokenizer()
    prompt = types.ModelInput.from_ints(tokenizer.encode(HELLO))

    def sample(max_tokens: int = 60, **params: Any) -> Any:
        asked = types.SamplingParams(max_tokens=max_tokens, temperature=0.0, **params)
        return sampler.sample(prompt, num_samples=1, sampling_params=asked).result().sequences[0]

    plain = sample()
    assert plain.stop_reason == "stop"
    assert plain.tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    endless = sample(stop=[])
    assert (endless.stop_reason, len(endless.tokens)) == ("length", 60)
    needle = tokenizer.decode(endless.tokens)[3:6]
    for stop in (needle, [needle]):
        cut = sample(stop=stop)
        assert cut.stop_reason == "stop"
        assert needle in tokenizer.decode(cut.tokens)
        assert needle not in tokenizer.decode(cut.tokens[:-1])
    at_token = sample(stop=[plain.tokens[2]])
    assert at_token.tokens[-1] == plain.tokens[2]
    assert sample(max_tokens=2).stop_reason == "length"


def test_a_sampling_client_in_another_process(client: Any) -> None:
    """A copy draws its sequence numbers from far above 32 bits."""
    sampler = done(client.create_sampling_client(base_model=BASE))
    copy = pickle.loads(pickle.dumps(sampler))
    params = types.SamplingParams(max_tokens=4, seed=1)
    prompt = types.ModelInput.from_ints(TEXT)
    here, there = (one.sample(prompt, 1, params).result().sequences[0].tokens for one in (sampler, copy))
    assert here == there


def test_the_async_calls(client: Any) -> None:
    async def go() -> float:
        run = await client.create_lora_training_client_async(BASE, rank=4)
        passed = await run.forward_backward_async([datum()], "cross_entropy")
        stepped = await run.optim_step_async(types.AdamParams())
        await stepped
        sampler = await run.save_weights_and_get_sampling_client_async()
        params = types.SamplingParams(max_tokens=3)
        answer = await sampler.sample_async(types.ModelInput.from_ints(TEXT), 2, params)
        assert len(answer.sequences) == 2
        return float((await passed).metrics["loss:sum"])

    assert asyncio.run(go()) > 0


def test_runs_are_listed(client: Any, rest: Any) -> None:
    run = done(client.create_lora_training_client(BASE, rank=2, user_metadata={"who": "suite"}))
    listed = rest.list_training_runs(limit=100).result()
    assert run.model_id in [row.training_run_id for row in listed.training_runs]
    assert listed.cursor.total_count >= 1
    info = rest.get_training_run(run.model_id).result()
    assert (info.base_model, info.lora_rank, info.user_metadata) == (BASE, 2, {"who": "suite"})


def test_checkpoints_are_listed_kept_and_deleted(run: Any, rest: Any) -> None:
    training = run.save_state("one", ttl_seconds=7200).result().path
    sampler = run.save_weights_for_sampler("two").result().path
    rows = {row.checkpoint_id: row for row in rest.list_checkpoints(run.model_id).result().checkpoints}
    assert {name: row.checkpoint_type for name, row in rows.items()} == {
        "weights/one": "training",
        "sampler_weights/two": "sampler",
    }
    assert rows["weights/one"].size_bytes > 0
    assert rows["weights/one"].tinker_path == training
    assert rows["weights/one"].expires_at is not None
    assert rows["sampler_weights/two"].expires_at is None
    assert rest.get_training_run_by_tinker_path(training).result().last_checkpoint.checkpoint_id == "weights/one"
    info = rest.get_weights_info_by_tinker_path(training).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (BASE, True, 8)
    rest.set_checkpoint_ttl_from_tinker_path(training, None).result()
    rest.set_checkpoint_ttl_from_tinker_path(sampler, 3600).result()
    kept = {row.tinker_path: row.expires_at for row in rest.list_user_checkpoints().result().checkpoints}
    assert kept[training] is None
    assert kept[sampler] is not None
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    rest.delete_checkpoint(run.model_id, "weights/one").result()
    assert rest.list_checkpoints(run.model_id).result().checkpoints == []


def test_sessions_and_samplers_are_listed(client: Any, run: Any, rest: Any) -> None:
    path = run.save_weights_for_sampler("seen").result().path
    done(client.create_sampling_client(model_path=path))
    session_id = run.model_id.partition(":")[0]
    assert session_id in rest.list_sessions(limit=100).result().sessions
    session = rest.get_session(session_id).result()
    assert run.model_id in session.training_run_ids
    sampler = rest.get_sampler(session.sampler_ids[-1]).result()
    assert sampler.base_model == BASE


@pytest.mark.skipif(not hasattr(tinker.ServiceClient, "close"), reason="earlier releases never end a session")
def test_a_session_is_finished(rest: Any) -> None:
    with tinker.ServiceClient() as client:
        run = done(client.create_lora_training_client(BASE, rank=2))
        assert done(rest.get_session(run.model_id.partition(":")[0])).training_run_ids == [run.model_id]

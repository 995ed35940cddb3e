"""Mistakes of every kind through the real SDK: refused at once, with the cure, and without harm to any run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.contract.raw import BASE, WITHIN_S, Raw
from tests.service import Service, running

# The SDK never closes its connections; the collector finds them during or after a test.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

TEXT = [5, 17, 42, 99, 7, 13, 28, 64]
N = len(TEXT) - 1
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    limits = ("--lora-max-rank", "64", "--max-request-tokens", "4000", "--max-samples-per-request", "8")
    flags = (*limits, "--gap-timeout-s", "1", "--poll-hold-s", "2")
    with running(tmp_path_factory.mktemp("bad-input") / "data", *flags) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=service.key)


@dataclass
class Pair:
    """The run that errs, a bystander, a sampler of the first; and what they answered before anything went wrong."""

    run: tinker.TrainingClient
    other: tinker.TrainingClient
    sampler: tinker.SamplingClient
    before: list[Any]

    def now(self) -> list[Any]:
        prompt = types.ModelInput.from_ints(TEXT)
        passes = [run.forward([datum()], "cross_entropy") for run in (self.run, self.other)]
        return [p.result().loss_fn_outputs[0]["logprobs"].tolist() for p in passes] + [
            self.sampler.compute_logprobs(prompt).result()
        ]


@pytest.fixture(scope="module")
def trained(client: tinker.ServiceClient) -> Pair:
    run, other = (client.create_lora_training_client(BASE, rank=4, seed=seed).result() for seed in (1, 2))
    for one in (run, other):
        one.forward_backward([datum()], "cross_entropy")
        one.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    pair = Pair(run, other, run.save_weights_and_get_sampling_client().result(), [])
    pair.before = pair.now()
    return pair


@pytest.fixture
def pair(trained: Pair) -> Iterator[Pair]:
    """After each test both runs and the sampler answer as before, to the bit."""
    yield trained
    assert trained.now() == trained.before


def tensor(values: Any, dtype: str = "float32", shape: list[int] | None = None) -> types.TensorData:
    flat = np.ravel(values).tolist()
    return types.TensorData(data=flat, dtype=dtype, shape=shape or list(np.shape(values)))  # type: ignore[arg-type]


def targets(values: list[int]) -> types.TensorData:
    return tensor(values, "int64")


def datum(tokens: list[int] = TEXT[:-1], targets: Any = None, **inputs: Any) -> types.Datum:
    """Inputs of None are left out; those that are no TensorData become float32."""
    made = {"target_tokens": tensor(TEXT[1:], "int64") if targets is None else targets}
    made |= {k: v if isinstance(v, types.TensorData) else tensor(v) for k, v in inputs.items()}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs={k: v for k, v in made.items() if v is not False}
    )


def policy(**changes: Any) -> types.Datum:
    return datum(**{"logprobs": [-1.0] * N, "advantages": [1.0] * N, **changes})


def refused(call: Callable[[], Any], words: str) -> str:
    """The call fails with the user's error, within a second (a busy machine gets three tries)."""
    elapsed_s = []
    for _ in range(3):
        started = time.monotonic()
        with pytest.raises(tinker.TinkerError, match=words) as caught:
            call().result()
        elapsed_s.append(time.monotonic() - started)
        error = caught.value
        if isinstance(error, tinker.RequestFailedError):
            assert error.category == types.RequestErrorCategory.User
        else:
            assert isinstance(error, tinker.APIStatusError)
            assert 400 <= error.status_code < 500
        if elapsed_s[-1] < WITHIN_S:
            return str(error)
    raise AssertionError(f"refused, but only after {elapsed_s} s")


CROSS_ENTROPY = {
    "target too large": (datum(targets=targets([*TEXT[2:], 1024])), r"target_tokens must lie in 0\.\.1023, found 1024"),
    "target negative": (datum(targets=targets([*TEXT[2:], -100])), r"0\.\.1023, found -100.*weight 0"),
    "target beyond 32 bits": (datum(targets=targets([*TEXT[2:], 2**40])), r"0\.\.1023"),
    "input too large": (datum([*TEXT[:-2], 1024]), r"model input tokens must lie in 0\.\.1023, found 1024"),
    "input negative": (datum([*TEXT[:-2], -1]), r"0\.\.1023, found -1"),
    "empty sequence": (datum([], targets([])), "give at least one token"),
    "fewer targets than tokens": (datum(targets=targets(TEXT[2:])), "give one target a token"),
    "more targets than tokens": (datum(targets=targets(TEXT)), "give one target a token"),
    "fewer weights than targets": (datum(weights=[1.0] * (N - 1)), "weights has shape .* must be equal"),
    "a column of weights": (datum(weights=[[1.0]] * N), "weights has shape .* must be equal"),
    "no targets": (datum(targets=False), "needs the input target_tokens"),
    "superfluous input": (datum(mask=[1.0] * N), "takes no input 'mask'; it takes: target_tokens, weights"),
    "advantages": (datum(advantages=[1.0] * N), "takes no input 'advantages'"),
    "NaN weight": (datum(weights=[NAN] + [1.0] * (N - 1)), "weights holds NaN or infinity: send finite"),
    "infinite weight": (datum(weights=[-INF] + [1.0] * (N - 1)), "weights holds NaN or infinity: send finite"),
    "float targets": (datum(targets=tensor(TEXT[1:])), "target_tokens must be int64, not float32"),
    "integer weights": (datum(weights=tensor([1] * N, "int64")), "weights must be float32, not int64"),
    "three dimensions": (datum(weights=tensor([1.0] * N, shape=[N, 1, 1])), r"shape \[7, 1, 1\] is not \[N\]"),
    "longer than the context": (datum([1] * 2049, targets([1] * 2049)), "longer than the context of .* 2048"),
}


@pytest.mark.parametrize("mistake", CROSS_ENTROPY)
@pytest.mark.parametrize("call", ["forward", "forward_backward"])
def test_bad_data(pair: Pair, mistake: str, call: str) -> None:
    bad, words = CROSS_ENTROPY[mistake]
    message = refused(lambda: getattr(pair.run, call)([datum(), bad], "cross_entropy"), words)
    assert "datum 1" in message


POLICY = {
    "no advantages": (datum(logprobs=[-1.0] * N), "needs the input advantages"),
    "no logprobs": (datum(advantages=[-1.0] * N), "needs the input logprobs"),
    "weights": (policy(weights=[1.0] * N), "takes no input 'weights'"),
    "short advantages": (policy(advantages=[1.0]), "advantages has shape .* must be equal"),
    "long logprobs": (policy(logprobs=[-1.0] * (N + 1)), "logprobs has shape .* must be equal"),
    "NaN logprob": (policy(logprobs=[NAN] * N), "logprobs holds NaN or infinity"),
    "infinite advantage": (policy(advantages=[INF] * N), "advantages holds NaN or infinity"),
    "integer advantages": (policy(advantages=tensor([1] * N, "int64")), "advantages must be float32, not int64"),
    "several targets a position": (
        policy(targets=tensor([[1, 2]] * N, "int64"), logprobs=[[-1.0] * 2] * N, advantages=[[1.0] * 2] * N),
        r"takes target_tokens of shape \[N\], not \[7, 2\]",
    ),
}


@pytest.mark.parametrize("mistake", POLICY)
@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro"])
def test_bad_data_for_policy_losses(pair: Pair, mistake: str, loss: Any) -> None:
    bad, words = POLICY[mistake]
    refused(lambda: pair.run.forward_backward([bad], loss), f"datum 0.*{words}")


LOSSES = {
    "unknown loss": ("no_such_loss", None, "unknown loss 'no_such_loss'; offered: cross_entropy, importance_sampling"),
    "loss without a published formula": ("stable_reinforce", None, "use importance_sampling"),
    "loss without its mask": ("gspo", None, "needs the input sequence_ratio_mask"),
    "custom loss without an id": ("custom", None, "takes the setting loss_id alone"),
    "custom loss that was never uploaded": ("custom", {"loss_id": "s0:loss:0"}, "no custom loss 's0:loss:0'"),
    "unknown key": ("ppo", {"epsilon": 0.2}, "no setting 'epsilon'; it has: clip_low_threshold, clip_high_threshold"),
    "key of another loss": ("dro", {"clip_low_threshold": 0.2}, "no setting 'clip_low_threshold'; it has: beta"),
    "key where there are none": ("importance_sampling", {"beta": 0.2}, "no setting 'beta'; it has: none"),
    "NaN": ("dro", {"beta": NAN}, "beta must be a finite number"),
    "infinity": ("cispo", {"clip_high_threshold": INF}, "clip_high_threshold must be a finite number"),
    "text": ("dro", {"beta": "much"}, "beta must be a finite number, not 'much'"),
    "crossed thresholds": ("ppo", {"clip_low_threshold": 1.5}, r"\(1.5\) is above clip_high_threshold \(1.2\)"),
    "crossed with the default": ("cispo", {"clip_high_threshold": -1.0}, r"\(0.0\) is above clip_high_threshold"),
}


@pytest.mark.parametrize("mistake", LOSSES)
def test_bad_losses(pair: Pair, mistake: str) -> None:
    loss, config, words = LOSSES[mistake]
    refused(lambda: pair.run.forward_backward([policy()], loss, config), words)  # type: ignore[arg-type]


def test_too_much_in_one_request(pair: Pair) -> None:
    data = [datum([1] * 1500, targets([1] * 1500)) for _ in range(3)]
    refused(lambda: pair.run.forward_backward(data, "cross_entropy"), "4500 tokens, at most 4000.*several calls")


ADAM = {
    "learning_rate": ([-1e-4, NAN, INF], "learning_rate must be"),
    "beta1": ([1.0, -0.1, NAN], "beta1 must"),
    "beta2": ([1.5, -0.1], "beta2 must"),
    "eps": ([0.0, -1e-8, NAN], "eps must"),
    "weight_decay": ([-0.1, INF], "weight_decay must"),
    "grad_clip_norm": ([-1.0, NAN], "grad_clip_norm must"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (values, _) in ADAM.items() for value in values])
def test_bad_optimizer_parameters(pair: Pair, name: str, value: float) -> None:
    """Accumulated gradients survive the refusal."""
    params = types.AdamParams(learning_rate=0.0).model_copy(update={name: value})
    pair.run.forward_backward([datum()], "cross_entropy").result()
    try:
        refused(lambda: pair.run.optim_step(params), ADAM[name][1])
    finally:
        good = pair.run.optim_step(types.AdamParams(learning_rate=0.0)).result()
    assert good.metrics is not None
    assert good.metrics["grad_norm"] > 0


def test_a_step_without_gradients_counts_as_zero_gradients(client: tinker.ServiceClient) -> None:
    """Accepted, on a fresh run and after a step: moments decay, and move the weights a little further."""
    run = client.create_lora_training_client(BASE, rank=2, seed=1).result()
    start = run.forward([datum()], "cross_entropy").result().metrics
    first = run.optim_step(types.AdamParams(learning_rate=1e-2)).result().metrics
    assert first is not None
    assert first["grad_norm"] == 0
    assert run.forward([datum()], "cross_entropy").result().metrics == start


@pytest.mark.parametrize(
    ("params", "num_samples", "words"),
    [
        ({"max_tokens": 0}, 1, "max_tokens must be at least 1"),
        ({"max_tokens": -5}, 1, "max_tokens must be at least 1"),
        ({"max_tokens": 2041}, 1, r"exceed the context of tinsmith/tiny, 2048: ask for at most 2040"),
        ({}, 0, r"num_samples must lie in 1\.\.8, not 0"),
        ({}, -1, r"num_samples must lie in 1\.\.8"),
        ({}, 9, r"num_samples must lie in 1\.\.8"),
        ({"temperature": -0.1}, 1, "temperature must be 0 .greedy. or more"),
        ({"top_p": 0.0}, 1, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.01}, 1, r"top_p must lie in \(0, 1\]"),
        ({"top_k": -2}, 1, r"top_k must be -1 \(off\) or at least 1"),
        ({"seed": -1}, 1, "seed must lie in"),
        ({"stop": [1024]}, 1, r"stop tokens must lie in 0\.\.1023"),
        ({"stop": [""]}, 1, "empty string: leave it out"),
        ({"stop": ["a"] * 65}, 1, "at most 64"),
    ],
)
def test_bad_sampling_parameters(pair: Pair, params: dict[str, Any], num_samples: int, words: str) -> None:
    asked = types.SamplingParams(**{"max_tokens": 4, **params})
    prompt = types.ModelInput.from_ints(TEXT)
    refused(lambda: pair.sampler.sample(prompt, num_samples=num_samples, sampling_params=asked), words)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "the prompt is empty: give at least one token"),
        ([1024], r"prompt tokens must lie in 0\.\.1023, found 1024"),
        ([3, -1], r"prompt tokens must lie in 0\.\.1023, found -1"),
        ([1] * 2048, "the prompt has 2048 tokens; tinsmith/tiny holds at most 2047 and one more"),
    ],
)
def test_bad_prompts(pair: Pair, prompt: list[int], words: str) -> None:
    params = types.SamplingParams(max_tokens=1)
    refused(lambda: pair.sampler.sample(types.ModelInput.from_ints(prompt), 1, params), words)


def test_extras_that_are_not_offered(pair: Pair) -> None:
    prompt, params = types.ModelInput.from_ints(TEXT), types.SamplingParams(max_tokens=1)
    refused(lambda: pair.sampler.sample(prompt, 1, params, topk_prompt_logprobs=129), r"0\.\.128")
    refused(lambda: pair.sampler.sample(prompt, 1, params, topk_sample_logprobs=129), r"0\.\.128")
    image = types.ModelInput(chunks=[types.ImageChunk(data=b"\x89PNG", format="png")])
    refused(lambda: pair.sampler.sample(image, 1, params), "only token chunks")


def test_without_max_tokens_a_sample_may_fill_the_context(pair: Pair) -> None:
    prompt = types.ModelInput.from_ints([1] * 2040)
    sequence = pair.sampler.sample(prompt, 1, types.SamplingParams(stop=[])).result().sequences[0]
    assert (len(sequence.tokens), sequence.stop_reason) == (8, "length")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"base_model": "nobody/nothing"}, "'nobody/nothing' is not served here; served: tinsmith/tiny"),
        ({"base_model": ""}, "served: tinsmith/tiny"),
        ({"rank": 0}, r"rank must lie in 1\.\.64, not 0"),
        ({"rank": -8}, r"rank must lie in 1\.\.64, not -8"),
        ({"rank": 65}, r"rank must lie in 1\.\.64, not 65"),
        ({"seed": -1}, "seed must lie in"),
        ({"optimizer": types.DimuonOptimizerConfig(version=1)}, "adamw"),
        ({"user_metadata": {"note": "x" * 9000}}, "at most 8192 are kept: shorten it"),
    ],
)
def test_bad_runs(client: tinker.ServiceClient, pair: Pair, asked: dict[str, Any], words: str) -> None:
    refused(lambda: client.create_lora_training_client(**{"base_model": BASE, "rank": 4, **asked}), words)


@pytest.mark.parametrize("rank", [1, 3, 63])
def test_ranks_need_not_be_powers_of_two(client: tinker.ServiceClient, pair: Pair, rank: int) -> None:
    run = client.create_lora_training_client(BASE, rank=rank).result()
    run.forward_backward([datum()], "cross_entropy")
    assert (run.optim_step(types.AdamParams()).result().metrics or {})["grad_norm"] > 0


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../etc/passwd", "*", "a*", "a b", "a\0b", "é", "x" * 129])
def test_bad_checkpoint_names(pair: Pair, name: str) -> None:
    words = "is no checkpoint name: use 1 to 128 letters, digits"
    refused(lambda: pair.run.save_state(name), words)
    refused(lambda: pair.run.save_weights_for_sampler(name), words)


@pytest.mark.parametrize("ttl", [0, -1, 3599, 10**10])
def test_bad_times_to_live(pair: Pair, ttl: int) -> None:
    refused(lambda: pair.run.save_state("x", ttl_seconds=ttl), "ttl_seconds must lie in")


BOGUS = (
    "tinker://",
    "tinker://nowhere",
    "tinker://nowhere/weights",
    "tinker://nowhere/weights/",
    "tinker://nowhere/weights/a/b",
    "tinker://nowhere/other/a",
    "tinker:///weights/a",
    "tinker://nowhere/weights/..",
    "tinker://nowhere/weights/*",
    "tinker://../weights/a",
)


@pytest.mark.parametrize("path", BOGUS)
def test_bogus_paths(service: Service, client: tinker.ServiceClient, pair: Pair, path: str) -> None:
    words = "no checkpoint"
    refused(lambda: client.create_training_client_from_state(path), words)
    refused(lambda: client.create_training_client_from_state_with_optimizer(path), words)
    refused(lambda: client.create_sampling_client(model_path=path), words)
    with pytest.warns(FutureWarning, match="load_state"):
        refused(lambda: pair.run.load_state(path), words)
    with contextlib.closing(Raw(service.url, service.key)) as raw:
        assert raw.send("POST", "/weights_info", json={"tinker_path": path}).status_code in (400, 404)


def test_checkpoints_that_do_not_fit(client: tinker.ServiceClient, pair: Pair) -> None:
    small = client.create_lora_training_client(BASE, rank=2).result()
    training = small.save_state("small").result().path
    sampler = small.save_weights_for_sampler("small").result().path
    with pytest.warns(FutureWarning, match="load_state"):
        refused(lambda: pair.run.load_state(training), "rank 2.*rank 4.*create_training_client_from_state")
    refused(lambda: client.create_sampling_client(model_path=training), "save one with save_weights_for_sampler")
    refused(lambda: client.create_training_client_from_state_with_optimizer(sampler), "load one saved with save_state")


def test_the_same_name_twice_needs_overwrite(client: tinker.ServiceClient, pair: Pair) -> None:
    """Then the last counts; what was loaded or sampled from before stays as it was."""
    run = client.create_lora_training_client(BASE, rank=4, seed=1).result()
    prompt = types.ModelInput.from_ints(TEXT)
    paths, samplers, answers = [], [], []
    for _ in range(2):
        paths.append(run.save_state("twice", overwrite=True).result().path)
        refused(lambda: run.save_state("twice"), "weights/twice already.*overwrite=True")
        sampler_path = run.save_weights_for_sampler("twice").result().path
        samplers.append(client.create_sampling_client(model_path=sampler_path).result())
        answers.append(samplers[-1].compute_logprobs(prompt).result())
        run.forward_backward([datum()], "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert paths[0] == paths[1]
    assert answers[0] != answers[1]
    assert [s.compute_logprobs(prompt).result() for s in samplers] == answers
    resumed = client.create_training_client_from_state(paths[0]).result()
    loaded = resumed.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].tolist()
    np.testing.assert_allclose(loaded, np.array(answers[1][1:], np.float32), atol=1e-5)


def test_a_mistake_that_the_client_finds_does_not_hold_up_the_run(client: tinker.ServiceClient) -> None:
    """The SDK takes a number, then finds that it can't write the request, and never sends that number."""
    run = client.create_lora_training_client(BASE, rank=2).result()
    pointer = types.ModelInput(chunks=[types.ImageAssetPointerChunk(location="x", format="png")])
    bad = types.Datum(model_input=pointer, loss_fn_inputs={"target_tokens": targets([1])})
    with pytest.raises(ValueError, match="Unsupported model input chunk"):
        run.forward_backward([bad], "cross_entropy").result()
    assert run.forward([datum()], "cross_entropy").result(timeout=10).metrics["loss:sum"] > 0


def test_refusals_consume_their_number_and_leave_no_gradient(client: tinker.ServiceClient) -> None:
    """A burst of good and bad requests, posted before any result is fetched."""
    run = client.create_lora_training_client(BASE, rank=4, seed=1).result()
    bad, _ = CROSS_ENTROPY["target too large"]
    futures = [run.forward_backward([datum()] if i % 2 else [bad], "cross_entropy") for i in range(8)]
    step = run.optim_step(types.AdamParams(learning_rate=0.0))
    for index, future in enumerate(futures):
        if index % 2:
            assert future.result().metrics["loss:sum"] > 0
        else:
            with pytest.raises(tinker.RequestFailedError):
                future.result()
    found = (step.result().metrics or {})["grad_norm"]
    run.forward_backward([datum()], "cross_entropy")
    once = (run.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics or {})["grad_norm"]
    assert found == pytest.approx(4 * once, rel=1e-5)

"""Each check refuses what it should, with the cure in its message, and lets the rest pass."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tinsmith.config import Settings
from tinsmith.errors import TinsmithError, TooLargeError, UnsupportedError, UserError
from tinsmith.sampling.logits import Warp
from tinsmith.types import AdamParams, BaseInfo, Datum, LossSpec, SamplingParams, Targets
from tinsmith.validate.requests import check_adam, check_lora, check_metadata, check_sample, check_training, check_ttl
from tinsmith.wire.sampling import ParamsBody, SampleBody, SampleRequest, decode_sample
from tinsmith.wire.training import TrainingRequest

INFO = BaseInfo("base", "/nowhere", "llama", vocab_size=100, max_context=16, eos_tokens=(0,))
SETTINGS = Settings(max_request_tokens=40, lora_max_rank=8, max_samples_per_request=4)


def datum(num_tokens: int = 3, **inputs: Any) -> Datum:
    targets = {"target_tokens": np.arange(num_tokens, dtype=np.int64)}
    return Datum(np.arange(num_tokens, dtype=np.int32), {**targets, **inputs})


def training(*data: Datum, loss: str = "cross_entropy", **config: float | str) -> TrainingRequest:
    return TrainingRequest("r", 1, data, LossSpec(loss, config), forward_only=False)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def policy(**inputs: Any) -> Datum:
    return datum(logprobs=floats(3), advantages=floats(3), **inputs)


@pytest.mark.parametrize(
    "request_",
    [
        training(datum()),
        training(datum(weights=floats(3))),
        training(datum(16)),
        training(datum(weights=floats(3, 2), target_tokens=np.ones((3, 2), np.int64))),
        training(policy(), loss="importance_sampling"),
        training(policy(), loss="ppo", clip_low_threshold=0.5),
        training(policy(), loss="cispo", clip_low_threshold=1.0, clip_high_threshold=1.0),
        training(policy(), loss="dro", beta=0.0),
        training(policy(sequence_ratio_mask=floats(3)), loss="gspo"),
        training(policy(clip_low_threshold=floats(3)), loss="ppo"),
        training(policy(clip_low_threshold=floats(3)), loss="cispo", clip_high_threshold=1.0),
        training(policy(clip_high_threshold=floats(3), sequence_ratio_mask=floats(3)), loss="gspo"),
    ],
)
def test_good_training_requests_pass(request_: TrainingRequest) -> None:
    check_training(request_, INFO, SETTINGS)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (training(), "data is empty"),
        (training(datum(0)), "datum 0.*empty"),
        (training(datum(17)), "context of base, 16"),
        (
            training(datum(), Datum(np.int32([1, 100]), datum(2).inputs)),
            "datum 1: model input tokens.*0..99, found 100",
        ),
        (training(datum(target_tokens=np.int64([1, -100, 2]))), "found -100.*weight 0"),
        (training(datum(target_tokens=np.int64([1, 2]))), "one target a token"),
        (training(datum(target_tokens=np.ones((3, 0), np.int64))), "one target a token"),
        (training(datum(target_tokens=floats(3))), "must be int64"),
        (training(datum(weights=floats(2))), "they must be equal"),
        (training(datum(weights=np.ones(3, np.int64))), "weights must be float32"),
        (training(datum(weights=np.float32([1, np.nan, 1]))), "NaN"),
        (training(datum(weights=np.float32([1, np.inf, 1]))), "infinity"),
        (training(datum(mask=floats(3))), "takes no input 'mask'.*target_tokens, weights"),
        (training(Datum(np.int32([1]), {})), "needs the input target_tokens"),
        (training(datum(logprobs=floats(3)), loss="importance_sampling"), "needs the input advantages"),
        (training(datum(target_tokens=np.ones((3, 2), np.int64)), loss="importance_sampling"), "needs|shape"),
        (training(datum(), loss="nonsense"), "offered: cross_entropy, importance_sampling, ppo, cispo, dro"),
        (training(datum(), beta=1.0), "no setting 'beta'"),
        (training(policy(), loss="ppo", beta=1.0), "it has: clip_low_threshold, clip_high_threshold"),
        (training(policy(), loss="ppo", clip_low_threshold=1.3), r"clip_low_threshold \(1.3\) is above .* \(1.2\)"),
        (training(policy(), loss="cispo", clip_high_threshold=-1.0), r"clip_low_threshold \(0.0\) is above"),
        (training(policy(), loss="ppo", clip_high_threshold=float("inf")), "must be a finite number"),
        (training(policy(), loss="dro", beta=float("nan")), "beta must be a finite number"),
        (training(policy(), loss="dro", beta="0.1"), "beta must be a finite number"),
        (training(datum(), loss="dro"), "needs the input logprobs"),
        (training(policy(weights=floats(3)), loss="ppo"), "takes no input 'weights'"),
        (training(policy(), loss="gspo"), "needs the input sequence_ratio_mask"),
        (training(policy(sequence_ratio_mask=0 * floats(3)), loss="gspo"), "zero everywhere: mark the sampled tokens"),
        (training(policy(clip_low_threshold=floats(2)), loss="ppo"), "they must be equal"),
        (training(policy(clip_low_threshold=2 * floats(3)), loss="ppo"), "is above clip_high_threshold at token 0"),
        (training(policy(clip_high_threshold=np.float32([1, 0.5, 1])), loss="ppo"), "above .* at token 1"),
        (
            training(policy(clip_low_threshold=floats(3)), loss="ppo", clip_low_threshold=0.5),
            "both an input and a setting",
        ),
        (training(policy(clip_low_threshold=floats(3)), loss="dro"), "takes no input 'clip_low_threshold'"),
    ],
)
def test_bad_training_requests(request_: TrainingRequest, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_training(request_, INFO, SETTINGS)


def test_too_many_tokens() -> None:
    with pytest.raises(TooLargeError, match="several calls"):
        check_training(training(*[datum(14)] * 3), INFO, SETTINGS)


def test_a_known_loss_that_is_not_on_offer() -> None:
    with pytest.raises(UnsupportedError, match="importance_sampling"):
        check_training(training(datum(), loss="stable_reinforce"), INFO, SETTINGS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": float("nan")}, "learning_rate must be a finite"),
        ({"learning_rate": -1.0}, "0 or more"),
        ({"beta1": 1.0}, "beta1 must lie"),
        ({"beta2": -0.1}, "beta2 must lie"),
        ({"eps": 0.0}, "eps must be greater"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm"),
    ],
)
def test_bad_adam(changes: dict[str, float], words: str) -> None:
    check_adam(AdamParams(learning_rate=0.0))
    with pytest.raises(UserError, match=words):
        check_adam(replace(AdamParams(), **changes))


def sample(**changes: Any) -> SampleRequest:
    names = SampleRequest.__dataclass_fields__
    params = SamplingParams(**{"max_tokens": 4, **{k: v for k, v in changes.items() if k not in names}})
    good = SampleRequest(np.int32([1, 2]), params, 1, None, prompt_logprobs=False, topk_prompt_logprobs=0)
    return replace(good, **{k: v for k, v in changes.items() if k in names})


@pytest.mark.parametrize("good", [{}, {"max_tokens": None}, {"max_tokens": 14}, {"temperature": 0.0}, {"seed": 0}])
def test_good_samples_pass(good: dict[str, Any]) -> None:
    check_sample(sample(**good), INFO, SETTINGS)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 5}, "1..4"),
        ({"prompt": np.zeros(0, np.int32)}, "prompt is empty"),
        ({"prompt": np.int32([100])}, "0..99"),
        ({"prompt": np.ones(16, np.int32)}, "at most 15"),
        ({"max_tokens": 15}, "ask for at most 14"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop_strings": ("",)}, "empty string"),
        ({"stop_strings": ("a", "b" * 257)}, "a string of 257 characters, at most 256 are allowed: shorten it"),
        ({"stop_tokens": (100,)}, "stop tokens"),
        ({"topk_prompt_logprobs": 101}, "topk_prompt_logprobs"),
    ],
)
def test_bad_samples(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_sample(sample(**bad), INFO, SETTINGS)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_samples": 4, "max_tokens": 10, "topk_sample_logprobs": 2},
        {"num_samples": 4, "max_tokens": None, "topk_sample_logprobs": 2},
        {"num_samples": 1, "max_tokens": 1, "prompt": np.ones(15, np.int32), "topk_prompt_logprobs": 100},
    ],
)
def test_an_answer_beyond_the_bound_is_refused_by_its_name(asked: dict[str, Any]) -> None:
    request = sample(**asked)
    check_sample(request, INFO, replace(SETTINGS, max_sample_numbers=2000))
    with pytest.raises(TooLargeError, match=r"at most 100 are allowed \(--max-sample-numbers\)"):
        check_sample(request, INFO, replace(SETTINGS, max_sample_numbers=100))


def test_stability_info_is_refused_by_name_unless_routes_are_replayed() -> None:
    asked = sample(records_routes=True)
    with pytest.raises(UnsupportedError, match=r"record_stability_info.* loss_fn=importance_sampling.*--router-replay"):
        check_sample(asked, INFO, SETTINGS)
    check_sample(asked, INFO, replace(SETTINGS, router_replay=True))


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_bad_ranks_name_the_largest(rank: int) -> None:
    with pytest.raises(UserError, match=r"1\.\.8"):
        check_lora(rank, None, Targets(), SETTINGS)


def test_lora_needs_a_target() -> None:
    check_lora(8, 0, Targets(attn=False, mlp=False), SETTINGS)
    with pytest.raises(UserError, match="train_attn"):
        check_lora(8, 0, Targets(attn=False, mlp=False, unembed=False), SETTINGS)


def test_metadata_becomes_text_and_is_bounded() -> None:
    assert check_metadata({"a": "x", "b": [1], "c": None}) == {"a": "x", "b": "[1]", "c": "null"}
    assert check_metadata(None) == {}
    with pytest.raises(UserError, match="shorten"):
        check_metadata({"a": "x" * 10_000})


@pytest.mark.parametrize("ttl", [0, -1, 3599, 10 * 366 * 86400 + 1, 10**10])
def test_bad_ttl(ttl: int) -> None:
    """As the SDK documents it: one hour to ten years."""
    for good in (None, 3600, 10 * 365 * 86400):
        assert check_ttl(good, Settings()) == good
    with pytest.raises(UserError, match=r"ttl_seconds must lie in 3600\.\."):
        check_ttl(ttl, Settings())


@pytest.mark.parametrize("value", [2**31, 2**63, -(2**63) - 1, 2**64, 10**400])
@pytest.mark.parametrize(
    "name",
    ["max_tokens", "seed", "top_k", "num_samples", "topk_prompt_logprobs", "topk_sample_logprobs", "stop",
     "prompt_alt_tokens_k", "prompt_logprobs_last_n", "temperature", "top_p", "min_p", "presence_penalty", "prompt"],
)  # fmt: skip
def test_no_number_of_a_sample_is_too_large_to_be_refused(name: str, value: int) -> None:
    """What passes can be sampled with; a top_k beyond the vocabulary keeps all of it."""
    given: Any = [value] if name == "stop" else value
    params = {"max_tokens": 4, **({name: given} if name in ParamsBody.__struct_fields__ else {})}
    tokens = [value] if name == "prompt" else [1, 2]
    body = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]}, "sampling_params": params}
    if name in SampleBody.__struct_fields__ and name != "prompt":
        body |= {name: given, "prompt_logprobs": True}
    raw = json.dumps(body).encode()
    is_fine = (name == "top_k" and value > 0) or (name == "seed" and value == 2**31)
    is_fine = is_fine or (name == "temperature" and 0 < value < 10**300)
    if is_fine:
        asked = decode_sample(raw)
        check_sample(asked, INFO, SETTINGS)
        Warp.of([asked.params], INFO.vocab_size, torch.device("cpu"))
    else:
        with pytest.raises(TinsmithError):
            check_sample(decode_sample(raw), INFO, SETTINGS)

"""The asample surface against the real SDK's models and decoder."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from tinker import types
from tinker.lib.public_interfaces.sampling_client import _tensor_data_to_model
from tinker.proto.response_conv import deserialize_sample_response

from tinsmith.errors import UnsupportedError
from tinsmith.types import SampledSequence, SampleResult
from tinsmith.wire.media import WireError
from tinsmith.wire.sampling import decode_sample, encode_sample_result


def body(**changes: Any) -> bytes:
    request = {
        "sampling_session_id": "s:sample:0",
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}, {"type": "encoded_text", "tokens": [3]}]},
        "sampling_params": {"max_tokens": 4, "seed": 7, "temperature": 0.5, "top_k": -1, "top_p": 0.9},
        "num_samples": 2,
        "type": "sample",
    }
    return json.dumps({**request, **changes}).encode()


def test_the_sdk_model_decodes() -> None:
    request = types.SampleRequest(
        num_samples=3,
        prompt=types.ModelInput.from_ints([4, 5]),
        sampling_params=types.SamplingParams(max_tokens=8, stop=["\n"], temperature=0.7),
        sampling_session_id="s:sample:0",
        seq_id=1,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
    )
    decoded = decode_sample(request.model_dump_json(exclude_none=True).encode())
    np.testing.assert_array_equal(decoded.prompt, [4, 5])
    assert decoded.num_samples == 3
    assert decoded.prompt_logprobs
    assert decoded.topk_prompt_logprobs == 2
    assert decoded.params.stop_strings == ("\n",)
    assert decoded.params.stop_tokens is None
    assert decoded.seed is None


def test_chunks_are_joined_and_the_item_is_what_the_engine_takes() -> None:
    item = decode_sample(body()).item("req-1", "adapter", seed=9)
    np.testing.assert_array_equal(item.prompt, [1, 2, 3])
    assert item.prompt.dtype == np.int32
    assert (item.seed, item.adapter, item.num_samples) == (9, "adapter", 2)
    assert item.params.max_tokens == 4


@pytest.mark.parametrize(
    ("stop", "tokens", "strings"),
    [(None, None, ()), ([], (), ()), ([5, 6], (5, 6), ()), ("ab", None, ("ab",)), (["a", "b"], None, ("a", "b"))],
)
def test_stop(stop: Any, tokens: Any, strings: Any) -> None:
    params = decode_sample(body(sampling_params={"stop": stop})).params
    assert (params.stop_tokens, params.stop_strings) == (tokens, strings)


def test_mixed_stops_are_refused() -> None:
    with pytest.raises(WireError, match="not of both"):
        decode_sample(body(sampling_params={"stop": ["a", 1]}))


def test_stability_info_asks_for_routes() -> None:
    assert decode_sample(body(record_stability_info=True)).records_routes
    assert not decode_sample(body()).records_routes


def test_scores_of_the_sdk_model_decode() -> None:
    ids = torch.tensor([[7, -1], [-1, -1], [-1, 9]])
    for data in (types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, pad_value=-1)):
        request = types.SampleRequest(
            prompt=types.ModelInput.from_ints([4, 5, 6, 7]),
            sampling_params=types.SamplingParams(max_tokens=1),
            sampling_session_id="s:sample:0",
            seq_id=10**18,
            prompt_logprobs=True,
            prompt_logprobs_last_n=2,
            topk_sample_logprobs=3,
            prompt_alt_tokens_k=4,
            target_prompt_logprobs=_tensor_data_to_model(data),
        )
        item = decode_sample(request.model_dump_json(exclude_none=True).encode()).item("req-1", None, seed=9)
        assert (item.prompt_logprobs_last_n, item.topk_sample_logprobs, item.prompt_alt_tokens_k) == (2, 3, 4)
        targets = item.prompt_targets
        assert targets.shape == (3, 2)
        asked = targets.ids >= 0
        assert list(zip(targets.rows[asked], targets.ids[asked], strict=True)) == [(0, 7), (2, 9)]


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"data": [1, 2], "dtype": "float32", "shape": [2, 1]}, "int64"),
        ({"data": [1, 2], "dtype": "int64"}, "shape"),
        ({"data": [1, 2], "dtype": "int64", "shape": [2]}, "shape"),
        ({"data": [1, 2], "dtype": "int64", "shape": [2, 2]}, "do not fill"),
        ({"data": [1, 2], "dtype": "int64", "shape": [2, 2], "sparse_crow_indices": [0, 1, 2]}, "together"),
        ({"data": [1], "shape": [1, 2], "sparse_crow_indices": [0, 2], "sparse_col_indices": [0]}, "row pointers"),
        ({"data": [1], "shape": [2, 2], "sparse_crow_indices": [0, 1], "sparse_col_indices": [0]}, "row pointers"),
        ({"data": [1], "shape": [1, 2], "sparse_crow_indices": [0, 1], "sparse_col_indices": [2]}, "column"),
        ({"data": [1], "shape": [1, 2], "sparse_crow_indices": [0, 1], "sparse_col_indices": []}, "column"),
        ({"data": [-2], "shape": [1, 1]}, "data"),
        ({"data": [2**40], "shape": [1, 1]}, "data"),
        ({"data": [1], "shape": [-1, -1]}, "shape"),
    ],
)
def test_bad_targets_are_refused(tensor: dict[str, Any], words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode_sample(body(target_prompt_logprobs=tensor))


def test_image_prompts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="image"):
        decode_sample(body(prompt={"chunks": [{"type": "image", "data": "", "format": "png"}]}))


@pytest.mark.parametrize("tokens", [[2**31], ["a"], [1.5], None])
def test_prompts_of_other_things_than_tokens_are_refused(tokens: Any) -> None:
    with pytest.raises(WireError):
        decode_sample(body(prompt={"chunks": [{"type": "encoded_text", "tokens": tokens}]}))


def test_nan_in_json_is_read_not_refused_as_syntax() -> None:
    assert np.isnan(decode_sample(body(sampling_params={"temperature": float("nan")})).params.temperature)


def test_results_decode_in_the_sdk() -> None:
    result = SampleResult(
        sequences=(
            SampledSequence(np.int32([4, 5]), np.float32([-0.5, -1]), stopped=True),
            SampledSequence(np.int32([6]), np.float32([-2]), stopped=False),
        ),
        prompt_logprobs=np.float32([np.nan, -3]),
        topk_prompt_tokens=np.int32([[0, 0], [7, 8]]),
        topk_prompt_logprobs=np.float32([[-99999, -99999], [-1, -2]]),
        prompt_cache_hit_tokens=5,
    )
    response = deserialize_sample_response(encode_sample_result(result))
    assert [s.stop_reason for s in response.sequences] == ["stop", "length"]
    assert [list(s.tokens) for s in response.sequences] == [[4, 5], [6]]
    assert list(response.sequences[0].logprobs or ()) == [-0.5, -1]
    assert response.prompt_logprobs == [None, -3]
    assert response.topk_prompt_logprobs == [None, [(7, -1.0), (8, -2.0)]]
    assert response.prompt_cache_hit_tokens == 5


def test_scores_decode_in_the_sdk() -> None:
    ids = torch.tensor([[7, -1], [-1, -1], [-1, 9]])
    top = {"topk_tokens": np.int32([[4, 1]]), "topk_logprobs": np.float32([[-1, -2]])}
    for data in (types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, pad_value=-1)):
        sent = body(target_prompt_logprobs=_tensor_data_to_model(data).model_dump(exclude_none=True))
        targets = decode_sample(sent).prompt_targets
        result = SampleResult(
            sequences=(SampledSequence(np.int32([4]), np.float32([-1]), stopped=True, **top),),
            prompt_targets=targets,
            prompt_target_logprobs=np.where(targets.ids >= 0, -targets.ids / 2, 0).astype(np.float32),
            prompt_alt_tokens=np.int64([[1, 2], [3, 4], [5, 6]]),
            prompt_alt_logprobs=np.float32([[-1, -2], [-3, -4], [-5, -6]]),
        )
        response = deserialize_sample_response(encode_sample_result(result))
        assert response.sequences[0].topk_logprobs == [[(4, -1.0), (1, -2.0)]]
        scored = response.target_prompt_logprobs
        assert (scored.dtype, scored.shape) == ("float32", [3, 2])
        assert (scored.sparse_crow_indices is None) == (data.sparse_crow_indices is None)
        assert scored.to_torch().tolist() == [[-3.5, 0], [0, 0], [0, -4.5]]
        assert response.prompt_alt_tokens.tokens.to_torch().tolist() == [[1, 2], [3, 4], [5, 6]]
        assert response.prompt_alt_tokens.logprobs.to_torch().tolist() == [[-1, -2], [-3, -4], [-5, -6]]

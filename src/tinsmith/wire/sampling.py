"""The asample surface: a JSON request in, a protobuf result out.

`stop` is read thus: absent or null keeps the model's own end tokens; a list of token ids replaces them; strings are
looked for beside them; an empty list stops at nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from google.protobuf.message import DecodeError
from msgspec import Meta, Struct

from tinsmith.errors import CorruptError, UnsupportedError, echo
from tinsmith.pictures import Picture
from tinsmith.types import (
    FloatArray,
    OpId,
    PromptTargets,
    SampledSequence,
    SampleItem,
    SampleResult,
    SamplingParams,
    TokenArray,
)
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.images import BLIND, Chunks, Looking, Sight
from tinsmith.wire.media import WireError, decode_json
from tinsmith.wire.tensors import encode_floats, encode_ids, encode_longs

Token = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
TargetId = Annotated[int, Meta(ge=-1, lt=2**31)]
Index = Annotated[int, Meta(ge=0, lt=2**31)]
POINTER = "image_asset_pointer"


class ChunkBody(Struct):
    """data: of a picture, base64 in the JSON."""

    type: str = "encoded_text"
    tokens: list[Token] | None = None
    data: bytes | None = None
    format: str = ""
    expected_tokens: int | None = None


class PromptBody(Struct):
    chunks: list[ChunkBody]


class ParamsBody(Struct):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    json_schema: str | None = None


class TargetsBody(Struct):
    """A TensorData of the client: [P-1, K], dense, or CSR if the indices are there."""

    data: list[TargetId]
    dtype: str = "int64"
    shape: list[Index] | None = None
    sparse_crow_indices: list[Index] | None = None
    sparse_col_indices: list[Index] | None = None


class SampleBody(Struct):
    prompt: PromptBody
    sampling_params: ParamsBody
    num_samples: int = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TargetsBody | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """prompt: int32 [P], with the placeholders of `pictures`. seed None: the server draws one. The rest as in
    `SampleItem`."""

    prompt: TokenArray
    params: SamplingParams
    num_samples: int
    seed: int | None
    prompt_logprobs: bool
    topk_prompt_logprobs: int
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    prompt_targets: PromptTargets | None = None
    prompt_alt_tokens_k: int = 0
    records_routes: bool = False
    pictures: tuple[Picture, ...] = ()

    def item(self, op_id: OpId, adapter: str | None, seed: int) -> SampleItem:
        """The request as the engine takes it, with the seed that was stored for it."""
        return SampleItem(
            op_id=op_id,
            adapter=adapter,
            prompt=self.prompt,
            params=self.params,
            num_samples=self.num_samples,
            seed=seed,
            prompt_logprobs=self.prompt_logprobs,
            topk_prompt_logprobs=self.topk_prompt_logprobs,
            topk_sample_logprobs=self.topk_sample_logprobs,
            prompt_logprobs_last_n=self.prompt_logprobs_last_n,
            prompt_targets=self.prompt_targets,
            prompt_alt_tokens_k=self.prompt_alt_tokens_k,
            records_routes=self.records_routes,
            pictures=self.pictures,
        )


def decode_sample(body: bytes, sight: Sight = BLIND) -> SampleRequest:
    """An asample request; pictures that it names instead of holding them were fetched before.

    Raises:
        WireError: it doesn't read as one.
        UserError: pictures that can't be shown to the base model.
        UnsupportedError: it asks for something that isn't offered; the message names it.
    """
    request = decode_json(body, SampleBody)
    params = request.sampling_params
    stop_tokens, stop_strings = _decode_stop(params.stop)
    chunks = _decode_prompt(request.prompt, sight)
    return SampleRequest(
        prompt=chunks.tokens,
        pictures=chunks.pictures,
        params=SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_k=params.top_k or -1,
            top_p=params.top_p,
            min_p=params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            json_schema=params.json_schema,
            stop_tokens=stop_tokens,
            stop_strings=stop_strings,
        ),
        num_samples=request.num_samples,
        seed=params.seed,
        prompt_logprobs=bool(request.prompt_logprobs),
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        topk_sample_logprobs=request.topk_sample_logprobs,
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
        prompt_targets=_decode_targets(request.target_prompt_logprobs),
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        records_routes=bool(request.record_stability_info),
    )


def encode_sample_result(result: SampleResult) -> bytes:
    """A SampleResponse: sequences in order, float32 logprobs, NaN for prompt tokens without one."""
    response = pb.SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    response.sequences.extend(sequence_message(sequence) for sequence in result.sequences)
    if result.prompt_logprobs is not None:
        response.prompt_logprobs = encode_floats(result.prompt_logprobs)
    if result.topk_prompt_tokens is not None and result.topk_prompt_logprobs is not None:
        response.topk_prompt_logprobs.CopyFrom(_topk_message(result.topk_prompt_tokens, result.topk_prompt_logprobs))
    if result.prompt_targets is not None and result.prompt_target_logprobs is not None:
        _set_targets(response.target_prompt_logprobs, result.prompt_targets, result.prompt_target_logprobs)
    if result.prompt_alt_tokens is not None and result.prompt_alt_logprobs is not None:
        drawn = response.prompt_alt_tokens
        shape = result.prompt_alt_tokens.shape
        drawn.tokens.CopyFrom(pb.Tensor(dense=encode_longs(result.prompt_alt_tokens), dtype=pb.DT_I64, shape=shape))
        drawn.logprobs.CopyFrom(
            pb.Tensor(dense=encode_floats(result.prompt_alt_logprobs), dtype=pb.DT_F32, shape=shape)
        )
    return bytes(response.SerializeToString())


def decode_sample_result(body: bytes) -> SampleResult:
    """The sequences of a recorded SampleResponse, and how much of the prompt was cached.

    Raises:
        CorruptError: it isn't one.
    """
    response = pb.SampleResponse()
    try:
        response.ParseFromString(body)
        sequences = tuple(read_sequence(message) for message in response.sequences)
    except (DecodeError, ValueError):
        raise CorruptError("the recorded result of a sample request can't be read") from None
    return SampleResult(sequences, prompt_cache_hit_tokens=response.prompt_cache_hit_tokens)


def sequence_message(sequence: SampledSequence) -> pb.SampledSequence:
    message = pb.SampledSequence(
        stop_reason=pb.SR_STOP if sequence.stopped else pb.SR_LENGTH,
        tokens=encode_ids(sequence.tokens),
        logprobs=encode_floats(sequence.logprobs),
    )
    if sequence.topk_tokens is not None and sequence.topk_logprobs is not None:
        message.topk_sampled_logprobs.CopyFrom(_topk_message(sequence.topk_tokens, sequence.topk_logprobs))
    return message


def read_sequence(message: pb.SampledSequence) -> SampledSequence:
    """Raises: ValueError: sizes that don't fit together."""
    sequence = SampledSequence(
        tokens=np.frombuffer(message.tokens, "<i4").astype(np.int32),
        logprobs=np.frombuffer(message.logprobs, "<f4").astype(np.float32),
        stopped=message.stop_reason == pb.SR_STOP,
    )
    if not message.HasField("topk_sampled_logprobs"):
        return sequence
    topk = message.topk_sampled_logprobs
    shape = (topk.length, topk.k)
    return replace(
        sequence,
        topk_tokens=np.frombuffer(topk.token_ids, "<i4").astype(np.int32).reshape(shape),
        topk_logprobs=np.frombuffer(topk.logprobs, "<f4").astype(np.float32).reshape(shape),
    )


def _topk_message(tokens: TokenArray, logprobs: FloatArray) -> pb.TopkLogprobs:
    length, k = tokens.shape
    return pb.TopkLogprobs(token_ids=encode_ids(tokens), logprobs=encode_floats(logprobs), k=k, length=length)


def _set_targets(tensor: pb.Tensor, targets: PromptTargets, logprobs: FloatArray) -> None:
    """The layout of the request, with logprobs for ids."""
    tensor.dtype = pb.DT_F32
    tensor.shape.extend(targets.shape)
    if targets.crow is None or targets.cols is None:
        tensor.dense = encode_floats(logprobs)
        return
    tensor.sparse_csr.values = encode_floats(logprobs)
    tensor.sparse_csr.crow_indices = encode_longs(targets.crow)
    tensor.sparse_csr.col_indices = encode_longs(targets.cols)


def _decode_prompt(prompt: PromptBody, sight: Sight) -> Chunks:
    chunks = Chunks(Looking(sight), "prompt")
    for chunk in prompt.chunks:
        if chunk.type == "image":
            if chunk.data is None:
                raise WireError("an image chunk needs data, a file as base64")
            chunks.add_picture(chunk.data, chunk.format, chunk.expected_tokens)
            continue
        if chunk.type == POINTER:
            raise UnsupportedError(
                f"prompt chunk {POINTER} is not offered here, since this server names no locations to fetch pictures "
                "from (--picture-locations): send the picture itself, as an image chunk"
            )
        if chunk.type != "encoded_text":
            raise UnsupportedError(
                f"prompt chunk {echo(chunk.type)} is not offered here: only token chunks and images are"
            )
        if chunk.tokens is None:
            raise WireError("an encoded_text chunk needs tokens")
        chunks.add_tokens(np.array(chunk.tokens, np.int32))
    return chunks


def _decode_stop(stop: str | Sequence[str | int] | None) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    if stop is None:
        return None, ()
    if isinstance(stop, str):
        return None, (stop,)
    tokens = tuple(item for item in stop if isinstance(item, int))
    strings = tuple(item for item in stop if isinstance(item, str))
    if tokens and strings:
        raise WireError("stop is a list of strings or a list of token ids, not of both")
    return (None, strings) if strings else (tokens, ())


def _decode_targets(body: TargetsBody | None) -> PromptTargets | None:
    """Checked as far as the layout goes; what it says of the prompt is for `validate`."""
    if body is None:
        return None
    name = "target_prompt_logprobs"
    if body.dtype != "int64" or body.shape is None or len(body.shape) != 2:
        raise WireError(f"{name} must be int64 of shape [prompt tokens - 1, K]")
    num_rows, num_cols = body.shape
    ids = np.array(body.data, np.int64)
    if (body.sparse_crow_indices is None) != (body.sparse_col_indices is None):
        raise WireError(f"{name}: sparse_crow_indices and sparse_col_indices come together")
    if body.sparse_crow_indices is None or body.sparse_col_indices is None:
        if ids.size != num_rows * num_cols:
            raise WireError(f"{name}: {ids.size} ids do not fill shape {body.shape}")
        return PromptTargets(ids, (num_rows, num_cols))
    crow = np.array(body.sparse_crow_indices, np.int64)
    cols = np.array(body.sparse_col_indices, np.int64)
    if crow.size != num_rows + 1 or crow[0] != 0 or crow[-1] != ids.size or bool((np.diff(crow) < 0).any()):
        raise WireError(f"{name}: row pointers do not describe {num_rows} rows of {ids.size} ids")
    if cols.size != ids.size or bool((cols >= num_cols).any()):
        raise WireError(f"{name}: column indices do not lie below {num_cols}, one an id")
    return PromptTargets(ids, (num_rows, num_cols), crow, cols)

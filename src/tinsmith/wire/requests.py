"""The JSON requests, as structs; fields that the server ignores on purpose are left out.

An op's request is read in two goes: its address first (an address makes a bad request an op that failed), then the
rest. `decode_optim_step` is shared with the worker, which reads the stored body of an op again; what the server adds to
an op is in `meta`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, structs

from tinsmith.errors import UnsupportedError, echo
from tinsmith.scopes import Scope
from tinsmith.types import AdamParams
from tinsmith.wire.media import WireError, decode_json

MAX_KEY_S = 10 * 366 * 24 * 3600.0

NonNegative = Annotated[int, Meta(ge=0, le=2**63 - 1)]
TrainingSeq = Annotated[int, Meta(ge=1, lt=2**31)]
CLONE_SEQS = 10**9  # seq_ids that each client of a sampler has for itself
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]*$")]
ObjectId = Annotated[str, Meta(min_length=1, max_length=256)]


class RunAddress(Struct):
    """Of an op on a run that exists."""

    model_id: ObjectId
    seq_id: TrainingSeq


class NewRunAddress(Struct):
    """Of an op that makes a run: its request 0."""

    session_id: ObjectId
    model_seq_id: NonNegative


class SamplerAddress(Struct):
    sampling_session_id: ObjectId
    seq_id: NonNegative


class ClientConfig(Struct):
    sdk_version: str = ""


class CreateSession(Struct):
    tags: list[str] = []
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class SessionHeartbeat(Struct):
    session_id: ObjectId


class FinishReason(Struct):
    type: str = "success"


class FinishSession(Struct):
    reason: FinishReason = msgspec.field(default_factory=FinishReason)
    detail: str | None = None


class AssignProject(Struct):
    project_id: Annotated[str, Meta(min_length=1, max_length=512)]


class LoraConfig(Struct):
    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Struct, frozen=True):
    type: str = "adamw"


class CreateModel(Struct):
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig | None = None


class GetInfo(Struct):
    model_id: ObjectId


class AdamBody(Struct):
    """None stands for NaN or an infinity: the client's JSON writes them as null."""

    learning_rate: float | None = 1e-4
    beta1: float | None = 0.9
    beta2: float | None = 0.95
    eps: float | None = 1e-12
    weight_decay: float | None = 0.0
    grad_clip_norm: float | None = 0.0


class OptimStep(Struct):
    adam_params: AdamBody | None = None
    optimizer_params: OptimizerConfig | None = None


class SaveWeights(Struct):
    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


class SaveWeightsForSampler(Struct):
    path: str | None = None
    sampling_session_seq_id: NonNegative | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = None
    user_metadata: dict[str, Any] | None = None


class SaveWeightsExternal(Struct):
    path: str
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Struct):
    """Both addressings: (session_id, model_seq_id) makes a run, (model_id, seq_id) loads into one.

    weights_access_token: a secret; it is looked at and never kept.
    """

    path: str
    optimizer: bool = False
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None


class CopyWeights(Struct):
    """Either destination_project_id, or both session_id and model_seq_id. The token may come in a header instead."""

    source_path: str
    destination_project_id: ObjectId | None = None
    session_id: ObjectId | None = None
    model_seq_id: NonNegative | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None


class WeightsInfo(Struct):
    tinker_path: str


class CreateSamplingSession(Struct):
    session_id: ObjectId
    sampling_session_seq_id: NonNegative
    base_model: str | None = None
    model_path: str | None = None


class RetrieveFuture(Struct):
    request_id: ObjectId


class LossAddress(Struct):
    """Of a custom loss that a session uploads."""

    session_id: ObjectId
    custom_loss_seq_id: NonNegative


class CancelFuture(Struct):
    request_id: ObjectId


class JoinSamplingSession(Struct):
    sampling_session_id: ObjectId


class FuturesTarget(Struct):
    """One client of a sampler: `cloned_sampler_id` is 0 for the first, and seq_id // CLONE_SEQS for all."""

    sampling_session_id: ObjectId
    cloned_sampler_id: Annotated[int, Meta(ge=0, lt=2**63 // CLONE_SEQS)] = 0


class RetrieveFutures(Struct):
    """`retrieved_request_ids` is left out: results are kept for as long as they may be asked for again."""

    target: FuturesTarget
    prev_cursor: NonNegative = 0
    timeout: float | None = None


class SetTtl(Struct):
    ttl_seconds: int | None = None


class CreateAccessToken(Struct):
    ttl_seconds: Annotated[int, Meta(ge=1, le=30 * 24 * 3600)] = 24 * 3600


class CreateKey(Struct, forbid_unknown_fields=True):
    """tenant None: the caller's own. scope None: full, or admin with `is_admin`. expires_s: from now on; None: it
    lasts. An unknown field is refused: a misspelt scope would make a key that may do everything."""

    name: Name
    tenant: Name | None = None
    is_admin: bool = False
    scope: Scope | None = None
    expires_s: Annotated[float, Meta(ge=1, le=MAX_KEY_S)] | None = None


class RotateKey(Struct, forbid_unknown_fields=True):
    """grace_s: for how long the key works beside its successor. expires_s: of the successor, from now on; None: it
    lives as long as the key was made for."""

    grace_s: Annotated[float, Meta(ge=0, le=MAX_KEY_S)] = 24 * 3600.0
    expires_s: Annotated[float, Meta(ge=1, le=MAX_KEY_S)] | None = None


class SetQuotas(Struct, forbid_unknown_fields=True):
    """tenant: its name. key_id: one of its keys; None: the tenant itself. quotas: by name; null takes one away."""

    tenant: Annotated[str, Meta(min_length=1, max_length=128)]
    quotas: Annotated[dict[str, float | None], Meta(min_length=1, max_length=16)]
    key_id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None


class SetWeight(Struct):
    tenant: Annotated[str, Meta(min_length=1, max_length=128)]
    weight: Annotated[float, Meta(ge=0.01, le=100)]


def decode_optim_step(body: bytes) -> AdamParams:
    """The AdamW parameters of an optim_step request; what was no number in the client is NaN.

    Raises:
        WireError: the body doesn't read as one.
        UnsupportedError: another optimizer is asked for.
    """
    request = decode_json(body, OptimStep)
    if request.optimizer_params is not None:
        raise UnsupportedError(
            f"optimizer {echo(request.optimizer_params.type)} is not offered here: pass AdamParams (adamw)"
        )
    if request.adam_params is None:
        raise WireError("optim_step needs adam_params")
    adam = {name: math.nan if value is None else value for name, value in structs.asdict(request.adam_params).items()}
    return AdamParams(**adam)

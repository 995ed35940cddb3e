"""What the server adds to an op beside the client's payload: `ops.meta`, a small JSON object, one struct a kind.

    CREATE        CreateMeta       no payload   the spec; from a checkpoint also its path, blob, optimizer
    LOAD          LoadMeta         no payload   the checkpoint's path, blob and whether its moments are wanted
    SAVE          SaveMeta         no payload   the checkpoint's name, lifetime, metadata
    SAVE_SAMPLER  SaveSamplerMeta  no payload   the same with a name, or the id of the sampler to make
    SAVE_EXTERNAL SaveExternalMeta no payload   the checkpoint's name, lifetime, whom to encrypt it to
    SAMPLE        SampleMeta       the request  the drawn seed, the sampler
    FORWARD, FORWARD_BACKWARD     the request; with a custom loss LossMeta, else {}
    OPTIM_STEP                    the request; their meta is {}

The API writes them, the worker reads them. A store keeps meta as a plain dict, so `to_meta` and `read_meta` convert.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from tinsmith.types import BlobKey, RunSpec, SamplerId, SessionId

MetaStruct = TypeVar("MetaStruct", bound=Struct)


class CreateMeta(Struct, frozen=True):
    """blob None: a fresh adapter from `spec`; else weights (and moments, if `optimizer`) come from the blob."""

    spec: RunSpec
    path: str | None = None
    blob: BlobKey | None = None
    optimizer: bool = False


class LoadMeta(Struct, frozen=True):
    path: str
    blob: BlobKey
    optimizer: bool = False


class SaveMeta(Struct, frozen=True):
    """ttl_s: seconds that it is kept once it is written; None: for good."""

    name: str
    ttl_s: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] = {}


class SaveSamplerMeta(Struct, frozen=True):
    """Exactly one of `name` (a checkpoint, kept) and `sampler_id` (ephemeral, lives with its session) is set.

    is_inflight: the weights are also those of the run's earlier inflight samplers from now on.
    """

    name: str | None
    sampler_id: SamplerId | None
    session_id: SessionId
    ttl_s: int | None = None
    user_metadata: dict[str, str] = {}
    is_inflight: bool = False


class SaveExternalMeta(Struct, frozen=True):
    """recipients: age's public keys, as `age.check_recipients` passed them; empty: not encrypted.

    actor, actor_key_id: the tenant's name and the key that asked, for the audit log.
    """

    name: str
    ttl_s: int | None = None
    recipients: tuple[str, ...] = ()
    actor: str = ""
    actor_key_id: str = ""


class LossMeta(Struct, frozen=True):
    """blob: the create_custom_loss request of the loss; no file is deleted while such an op may be run again."""

    loss_id: str
    blob: BlobKey


class SampleMeta(Struct, frozen=True):
    """stream: the API wants to hear of the samples while they are under way."""

    seed: int
    sampler_id: SamplerId
    num_samples: int
    stream: bool = False


def to_meta(value: Struct) -> dict[str, Any]:
    """A struct as the plain JSON object that the store keeps."""
    plain: dict[str, Any] = msgspec.to_builtins(value)
    return plain


def read_meta(meta: dict[str, Any], kind: type[MetaStruct]) -> MetaStruct:
    """Raises: msgspec.ValidationError: another kind of op's meta, or one written by an incompatible version."""
    return msgspec.convert(meta, type=kind)

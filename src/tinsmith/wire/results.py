"""The JSON results that the worker stores and clients fetch unchanged, and the JSON of a failure."""

from __future__ import annotations

from typing import Any

from tinsmith.types import Failure, OptimResult, RunId, SamplerId
from tinsmith.wire.media import encode_json

CATEGORIES = {"user": "user", "capacity": "server", "server": "server"}  # the client knows user, server and unknown


def create_result(run_id: RunId) -> bytes:
    return encode_json({"type": "create_model", "model_id": run_id})


def load_result(run_id: RunId, path: str) -> bytes:
    """For a load into a run, and for a run made from a checkpoint."""
    return encode_json({"type": "load_weights", "model_id": run_id, "path": path})


def optim_result(result: OptimResult) -> bytes:
    return encode_json({"type": "optim_step", "metrics": dict(result.metrics)})


def save_result(path: str) -> bytes:
    return encode_json({"type": "save_weights", "path": path})


def sampler_result(path: str | None, sampler_id: SamplerId | None) -> bytes:
    """path of a named save, sampler_id of an ephemeral one."""
    body: dict[str, Any] = {"type": "save_weights_for_sampler"}
    if path is not None:
        body["path"] = path
    if sampler_id is not None:
        body["sampling_session_id"] = sampler_id
    return encode_json(body)


def external_result(path: str, size_bytes: int) -> bytes:
    return encode_json({"type": "save_weights_external", "path": path, "size_bytes": size_bytes})


def loss_result(loss_id: str) -> bytes:
    return encode_json({"type": "create_custom_loss", "loss_id": loss_id})


def failure_result(failure: Failure) -> bytes:
    category = CATEGORIES.get(failure.category, "server")
    return encode_json({"error": failure.message, "category": category, "code": failure.code})

"""Every closed route and the request that exercises it, so that a new route can't be forgotten by the tests of access.

`KINDS` are those of checkpoints: the middle parts of their paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np

from tests.contract.raw import BASE, PROTOBUF, Raw
from tinsmith.api import app
from tinsmith.wire import wire_pb2 as pb

KINDS = ("weights", "sampler_weights", "external_weights")


@dataclass(frozen=True, slots=True)
class Ids:
    """What a tenant has: one of each kind. `sampler_path` and `path` are checkpoints of `run`.

    `sample` is the future of a sample, `future` that of a request of `run`.
    """

    session: str
    run: str
    sampler: str
    future: str
    sample: str
    path: str
    sampler_path: str

    def hide(self, text: str) -> str:
        """The text without the ids, to compare answers about different objects."""
        for name in ("path", "sampler_path", "run", "sampler", "session", "future", "sample"):
            text = text.replace(getattr(self, name), f"<{name}>")
        return text


@dataclass(frozen=True, slots=True)
class Probe:
    """One request."""

    method: str
    path: str
    json: Any = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        body = {"json": self.json} if self.content is None else {"content": self.content}
        return {**({} if self.json is None and self.content is None else body), "headers": dict(self.headers)}


def probes(at: Ids, mine: Ids, seq_id: int = 90) -> dict[str, list[Probe]]:
    """By route: requests about the objects `at`, by someone who has `mine`; `seq_id` is one that isn't taken yet."""
    checkpoints = f"/training_runs/{at.run}/checkpoints"
    seq = {"model_id": at.run, "seq_id": seq_id}
    new_run = {"session_id": at.session, "model_seq_id": seq_id}
    my_run = {"session_id": mine.session, "model_seq_id": seq_id}
    my_sampler = {"session_id": mine.session, "sampling_session_seq_id": seq_id}
    chat = {"model": at.sampler_path, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    sample = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 1}}
    target = {"type": "sampling_session", "sampling_session_id": at.sampler}
    return {
        "POST /create_session": [],
        "POST /session_heartbeat": [Probe("POST", "/session_heartbeat", {"session_id": at.session})],
        "POST /sessions/{session_id:str}/finish": [Probe("POST", f"/sessions/{at.session}/finish", {})],
        "GET /sessions": [],
        "GET /sessions/{session_id:str}": [Probe("GET", f"/sessions/{at.session}")],
        "PUT /sessions/{session_id:str}/project": [
            Probe("PUT", f"/sessions/{at.session}/project", {"project_id": "mine"})
        ],
        "POST /sessions/search": [],
        "GET /sessions/{session_id:str}/trace_export": [Probe("GET", f"/sessions/{at.session}/trace_export")],
        "POST /auth/token": [],
        "GET /auth/apikey/me": [],
        "DELETE /auth/apikey/me": [],
        "GET /audit": [],
        "GET /billing/usage/events": [],
        "GET /billing/usage/checkpoints/current": [],
        "POST /client/config": [],
        "POST /client/dynamic_config": [],
        "POST /telemetry": [],
        "GET /get_server_capabilities": [],
        "POST /create_model": [Probe("POST", "/create_model", {**new_run, "base_model": BASE})],
        "POST /get_info": [Probe("POST", "/get_info", {"model_id": at.run})],
        "POST /forward_backward": [
            Probe("POST", "/forward_backward", content=training(at.run, seq_id), headers={"content-type": PROTOBUF}),
            Probe(
                "POST",
                "/forward_backward",
                content=training(mine.run, seq_id + 100, loss_of=at.session),
                headers={"content-type": PROTOBUF},
            ),
        ],
        "POST /create_custom_loss": [Probe("POST", "/create_custom_loss", custom_loss(at.session, seq_id))],
        "POST /optim_step": [Probe("POST", "/optim_step", {**seq, "adam_params": {}})],
        "POST /save_weights": [Probe("POST", "/save_weights", {**seq, "path": "x"})],
        "POST /save_weights_for_sampler": [
            Probe("POST", "/save_weights_for_sampler", {**seq, "path": "x"}),
            Probe("POST", "/save_weights_for_sampler", {**seq, "sampling_session_seq_id": 5}),
        ],
        "POST /save_weights_external": [Probe("POST", "/save_weights_external", {**seq, "path": "x"})],
        "POST /load_weights": [
            Probe("POST", "/load_weights", {**seq, "path": mine.path, "optimizer": False}),
            Probe("POST", "/load_weights", {**new_run, "path": mine.path}),
            Probe("POST", "/load_weights", {**my_run, "path": at.path}),
            Probe("POST", "/load_weights", {"model_id": mine.run, "seq_id": seq_id, "path": at.path}),
        ],
        "POST /weights_info": [
            Probe("POST", "/weights_info", {"tinker_path": at.path}),
            Probe("POST", "/weights_info", {"tinker_path": at.sampler_path}),
        ],
        "POST /create_sampling_session": [
            Probe("POST", "/create_sampling_session", {**my_sampler, "model_path": at.sampler_path}),
            Probe("POST", "/create_sampling_session", {**my_sampler, "session_id": at.session, "base_model": BASE}),
        ],
        "GET /samplers/{sampler_id:str}": [Probe("GET", f"/samplers/{at.sampler}")],
        "POST /asample": [
            Probe("POST", "/asample", {"sampling_session_id": at.sampler, "seq_id": seq_id, **sample}),
        ],
        "POST /join_sampling_session": [Probe("POST", "/join_sampling_session", {"sampling_session_id": at.sampler})],
        "POST /retrieve_futures": [Probe("POST", "/retrieve_futures", {"target": target, "timeout": 0})],
        "POST /cancel_future": [Probe("POST", "/cancel_future", {"request_id": at.sample})],
        "POST /retrieve_future": [Probe("POST", "/retrieve_future", {"request_id": at.future})],
        "GET /training_runs": [],
        "GET /training_runs/{run_id:str}": [Probe("GET", f"/training_runs/{at.run}")],
        "GET /training_runs/{run_id:str}/checkpoints": [Probe("GET", checkpoints)],
        "DELETE /training_runs/{run_id:str}": [Probe("DELETE", f"/training_runs/{at.run}?with_checkpoints=true")],
        "GET /checkpoints": [],
        "DELETE /training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}": [
            Probe("DELETE", f"{checkpoints}/weights/kept"),
            Probe("DELETE", f"{checkpoints}/sampler_weights/kept"),
            Probe("DELETE", f"{checkpoints}/external_weights/kept"),
        ],
        "PUT /training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}/ttl": [
            Probe("PUT", f"{checkpoints}/weights/kept/ttl", {"ttl_seconds": 3600}),
            Probe("PUT", f"{checkpoints}/sampler_weights/kept/ttl", {"ttl_seconds": None}),
        ],
        "POST /training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}/publish": [
            Probe("POST", f"{checkpoints}/{kind}/kept/publish") for kind in KINDS
        ],
        "DELETE /training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}/publish": [
            Probe("DELETE", f"{checkpoints}/{kind}/kept/publish") for kind in KINDS
        ],
        "POST /training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}/access_token": [
            Probe("POST", f"{checkpoints}/{kind}/kept/access_token", {}) for kind in KINDS
        ],
        "GET /training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}/archive": [
            Probe("GET", f"{checkpoints}/{kind}/kept/archive") for kind in KINDS
        ],
        "GET /training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}/external_weights_urls": [
            Probe("GET", f"{checkpoints}/external_weights/kept/external_weights_urls")
        ],
        "POST /copy_weights": [
            Probe("POST", "/copy_weights", {"source_path": at.path, "destination_project_id": "p"}),
            Probe("POST", "/copy_weights", {"source_path": at.sampler_path, **my_run, "model_seq_id": seq_id + 100}),
            Probe("POST", "/copy_weights", {"source_path": mine.path, **new_run, "model_seq_id": seq_id + 200}),
        ],
        "POST /import_weights": [],
        "GET /oai/api/v1/models": [],
        "GET /oai/api/v1/models/{model:path}": [Probe("GET", f"/oai/api/v1/models/{quote(at.sampler_path, safe='')}")],
        "POST /oai/api/v1/chat/completions": [Probe("POST", "/oai/api/v1/chat/completions", {**chat, "n": 2})],
        "POST /oai/api/v1/completions": [
            Probe("POST", "/oai/api/v1/completions", {"model": at.sampler_path, "prompt": "a", "max_tokens": 1})
        ],
        "POST /anthropic/api/v1/messages": [Probe("POST", "/anthropic/api/v1/messages", chat)],
        "POST /anthropic/api/v1/messages/count_tokens": [
            Probe("POST", "/anthropic/api/v1/messages/count_tokens", {**chat, "max_tokens": None})
        ],
        "POST /admin/keys": [],
        "GET /admin/keys": [],
        "POST /admin/keys/{key_id:str}/rotate": [],
        "DELETE /admin/keys/{key_id:str}": [],
        "GET /admin/quotas": [],
        "PUT /admin/quotas": [],
        "GET /admin/weights": [],
        "POST /admin/weights": [],
        "GET /admin/runs": [],
    }


def belongings(raw: Raw) -> Ids:
    """Make one of each kind."""
    session = raw.session()
    raw.good("/create_custom_loss", json=custom_loss(session))
    run = raw.run(session)
    future = raw.send("POST", "/save_weights", json={**run.next(), "path": "kept"}).json()["request_id"]
    path = raw.result(future)
    assert isinstance(path, httpx.Response)
    sampler_path = raw.good("/save_weights_for_sampler", json={**run.next(), "path": "kept"}).json()["path"]
    raw.good("/save_weights_external", json={**run.next(), "path": "kept"})
    body = {"session_id": session, "sampling_session_seq_id": 0, "model_path": sampler_path}
    sampler = raw.good("/create_sampling_session", json=body).json()["sampling_session_id"]
    asked = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 1}}
    sample = raw.send("POST", "/asample", json={"sampling_session_id": sampler, "seq_id": 0, **asked}).json()[
        "request_id"
    ]
    return Ids(session, run.run_id, sampler, future, sample, path.json()["path"], sampler_path)


def closed_routes() -> list[str]:
    """ "METHOD /path" of every route that needs a key."""
    rooms = (
        ("", (*app.CLOSED, *app.ADMIN, *app.WATCHING)),
        ("/oai/api/v1", app.OPENAI),
        ("/anthropic/api/v1", app.ANTHROPIC),
    )
    return sorted(
        f"{method} {prefix}{path}"
        for prefix, handlers in rooms
        for handler in handlers
        for path in handler.paths
        for method in handler.http_methods
        if method not in ("OPTIONS", "HEAD")
    )


def concrete(route: str) -> tuple[str, str]:
    """A method and a path with something in each of its holes."""
    method, _, path = route.partition(" ")
    for hole in ("run_id", "session_id", "sampler_id", "key_id", "kind", "name"):
        path = path.replace(f"{{{hole}:str}}", "weights" if hole == "kind" else "x")
    path = path.replace("{model:path}", "x")
    return method, path


def custom_loss(session_id: str, seq_id: int = 0) -> dict[str, Any]:
    """A request to upload the mean of the log-probabilities."""
    nodes = [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        {"op": "call_method", "name": "mean", "target": "mean", "args": [{"ref": "logprobs"}]},
        {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": "mean"}, {"dict": {}}]}]},
    ]
    return {
        "session_id": session_id,
        "custom_loss_seq_id": seq_id,
        "name": "mean",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {"format": 1, "nodes": nodes},
    }


def training(run_id: str, seq_id: int, loss_of: str | None = None) -> bytes:
    """`loss_of`: with the first custom loss of that session."""
    message = pb.ForwardBackwardRequest(
        model_id=run_id, seq_id=seq_id, loss_fn="custom" if loss_of else "cross_entropy"
    )
    if loss_of:
        message.loss_fn_config_v2["loss_id"].text = f"{loss_of}:loss:0"
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([1, 2], "<i4").tobytes()
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = np.array([2, 3], "<i8").tobytes(), pb.DT_I64
    return bytes(message.SerializeToString())

"""From POST to result: admission, duplicates, bad requests that fail alone, bodies under a bound, long polls."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
import zstandard
from litestar.testing import TestClient

from tinsmith.api.app import build_app
from tinsmith.types import OpKind, OpState
from tinsmith.wire import wire_pb2 as pb

BASE = "tinsmith/tiny"


def training_body(run_id: str, seq_id: int, num_tokens: int = 3, loss: str = "cross_entropy", **options: Any) -> bytes:
    message = pb.ForwardBackwardRequest(model_id=run_id, seq_id=seq_id, loss_fn=loss, **options)
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.ones(num_tokens, "<i4").tobytes()
    datum.loss_fn_inputs["target_tokens"].CopyFrom(
        pb.Tensor(dense=np.ones(num_tokens, "<i8").tobytes(), dtype=pb.DT_I64, shape=[num_tokens])
    )
    return message.SerializeToString()


def send_training(api: Any, body: bytes, status: int = 200, **headers: str) -> Any:
    headers = {"Content-Type": "application/x-protobuf", **headers}
    return api.call("POST", "/forward_backward", status, content=body, headers=headers)


@pytest.fixture
def run_id(api: Any, worker: Any) -> str:
    promise = api.create(api.session())
    worker.step()
    assert api.result(promise) == {"type": "create_model", "model_id": promise["model_id"]}
    return str(promise["model_id"])


@pytest.fixture
def sampler_id(api: Any) -> str:
    body = {"session_id": api.session(), "sampling_session_seq_id": 0, "base_model": BASE}
    return str(api.post("/create_sampling_session", body)["sampling_session_id"])


def sample_body(sampler_id: str, seq_id: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler_id,
        "seq_id": seq_id,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 4},
        **changes,
    }


def failure(api: Any, promise: dict[str, Any]) -> str:
    """The message of a request that was born failed; its category is the user's."""
    result = api.result(promise)
    assert result["category"] == "user", result
    return str(result["error"])


def test_flags(api: Any) -> None:
    assert api.post("/client/config", {"sdk_version": "0.38.0"})["proto_compress_fwdbwd"] is True
    assert api.post("/client/dynamic_config", {})["sample_cancel_enabled"] is False
    assert api.post("/telemetry", {"events": []}) == {"status": "accepted"}


def test_create_model_is_idempotent_and_keeps_its_seed(api: Any, house: Any) -> None:
    session = api.session()
    first = api.create(session, user_metadata={"n": 1})
    assert first["model_id"] == f"{session}:train:0"
    assert api.create(session, lora_config={"rank": 8})["request_id"] == first["request_id"]
    spec = house.store.runs.get(house.tenant_id, first["model_id"]).spec
    assert (spec.rank, spec.base_model) == (4, BASE)
    assert 0 <= spec.seed < 2**63


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model": "meta/other"}, "served: tinsmith/tiny"),
        ({"lora_config": {"rank": 0}}, "1..128"),
        ({"lora_config": {"rank": -3}}, "1..128"),
        ({"lora_config": {"rank": 129}}, "1..128"),
        ({"lora_config": {"rank": "x"}}, "rank"),
        ({"lora_config": {"rank": 4, "seed": -1}}, "seed"),
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, "adamw"),
        ({"base_model": 5}, "base_model"),
        (
            {"lora_config": {"rank": 4, "train_mlp": False, "train_attn": False, "train_unembed": False}},
            "nothing to train",
        ),
    ],
)
def test_a_bad_create_fails_its_future(api: Any, changes: dict[str, Any], words: str) -> None:
    session = api.session()
    promise = api.create(session, **changes)
    assert words in failure(api, promise)
    assert api.create(session)["request_id"] == promise["request_id"]
    api.post("/get_info", {"model_id": promise["model_id"]}, 404)


def test_a_finished_session_makes_no_more_runs(api: Any) -> None:
    session = api.session()
    api.post("/session_heartbeat", {"session_id": session})
    for _ in range(2):
        api.post(f"/sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None})
    assert api.post("/session_heartbeat", {"session_id": session}, 410)["code"] == "gone"
    assert "has ended" in failure(api, api.create(session))


def test_get_info_gives_the_tokenizer(api: Any, run_id: str, house: Any) -> None:
    info = api.post("/get_info", {"model_id": run_id})
    assert info["model_id"] == run_id
    assert (info["is_lora"], info["lora_rank"]) == (True, 4)
    assert info["model_data"] == {
        "arch": house.services.bases[BASE].info.arch,
        "model_name": BASE,
        "tokenizer_id": house.services.bases[BASE].info.path,
    }


def test_chunks_may_come_in_any_order_and_twice(api: Any, run_id: str, worker: Any) -> None:
    late = [send_training(api, training_body(run_id, seq)) for seq in (2, 3)]
    assert worker.step() == 0
    again = api.result(late[1], 408)
    assert (again["type"], again["queue_state"]) == ("try_again", "active")
    assert "request 1 of this run has not arrived" in again["queue_state_reason"]
    first = send_training(api, training_body(run_id, 1))
    assert send_training(api, training_body(run_id, 2))["request_id"] == late[0]["request_id"]
    assert worker.step() == 3
    for promise in (first, *late):
        response = api.raw("POST", "/api/v1/retrieve_future", json={"request_id": promise["request_id"]})
        assert response.headers["content-type"] == "application/x-protobuf"
        output = pb.ForwardBackwardOutput.FromString(response.content)
        assert output.metrics["loss:sum"] == 1.0
    assert [op.seq_id for op in worker.seen[1:]] == [1, 2, 3]


def test_a_large_payload_goes_to_a_file_and_a_duplicate_leaves_none(
    api: Any, run_id: str, house: Any, worker: Any
) -> None:
    def files() -> int:
        return sum(path.is_file() for path in (house.settings.data_dir / "blobs").rglob("*"))

    before = files()
    body = training_body(run_id, 1, num_tokens=2000)
    promise = send_training(api, zstandard.compress(body), **{"Content-Encoding": "zstd"})
    assert files() == before + 1
    assert send_training(api, body)["request_id"] == promise["request_id"]
    assert files() == before + 1
    op = house.store.ops.get(house.tenant_id, promise["request_id"])
    assert (op.kind, op.cost_tokens, op.payload_bytes) == (OpKind.FORWARD_BACKWARD, 2000, len(body))
    worker.step()
    assert house.store.ops.get(house.tenant_id, promise["request_id"]).state is OpState.DONE


def test_forward_only_is_its_own_kind(api: Any, run_id: str, house: Any) -> None:
    promise = send_training(api, training_body(run_id, 1, forward_only=True))
    assert house.store.ops.get(house.tenant_id, promise["request_id"]).kind is OpKind.FORWARD


def test_a_bad_request_fails_alone_and_consumes_its_seq_id(api: Any, run_id: str, worker: Any) -> None:
    bad = [
        (send_training(api, training_body(run_id, 1, loss="nonsense")), "unknown loss"),
        (send_training(api, training_body(run_id, 2)[:-2]), "no ForwardBackwardRequest"),
        (api.post("/optim_step", {"model_id": run_id, "seq_id": 3, "optimizer_params": {"type": "dimuon"}}), "adamw"),
        (api.post("/optim_step", {"model_id": run_id, "seq_id": 4, "adam_params": {"beta1": 2}}), "beta1"),
        (api.post("/save_weights", {"model_id": run_id, "seq_id": 5, "path": "../x"}), "checkpoint name"),
        (api.post("/save_weights_for_sampler", {"model_id": run_id, "seq_id": 6}), "needs a path"),
        (api.post("/save_weights_external", {"model_id": run_id, "seq_id": 7, "path": ".."}), "checkpoint name"),
        (api.post("/load_weights", {"model_id": run_id, "seq_id": 8, "path": "tinker://a:train:0/weights/b"}), "b"),
        (api.post("/save_weights", {"model_id": run_id, "seq_id": 9, "path": "a", "ttl_seconds": 0}), "ttl_seconds"),
    ]
    good = api.post("/optim_step", {"model_id": run_id, "seq_id": 10, "adam_params": {"learning_rate": 0.5}})
    worker.step()
    assert api.result(good)["metrics"] == {"lr": 0.5}
    for promise, words in bad:
        assert words in failure(api, promise)


def test_a_bomb_is_refused_and_its_seq_id_consumed(make_house: Any) -> None:
    house = make_house(max_body_bytes=100_000)
    worker = house.make_worker()
    with TestClient(build_app(house.services)) as client:
        headers = {"X-API-Key": house.key}

        def post(path: str, status: int, **options: Any) -> Any:
            options["headers"] = {**headers, **options.get("headers", {})}
            response = client.post(f"/api/v1{path}", **options)
            assert response.status_code == status, response.text
            return response.json()

        session = post("/create_session", 200, json={})["session_id"]
        run_id = post("/create_model", 200, json={"session_id": session, "model_seq_id": 0, "base_model": BASE})[
            "model_id"
        ]
        bomb = zstandard.compress(training_body(run_id, 1) + b"\0" * 50_000_000)
        assert len(bomb) < 100_000
        refused = post("/forward_backward", 413, content=bomb, headers={"Content-Encoding": "zstd"})
        assert refused["code"] == "too_large"
        post("/forward_backward", 413, content=training_body(run_id, 2) + b"\0" * 150_000)
        post("/forward_backward", 400, content=b"no zstd", headers={"Content-Encoding": "zstd"})
        post("/forward_backward", 400, content=b"", headers={"Content-Encoding": "br"})
        post("/asample", 413, content=b" " * 100_001)
        good = post("/optim_step", 200, json={"model_id": run_id, "seq_id": 3, "adam_params": {}})
        worker.step()
        assert "metrics" in post("/retrieve_future", 200, json=good)


def test_saves_loads_and_lists(api: Any, run_id: str, worker: Any, house: Any) -> None:
    training = api.post(
        "/save_weights",
        {"model_id": run_id, "seq_id": 1, "path": "s1", "ttl_seconds": 3600, "user_metadata": {"k": "v"}},
    )
    sampling = api.post(
        "/save_weights_for_sampler", {"model_id": run_id, "seq_id": 2, "path": "w1", "kind": "snapshot"}
    )
    ephemeral = api.post("/save_weights_for_sampler", {"model_id": run_id, "seq_id": 3, "sampling_session_seq_id": 5})
    worker.step()
    path, sampler_path = api.result(training)["path"], api.result(sampling)["path"]
    assert path == f"tinker://{run_id}/weights/s1"
    assert sampler_path == f"tinker://{run_id}/sampler_weights/w1"
    session = run_id.split(":", 1)[0]
    assert api.result(ephemeral)["sampling_session_id"] == f"{session}:sample:5"
    assert api.get(f"/samplers/{session}:sample:5") == {"sampler_id": f"{session}:sample:5", "base_model": BASE}

    info = api.post("/weights_info", {"tinker_path": path})
    assert (info["base_model"], info["lora_rank"], info["is_lora"], info["train_mlp"]) == (BASE, 4, True, True)

    run = api.get(f"/training_runs/{run_id}")
    assert run["last_checkpoint"]["tinker_path"] == path
    assert run["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/w1"
    assert run["model_owner"] == "alice"
    listed = api.get("/training_runs?limit=1")
    assert listed["cursor"] == {"offset": 0, "limit": 1, "total_count": 1}
    of_run = api.get(f"/training_runs/{run_id}/checkpoints")["checkpoints"]
    assert {entry["checkpoint_type"] for entry in of_run} == {"training", "sampler"}
    assert api.get("/checkpoints")["cursor"]["total_count"] == 2

    url = f"/training_runs/{run_id}/checkpoints/weights/s1"
    expiring = next(entry for entry in of_run if entry["checkpoint_type"] == "training")
    assert expiring["expires_at"]
    assert expiring["user_metadata"] == {"k": "v"}
    api.call("PUT", f"{url}/ttl", 204, json={"ttl_seconds": None})
    assert "expires_at" not in api.get(f"/training_runs/{run_id}")["last_checkpoint"]
    api.call("DELETE", url, 204)
    api.call("DELETE", url, 404)
    assert api.get("/checkpoints")["cursor"]["total_count"] == 1


def test_runs_from_a_checkpoint_and_loads_into_one(api: Any, run_id: str, worker: Any, house: Any) -> None:
    saved = api.post("/save_weights", {"model_id": run_id, "seq_id": 1, "path": "s1"})
    sampler = api.post("/save_weights_for_sampler", {"model_id": run_id, "seq_id": 2, "path": "w1"})
    worker.step()
    path, sampler_path = api.result(saved)["path"], api.result(sampler)["path"]
    session = api.session()
    made = api.post("/load_weights", {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True})
    into = api.post("/load_weights", {"model_id": run_id, "seq_id": 3, "path": path, "optimizer": True})
    worker.step()
    new_id = f"{session}:train:0"
    assert api.result(made) == {"type": "load_weights", "model_id": new_id, "path": path}
    assert api.result(into)["model_id"] == run_id
    assert house.store.runs.get(house.tenant_id, new_id).spec.rank == 4

    refused = [
        ({"session_id": session, "model_seq_id": 1, "path": sampler_path, "optimizer": True}, "no optimizer state"),
        (
            {"session_id": session, "model_seq_id": 2, "path": "tinker://x:train:0/weights/a", "optimizer": False},
            "x:train",
        ),
        ({"session_id": session, "model_seq_id": 3, "path": path, "base_model": "other"}, "not on 'other'"),
        ({"session_id": session, "model_seq_id": 4, "path": path, "optimizer_config": {"type": "dimuon"}}, "adamw"),
    ]
    for body, words in refused:
        assert words in failure(api, api.post("/load_weights", body))
    wide = api.create(session, seq=9, lora_config={"rank": 8})["model_id"]
    promise = api.post("/load_weights", {"model_id": wide, "seq_id": 1, "path": path, "optimizer": False})
    assert "rank 4" in failure(api, promise)


def test_a_secret_in_a_load_is_not_stored(api: Any, run_id: str, worker: Any, house: Any) -> None:
    saved = api.post("/save_weights", {"model_id": run_id, "seq_id": 1, "path": "s1"})
    worker.step()
    body = {"model_id": run_id, "seq_id": 2, "path": api.result(saved)["path"], "weights_access_token": "hush-hush"}
    op = house.store.ops.get(house.tenant_id, api.post("/load_weights", body)["request_id"])
    assert op.payload is None
    assert op.payload_blob is None
    assert "hush" not in json.dumps(op.meta)


def test_sampling_sessions(api: Any, run_id: str, worker: Any) -> None:
    saved = api.post("/save_weights", {"model_id": run_id, "seq_id": 1, "path": "s1"})
    sampler = api.post("/save_weights_for_sampler", {"model_id": run_id, "seq_id": 2, "path": "w1"})
    worker.step()
    session = api.session()

    def make(status: int = 200, seq: int = 0, **body: Any) -> Any:
        whole = {"session_id": session, "sampling_session_seq_id": seq, **body}
        return api.post("/create_sampling_session", whole, status)

    path = api.result(sampler)["path"]
    made = make(model_path=path)
    assert make(model_path=path) == made
    assert api.get(f"/samplers/{made['sampling_session_id']}")["model_path"] == path
    assert "save_weights_for_sampler" in make(400, model_path=api.result(saved)["path"])["detail"]
    assert "served" in make(400, base_model="other")["detail"]
    assert "base_model or a model_path" in make(400)["detail"]
    make(404, model_path=f"tinker://{run_id}/sampler_weights/none")
    assert api.get(f"/sessions/{session}") == {
        "training_run_ids": [],
        "sampler_ids": [made["sampling_session_id"]],
        "user_metadata": {"a": "1"},
    }


def test_samples(api: Any, sampler_id: str, worker: Any, house: Any) -> None:
    large = 5 * 10**18
    first = api.post("/asample", sample_body(sampler_id, seq_id=large, sampling_params={"max_tokens": 4, "seed": 7}))
    again = api.post("/asample", sample_body(sampler_id, seq_id=large, num_samples=1))
    assert again == first
    assert len(set(first["sample_sequence_ids"])) == 2
    drawn = api.post("/asample", sample_body(sampler_id, seq_id=0))
    seeds = [house.store.ops.get(house.tenant_id, p["request_id"]).meta["seed"] for p in (first, drawn)]
    assert seeds[0] == 7
    assert 0 <= seeds[1] < 2**63
    assert worker.step() == 2
    response = api.raw("POST", "/api/v1/retrieve_future", json={"request_id": first["request_id"]})
    decoded = pb.SampleResponse.FromString(response.content)
    assert [np.frombuffer(s.tokens, "<i4").tolist() for s in decoded.sequences] == [[7] * 4] * 2


def test_bad_samples(api: Any, sampler_id: str) -> None:
    api.post("/asample", sample_body("s:sample:99"), 404)
    api.post("/asample", {"prompt": {"chunks": []}}, 400)
    cases = [
        ({"num_samples": 0}, "num_samples"),
        ({"prompt": {"chunks": []}}, "prompt is empty"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [10**6]}]}}, "prompt tokens"),
        ({"prompt": {"chunks": [{"type": "image", "data": ""}]}}, "image"),
        ({"prompt": None}, "prompt"),
        ({"sampling_params": {"max_tokens": 10**6}}, "context"),
        ({"topk_sample_logprobs": 200}, "topk_sample_logprobs"),
    ]
    for seq, (changes, words) in enumerate(cases):
        assert words in failure(api, api.post("/asample", sample_body(sampler_id, seq_id=seq, **changes)))


def test_a_poll_wakes_when_the_worker_rings(make_house: Any) -> None:
    house = make_house(poll_hold_s=20.0, scan_interval_s=20.0)
    worker = house.make_worker()
    with TestClient(build_app(house.services)) as client:
        headers = {"X-API-Key": house.key}
        session = client.post("/api/v1/create_session", json={}, headers=headers).json()["session_id"]
        body = {"session_id": session, "model_seq_id": 0, "base_model": BASE}
        promise = client.post("/api/v1/create_model", json=body, headers=headers).json()
        answers: list[Any] = []

        def poll() -> None:
            answers.append(client.post("/api/v1/retrieve_future", json=promise, headers=headers))

        threads = [threading.Thread(target=poll) for _ in range(3)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 5
        while house.services.waiters.num_waiting < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        started = time.monotonic()
        worker.step()
        for thread in threads:
            thread.join(10)
        assert time.monotonic() - started < 5
        assert [answer.json()["model_id"] for answer in answers] == [promise["model_id"]] * 3
        assert house.services.waiters.num_waiting == 0


def test_a_lost_ring_costs_a_scan(api: Any, worker: Any, house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    promise = api.create(api.session())
    monkeypatch.setattr(worker._api, "ring", lambda: None)
    timer = threading.Timer(0.05, worker.step)
    timer.start()
    assert api.result(promise)["model_id"] == promise["model_id"]
    timer.join()


def test_what_a_poll_waits_for(api: Any, house: Any, run_id: str) -> None:
    first = api.post("/optim_step", {"model_id": run_id, "seq_id": 1, "adam_params": {}})
    second = api.post("/optim_step", {"model_id": run_id, "seq_id": 2, "adam_params": {}})
    assert api.result(first, 408)["queue_state_reason"] == "next in the queue"
    assert api.result(second, 408)["queue_state_reason"] == "1 request ahead in the queue"
    house.ready.clear()
    assert "still being loaded" in api.result(first, 408)["queue_state_reason"]


def test_an_unknown_request_is_gone(api: Any) -> None:
    assert api.result({"request_id": "req-none"}, 410)["detail"] == "unknown or expired request id"

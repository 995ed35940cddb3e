"""Bytes that are no request, on every route of a real server: refused at once, and the runs are as they were."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import zstandard

from tests.contract.raw import BASE, PROTOBUF, Raw, RawRun, Refusal, ours, refused
from tests.contract.routes import closed_routes, concrete
from tests.service import Service, running
from tinsmith.wire import wire_pb2 as pb

MAX_BODY_BYTES = 300_000
WITH_BODY = [r for r in closed_routes() if r.startswith(("POST", "PUT")) and not r.endswith("/publish")]
ZSTD = {"content-encoding": "zstd"}

JUNK = {
    "nothing": b"",
    "noise": random.Random(1).randbytes(4000),
    "zeros": bytes(1000),
    "half an object": b'{"session_id": "s',
    "text": b"hello",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
    "a deep field": b'{"user_metadata":' + b'{"a":' * 40_000 + b"1" + b"}" * 40_001,
    "not UTF-8": b'{"session_id": "\xff\xfe"}',
    "half a surrogate pair": b'{"session_id": "\\ud800", "model_id": "\\ud800", "name": "\\ud800"}',
    "a huge number": b'{"seq_id": 1' + b"0" * 5000 + b"}",
    "NaN": b'{"seq_id": NaN, "model_id": "x", "ttl_seconds": NaN}',
    "other types": b'{"session_id": [], "model_id": {}, "seq_id": "1", "request_id": 7, "name": 3}',
    "null bytes": b'{"session_id": "\\u0000", "model_id": "\\u0000", "seq_id": 1, "request_id": "\\u0000"}',
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    flags = ("--device", "fake", "--max-body-bytes", str(MAX_BODY_BYTES))
    with running(tmp_path_factory.mktemp("bodies") / "data", *flags) as service:
        yield service


@pytest.fixture(scope="module")
def raw(service: Service) -> Iterator[Raw]:
    raw = Raw(service.url, service.key)
    yield raw
    raw.close()


@pytest.fixture(scope="module")
def session(raw: Raw) -> str:
    return raw.session()


@pytest.fixture(scope="module")
def runs(raw: Raw, session: str) -> tuple[RawRun, RawRun, bytes]:
    """The one that errs, a bystander with the same seed, and what both say."""
    one, other = raw.run(session, 0), raw.run(session, 1)
    return one, other, other.forward()


@pytest.fixture
def run(runs: tuple[RawRun, RawRun, bytes]) -> Iterator[RawRun]:
    yield runs[0]
    assert runs[0].forward() == runs[1].forward() == runs[2]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("route", WITH_BODY)
def test_junk(raw: Raw, route: str, junk: str) -> None:
    """Either the user's mistake, or, where no field is required, an answer."""
    method, path = concrete(route)
    for media in ("application/json", PROTOBUF):
        response = raw.send(method, path, content=JUNK[junk], headers={"content-type": media})
        assert response.status_code < 500, response.text
        assert response.elapsed.total_seconds() < 1.0
        if response.status_code >= 400:
            problem = ours(response.json())
            assert problem["detail"]
            assert problem["category"] == "user"


@pytest.mark.parametrize(
    "route", [r for r in WITH_BODY if r != "POST /import_weights"]
)  # takes what a base's adapters may
def test_oversized(raw: Raw, route: str) -> None:
    method, path = concrete(route)
    body = b'{"x": "' + b"x" * 2 * MAX_BODY_BYTES + b'"}'
    for content in (body, iter([body[:100_000], body[100_000:]])):
        if path.startswith(("/oai/", "/anthropic/")):  # with codes of their own
            assert raw.send(method, path, content=content).status_code == 413
            continue
        found = refused(lambda content=content: raw.ask(method, path, content=content))
        assert (found.status, found.code) == (413, "too_large")


def test_an_oversized_chunk_takes_its_number(run: RawRun) -> None:
    message = run.message()
    message.data[0].model_input[0].encoded_text.tokens = bytes(2 * MAX_BODY_BYTES)
    found = run.train(message.SerializeToString())
    assert isinstance(found, Refusal)
    assert found.status == 413
    assert "fewer datums" in found.message


@pytest.mark.parametrize("size", [10**8, 10**9])
def test_a_zstd_bomb_takes_its_number_and_little_time(run: RawRun, size: int) -> None:
    message = run.message()
    body = message.SerializeToString() + bytes(size)
    bomb = zstandard.ZstdCompressor().compress(body)
    assert len(bomb) < MAX_BODY_BYTES
    found = refused(lambda: run.train(bomb, ZSTD))
    assert (found.status, found.code) == (413, "too_large")


def test_zstd_that_is_none(run: RawRun) -> None:
    good = run.message().SerializeToString()
    packed = zstandard.ZstdCompressor().compress(good)
    for body in (b"", b"x", good, packed[: len(packed) // 2], packed[:-1], packed + b"x", packed[:4] + bytes(50)):
        found = refused(lambda body=body: run.train(body, ZSTD))
        assert (found.status, found.code) == (400, "invalid_request")
        assert "zstd" in found.message
    assert refused(lambda: run.train(good, {"content-encoding": "br"})).message.endswith("send zstd, or no encoding")
    assert isinstance(run.train(packed, ZSTD), httpx.Response)  # the number was not taken by any of these


def test_truncated_protobuf(run: RawRun) -> None:
    """With the address still legible the number is consumed by a failed future; without, the request is refused."""
    for keep in (1, 5, 20, 40, 60, 80, -1):
        body = run.message().SerializeToString()
        found = run.train(body[:keep])
        if isinstance(found, httpx.Response):
            pytest.fail(f"{keep} of {len(body)} bytes were taken for a request")
        assert found.category == "user"
        if found.status != 200:
            run.seq_id -= 1
            assert "model_id and a seq_id" in found.message


def test_flipped_bytes(run: RawRun) -> None:
    """Any byte of a request changed: an answer or a refusal, never a fault; the run can be read afterwards."""
    draw = random.Random(2)
    for _ in range(60):
        body = bytearray(run.message(forward_only=True).SerializeToString())
        at = draw.randrange(60, len(body))
        body[at] ^= 1 << draw.randrange(8)
        answer = run.train(bytes(body))
        if isinstance(answer, Refusal):
            assert answer.category == "user", answer


SPOILED: dict[str, Any] = {
    "no data": (lambda m: m.ClearField("data"), "data is empty: send at least one datum"),
    "no chunk": (lambda m: m.data[0].ClearField("model_input"), "the model input is empty"),
    "image": (lambda m: m.data[0].model_input.add().image.SetInParent(), "only token chunks"),
    "odd token bytes": (lambda m: setattr(text(m), "tokens", b"\1\2\3"), "not a multiple of 4"),
    "odd target bytes": (lambda m: setattr(targets(m), "dense", b"\1\2\3"), "no whole number of"),
    "no dtype": (lambda m: setattr(targets(m), "dtype", 0), "dtype 0 is not float32 or int64"),
    "unknown dtype": (lambda m: setattr(targets(m), "dtype", 77), "dtype 77 is not float32 or int64"),
    "negative shape": (lambda m: targets(m).shape.extend([-3]), "is not"),
    "shape that isn't filled": (lambda m: targets(m).shape.extend([3, 2]), "do not fill shape"),
    "too many dimensions": (lambda m: targets(m).shape.extend([1, 1, 3]), "is not"),
    "shape of nothing": (lambda m: targets(m).shape.extend([0]), "do not fill shape"),
    "sparse without shape": (lambda m: sparse(m, [0, 1], [0]), "needs a shape"),
    "sparse rows that don't add up": (lambda m: sparse(m, [0, 1, 5, 3], [0, 0, 0], 3, 1), "row pointers"),
    "sparse column outside": (lambda m: sparse(m, [0, 1, 2, 3], [0, 9, 0], 3, 1), "column indices"),
    "a vast sparse tensor": (lambda m: sparse(m, [0], [], 2**40, 2**20), "may hold at most"),
    "no loss": (lambda m: setattr(m, "loss_fn", ""), "unknown loss ''; offered: cross_entropy"),
    "a long name of a loss": (lambda m: setattr(m, "loss_fn", "x" * 10_000), "offered: cross_entropy"),
}


@pytest.mark.parametrize("mistake", SPOILED)
def test_spoiled_messages(run: RawRun, mistake: str) -> None:
    spoil, words = SPOILED[mistake]

    def send() -> Any:
        message = run.message()
        spoil(message)
        return run.train(message.SerializeToString())

    found = refused(send)
    assert (found.status, found.category) == (200, "user")
    assert words in found.message
    assert len(found.message) < 600


@pytest.mark.parametrize("seq_id", [0, -1])
def test_numbers_that_are_none(run: RawRun, seq_id: int) -> None:
    message = run.message()
    run.seq_id -= 1
    message.seq_id = seq_id
    assert refused(lambda: run.train(message.SerializeToString())).status == 400
    body = {"model_id": run.run_id, "seq_id": seq_id, "adam_params": {}}
    found = refused(lambda: run.raw.ask("POST", "/optim_step", json=body))
    assert "seq_id" in found.message


def test_the_same_number_twice_is_one_request(run: RawRun) -> None:
    body = {**run.next(), "adam_params": {"learning_rate": 0.0}}
    first = run.raw.send("POST", "/optim_step", json=body).json()
    second = run.raw.send("POST", "/optim_step", json={**body, "adam_params": {"learning_rate": -1}}).json()
    assert first == second


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_config": {"rank": 0}}, "rank must lie in 1..128, not 0"),
        ({"lora_config": {"rank": 2.5}}, "lora_config.rank"),
        ({"lora_config": {"rank": "8"}}, "lora_config.rank"),
        ({"lora_config": {"rank": None}}, "lora_config.rank"),
        ({"lora_config": {"seed": 2**63}}, "seed must lie in"),
        (
            {"lora_config": {"train_attn": False, "train_mlp": False, "train_unembed": False}},
            "set at least one of train_attn, train_mlp and train_unembed",
        ),
        ({"base_model": None}, "base_model"),
        ({"base_model": "../../etc"}, "served: tinsmith/tiny"),
        ({"optimizer_config": {"type": "sgd"}}, "use adamw"),
        ({"user_metadata": ["a"]}, "user_metadata"),
    ],
)
def test_bad_runs(raw: Raw, session: str, run: RawRun, changes: dict[str, Any], words: str) -> None:
    body = {"session_id": session, "model_seq_id": random.randrange(10, 2**40), "base_model": BASE, **changes}
    assert words in refused(lambda: raw.ask("POST", "/create_model", json=body)).message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adam_params": None}, "needs adam_params"),
        ({"adam_params": {"learning_rate": None}}, "learning_rate must be a finite number"),
        ({"adam_params": {"learning_rate": "fast"}}, "adam_params.learning_rate"),
        ({"adam_params": {"eps": 0}}, "eps must be greater than 0"),
        ({"optimizer_params": {"type": "dimuon", "learning_rate": 1}}, "pass AdamParams"),
    ],
)
def test_bad_steps(run: RawRun, changes: dict[str, Any], words: str) -> None:
    assert words in refused(lambda: run.raw.ask("POST", "/optim_step", json={**run.next(), **changes})).message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 10**9}, "num_samples"),
        ({"prompt": {}}, "chunks"),
        ({"prompt": {"chunks": []}}, "the prompt is empty"),
        ({"prompt": {"chunks": [{"type": "encoded_text"}]}}, "needs tokens"),
        ({"prompt": {"chunks": [{"tokens": [2**40]}]}}, "prompt.chunks"),
        ({"prompt": {"chunks": [{"type": "image", "data": ""}]}}, "only token chunks"),
        ({"sampling_params": {"max_tokens": "many"}}, "sampling_params.max_tokens"),
        ({"sampling_params": {"temperature": None}}, "sampling_params.temperature"),
        ({"sampling_params": {"stop": [1, "a"]}}, "not of both"),
        ({"sampling_params": {"stop": [1.5]}}, "sampling_params.stop"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({"prompt_logprobs_last_n": 3}, "set prompt_logprobs too"),
    ],
)
def test_bad_samples(raw: Raw, session: str, run: RawRun, changes: dict[str, Any], words: str) -> None:
    made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    sampler = raw.good("/create_sampling_session", json=made).json()["sampling_session_id"]
    body = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 1}, "num_samples": 1, **changes}
    body |= {"sampling_session_id": sampler, "seq_id": random.randrange(2**60)}
    assert words in refused(lambda: raw.ask("POST", "/asample", json=body)).message


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_numbers_that_json_lacks(raw: Raw, session: str, name: str) -> None:
    made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    sampler = raw.good("/create_sampling_session", json=made).json()["sampling_session_id"]
    for value in (float("nan"), float("inf"), -float("inf")):
        params = {"max_tokens": 1, name: value}
        body = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": params, "sampling_session_id": sampler}
        text = json.dumps({**body, "seq_id": random.randrange(2**60)})
        assert f"{name} must" in refused(lambda text=text: raw.ask("POST", "/asample", content=text)).message


@pytest.mark.parametrize("name", ["..%2f..%2fx", "%2e%2e", "*", "a%00b", "%ff", "x" * 200, "a%2fb"])
def test_names_in_paths(raw: Raw, run: RawRun, name: str) -> None:
    """Names that can't have been saved under find nothing."""
    url = f"/training_runs/{run.run_id}/checkpoints/weights/{name}"
    assert refused(lambda: raw.ask("DELETE", url)).status in (400, 404)
    assert refused(lambda: raw.ask("PUT", f"{url}/ttl", json={"ttl_seconds": 3600})).status in (400, 404)


def test_queries(raw: Raw) -> None:
    for query in ("limit=0", "limit=-1", "limit=x", "limit=9" + "9" * 20, "offset=-1", "offset=9" + "9" * 20):
        for path in ("/sessions", "/training_runs", "/checkpoints"):
            assert refused(lambda url=f"{path}?{query}": raw.ask("GET", url)).status == 400
    assert raw.send("GET", "/checkpoints?offset=9223372036854775807").json()["checkpoints"] == []


def text(message: pb.ForwardBackwardRequest) -> Any:
    return message.data[0].model_input[0].encoded_text


def targets(message: pb.ForwardBackwardRequest) -> Any:
    return message.data[0].loss_fn_inputs["target_tokens"]


def sparse(message: pb.ForwardBackwardRequest, crow: list[int], cols: list[int], *shape: int) -> None:
    tensor = targets(message)
    tensor.sparse_csr.values = np.array(cols, "<i8").tobytes()
    tensor.sparse_csr.crow_indices = np.array(crow, "<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array(cols, "<i8").tobytes()
    tensor.shape.extend(shape)

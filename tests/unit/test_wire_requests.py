"""JSON requests, op meta, results and tinker paths."""

from __future__ import annotations

import json
import math

import pytest

from tinsmith.errors import UnsupportedError, UserError
from tinsmith.types import AdamParams, CheckpointKind, Failure, OptimResult, RunSpec, Targets
from tinsmith.wire import results
from tinsmith.wire.media import WireError, decode_json
from tinsmith.wire.meta import CreateMeta, SampleMeta, SaveSamplerMeta, read_meta, to_meta
from tinsmith.wire.paths import parse_path
from tinsmith.wire.requests import CreateModel, RunAddress, decode_optim_step


def test_optim_step_reads_adam_params() -> None:
    body = b'{"model_id":"r","seq_id":2,"type":"optim_step","adam_params":{"learning_rate":0.01,"beta1":0.8,"new":1}}'
    assert decode_optim_step(body) == AdamParams(learning_rate=0.01, beta1=0.8)


def test_null_is_what_the_client_makes_of_nan() -> None:
    params = decode_optim_step(b'{"adam_params":{"learning_rate":null}}')
    assert math.isnan(params.learning_rate)
    assert params.beta1 == AdamParams().beta1


@pytest.mark.parametrize("body", [b'{"x":' * 100_000, b'{"x":' * 100_000 + b"1" + b"}" * 100_000])
def test_deep_nesting_is_no_fault_of_ours(body: bytes) -> None:
    with pytest.raises(WireError, match="nested too deeply"):
        decode_json(body, CreateModel)


def test_another_optimizer_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"dimuon.*adamw"):
        decode_optim_step(b'{"optimizer_params":{"type":"dimuon","learning_rate":0.1}}')


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"not json", b'{"model_id":"","seq_id":1}', b'{"model_id":"r","seq_id":0}']
)
def test_broken_addresses(body: bytes) -> None:
    with pytest.raises(WireError):
        decode_json(body, RunAddress)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(WireError, match="not JSON"):
        decode_json(b'{"base_model":"\\ud800"}', CreateModel)


def test_meta_survives_the_store() -> None:
    create = CreateMeta(spec=RunSpec("s:train:0", "base", rank=8, seed=2**63 - 1, targets=Targets(mlp=False)))
    save = SaveSamplerMeta(name=None, sampler_id="s:sample:1", session_id="s", ttl_s=5)
    sample = SampleMeta(seed=5, sampler_id="s:sample:1", num_samples=2)
    for value in (create, save, sample):
        assert read_meta(json.loads(json.dumps(to_meta(value))), type(value)) == value


def test_results() -> None:
    assert json.loads(results.create_result("r")) == {"type": "create_model", "model_id": "r"}
    assert json.loads(results.optim_result(OptimResult({"grad_norm": 1.0})))["metrics"] == {"grad_norm": 1.0}
    assert json.loads(results.sampler_result(None, "s:sample:0")) == {
        "type": "save_weights_for_sampler",
        "sampling_session_id": "s:sample:0",
    }
    assert json.loads(results.failure_result(Failure("capacity", "capacity", "full"))) == {
        "error": "full",
        "category": "server",
        "code": "capacity",
    }


def test_paths() -> None:
    place = parse_path("tinker://s1:train:0/sampler_weights/a.b-1")
    assert (place.run_id, place.kind, place.name) == ("s1:train:0", CheckpointKind.SAMPLER, "a.b-1")
    assert str(place) == "tinker://s1:train:0/sampler_weights/a.b-1"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "s1/weights/a",
        "tinker://s1/weights",
        "tinker:///weights/a",
        "tinker://s1/other/a",
        "tinker://s1/weights/a/b",
        "tinker://s1/weights/../a",
        "tinker://s1/weights/..",
        "tinker://s1/weights/",
        "tinker://s1/weights/a b",
        "tinker://s1/weights/" + "a" * 129,
    ],
)
def test_broken_paths(path: str) -> None:
    with pytest.raises(UserError):
        parse_path(path)

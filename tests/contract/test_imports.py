"""Weights from elsewhere, through the API: what becomes of them, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.contract.conftest import House, small_state
from tests.contract.raw import BASE, Raw, Refusal
from tests.contract.standing import QUERY, standing
from tinsmith.api import imports
from tinsmith.files.checkpoint_file import dump_state, load_state
from tinsmith.scopes import Scope
from tinsmith.store.quota_rules import Quota
from tinsmith.types import CheckpointKind, RunId, RunSpec, RunState, Targets

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def halves(
    module: str = QUERY, rank: int = 2, inputs: int = 6, outputs: int = 6, suffix: str = ".weight"
) -> dict[str, Any]:
    rng = np.random.default_rng(len(module))
    return {
        f"base_model.model.{module}.lora_A{suffix}": rng.normal(size=(rank, inputs)).astype(np.float32),
        f"base_model.model.{module}.lora_B{suffix}": rng.normal(size=(outputs, rank)).astype(np.float32),
    }


def archive(
    tensors: Mapping[str, Any] | bytes | None = None, more: Mapping[str, bytes] | None = None, **config: Any
) -> bytes:
    weights = tensors if isinstance(tensors, bytes) else save(dict(halves() if tensors is None else tensors))
    files = {"adapter_config.json": json.dumps({**CONFIG, **config}).encode(), "adapter_model.safetensors": weights}
    return tar_of({**files, **(more or {})})


def tar_of(files: Mapping[str, bytes], **attributes: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for attribute, value in attributes.items():
                setattr(entry, attribute, value)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def headed(header: bytes, data: bytes = bytes(4)) -> bytes:
    """A safetensors file with a header as it stands."""
    return struct.pack("<Q", len(header)) + header + data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, Raw, Raw]]:
    with (
        standing(tmp_path_factory.mktemp("imports"), min_ttl_s=1) as (house, url),
        closing(Raw(url, house.key)) as raw,
        closing(Raw(url, house.other_key)) as other,
    ):
        yield house, raw, other


def send(raw: Raw, body: bytes, query: str = "", **headers: str) -> Any:
    """The answer's JSON, or how it was refused."""
    answer = raw.ask("POST", f"/import_weights{query}", content=body, headers=headers)
    return answer if isinstance(answer, Refusal) else answer.json()


def stored(house: House, path: str) -> Any:
    run_id, kind, name = path.removeprefix("tinker://").split("/")
    row = house.store.checkpoints.get_any(RunId(run_id), CheckpointKind(kind), name)
    return row, load_state(house.blobs.get(row.blob))


def test_an_adapter_becomes_two_checkpoints_of_one_file(place: tuple[House, Raw, Raw]) -> None:
    house, raw, _ = place
    made = send(raw, archive(), "?name=mine&project_id=p&ttl_seconds=3600")
    assert (made["lora_rank"], made["base_model"], made["has_optimizer"]) == (2, BASE, False)
    (row, state), (sampler, _) = stored(house, made["path"]), stored(house, made["sampler_path"])
    assert row.blob == sampler.blob
    assert row.name == sampler.name == "mine"
    assert row.expires_at == pytest.approx(row.created_at + 3600, abs=5)
    assert (row.spec.rank, row.spec.alpha, row.spec.targets) == (2, 4.0, Targets(True, False, False))
    assert state.spec == row.spec
    for name, tensor in halves().items():
        plain = name.replace("base_model.model.", "param/").removesuffix(".weight")
        np.testing.assert_array_equal(state.tensors[plain], tensor)


def test_it_is_loaded_into_a_run_and_sampled_from_like_any_other(place: tuple[House, Raw, Raw]) -> None:
    _, raw, _ = place
    made = send(raw, archive())
    session = raw.session()
    body = {"session_id": session, "model_seq_id": 0, "path": made["path"]}
    assert not isinstance(raw.ask("POST", "/load_weights", json=body), Refusal)
    assert raw.send("POST", "/get_info", json={"model_id": f"{session}:train:0"}).json()["lora_rank"] == 2
    refused = raw.ask("POST", "/load_weights", json={**body, "model_seq_id": 1, "optimizer": True})
    assert isinstance(refused, Refusal)
    assert "no optimizer state" in refused.message
    sampler = {"session_id": session, "sampling_session_seq_id": 0, "model_path": made["sampler_path"]}
    assert raw.send("POST", "/create_sampling_session", json=sampler).status_code == 200


def test_another_tenant_has_no_part_in_it(place: tuple[House, Raw, Raw]) -> None:
    _, raw, other = place
    made = send(raw, archive())
    for path in (made["path"], made["sampler_path"]):
        found = other.ask("POST", "/weights_info", json={"tinker_path": path})
        assert isinstance(found, Refusal)
        assert found.code == "not_found"


def test_the_same_key_makes_one_import(place: tuple[House, Raw, Raw]) -> None:
    house, raw, other = place
    key = {"X-Idempotency-Key": "one"}
    first = send(raw, archive(), **key)
    files = {file.key for file in house.blobs.files()}
    assert send(raw, archive(), **key) == first
    assert {file.key for file in house.blobs.files()} == files
    changed = send(raw, archive(lora_alpha=8), **key)
    assert (changed.code, "X-Idempotency-Key" in changed.message) == ("invalid_request", True)
    assert send(other, archive(), **key)["path"] != first["path"]


def test_a_run_that_holds_imports_is_not_trained(place: tuple[House, Raw, Raw]) -> None:
    _, raw, _ = place
    run = send(raw, archive())["path"].split("/")[2]
    found = raw.ask("POST", "/optim_step", json={"model_id": run, "seq_id": 1, "adam_params": {}})
    assert isinstance(found, Refusal)
    assert "create_training_client_from_state" in found.message


def test_it_is_in_the_audit_log_with_its_digest(place: tuple[House, Raw, Raw]) -> None:
    _, raw, _ = place
    made = send(raw, archive())
    entries = raw.send("GET", "/audit").json()["entries"][-2:]
    assert [entry["event"] for entry in entries] == ["checkpoint_import"] * 2
    assert [entry["tinker_path"] for entry in entries] == [made["path"], made["sampler_path"]]
    assert all(len(entry["event_details"]["sha256"]) == 64 for entry in entries)


def test_a_states_moments_and_step_come_along(place: tuple[House, Raw, Raw]) -> None:
    house, raw, _ = place
    spec = RunSpec(RunId("elsewhere"), "their/name", 3, 9, Targets(True, False, False))
    state = small_state(spec, ("param", "m", "v"))
    whole = type(state)(spec, 41, state.tensors)
    for body in (dump_state(whole), tar_of({"run_state.safetensors": dump_state(whole)})):
        made = send(raw, body)
        row, found = stored(house, made["path"])
        assert made["has_optimizer"]
        assert row.has_optimizer
        assert (found.step, found.spec.seed, found.spec.base_model) == (41, 9, BASE)
        assert all(np.array_equal(found.tensors[name], tensor) for name, tensor in state.tensors.items())


def test_a_downloaded_state_is_what_is_stored(place: tuple[House, Raw, Raw]) -> None:
    house, raw, _ = place
    lora = {"rank": 2, "train_mlp": False, "train_unembed": False}
    made = {"session_id": raw.session(), "model_seq_id": 0, "base_model": BASE, "lora_config": lora}
    run = raw.good("/create_model", json=made).json()["model_id"]
    path = raw.good("/save_weights", json={"model_id": run, "seq_id": 1, "path": "kept"}).json()["path"]
    run_id, kind, name = path.removeprefix("tinker://").split("/")
    url = f"/training_runs/{run_id}/checkpoints/{kind}/{name}/archive"
    archive = raw.send("GET", f"{url}?content=state", follow_redirects=True).content
    row = house.store.checkpoints.get_any(RunId(run_id), CheckpointKind(kind), name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.getnames() == ["run_state.safetensors", "checkpoint_complete"]
        assert tar.extractfile("run_state.safetensors").read() == house.blobs.get(row.blob)
    assert send(raw, archive)["has_optimizer"]
    assert raw.send("GET", f"{url}?content=other").status_code == 400


def test_experts_come_in_each_layout(place: tuple[House, Raw, Raw]) -> None:
    """Stacked, one by one with a factor that all share, and with those that the base's shares can't hold."""
    house, raw, _ = place
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(3, 4, 2)).astype(np.float32)
    stacked = {
        "base_model.model.model.layers.0.mlp.experts.w1.lora_A.weight": shared[None],
        "base_model.model.model.layers.0.mlp.experts.w1.lora_B.weight": own,
    }
    one_by_one = {
        f"base_model.model.model.layers.0.block_sparse_moe.experts.{number}.w1.{half}.weight": tensor
        for number in range(3)
        for half, tensor in (("lora_A", shared), ("lora_B", own[number]))
    }
    states = [stored(house, send(raw, archive(tensors))["path"])[1].tensors for tensors in (stacked, one_by_one)]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    np.testing.assert_array_equal(states[0]["param/model.layers.0.mlp.experts.w1.lora_B"], own)
    assert not states[0]["param/model.layers.0.mlp.experts.w2.lora_B"].any()
    changed = dict(one_by_one)
    name = next(name for name in changed if ".2.w1.lora_A" in name)
    changed[name] = shared + 1
    assert "--expert-adapters own" in send(raw, archive(changed)).message
    del changed[name], changed[name.replace("lora_A", "lora_B")]
    assert "expert 2 has no adapter" in send(raw, archive(changed)).message


ATTN = RunSpec(RunId("r"), "b", 2, targets=Targets(True, False, False))
NARROW = {name: tensor[:, :5] if "lora_A" in name else tensor for name, tensor in halves().items()}
EXPERTS_APART = {
    f"base_model.model.model.layers.0.mlp.experts.{number}.w1.{half}.weight": np.ones(shape, np.float32)
    for number in range(3)
    for half, shape in (("lora_A", (2, 6)), ("lora_B", (4, 2)))
}
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "holds no files"),
    "no tar": (b"x" * 2000, "not an uncompressed tar"),
    "a compressed tar": (gzip.compress(archive()), "is gzip, not an uncompressed tar"),
    "a short compressed tar": (gzip.compress(b"x"), "is gzip, not an uncompressed tar"),
    "a zip archive": (b"PK\x03\x04" + bytes(2000), "is a zip archive, not an uncompressed tar"),
    "a tar that is cut short": (archive()[:1700], "not sent whole"),
    "no weights": (tar_of({"adapter_config.json": b"{}"}), "lacks adapter_model.safetensors"),
    "a pickle": (tar_of({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}), "is a pickle"),
    "a link": (tar_of({"adapter_config.json": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain file"),
    "a device": (tar_of({"adapter_config.json": b""}, type=tarfile.CHRTYPE), "no plain file"),
    "a name that leads away": (tar_of({"../../adapter_config.json": b"{}"}), "leads elsewhere"),
    "an absolute name": (tar_of({"/adapter_config.json": b"{}"}), "leads elsewhere"),
    "many entries": (tar_of({f"f{number}": b"" for number in range(300)}), "more than 256 entries"),
    "a long extended header": (
        tar_of({"x": bytes(1 << 17)}, type=tarfile.XHDTYPE), "extended header that is too long"),
    "a config that is none": (tar_of({"adapter_config.json": b"{", "adapter_model.safetensors": b""}), "can't be read"),
    "a config too long": (archive(more={"adapter_config.json": b" " * (2**20 + 1)}), "bytes, at most"),
    "another method": (archive(peft_type="IA3"), "does not describe a LoRA"),
    "DoRA": (archive(use_dora=True), "use_dora"),
    "trained biases": (archive(bias="all"), "biases"),
    "biases of the factors": (archive(lora_bias=True), "lora_bias"),
    "modules to save": (archive(modules_to_save=["score", "embed_tokens"]), "score"),
    "a changed base": (archive(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "a setting of tomorrow": (archive(twisted=True), "twisted"),
    "rank 0": (archive(r=0), "at least 1"),
    "another rank than the tensors'": (archive(r=64), f"says rank 64 for '{QUERY}' (r), and its tensors have rank 2"),
    "another rank by a pattern": (
        archive(rank_pattern={"k_proj": 2, "q_proj": 99}), "rank_pattern 'q_proj'), and its tensors have rank 2"),
    "another rank than the experts'": (
        archive(EXPERTS_APART, rank_pattern={r"experts.1.w1": 1}), "experts.1.w1' (rank_pattern"),
    "experts scaled apart": (archive(EXPERTS_APART, alpha_pattern={"experts.1.w1": 9}), "experts have one scale"),
    "ranks that are none": (archive(rank_pattern={"q_proj": 2.0}), "rank_pattern 'q_proj' must be a whole number"),
    "ranks in a list": (archive(rank_pattern=[]), "rank_pattern must be an object"),
    "a flag in words": (archive(use_rslora="no"), 'use_rslora must be true or false, not \'"no"\''),
    "a flag of another method in words": (archive(use_dora="false"), "use_dora must be true or false"),
    "a flag as a number": (archive(inference_mode=0), "inference_mode must be true or false"),
    "no alpha": (archive(lora_alpha=None), "lora_alpha"),
    "alpha that is not finite": (
        tar_of({"adapter_config.json": b'{"r": 1, "lora_alpha": Infinity}', "adapter_model.safetensors": b""}),
        "above 0"),
    "a pattern that takes time": (archive(alpha_pattern={"(a+)+b": 1}), "beyond what is read"),
    "a header longer than the file": (archive(struct.pack("<Q", 2**40)), "a header of"),
    "a header that is none": (archive(struct.pack("<Q", 4) + b"[[[["), "can't be read"),
    "more tensors than any model has": (
        archive(headed(b"{" + b",".join(b'"%d":{}' % number for number in range(252_000)) + b"}")),
        "more than 250000 tensors"),
    "a header that nests": (archive(struct.pack("<Q", 20_000) + b"[" * 20_000), "can't be read"),
    "a shape that lies": (
        archive(struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'.ljust(64) + bytes(4)),
        "disagree"),
    "bytes that are shared": (
        archive(struct.pack("<Q", 112) + (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        ).ljust(112) + bytes(4)), "shares bytes"),
    "a type that is none": (archive(save({"a": np.zeros(2, np.int64)})), "F32, F16 and BF16"),
    "half an adapter": (archive(dict(list(halves().items())[:1])), "without its other half"),
    "no half at all": (archive({"model.norm.weight": np.zeros(2, np.float32)}), "no half of a LoRA adapter"),
    "magnitudes": (
        archive({**halves(), f"base_model.model.{QUERY}.lora_magnitude_vector": np.zeros(6, np.float32)}), "DoRA"),
    "an embedding's adapter": (
        archive({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((2, 3), np.float32)}),
        "of an embedding"),
    "two adapters": (
        archive({**halves(suffix=".one.weight"), **halves("lm_head", suffix=".two.weight")}), "several adapters"),
    "another model's layer": (archive(halves("model.layers.7.self_attn.q_proj")), "of another model"),
    "a router": (archive(halves("model.layers.0.mlp.gate")), "a router"),
    "another width": (archive(NARROW), "6 inputs"),
    "numbers that are not finite": (archive({n: t * np.float32(np.inf) for n, t in halves().items()}), "not finite"),
    "a rank too large": (archive(halves(rank=4096), r=4096), "rank must lie"),
    "a head that is not the base's": (
        archive({**halves("lm_head", 2, 6, 50), "base_model.model.lm_head.base_layer.weight": np.ones((50, 6), "f4")}),
        "not the served base's"),
    "a state of a full run": (dump_state(RunState(replace(ATTN, rank=0), 0, {})), "--full-fine-tuning"),
    "a state of other layers": (
        dump_state(small_state(replace(ATTN, targets=Targets(False, True, False)))), "lacks param/"),
    "a state of another width": (
        dump_state(small_state(ATTN, width=5)), "another base model"),
    "an alpha beyond all numbers": (archive(lora_alpha=10**400), "above 0"),
    "an alpha that overflows": (archive(lora_alpha=1e300), "at most 1e+06"),
    "a layer's alpha that overflows": (archive(alpha_pattern={"q_proj": 1e300}), "at most 1e+06"),
    "a state whose alpha overflows": (dump_state(small_state(replace(ATTN, alpha=1e300))), "at most 1e+06"),
    "a type that is no text": (
        archive(headed(b'{"a":{"dtype":"\\ud800","shape":[1],"data_offsets":[0,4]}}')), "can't be read"),
    "a part that is no text": (
        headed(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), "can't be read"),
    "a label that is no text": (
        headed(b'{"__metadata__":{"tinsmith":"{\\"format\\":\\"\\ud800\\""}}'), "can't be read"),
    "a name without end": (archive(halves("model." * 200_000 + QUERY), alpha_pattern={".*zz": 1}), "characters"),
    "an entry without end": (archive(headed(b'{"a":[' + b"[]," * 400_000 + b"[]]}")), "longer than"),
    "a state with a seed that is none": (dump_state(small_state(replace(ATTN, seed=-1))), "seed must lie"),
    "a state with half its moments": (
        dump_state(small_state(ATTN, ("param", "m"))), "both moments"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_taken_is_refused_by_name_and_leaves_nothing(place: tuple[House, Raw, Raw], case: str) -> None:
    house, raw, _ = place
    body, words = REFUSED[case]
    before = {file.key for file in house.blobs.files()}, len(raw.send("GET", "/audit").json()["entries"])
    found = send(raw, body)
    assert isinstance(found, Refusal), found
    assert found.category == "user"
    assert words in found.message
    assert ({file.key for file in house.blobs.files()}, len(raw.send("GET", "/audit").json()["entries"])) == before


@pytest.mark.parametrize(
    ("query", "words"),
    [("?name=../x", "no checkpoint name"), ("?base_model=none", "not served"), ("?ttl_seconds=0", "ttl_seconds"),
     ("?ttl_seconds=x", "ttl_seconds"), (f"?project_id={'x' * 300}", "project_id")],
)  # fmt: skip
def test_bad_questions(place: tuple[House, Raw, Raw], query: str, words: str) -> None:
    found = send(place[1], archive(), query)
    assert isinstance(found, Refusal)
    assert words in found.message


def test_a_base_whose_layers_are_not_known_yet_asks_for_patience(place: tuple[House, Raw, Raw]) -> None:
    house, raw, _ = place
    (table,) = (house.settings.data_dir / "layers").iterdir()
    content = table.read_bytes()
    table.unlink()
    found = send(raw, archive())
    table.write_bytes(content)
    assert (found.status, found.category) == (503, "capacity")


def test_storage_is_counted_and_bounded(place: tuple[House, Raw, Raw]) -> None:
    """Both checkpoints count, and one that would go beyond the quota leaves no file."""
    house, _, other = place
    tenant = house.store.tenants.by_name("bob").tenant_id
    made = send(other, archive())
    size = made["size_bytes"]
    kept = sum(row.size_bytes for row in house.store.checkpoints.list(tenant, 100, 0)[0])
    house.store.quotas.put(tenant, None, {Quota.STORAGE_BYTES: kept + 2 * size}, 0.0)
    assert isinstance(send(other, archive()), dict)
    before = {file.key for file in house.blobs.files()}
    found = send(other, archive())
    assert (found.code, "storage_bytes" in found.message) == ("quota", True)
    assert {file.key for file in house.blobs.files()} == before
    house.store.quotas.put(tenant, None, {Quota.STORAGE_BYTES: None}, 0.0)


def test_a_key_that_samples_may_not_import(place: tuple[House, Raw, Raw]) -> None:
    house, raw, _ = place
    _, secret = house.store.tenants.create_key(house.tenant_id, "sampler", scope=Scope.SAMPLE)
    assert send(raw, archive(), **{"X-API-Key": secret}).code == "forbidden"


def test_a_body_with_an_encoding_is_refused(place: tuple[House, Raw, Raw]) -> None:
    assert "content-encoding" in send(place[1], archive(), **{"content-encoding": "zstd"}).message


def test_nothing_of_an_upload_has_a_name(place: tuple[House, Raw, Raw], tmp_path: Path) -> None:
    house, _, _ = place
    before = {file.key for file in house.blobs.files()}
    with house.blobs.scratch() as file:
        file.write(b"x" * 1000)
        file.flush()
        assert {found.key for found in house.blobs.files()} == before


def test_one_tenants_import_keeps_no_other_waiting(
    place: tuple[House, Raw, Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, raw, other = place
    is_looking, may_go_on = threading.Event(), threading.Event()
    whole = imports.look

    def look(*args: Any) -> Any:
        if not is_looking.is_set():
            is_looking.set()
            assert may_go_on.wait(60)
        return whole(*args)

    monkeypatch.setattr(imports, "look", look)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(send, raw, archive(), "?name=slow")
        assert is_looking.wait(60)
        assert send(other, archive(), "?name=quick")["lora_rank"] == 2
        assert not slow.done()
        again = send(raw, archive(), "?name=second")
        assert isinstance(again, Refusal), "a tenant imports one at a time"
        may_go_on.set()
        assert slow.result()["lora_rank"] == 2

"""A house for the API's tests: a real store and files on disk, and a worker that finishes ops by hand."""

from __future__ import annotations

import copy
import gc
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient

from tests.contract.raw import Raw
from tests.service import Service
from tinsmith.api.app import build_app, with_edge
from tinsmith.api.main import Server, make_server
from tinsmith.api.pieces import Pieces
from tinsmith.api.services import ServedBase, Services
from tinsmith.api.waiters import Waiters
from tinsmith.bases.catalog import SHIPPED_NAME, SHIPPED_PATH, BaseRef, describe
from tinsmith.bases.tokenizer_files import tokenizer_files
from tinsmith.config import Settings
from tinsmith.files.adapter_files import pack_external
from tinsmith.files.blobs import Blobs, checkpoint_key
from tinsmith.files.checkpoint_file import dump_state
from tinsmith.files.datadir import DataDir
from tinsmith.ipc.bell import Bell, Ringer
from tinsmith.ipc.tokenline import TokenLine, line_path
from tinsmith.scopes import Scope
from tinsmith.signing import Signer
from tinsmith.store import Store, open_store
from tinsmith.store.rows import Finished, NewCheckpoint, NewSampler, OpRow
from tinsmith.store.usage_rows import Usage
from tinsmith.types import (
    CheckpointKind,
    OpKind,
    OpState,
    OptimResult,
    RunSpec,
    RunState,
    SampledSequence,
    SampleResult,
    TrainResult,
)
from tinsmith.wire import results
from tinsmith.wire.media import JSON, PROTOBUF
from tinsmith.wire.meta import CreateMeta, LoadMeta, SampleMeta, SaveExternalMeta, SaveMeta, SaveSamplerMeta, read_meta
from tinsmith.wire.requests import decode_optim_step
from tinsmith.wire.sampling import decode_sample, encode_sample_result
from tinsmith.wire.training import decode_training, encode_train_result

BASE = SHIPPED_NAME


SAVES = {
    OpKind.SAVE: (SaveMeta, CheckpointKind.TRAINING),
    OpKind.SAVE_SAMPLER: (SaveSamplerMeta, CheckpointKind.SAMPLER),
    OpKind.SAVE_EXTERNAL: (SaveExternalMeta, CheckpointKind.EXTERNAL),
}


def small_state(spec: RunSpec, parts: tuple[str, ...] = ("param",), width: int = 6) -> RunState:
    """An adapter of one layer, with numbers that differ."""
    shapes = {"lora_A": (spec.rank, width), "lora_B": (width, spec.rank)}
    tensors = {
        f"{part}/model.layers.0.self_attn.q_proj.{half}": np.arange(
            spec.rank * width, dtype=np.float32
        ).reshape(shape) + number
        for number, part in enumerate(parts)
        for half, shape in shapes.items()
    }  # fmt: skip
    return RunState(spec, 0, tensors)


class HandWorker:
    """Claims what is runnable and finishes it with made-up numbers; `seen` is the order of its work."""

    def __init__(self, store: Store, blobs: Blobs, bell: Bell, api: Ringer, base: str = BASE) -> None:
        self._store, self._blobs, self._bell, self._api, self._base = store, blobs, bell, api, base
        self._me = store.workers.register("hand" if base == BASE else f"hand of {base}", base, 3600.0, time.time())
        store.workers.set_ready(self._me)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="hand-worker")
        self.seen: list[OpRow] = []

    def step(self) -> int:
        """Finish all that is runnable now; how many ops."""
        self._store.runs.lease(self._me, self._base, 100)
        runnable = self._store.waiting.all(self._me, self._base, 1000).ops
        ops = self._store.ops.claim(self._me, [op.id for op in runnable], time.time())
        ops.sort(key=lambda op: (op.run_id or "", op.seq_id))
        if ops:
            self._store.ops.finish(self._me, [self._outcome(op) for op in ops], time.time())
            self.seen.extend(ops)
            self._api.ring()
        return len(ops)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._api.close()

    def _loop(self) -> None:
        while not self._stop.is_set():
            if not self.step():
                self._bell.wait(0.05)

    def _payload(self, op: OpRow) -> bytes:
        return op.payload if op.payload is not None else self._blobs.get(op.payload_blob)

    def _outcome(self, op: OpRow) -> Finished:
        extra: dict[str, Any] = {}
        media = JSON
        if op.kind.is_pass:
            data = decode_training(self._payload(op)).data
            extra["usage"] = Usage(trained_tokens=sum(d.num_tokens for d in data))
            logprobs = tuple(np.full(d.inputs["target_tokens"].shape, -1, np.float32) for d in data)
            body, media = encode_train_result(TrainResult(logprobs, {"loss:sum": float(len(data))})), PROTOBUF
        elif op.kind is OpKind.SAMPLE:
            body, media = self._sampled(op), PROTOBUF
            extra["usage"] = Usage(prefill_tokens=decode_sample(self._payload(op)).prompt.size, sampled_tokens=3)
        elif op.kind is OpKind.OPTIM_STEP:
            body = results.optim_result(OptimResult({"lr": decode_optim_step(self._payload(op)).learning_rate}))
        elif op.kind is OpKind.CREATE:
            create = read_meta(op.meta, CreateMeta)
            body = results.create_result(op.run_id) if create.blob is None else self._loaded(op, create.path)
        elif op.kind is OpKind.LOAD:
            body = self._loaded(op, read_meta(op.meta, LoadMeta).path)
        else:
            body, extra = self._saved(op)
        return Finished(op.id, OpState.DONE, result=body, result_bytes=len(body), media=media, **extra)

    def _loaded(self, op: OpRow, path: str | None) -> bytes:
        assert self._blobs.exists(op.meta["blob"])
        return results.load_result(op.run_id, path or "")

    def _sampled(self, op: OpRow) -> bytes:
        asked = decode_sample(self._payload(op))
        seed = read_meta(op.meta, SampleMeta).seed
        tokens = np.full(asked.params.max_tokens or 3, seed % 50, np.int32)
        sequence = SampledSequence(tokens, np.full(tokens.size, -0.5, np.float32), stopped=False)
        prompt = np.full(asked.prompt.size, -2, np.float32) if asked.prompt_logprobs else None
        if prompt is not None:
            prompt[0] = np.nan
        return encode_sample_result(SampleResult((sequence,) * asked.num_samples, prompt_logprobs=prompt))

    def _saved(self, op: OpRow) -> tuple[bytes, dict[str, Any]]:
        run = self._store.runs.get(op.tenant_id, op.run_id)
        key = checkpoint_key(op.tenant_id)
        state = small_state(run.spec, ("param", "m", "v") if op.kind is OpKind.SAVE else ("param",))
        meta_kind, kind = SAVES[op.kind]
        save = read_meta(op.meta, meta_kind)
        if op.kind is OpKind.SAVE_EXTERNAL:
            info = self._blobs.put(key, pack_external(state, describe(BaseRef(BASE, SHIPPED_PATH)), save.recipients, 0))
        else:
            info = self._blobs.put(key, dump_state(state))
        if save.name is None:
            sampler = NewSampler(
                op.tenant_id, run.session_id, save.sampler_id, BASE, None, run.run_id, info.key, run.spec
            )  # fmt: skip
            return results.sampler_result(None, save.sampler_id), {"sampler": sampler}
        checkpoint = NewCheckpoint(
            run.run_id, kind, save.name, info.key, info.size, info.sha256,
            None if save.ttl_s is None else time.time() + save.ttl_s, getattr(save, "user_metadata", {}),
            has_optimizer=op.kind is OpKind.SAVE, overwrite=getattr(save, "overwrite", True),
        )  # fmt: skip
        path = f"tinker://{run.run_id}/{kind.value}/{save.name}"
        bodies = {
            OpKind.SAVE: results.save_result(path),
            OpKind.SAVE_SAMPLER: results.sampler_result(path, None),
            OpKind.SAVE_EXTERNAL: results.external_result(path, info.size),
        }
        return bodies[op.kind], {"checkpoint": checkpoint}


@dataclass
class House:
    """`key` speaks for tenant alice (an admin), `other_key` for bob."""

    root: Path
    settings: Settings
    store: Store = field(init=False)
    ready: set[str] = field(default_factory=lambda: {BASE})
    workers: list[HandWorker] = field(default_factory=list)
    bells: list[Bell] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = open_store(self.settings.data_dir, synchronous="NORMAL")
        self.blobs = Blobs(self.settings.data_dir / "blobs")
        alice, bob = self.store.tenants.create("alice"), self.store.tenants.create("bob")
        _, self.key = self.store.tenants.create_key(alice.tenant_id, "laptop", scope=Scope.ADMIN)
        _, self.other_key = self.store.tenants.create_key(bob.tenant_id, "laptop")
        self.tenant_id = alice.tenant_id
        self.api_bell = Bell(self.root / "api.sock")
        self.worker_bell = Bell(self.root / "worker.sock")
        self.line = TokenLine(line_path(self.root / "api.sock"))
        ref = BaseRef(BASE, SHIPPED_PATH)
        files = {file.name: file for file in tokenizer_files(SHIPPED_PATH)}
        self.services = Services(
            settings=self.settings,
            store=self.store,
            blobs=self.blobs,
            bases={BASE: ServedBase(describe(ref), files)},
            waiters=Waiters(self.api_bell, self.settings.scan_interval_s),
            ringers={BASE: [Ringer(self.root / "worker.sock")]},
            ready_bases=lambda: self.ready,
            signer=Signer(DataDir(self.settings.data_dir).signing_secret()),
            pieces=Pieces(self.line),
        )

    def make_worker(self, base: str = BASE) -> HandWorker:
        """Once for each base."""
        bell = self.worker_bell
        if self.workers:
            bell = Bell(self.root / f"worker{len(self.workers)}.sock")
            self.bells.append(bell)
        self.workers.append(HandWorker(self.store, self.blobs, bell, Ringer(self.root / "api.sock"), base))
        return self.workers[-1]

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.services.close()
        self.api_bell.close()
        for bell in (self.worker_bell, *self.bells):
            bell.close()
        self.line.close()
        self.store.close()


class Api:
    """A client of the app in this process, as one tenant."""

    def __init__(self, client: TestClient[Any], key: str | None) -> None:
        self._client = client
        self.headers = {} if key is None else {"X-API-Key": key}

    def post(self, path: str, body: Any = None, status: int = 200, **options: Any) -> Any:
        return self.call("POST", path, status, json={} if body is None else body, **options)

    def get(self, path: str, status: int = 200, **options: Any) -> Any:
        return self.call("GET", path, status, **options)

    def call(self, method: str, path: str, status: int, **options: Any) -> Any:
        headers = {**self.headers, **options.pop("headers", {})}
        response = self._client.request(method, f"/api/v1{path}", headers=headers, **options)
        assert response.status_code == status, f"{response.status_code}: {response.text}"
        return response.json() if response.content else None

    def raw(self, method: str, url: str, **options: Any) -> Any:
        headers = {**self.headers, **options.pop("headers", {})}
        return self._client.request(method, url, headers=headers, **options)

    def session(self) -> str:
        return str(
            self.post("/create_session", {"tags": [], "user_metadata": {"a": 1}, "sdk_version": "t"})["session_id"]
        )

    def create(self, session: str, seq: int = 0, **changes: Any) -> dict[str, Any]:
        body = {"session_id": session, "model_seq_id": seq, "base_model": BASE, "lora_config": {"rank": 4}, **changes}
        return dict(self.post("/create_model", body))

    def result(self, promise: dict[str, Any], status: int = 200) -> Any:
        return self.post("/retrieve_future", {"request_id": promise["request_id"]}, status)


@pytest.fixture
def make_house(tmp_path: Path) -> Iterator[Any]:
    houses: list[House] = []

    def make(**changes: Any) -> House:
        defaults = {"data_dir": tmp_path / "data", "poll_hold_s": 0.3, "scan_interval_s": 0.1, "min_ttl_s": 1}
        houses.append(House(tmp_path, Settings(**{**defaults, **changes})))
        return houses[-1]

    yield make
    for made in houses:
        made.close()


@pytest.fixture
def house(make_house: Any) -> House:
    return make_house()


@pytest.fixture
def client(house: House) -> Iterator[TestClient[Any]]:
    with TestClient(with_edge(build_app(house.services)), raise_server_exceptions=False) as test_client:
        yield test_client


@pytest.fixture
def api(house: House, client: TestClient[Any]) -> Api:
    return Api(client, house.key)


@pytest.fixture
def other(house: House, client: TestClient[Any]) -> Api:
    return Api(client, house.other_key)


@pytest.fixture
def anonymous(client: TestClient[Any]) -> Api:
    return Api(client, None)


@pytest.fixture
def worker(house: House) -> HandWorker:
    """Not started: call `step`, or `start` its thread."""
    return house.make_worker()


@dataclass
class Live:
    """The API behind uvicorn on a free port, in a thread."""

    url: str
    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def live(house: House) -> Iterator[Live]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    waiters = Waiters(None, house.settings.scan_interval_s)  # the others' belong to another event loop
    server = make_server(replace(house.services, waiters=waiters))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="uvicorn")
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    made = Live(f"http://127.0.0.1:{sock.getsockname()[1]}", server, thread)
    yield made
    made.stop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # connections that the SDK never closes


@pytest.fixture(scope="module")
def shared_server(plain_server: Service, request: pytest.FixtureRequest) -> Service:
    """It as an administrator sees it whose tenant is the module's own."""
    asked = {"name": "module", "tenant": request.module.__name__.rpartition(".")[2], "is_admin": True}
    with closing(Raw(plain_server.url, plain_server.key)) as raw:
        own = copy.copy(plain_server)
        own.key = str(raw.good("/admin/keys", json=asked).json()["secret"])
        return own

"""External checkpoints through the worker: written, sealed, expired, and written again after a crash."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest

from tests.flow.house import House, settle
from tests.service import until
from tinsmith.files.adapter_files import external_files
from tinsmith.store.rows import OpRow
from tinsmith.types import CheckpointKind, OpKind, RunId
from tinsmith.upkeep.janitor import sweep
from tinsmith.wire.meta import SaveExternalMeta, to_meta
from tinsmith.worker.loop import Worker

DAY = 24 * 3600.0


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path)) as house:
        yield house


def save_external(house: House, run: RunId, seq: int, **meta: object) -> OpRow:
    wanted = to_meta(SaveExternalMeta("out", **meta))  # type: ignore[arg-type]
    return house.enqueue(house.op(OpKind.SAVE_EXTERNAL, run, seq, meta=wanted, payload=None))


def work_off(house: House, worker: Worker, op: OpRow) -> None:
    """Until the op is final: its file is written beside the loop."""

    def is_final() -> bool:
        worker.step()
        return house.get(op).state.is_final

    until(is_final, 30)


def names(house: House, run: RunId) -> list[str]:
    row = house.store.checkpoints.get(house.tenant, run, CheckpointKind.EXTERNAL, "out")
    assert row.size_bytes == house.blobs.size(row.blob)
    with house.blobs.open(row.blob) as stored:
        return list(external_files(stored))


def test_an_export_is_written_and_its_size_told(house: House) -> None:
    run = house.create_run()
    op = save_external(house, run, 1)
    work_off(house, house.worker(), op)
    assert names(house, run) == ["adapter_config.json", "adapter_model.safetensors"]
    row = house.store.checkpoints.get(house.tenant, run, CheckpointKind.EXTERNAL, "out")
    assert json.loads(house.result(op)) == {
        "type": "save_weights_external",
        "path": f"tinker://{run}/external_weights/out",
        "size_bytes": row.size_bytes,
    }
    assert not row.has_optimizer


def test_what_is_sealed_is_nowhere_in_the_clear(house: House) -> None:
    run = house.create_run()
    key = str(pyrage.x25519.Identity.generate().to_public())
    work_off(house, house.worker(), save_external(house, run, 1, recipients=(key,)))
    assert names(house, run) == ["adapter_config.json.age", "adapter_model.safetensors.age"]
    for path in (house.root / "blobs").rglob("*"):
        assert path.is_dir() or b"lora_A" not in path.read_bytes()


def test_an_export_is_made_though_the_worker_died(house: House) -> None:
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    op = save_external(house, run, 1)
    while house.get(op).state == "queued":
        worker.step()
        time.sleep(0.02)
    work_off(house, house.worker(), op)
    assert names(house, run) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_export_expires_with_its_file(house: House) -> None:
    run = house.create_run()
    asked = save_external(house, run, 1, ttl_s=100)
    asked_at = time.time()
    time.sleep(0.1)
    work_off(house, house.worker(), asked)
    row = house.store.checkpoints.get(house.tenant, run, CheckpointKind.EXTERNAL, "out")
    assert row.expires_at is not None
    assert asked_at + 100.1 <= row.expires_at <= time.time() + 100, "counted from when it is written"
    blob = row.blob
    sweep(house.store, house.blobs, house.settings, time.time() + 50)
    assert house.blobs.exists(blob)
    sweep(house.store, house.blobs, house.settings, time.time() + 101)
    sweep(house.store, house.blobs, house.settings, time.time() + DAY)
    assert not house.blobs.exists(blob)

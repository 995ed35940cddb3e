from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.house import House, settle
from tinsmith.errors import GoneError, NotFoundError
from tinsmith.types import CheckpointKind, OpKind, SamplerId, SessionId
from tinsmith.upkeep.janitor import Swept, sweep
from tinsmith.wire.meta import SaveSamplerMeta, to_meta

DAY = 24 * 3600.0


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path, inline_bytes=1, result_ttl_s=DAY)) as house:
        yield house


def files(house: House) -> set[str]:
    return {p.name for p in (house.root / "blobs").rglob("*") if p.is_file()}


def test_nothing_is_swept_before_its_time(house: House) -> None:
    run = house.create_run()
    op = house.forward_backward(run, 1, [1, 2])
    house.save(run, 2, "kept")
    settle(house.worker())
    before = files(house)
    assert sweep(house.store, house.blobs, house.settings, time.time()) == Swept(0, 0, 0)
    assert files(house) == before
    assert house.result(op)


def test_old_results_go_with_their_files(house: House) -> None:
    run = house.create_run()
    op = house.forward_backward(run, 1, [1, 2])
    settle(house.worker())
    swept = sweep(house.store, house.blobs, house.settings, time.time() + 2 * DAY)
    assert swept.num_results >= 1
    with pytest.raises(GoneError):
        house.get(op)


def test_samplers_end_a_while_after_their_session_and_named_checkpoints_stay(house: House) -> None:
    run = house.create_run()
    unnamed, named = (SamplerId(f"{house.session}:sample:{number}") for number in (0, 1))
    house.save_sampler(run, 1, unnamed)
    meta = to_meta(SaveSamplerMeta("kept", named, SessionId(house.session)))
    house.enqueue(house.op(OpKind.SAVE_SAMPLER, run, 2, meta=meta, payload=None))
    settle(house.worker())
    kept = house.store.checkpoints.get(house.tenant, run, CheckpointKind.SAMPLER, "kept").blob
    house.sampler(kept, number=1)
    blob = house.store.samplers.get(house.tenant, unnamed).blob
    assert blob is not None

    now = time.time()
    house.store.sessions.finish(house.tenant, SessionId(house.session), "done", None, now)
    sweep(house.store, house.blobs, house.settings, now + 0.9 * DAY)
    assert house.store.samplers.get(house.tenant, unnamed).blob == blob
    sweep(house.store, house.blobs, house.settings, now + 1.1 * DAY)
    for sampler in (unnamed, named):
        with pytest.raises(NotFoundError):
            house.store.samplers.get(house.tenant, sampler)
    sweep(house.store, house.blobs, house.settings, now + 1.2 * DAY)  # files have a while of grace
    assert not house.blobs.exists(blob)
    assert house.blobs.exists(kept)
    assert house.store.checkpoints.get(house.tenant, run, CheckpointKind.SAMPLER, "kept").blob == kept


def test_a_deleted_checkpoint_stays_while_a_load_needs_it(house: House) -> None:
    run = house.create_run()
    house.save(run, 1, "mid")
    worker = house.worker()
    settle(worker)
    blob = house.store.checkpoints.get(house.tenant, run, CheckpointKind.TRAINING, "mid").blob
    house.load(run, 2, blob)
    house.store.checkpoints.delete(house.tenant, run, CheckpointKind.TRAINING, "mid")
    sweep(house.store, house.blobs, house.settings, time.time() + 1)
    assert house.blobs.exists(blob)
    settle(worker)
    worker.close()
    sweep(house.store, house.blobs, house.settings, time.time() + DAY)
    assert house.blobs.exists(blob), "without the newest snapshot the load would be carried out again"
    house.optim_step(run, 3)
    worker = house.worker()
    settle(worker)
    worker.close()
    sweep(house.store, house.blobs, house.settings, time.time() + DAY)
    assert not house.blobs.exists(blob)


def test_what_a_killed_backup_held_goes_and_one_under_way_keeps_its_files(house: House) -> None:
    held = {name: house.root / f".backup-{name}" for name in ("killed", "working", "young")}
    for staging in held.values():
        staging.mkdir()
        (staging / "file").write_bytes(b"x")
    for name in ("killed", "working"):
        os.utime(held[name], (time.time() - 7200, time.time() - 7200))
    descriptor = os.open(held["working"], os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        sweep(house.store, house.blobs, house.settings, time.time())
    finally:
        os.close(descriptor)
    assert [name for name, staging in held.items() if staging.exists()] == ["working", "young"]

"""Tenants and keys, sessions, samplers, checkpoints: and that no tenant sees another's."""

from __future__ import annotations

import base64
import functools
import operator
import os
from typing import Any

import pytest

from tinsmith.errors import GoneError, NotFoundError, UserError
from tinsmith.scopes import Scope
from tinsmith.store.rows import NewCheckpoint, NewSampler
from tinsmith.types import BlobKey, CheckpointKind, OpId, OpKind, RunId, RunSpec, SamplerId, SessionId, TenantId

TRAINING, SAMPLER = CheckpointKind.TRAINING, CheckpointKind.SAMPLER


def blob(name: str) -> BlobKey:
    return BlobKey(f"tenants/t/area/{name}")


def checkpoint(run: RunId, name: str, kind: CheckpointKind = TRAINING, **more: Any) -> NewCheckpoint:
    return NewCheckpoint(run, kind, name, **{"blob": blob(name), "size_bytes": 3, "sha256": "00", **more})


def test_a_key_is_256_bits_that_nobody_can_guess(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn by the system for each key anew; of a hundred, every bit of them is set in some and not in others."""
    drawn: list[int] = []
    real = os.urandom
    monkeypatch.setattr("secrets.token_bytes", lambda size=32: drawn.append(size) or real(size))
    made = [world.store.tenants.create_key(world.tenant, "k")[1].removeprefix("tml-") for _ in range(100)]
    keys = [int.from_bytes(base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4))) for secret in made]
    assert drawn.count(32) == 100
    assert len(set(keys)) == 100
    assert functools.reduce(operator.or_, keys) == 2**256 - 1
    assert functools.reduce(operator.and_, keys) == 0


def test_keys_open_until_revoked(world: Any) -> None:
    tenants = world.store.tenants
    key, secret = tenants.create_key(world.tenant, "laptop", scope=Scope.ADMIN)
    assert secret.startswith("tml-")
    assert len(secret) > 40
    who = tenants.authenticate(secret)
    assert (who.tenant_id, who.tenant_name, who.key_id, who.is_admin) == (world.tenant, "alice", key.key_id, True)
    assert tenants.authenticate(secret + "x") is None
    assert tenants.authenticate("") is None
    assert tenants.list_keys() == [key]
    revoked = tenants.revoke_key(key.key_id, now=9.0)
    assert revoked.revoked_at == 9.0
    assert tenants.revoke_key(key.key_id, now=10.0) == revoked
    assert tenants.authenticate(secret) is None
    with pytest.raises(NotFoundError):
        tenants.revoke_key("nope")
    with pytest.raises(NotFoundError):
        tenants.create_key(TenantId("nope"), "x")


def test_secrets_are_not_stored(world: Any, tmp_path: Any) -> None:
    _, secret = world.store.tenants.create_key(world.tenant, "laptop")
    assert not any(secret.encode() in path.read_bytes() for path in tmp_path.glob("tinsmith.db*"))


def test_a_stored_digest_opens_nothing(world: Any) -> None:
    """What a copy of the database holds of a key is no key, nor a token's beginning."""
    _, secret = world.store.tenants.create_key(world.tenant, "laptop")
    with world.store._database.read() as conn:
        (digest,) = conn.exec_driver_sql("SELECT digest FROM keys").one()
    assert len(digest) == 64
    for text in (digest, f"tml-{digest}", digest.upper(), bytes.fromhex(digest).decode("latin-1")):
        assert world.store.tenants.authenticate(text) is None
    assert world.store.tenants.authenticate(secret) is not None


def test_keys_end_by_time_and_have_one_successor(world: Any) -> None:
    tenants = world.store.tenants
    key, secret = tenants.create_key(world.tenant, "ci", scope=Scope.SAMPLE, expires_at=100.0, now=10.0)
    assert tenants.authenticate(secret, now=99.0).scope is Scope.SAMPLE
    assert tenants.authenticate(secret, now=100.0) is None
    assert tenants.principal(key.key_id, now=100.0) is None
    heir, new_secret = tenants.rotate_key(key.key_id, 5.0, now=50.0)
    assert (heir.name, heir.scope, heir.expires_at) == ("ci", Scope.SAMPLE, 140.0)
    assert tenants.authenticate(secret, now=54.0).key_id == key.key_id
    assert tenants.authenticate(secret, now=55.0) is None
    assert tenants.authenticate(new_secret, now=139.0).key_id == heir.key_id
    assert tenants.key(key.key_id).successor_id == heir.key_id
    last, _ = tenants.rotate_key(heir.key_id, 1000.0, 60.0, now=51.0)
    assert tenants.key(heir.key_id).expires_at == 140.0
    assert last.expires_at == 60.0
    for key_id, now in ((key.key_id, 52.0), (last.key_id, 60.0)):
        with pytest.raises(UserError):
            tenants.rotate_key(key_id, 5.0, now=now)


def test_tenant_names_are_unique(world: Any) -> None:
    assert world.store.tenants.by_name("alice").tenant_id == world.tenant
    assert world.store.tenants.by_name("bob") is None
    with pytest.raises(UserError):
        world.store.tenants.create("alice")
    with pytest.raises(UserError):
        world.store.tenants.create("")


def test_session_life(world: Any) -> None:
    sessions = world.store.sessions
    made = sessions.create(
        world.tenant, tags=["a"], user_metadata={"k": 1}, sdk_version="0.38", project_id="p", display_name="d", now=5.0
    )
    assert len(made.session_id) == 25
    assert made.session_id[0] == "s"
    assert sessions.get(world.tenant, made.session_id) == made
    sessions.beat(world.tenant, made.session_id, 6.0)
    assert sessions.get(world.tenant, made.session_id).last_beat_at == 6.0
    sessions.finish(world.tenant, made.session_id, "success", None, 7.0)
    sessions.finish(world.tenant, made.session_id, "errored", "late", 8.0)
    row = sessions.get(world.tenant, made.session_id)
    assert (row.finished_at, row.finish_reason, row.finish_detail) == (7.0, "success", None)
    with pytest.raises(GoneError):
        sessions.beat(world.tenant, made.session_id, 9.0)


def test_silent_sessions_expire(world: Any) -> None:
    sessions = world.store.sessions
    alive = sessions.create(world.tenant, now=100.0).session_id
    assert list(sessions.expire(50.0, 700.0)) == [world.session]
    assert list(sessions.expire(50.0, 700.0)) == []
    assert sessions.get(world.tenant, world.session).finish_reason == "expired"
    with pytest.raises(GoneError):
        sessions.beat(world.tenant, world.session, 701.0)
    sessions.beat(world.tenant, alive, 701.0)


def test_sessions_are_listed_with_their_children(world: Any) -> None:
    run, sampler = world.run(), world.sampler()
    later = world.store.sessions.create(world.tenant, now=50.0).session_id
    page, total = world.store.sessions.list(world.tenant, 1, 0)
    assert ([s.session_id for s in page], total) == ([later], 2)
    runs, samplers = world.store.sessions.children(world.tenant, world.session)
    assert (list(runs), list(samplers)) == ([run], [sampler])


def test_samplers_are_made_once(world: Any) -> None:
    first = NewSampler(
        world.tenant,
        world.session,
        SamplerId("s"),
        "tiny",
        "tinker://x",
        RunId("r"),
        blob("a"),
        RunSpec(RunId("r"), "tiny"),
    )
    made = world.store.samplers.create(first, 5.0)
    assert world.store.samplers.create(NewSampler(world.tenant, world.session, SamplerId("s"), "other"), 6.0) == made
    assert world.store.samplers.get(world.tenant, SamplerId("s")) == made
    assert world.store.samplers.get_any(SamplerId("s")) == made
    with pytest.raises(NotFoundError):
        world.store.samplers.get_any(SamplerId("nope"))


def test_samplers_of_ended_sessions_retire_once_idle(world: Any) -> None:
    busy, idle = world.sampler(0, blob("busy")), world.sampler(1, blob("idle"))
    given_up = world.sample(busy, 0).row.id
    assert world.store.samplers.retire(world.now, world.now) == 0
    assert world.store.sessions.finish(world.tenant, world.session, "success", None, world.now) != set()
    assert world.state(given_up) == "cancelled"
    sample = world.sample(busy, 1).row.id
    assert world.store.samplers.retire(world.now + 1, world.now) == 1
    with pytest.raises(NotFoundError):
        world.store.samplers.get_any(idle)
    world.claim(sample)
    world.finish(sample)
    assert world.store.samplers.retire(world.now + 1, world.now) == 1
    assert set(world.store.checkpoints.collect(world.now + 100)) == {blob("busy"), blob("idle")}


def test_checkpoint_names_are_last_write_wins(world: Any) -> None:
    run, checkpoints = world.run(), world.store.checkpoints
    checkpoints.put(world.tenant, checkpoint(run, "a", blob=blob("1"), user_metadata={"x": "1", "y": "1"}), 10.0)
    checkpoints.put(world.tenant, checkpoint(run, "a", blob=blob("2"), user_metadata={"x": "2"}), 20.0)
    row = checkpoints.get(world.tenant, run, TRAINING, "a")
    assert (row.blob, row.created_at, row.user_metadata) == (blob("2"), 20.0, {"x": "2"})
    assert row.spec == RunSpec(run, "tiny", rank=8)
    assert row.path == f"tinker://{run}/weights/a"
    checkpoints.put(world.tenant, checkpoint(run, "a", blob=blob("3"), user_metadata={"z": "3"}, overwrite=True), 30.0)
    assert checkpoints.get(world.tenant, run, TRAINING, "a").user_metadata == {"z": "3"}
    assert checkpoints.collect(200.0) == [blob("1"), blob("2")]


def test_checkpoints_expire(world: Any) -> None:
    run, checkpoints = world.run(), world.store.checkpoints
    checkpoints.put(world.tenant, checkpoint(run, "a", expires_at=100.0), 10.0)
    checkpoints.put(world.tenant, checkpoint(run, "b"), 11.0)
    assert [c.name for c in checkpoints.list_run(world.tenant, run, now=99.0)] == ["b", "a"]
    assert [c.name for c in checkpoints.list_run(world.tenant, run, now=100.0)] == ["b"]
    assert checkpoints.list(world.tenant, 10, 0, now=100.0)[1] == 1
    with pytest.raises(NotFoundError):
        checkpoints.get(world.tenant, run, TRAINING, "a", now=100.0)
    checkpoints.set_expiry(world.tenant, run, TRAINING, "a", None, now=99.0)
    assert checkpoints.get(world.tenant, run, TRAINING, "a").expires_at is None
    checkpoints.set_expiry(world.tenant, run, TRAINING, "a", 150.0, now=99.0)
    assert checkpoints.collect(150.0) == []
    assert checkpoints.collect(211.0) == [blob("a")]


def test_last_is_the_newest_of_each_kind(world: Any) -> None:
    run, checkpoints = world.run(), world.store.checkpoints
    assert checkpoints.last(world.tenant, run) == (None, None)
    for at, name in ((1.0, "a"), (2.0, "b")):
        checkpoints.put(world.tenant, checkpoint(run, name), at)
    training, sampler = checkpoints.last(world.tenant, run)
    assert (training.name, sampler) == ("b", None)
    checkpoints.put(world.tenant, checkpoint(run, "s", SAMPLER), 3.0)
    assert checkpoints.last(world.tenant, run)[1].name == "s"


def test_a_file_in_use_is_not_collected(world: Any) -> None:
    run, checkpoints = world.run(), world.store.checkpoints
    checkpoints.put(world.tenant, checkpoint(run, "a"), 1.0)
    sampler = world.sampler(0, blob("a"))
    load = world.put(run, 1, OpKind.LOAD, meta={"blob": blob("a")}).row.id
    checkpoints.delete(world.tenant, run, TRAINING, "a", now=2.0)
    with pytest.raises(NotFoundError):
        checkpoints.delete(world.tenant, run, TRAINING, "a")
    assert checkpoints.collect(2.0) == []
    assert checkpoints.collect(1e6) == []
    world.work_off()
    world.store.sessions.finish(world.tenant, world.session, "success", None, 3.0)
    assert world.store.samplers.retire(4.0, 4.0) == 1
    assert world.state(load) == "done"
    assert checkpoints.collect(1e6) == []
    for number in range(2):
        assert checkpoints.collect(1e6) == [], "without the newest snapshot the load would be carried out again"
        world.store.runs.record_snapshot(world.worker, run, 1 + number, blob(f"snap{number}"), 1, 5.0)
    assert checkpoints.collect(1e6) == [blob("a")]
    assert str(sampler).endswith(":0")


def test_a_failed_load_lets_go_of_its_file(world: Any) -> None:
    run, checkpoints = world.run(), world.store.checkpoints
    world.work_off()
    checkpoints.put(world.tenant, checkpoint(run, "a"), 1.0)
    load = world.put(run, 1, OpKind.LOAD, meta={"blob": blob("a")}).row.id
    checkpoints.delete(world.tenant, run, TRAINING, "a", now=2.0)
    world.claim(load)
    world.fail(load)
    assert checkpoints.collect(1e6) == [blob("a")]


def test_tenants_see_nothing_of_each_other(world: Any) -> None:
    store, run, sampler = world.store, world.run(), world.sampler()
    op_id = world.sample(sampler, 0).row.id
    store.checkpoints.put(world.tenant, checkpoint(run, "a"), 1.0)
    bob = store.tenants.create("bob").tenant_id
    session = store.sessions.create(bob).session_id
    for call in (
        lambda: store.sessions.get(bob, world.session),
        lambda: store.sessions.beat(bob, world.session, 1.0),
        lambda: store.sessions.finish(bob, world.session, "success", None, 1.0),
        lambda: store.sessions.children(bob, world.session),
        lambda: store.samplers.get(bob, sampler),
        lambda: store.samplers.create(NewSampler(bob, session, sampler, "tiny"), 1.0),
        lambda: store.samplers.create(NewSampler(bob, world.session, SamplerId("new"), "tiny"), 1.0),
        lambda: world.sample(sampler, 0, tenant_id=bob),
        lambda: store.checkpoints.get(bob, run, TRAINING, "a"),
        lambda: store.checkpoints.list_run(bob, run),
        lambda: store.checkpoints.delete(bob, run, TRAINING, "a"),
        lambda: store.checkpoints.set_expiry(bob, run, TRAINING, "a", None),
        lambda: store.checkpoints.put(bob, checkpoint(run, "a"), 1.0),
        lambda: store.sessions.get(bob, SessionId("absent")),
    ):
        with pytest.raises(NotFoundError):
            call()
    with pytest.raises(GoneError) as foreign:
        store.ops.get(bob, op_id)
    with pytest.raises(GoneError) as absent:
        store.ops.get(bob, OpId("absent"))
    assert foreign.value.message == absent.value.message == "unknown or expired request id"
    assert store.checkpoints.list(bob, 10, 0) == ([], 0)
    assert store.checkpoints.last(bob, run) == (None, None)
    assert store.sessions.list(bob, 10, 0)[1] == 1
    assert store.sessions.get(world.tenant, world.session).finished_at is None

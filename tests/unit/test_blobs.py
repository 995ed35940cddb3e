from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import BinaryIO

import pytest

from tinsmith import crashpoints
from tinsmith.errors import ConfigError, CorruptError, NotFoundError, UserError
from tinsmith.files.blobs import Blobs, Digest, checkpoint_key, payload_key, result_key, snapshot_key
from tinsmith.types import BlobKey, OpId, RunId, TenantId

TENANT = TenantId("t1")
KEY = payload_key(TENANT, OpId("req-1"))


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "data" / "blobs")


def test_put_get(blobs: Blobs) -> None:
    info = blobs.put(KEY, b"hello")
    assert (info.size, info.sha256) == (5, hashlib.sha256(b"hello").hexdigest())
    assert info.key == f"{KEY}.{info.sha256[:32]}"
    assert blobs.get(info.key) == b"hello"
    assert blobs.exists(info.key)
    assert blobs.size(info.key) == 5
    other = blobs.put(KEY, b"other")
    assert blobs.get(other.key) == b"other"
    assert blobs.get(info.key) == b"hello"


def test_put_takes_pieces(blobs: Blobs) -> None:
    info = blobs.put(KEY, (memoryview(piece) for piece in (b"he", b"", b"llo")))
    assert info == blobs.put(KEY, memoryview(b"hello"))
    assert blobs.get(info.key) == b"hello"


@pytest.mark.parametrize("content", [b"hellp", b"hell", b"", b"hello!"])
def test_a_changed_file_is_called_corrupt(blobs: Blobs, tmp_path: Path, content: bytes) -> None:
    info = blobs.put(KEY, b"hello")
    (tmp_path / "data" / "blobs" / info.key).write_bytes(content)
    with pytest.raises(CorruptError, match="backup"):
        blobs.get(info.key)


def read_all(file: BinaryIO, digest: Digest) -> bytes:
    data = file.read()
    digest.update(data)
    return data


def test_a_file_is_checked_beside_the_reading(blobs: Blobs, tmp_path: Path) -> None:
    info = blobs.put(KEY, b"hello")
    assert blobs.load(info.key, read_all) == b"hello"
    (tmp_path / "data" / "blobs" / info.key).write_bytes(b"hellp")
    with pytest.raises(CorruptError, match="backup"):
        blobs.load(info.key, read_all)


def test_what_a_reader_makes_of_a_changed_file_is_no_error_of_its_own(blobs: Blobs, tmp_path: Path) -> None:
    def number(file: BinaryIO, digest: Digest) -> int:
        return int(file.read())

    info = blobs.put(KEY, b"hello")
    with pytest.raises(ValueError, match="invalid literal"):
        blobs.load(info.key, number)
    (tmp_path / "data" / "blobs" / info.key).write_bytes(b"hellp")
    with pytest.raises(CorruptError, match="backup"):
        blobs.load(info.key, number)


def test_open_outlives_a_deletion(blobs: Blobs) -> None:
    key = blobs.put(KEY, b"old").key
    with blobs.open(key) as file:
        blobs.delete(key)
        assert file.read() == b"old"


def test_missing(blobs: Blobs) -> None:
    blobs.delete(KEY)
    assert not blobs.exists(KEY)
    for read in (blobs.get, blobs.open, blobs.size):
        with pytest.raises(NotFoundError):
            read(KEY)


def test_delete(blobs: Blobs) -> None:
    key = blobs.put(KEY, b"x").key
    blobs.delete(key)
    assert not blobs.exists(key)


@pytest.mark.parametrize(
    "key",
    [
        "", "a", "/etc/passwd", "tenants/t/../../x", "tenants/t/a/../x", "tenants//a", "tenants/t", "other/t/a",
        "tenants/t/a/", "tenants/t/a b", "tenants/t/a\0", "tenants/t/a:b", "tenants/t/./a", "tenants/t/.tmp-1",
    ],
)  # fmt: skip
def test_malformed_keys(blobs: Blobs, key: str) -> None:
    with pytest.raises(UserError):
        blobs.put(BlobKey(key), b"x")
    with pytest.raises(UserError):
        blobs.exists(BlobKey(key))


def test_a_failed_write_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    old = blobs.put(KEY, b"old").key

    def pieces():  # type: ignore[no-untyped-def]
        yield memoryview(b"half")
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        blobs.put(KEY, pieces())
    assert blobs.get(old) == b"old"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [old.rpartition("/")[2]]


def test_keys(blobs: Blobs) -> None:
    run = RunId("s1:train:0")
    snapshot = snapshot_key(TENANT, run, 7)
    assert snapshot.startswith("tenants/t1/snapshots/s1-train-0/7-")
    assert snapshot != snapshot_key(TENANT, run, 7)
    assert checkpoint_key(TENANT) != checkpoint_key(TENANT)
    for key in (snapshot, checkpoint_key(TENANT), result_key(TENANT, OpId("req-1"))):
        assert blobs.exists(blobs.put(key, b"x").key)


def _put_and_die(root: Path, point: str) -> None:
    crashpoints.arm(point)
    Blobs(root).put(KEY, b"new")


@pytest.mark.parametrize(("point", "is_there"), [("blob.before_rename", False), ("blob.after_rename", True)])
def test_a_killed_writer_leaves_a_whole_file_or_none(tmp_path: Path, point: str, is_there: bool) -> None:
    blobs = Blobs(tmp_path)
    old = blobs.put(KEY, b"old").key
    process = multiprocessing.get_context("spawn").Process(target=_put_and_die, args=(tmp_path, point))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    new = BlobKey(f"{KEY}.{hashlib.sha256(b'new').hexdigest()[:32]}")
    assert blobs.exists(new) is is_there
    assert not is_there or blobs.get(new) == b"new"
    leftovers = list(tmp_path.rglob(".tmp-*"))
    assert len(leftovers) == (0 if is_there else 1)
    assert blobs.sweep(before=0.0) == 0
    assert blobs.sweep(before=2**40) == len(leftovers)
    assert blobs.get(old) == b"old"


def test_crash_points_count_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, sig: killed.append(pid))
    with pytest.raises(ConfigError):
        crashpoints.arm("nowhere")
    crashpoints.arm("store.after_claim", after=1)
    crashpoints.crash_point("store.before_finish_commit")
    crashpoints.crash_point("store.after_claim")
    assert killed == []
    crashpoints.crash_point("store.after_claim")
    crashpoints.disarm()
    crashpoints.crash_point("store.after_claim")
    assert killed == [os.getpid()]

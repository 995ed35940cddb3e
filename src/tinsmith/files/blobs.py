"""Files: payloads, results, snapshots and checkpoints, each under a key that begins with its tenant.

The only code that touches them. It knows bytes and keys, no rows and no formats. What stays true:

* A key either has a whole file or none: bytes go to a temporary file in the same directory, which is synced and
  renamed; then the directory is synced, and so is every directory made on the way. After `put` returns, the file
  survives a loss of power.
* The last part of a stored key is the digest of the content, and whoever reads a whole file checks it: a flipped bit is
  an error, never an input.
* A key never leaves the root, whatever it says.
* Files are their owner's alone (0600), and so are the directories made for them (0700), whatever the umask is.
* Keys of snapshots, checkpoints and losses are unique: nobody overwrites or deletes another's file by writing under
  his name.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from tinsmith.crashpoints import crash_point
from tinsmith.errors import CorruptError, NotFoundError, UserError
from tinsmith.files.private import DIRECTORY_MODE, opener
from tinsmith.observe.series import FSYNC
from tinsmith.types import BlobKey, OpId, RunId, TenantId

TEMPORARY = ".tmp-"
DIGEST_CHARS = 32
CHECKED_BYTES = 1 << 20  # at one time
_ALLOWED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-/")

T = TypeVar("T")


class Digest(Protocol):
    """Takes the bytes of a file in their order."""

    def update(self, data: Any, /) -> None: ...


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """key: under which the file is found from now on; size in bytes; sha256 in hex."""

    key: BlobKey
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that is there. size in bytes; changed_at: unix seconds; is_unfinished: a killed or busy writer's."""

    key: BlobKey
    size: int
    changed_at: float
    is_unfinished: bool


class Blobs:
    """Files below `root` on a local disk. Any method may be called from any thread and any process."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: set[Path] = set()  # directories that are on disk for good

    def put(self, key: BlobKey, data: bytes | bytearray | memoryview | Iterable[memoryview]) -> BlobInfo:
        """Write a file; it is on disk when this returns, under the key that the answer gives: `key`, a dot, a digest.

        Raises:
            UserError: the key is malformed.
            OSError: the disk is full, or can't be written.
        """
        path = self._path(key)
        self._make_directory(path.parent)
        digest, size = hashlib.sha256(), 0
        with _temporary(path) as temporary:
            for piece in (data,) if isinstance(data, bytes | bytearray | memoryview) else data:
                digest.update(piece)
                size += temporary.file.write(piece)
            temporary.file.flush()
            started = time.perf_counter()
            os.fsync(temporary.file.fileno())
            FSYNC.observe(time.perf_counter() - started)
            temporary.path = path.with_name(f"{path.name}.{digest.hexdigest()[:DIGEST_CHARS]}")
        crash_point("blob.after_rename")
        sync_directory(path.parent)
        return BlobInfo(BlobKey(f"{key}.{digest.hexdigest()[:DIGEST_CHARS]}"), size, digest.hexdigest())

    def scratch(self) -> BinaryIO:
        """A file for what comes in and isn't checked yet, on the same disk; it has no name, and is gone once closed,
        or with the process.

        Raises:
            OSError: the disk is full, or can't be written.
        """
        self._root.mkdir(parents=True, exist_ok=True, mode=DIRECTORY_MODE)
        return cast(BinaryIO, tempfile.TemporaryFile(dir=self._root, prefix=TEMPORARY))

    def get(self, key: BlobKey) -> bytes:
        """The whole file.

        Raises:
            NotFoundError: no such file.
            CorruptError: its content isn't what was stored.
        """
        with self.open(key) as file:
            data = file.read()
        _check_digest(key, hashlib.sha256(data).hexdigest())
        return data

    def load(self, key: BlobKey, read: Callable[[BinaryIO, Digest], T]) -> T:
        """What `read` makes of the file; it gives all of the file's bytes to the digest beside.

        Raises:
            NotFoundError: no such file.
            CorruptError: its content isn't what was stored, or `read` says so.
        """
        digest = hashlib.sha256()
        with self.open(key) as file:
            try:
                made = read(file, digest)
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):  # what it made of it so far
                self.open_checked(key).close()
                raise
        _check_digest(key, digest.hexdigest())
        return made

    def open_checked(self, key: BlobKey) -> BinaryIO:
        """The file, for reading piece by piece, once all of it was read and checked.

        Raises:
            NotFoundError: no such file.
            CorruptError: its content isn't what was stored.
        """
        file = self.open(key)
        try:
            digest = hashlib.sha256()
            while piece := file.read(CHECKED_BYTES):
                digest.update(piece)
            _check_digest(key, digest.hexdigest())
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def open(self, key: BlobKey) -> BinaryIO:
        """The file, for reading piece by piece, unchecked. A later `delete` doesn't change what is read from it.

        Raises:
            NotFoundError: no such file.
        """
        path = self._path(key)
        try:
            return path.open("rb")
        except FileNotFoundError:
            raise NotFoundError(f"no stored file {key}") from None

    def exists(self, key: BlobKey) -> bool:
        return self._path(key).is_file()

    def size(self, key: BlobKey) -> int:
        """Bytes. Raises: NotFoundError: no such file."""
        try:
            return self._path(key).stat().st_size
        except FileNotFoundError:
            raise NotFoundError(f"no stored file {key}") from None

    def delete(self, key: BlobKey) -> None:
        """Remove the file; one that is missing is fine. After a loss of power it may be there again."""
        self._path(key).unlink(missing_ok=True)

    def files(self) -> Iterator[StoredFile]:
        """All files, in no order; those that vanish meanwhile may be left out. A link is no file of ours."""
        for directory, _, names in os.walk(self._root):
            for name in names:
                path = Path(directory, name)
                with suppress(FileNotFoundError):
                    found = path.lstat()
                    if stat.S_ISREG(found.st_mode):
                        key = BlobKey(path.relative_to(self._root).as_posix())
                        yield StoredFile(key, found.st_size, found.st_mtime, name.startswith(TEMPORARY))

    def beside(self, key: BlobKey) -> list[BlobKey]:
        """The whole files in the same directory, itself among them."""
        parent = key.rpartition("/")[0]
        names = os.listdir(self._path(key).parent)
        return [BlobKey(f"{parent}/{name}") for name in names if not name.startswith(TEMPORARY)]

    def hold(self, key: BlobKey, other: Blobs) -> bool:
        """Keep a file whatever happens to it in `other`, on the same disk and without a copy; False if it has gone.

        Raises:
            OSError: the file system has no hard links, or this is another disk.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.hardlink_to(other._path(key))
        except FileExistsError:
            return True
        except FileNotFoundError:
            return False
        return True

    def discard(self, file: StoredFile) -> None:
        """Remove what `files` showed, unfinished or whole; one that is missing is fine."""
        self._root.joinpath(file.key).unlink(missing_ok=True)

    def sweep(self, before: float) -> int:
        """Remove what killed writers left unfinished before that time (unix seconds); how many files."""
        num_removed = 0
        for path in self._root.rglob(f"{TEMPORARY}*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()
                    num_removed += 1
        return num_removed

    def _path(self, key: BlobKey) -> Path:
        parts = key.split("/")
        if len(parts) < 3 or parts[0] != "tenants" or not _ALLOWED.issuperset(key):
            raise UserError(
                f"malformed file key {key!r}: it is tenants/TENANT/AREA/... of letters, digits, '.', '_', '-'"
            )
        if any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts):
            raise UserError(f"malformed file key {key!r}: it has an empty or reserved part")
        return self._root.joinpath(*parts)

    def _make_directory(self, directory: Path) -> None:
        """Make the directory and those above it, and put each new entry on disk."""
        if directory in self._known:
            return
        if self._root in directory.parents or not directory.parent.is_dir():
            self._make_directory(directory.parent)
        directory.mkdir(exist_ok=True, mode=DIRECTORY_MODE)
        sync_directory(directory.parent)
        self._known.add(directory)


def payload_key(tenant: TenantId, op_id: OpId) -> BlobKey:
    return _key(tenant, "payloads", op_id)


def result_key(tenant: TenantId, op_id: OpId) -> BlobKey:
    return _key(tenant, "results", op_id)


def routes_key(tenant: TenantId, op_id: OpId) -> BlobKey:
    return _key(tenant, "routes", op_id)


def snapshot_key(tenant: TenantId, run_id: RunId, seq: int) -> BlobKey:
    """Unique at each call: a worker that lost its run must not touch the file that the next holder made at this seq."""
    return _key(tenant, "snapshots", run_id, f"{seq}-{secrets.token_hex(8)}")


def checkpoint_key(tenant: TenantId) -> BlobKey:
    """Unique at each call."""
    return _key(tenant, "checkpoints", secrets.token_hex(16))


def tenant_of(key: BlobKey) -> TenantId:
    """Whose file it is; empty for a key that names no tenant."""
    parts = key.split("/", 2)
    return TenantId(parts[1] if len(parts) == 3 and parts[0] == "tenants" else "")


def stem(key: BlobKey) -> BlobKey:
    """A file's key without the digest: what it was written under, and known before it is."""
    directory, _, name = key.rpartition("/")
    return BlobKey(f"{directory}/{name.partition('.')[0]}")


def loss_key(tenant: TenantId) -> BlobKey:
    """Of a custom loss. Unique at each call."""
    return _key(tenant, "losses", secrets.token_hex(16))


def _key(*parts: str) -> BlobKey:
    return BlobKey("/".join(("tenants", *parts)).replace(":", "-"))


@dataclass(slots=True)
class _Temporary:
    """A file being written, and the path that it will have."""

    file: BinaryIO
    path: Path


@contextmanager
def _temporary(path: Path) -> Iterator[_Temporary]:
    """A file beside `path` that moves to its place when the block ends, and vanishes when it raises."""
    unfinished = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    is_renamed = False
    try:
        with open(unfinished, "xb", opener=opener) as file:
            temporary = _Temporary(file, path)
            yield temporary
        crash_point("blob.before_rename")
        unfinished.rename(temporary.path)
        is_renamed = True
    finally:
        if not is_renamed:
            unfinished.unlink(missing_ok=True)


def _check_digest(key: BlobKey, digest: str) -> None:
    if digest[:DIGEST_CHARS] != key.rpartition(".")[2]:
        raise CorruptError(f"the stored file {key} was changed on the disk; restore it from a backup")


def sync_directory(directory: Path) -> None:
    """Put the directory's entries on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Copies a data directory that may be in use, and makes a data directory from such a copy.

A backup is a directory: the database, every file that its rows name, the keys of the server, and `backup.json`, which
is written last. What stays true:

* It shows one moment: what the database of that moment names is in it, whatever was deleted while it was made. Files
  are held by hard links first, so a janitor at work takes nothing away.
* Every file is read and checked against its digest on the way, in both directions, and so are the rows. A damaged file
  is left out, a damaged row comes along as it is; both are named.
* A backup that was begun and not finished has no `backup.json`, and isn't restored from. Made again over an earlier
  one, it reads what is there, copies what is new or was damaged there, and drops what nobody names any more.
* Restoring needs an empty directory, in which the database appears last: what was cut off can be restored again.
* Files are their owner's alone in both, also where the directory was there before and others may enter it.
* A damaged backup is refused, unless what is damaged is to be left out: then all else of it comes back.
"""

from __future__ import annotations

import fcntl
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from tinsmith import __version__
from tinsmith.crashpoints import crash_point
from tinsmith.errors import ConfigError, CorruptError, UserError
from tinsmith.files.blobs import CHECKED_BYTES, Blobs, sync_directory
from tinsmith.files.private import close_to_others, opener
from tinsmith.store import DATABASE_FILE, open_as_it_is, open_store
from tinsmith.store.upkeep import RowFault
from tinsmith.types import BlobKey

MANIFEST = "backup.json"
FORMAT = 1
KEY_FILES = ("signing.key", "admin.key")
BLOBS = "blobs"
STAGING = ".backup-"
RESTORING = ".restore-"
MOST_NAMED = 10
HEADER_BYTES = 100  # of a database of SQLite
PART = ".part"
LOCKS = ("serve.lock", "tinsmith.lock", "tinsmith.turn")  # left where a backup was verified and repaired

Progress = Callable[[int, int], None]


class Manifest(Struct):
    """made_at: unix seconds; version: of tinsmith; num_bytes: of the files, without the database."""

    format: int
    version: str
    made_at: float
    num_files: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Copied:
    """num_new: files that were not there before. damaged: what of the source could not be copied, and why.

    damaged_rows: rows that were copied and are not what they were, and why; at odds with others, at least.
    """

    num_files: int
    num_bytes: int
    num_new: int
    damaged: tuple[str, ...]
    damaged_rows: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        return not (self.damaged or self.damaged_rows)


def silent(done: int, total: int) -> None:
    """No progress is shown."""


def back_up(data_dir: Path, target: Path, progress: Progress = silent) -> Copied:
    """Copy `data_dir`, whether it is served or not, into `target`: a new directory, or an earlier backup.

    Files that are damaged at the source are left out, unless an earlier backup here has them, and named in the answer,
    as are damaged rows; the backup is still whole but for that.

    Args:
        progress: told the bytes of files that are in the backup by now, and those there will be.

    Raises:
        ConfigError: there's no database in `data_dir`, or `target` is neither new, empty nor a backup, or one of
            another user that others may read.
        OSError: a disk is full, or the file system has no hard links.
    """
    if not (data_dir / DATABASE_FILE).is_file():
        raise ConfigError(f"{data_dir} is no data directory: it has no {DATABASE_FILE}")
    if target.resolve().is_relative_to(data_dir.resolve()):
        raise ConfigError(f"{target} lies in the data directory itself; name a place outside of it")
    _claim(target)
    source, copy = Blobs(data_dir / BLOBS), Blobs(target / BLOBS)
    database = target / (DATABASE_FILE + PART)
    with _held(data_dir, source) as held, closing(open_as_it_is(data_dir / DATABASE_FILE)) as store:
        rows = store.upkeep.copy(database, partial(_hold_named, held, source), time.time())
        copied = _copy_files(held, copy, rows.named, progress)
    (target / MANIFEST).unlink(missing_ok=True)
    database.replace(target / DATABASE_FILE)
    for name in KEY_FILES:
        if (data_dir / name).is_file():
            _copy_private(data_dir / name, target / name)
    for file in copy.files():
        if file.key not in rows.named:
            copy.discard(file)
    crash_point("backup.before_manifest")
    made = Manifest(FORMAT, __version__, time.time(), copied.num_files, copied.num_bytes)
    _write_private(target / MANIFEST, msgspec.json.format(msgspec.json.encode(made)) + b"\n")
    return replace(copied, damaged_rows=_told(rows.faults))


def restore(
    backup: Path, data_dir: Path, progress: Progress = silent, *, is_leaving_out_damaged: bool = False
) -> Copied:
    """Make the data directory `data_dir`, which must be new or empty, from a backup.

    Args:
        is_leaving_out_damaged: restore what is whole, and name the rest in the answer.

    Raises:
        ConfigError: `backup` is none, or unfinished, or of a newer tinsmith; or `data_dir` is not empty.
        CorruptError: a file or a row of the backup is damaged or missing.
        OSError: the disk is full.
    """
    read_manifest(backup)
    _require_database(backup)
    _make(data_dir)
    for left in data_dir.glob(f"{RESTORING}*"):
        shutil.rmtree(left)
    if any(data_dir.iterdir()):
        raise ConfigError(f"{data_dir} is not empty: name a new directory, and start the server with it")
    made = data_dir / f"{RESTORING}{secrets.token_hex(4)}"
    made.mkdir(mode=0o700)
    try:
        with open(made / DATABASE_FILE, "wb", opener=opener) as file:
            with (backup / DATABASE_FILE).open("rb") as copied_from:
                shutil.copyfileobj(copied_from, file)
            file.flush()
            os.fsync(file.fileno())
        with closing(open_store(made)) as store:  # one of an older tinsmith is brought to this schema
            now = time.time()
            faults = store.upkeep.troubles(now)
            lacking = _told(fault for fault in faults if fault.is_of_schema)
            if lacking:
                raise CorruptError(f"{backup} is damaged: {'; '.join(lacking[:MOST_NAMED])}. Restore an earlier backup")
            if store.mends.mend(now):
                faults = store.upkeep.troubles(now)
            damaged = _told(faults)
            if damaged and not is_leaving_out_damaged:
                raise _refusal(backup, damaged)
            named = {reference.blob for reference in store.upkeep.references()}
        copied = _copy_files(Blobs(backup / BLOBS), Blobs(made / BLOBS), named, progress)
        if copied.damaged and not is_leaving_out_damaged:
            raise _refusal(backup, copied.damaged)
        for name in KEY_FILES:
            if (backup / name).is_file():
                _copy_private(backup / name, made / name)
        for name in (BLOBS, *KEY_FILES, DATABASE_FILE):
            with suppress(FileNotFoundError):
                (made / name).rename(data_dir / name)
                crash_point("restore.half_moved")
        sync_directory(data_dir)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return replace(copied, damaged_rows=damaged)


def _told(faults: Iterable[RowFault]) -> tuple[str, ...]:
    return tuple(f"{fault.owner}: {fault.problem}" for fault in faults)


def _refusal(backup: Path, damaged: tuple[str, ...]) -> CorruptError:
    return CorruptError(
        f"{backup} is damaged: {'; '.join(damaged[:MOST_NAMED])}. Restore an earlier backup, or all that is whole of "
        "this one with --leave-out-damaged"
    )


def read_manifest(backup: Path) -> Manifest:
    """Raises: ConfigError: it is no whole backup, or one of a newer tinsmith."""
    try:
        manifest = msgspec.json.decode((backup / MANIFEST).read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{backup} is no backup, or was not finished: it has no {MANIFEST}") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{backup / MANIFEST} can't be read: {error}") from None
    if manifest.format > FORMAT:
        raise ConfigError(f"{backup} was made by tinsmith {manifest.version}; upgrade tinsmith")
    return manifest


def _require_database(backup: Path) -> None:
    """Raises: CorruptError: it is missing, empty or cut off. SQLite takes what is missing at its end for zeros, and
    makes a new one, which knows of nothing, of what is less than a page."""
    file = backup / DATABASE_FILE
    if not file.is_file() or file.stat().st_size < _num_bytes(file):
        raise CorruptError(
            f"{backup} is damaged: its {DATABASE_FILE} is missing, empty or cut off. Restore an earlier backup"
        )


def _num_bytes(file: Path) -> int:
    """That a database has at least, by its header (https://www.sqlite.org/fileformat.html, 1.3)."""
    with file.open("rb") as opened:
        header = opened.read(HEADER_BYTES)
    page_bytes, changed_at, num_pages, counted_at = (
        int.from_bytes(header[start:end], "big") for start, end in ((16, 18), (24, 28), (28, 32), (92, 96))
    )
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    return max(HEADER_BYTES, page_bytes * (num_pages if changed_at == counted_at else 1))


def _make(directory: Path) -> None:
    """Raises: ConfigError: it can't be made."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file: name a new directory")
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{directory} can't be made: {error.strerror}; name another") from None


def _claim(target: Path) -> None:
    """Make the directory, or see that what is in it may be written over."""
    _make(target)
    own = (MANIFEST, DATABASE_FILE, *KEY_FILES)
    known = {BLOBS, *own, *(name + PART for name in own), *LOCKS}
    strange = sorted(path.name for path in target.iterdir() if path.name not in known)
    if strange:
        raise ConfigError(f"{target} is no backup ({strange[0]} is in it); name a new directory, or an earlier backup")
    still_open = close_to_others(target / name for name in (BLOBS, *own))
    if still_open:
        raise ConfigError(f"{still_open[0]} is another user's, and open to others; make the backup as that user")


def drop_abandoned(data_dir: Path, before: float = math.inf) -> None:
    """Let go of files that backups held which were killed before that time (unix seconds). One under way isn't touched:
    it has its lock by the time that it is some seconds old."""
    for left in data_dir.glob(f"{STAGING}*"):
        with suppress(BlockingIOError, FileNotFoundError):
            if left.stat().st_mtime < before:
                with _locked(left):
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _held(data_dir: Path, source: Blobs) -> Iterator[Blobs]:
    """All files that are there now, held by links in a directory beside them for as long as the block runs."""
    drop_abandoned(data_dir)
    staging = data_dir / f"{STAGING}{secrets.token_hex(4)}"
    staging.mkdir(mode=0o700)
    held = Blobs(staging)
    try:
        with _locked(staging):
            _hold_all(source, held)
            yield held
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _hold_all(source: Blobs, held: Blobs) -> None:
    try:
        for file in source.files():
            if not file.is_unfinished:
                held.hold(file.key, source)
    except OSError as error:
        raise ConfigError(
            f"files can't be held by hard links here ({error.strerror}): stop the server and copy the whole directory"
        ) from None


def _hold_named(held: Blobs, source: Blobs, named: set[BlobKey]) -> None:
    """Those that have come since. One whose name is none, in a damaged row, is missing like one that has gone."""
    for key in named:
        with suppress(UserError):
            held.hold(key, source)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises: BlockingIOError: another process has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _copy_files(source: Blobs, target: Blobs, named: set[BlobKey], progress: Progress) -> Copied:
    sizes = {key: size for key in sorted(named) if (size := _size_of(source, key)) is not None}
    damaged: list[str] = []
    total, num_files, num_bytes, num_new = sum(sizes.values()), 0, 0, 0
    for key in sorted(named):
        if not (key in sizes and _size_of(target, key) == sizes[key] and _is_whole(target, key)):
            trouble = _copy_file(source, target, key) if key in sizes else f"the file {key} is missing"
            if trouble is None:
                num_new += 1
                crash_point("backup.half_copied")
            elif _is_whole(target, key):
                damaged.append(f"{trouble}; the backup has it from before")
            else:
                damaged.append(f"{trouble}; left out")
                continue
        num_files, num_bytes = num_files + 1, num_bytes + target.size(key)
        progress(num_bytes, total)
    return Copied(num_files, num_bytes, num_new, tuple(damaged))


def _size_of(blobs: Blobs, key: BlobKey) -> int | None:
    """Bytes; None: there is no such file, or can't be."""
    try:
        return blobs.size(key)
    except UserError:
        return None


def _is_whole(target: Blobs, key: BlobKey) -> bool:
    """Whether it is there, and still what was copied. Reads it."""
    try:
        target.open_checked(key).close()
    except (CorruptError, UserError, OSError):
        return False
    return True


def _copy_file(source: Blobs, target: Blobs, key: BlobKey) -> str | None:
    """What is wrong with the file, which isn't in `target` then; None: nothing."""
    try:
        stored = target.put(BlobKey(key.rpartition(".")[0]), _pieces(source, key))
    except CorruptError as error:
        return error.message
    if stored.key == key:
        return None
    target.delete(stored.key)
    return f"the file {key} was changed on the disk"


def _pieces(source: Blobs, key: BlobKey) -> Iterator[memoryview]:
    """Raises: CorruptError: the disk doesn't give them; an OSError is of where they go."""
    try:
        with source.open(key) as file:
            while piece := file.read(CHECKED_BYTES):
                yield memoryview(piece)
    except OSError as error:
        raise CorruptError(f"the file {key} can't be read ({error.strerror})") from error


def _copy_private(source: Path, target: Path) -> None:
    _write_private(target, source.read_bytes())


def _write_private(path: Path, data: bytes) -> None:
    """On disk, for its owner's eyes alone."""
    part = path.with_name(path.name + PART)
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_directory(path.parent)

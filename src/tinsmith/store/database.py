"""Connections, transactions and pragmas: what makes a write short, durable and alone.

Owns the connections of one process and knows no table. What stays true:

* A write is one BEGIN IMMEDIATE transaction: it holds the database's write lock from its first statement, so nothing
  read in it can be stale. Threads of one process queue on a lock of their own instead of polling the file's.
* Processes take turns at writing: whoever waits holds the turnstile (`turnstile.py`), and whoever has just written has
  to pass that first. Without it the API, flooded with requests, would begin one write after another and keep the
  worker from recording results.
* A durable write has reached the disk, with all that was committed before it, when its block ends.
* A read is one deferred transaction, a consistent view that ends with its block.
* Connections are held and reused, so that the driver's prepared statements live on.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unicodedata import normalize

import msgspec
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import NullPool

from tinsmith.errors import CapacityError, ConfigError, CorruptError, StorageFullError, TakenError
from tinsmith.files.private import make_empty
from tinsmith.observe.series import COMMIT
from tinsmith.store.prepared import driver_of
from tinsmith.store.turnstile import Turnstile

BUSY_TIMEOUT_S = 10.0
BUSY_POLL_S = 0.0002
CURE = (
    "look at the disk (is it failing?) and stop the server; if the database is damaged, make a new data directory of a "
    "backup (tinsmith restore)"
)
TAKEN = "the database is being written by another"
SYNCHRONOUS = ("FULL", "NORMAL")


class Database:
    """SQLite in WAL mode. Any method may be called from any thread.

    Args:
        path: the database file; made for its owner alone if it is missing.
        synchronous: "FULL" (a commit survives a loss of power) or "NORMAL" (it survives a crash of the process).

    Raises:
        ConfigError: another value of `synchronous`.
    """

    def __init__(self, path: Path, *, synchronous: str = "FULL") -> None:
        if synchronous not in SYNCHRONOUS:
            raise ConfigError(f"--sqlite-synchronous is one of {', '.join(SYNCHRONOUS)}, not {synchronous!r}")
        make_empty(path)  # what SQLite lays beside it has its mode
        self._engine = _make_engine(path, synchronous)
        self._turnstile = Turnstile(path.with_suffix(".turn"))
        self._write_lock = threading.Lock()
        self._writers: dict[bool, Connection] = {}
        self._idle: deque[Connection] = deque()
        self._is_closed = False

    @contextmanager
    def write(self, *, is_durable: bool = True, may_wait: bool = True) -> Iterator[Connection]:
        """One write transaction: committed when the block ends, rolled back when it raises.

        Args:
            is_durable: with False, a loss of power may undo it until the next durable write; a crash of a process
                doesn't. For what nobody was told of: a claim, a heartbeat. Spares an fsync.
            may_wait: for other writers, of this process and of others.

        Raises:
            CapacityError: another process held the write lock for longer than `BUSY_TIMEOUT_S`. Nothing was written.
            TakenError: there is another writer, and this one may not wait.
        """
        with self._alone(may_wait):
            connection = self._writers.get(is_durable) or self._connect()
            if is_durable not in self._writers:
                self._writers[is_durable] = connection
                driver = driver_of(connection)
                driver.execute("PRAGMA busy_timeout=0").close()  # `_begin_write` waits
                if not is_durable:
                    driver.execute("PRAGMA synchronous=NORMAL").close()
            writing = _transaction(connection, may_wait=may_wait, turnstile=self._turnstile, is_durable=is_durable)
            with errors_by_name(), writing:
                yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            with errors_by_name(), _transaction(connection):
                yield connection
        finally:
            if self._is_closed:
                connection.close()
            else:
                self._idle.append(connection)

    def close(self) -> None:
        """Close what is idle; a read under way closes its connection when it ends."""
        with self._write_lock:
            self._is_closed = True
            for writer in self._writers.values():
                writer.close()
            self._writers.clear()
        while self._idle:
            self._idle.pop().close()
        self._engine.dispose()
        self._turnstile.close()

    @contextmanager
    def _alone(self, may_wait: bool) -> Iterator[None]:
        if not self._write_lock.acquire(blocking=may_wait):
            raise TakenError(TAKEN)
        try:
            yield
        finally:
            self._write_lock.release()

    def _connect(self) -> Connection:
        if self._is_closed:
            raise RuntimeError("the store is closed")
        return self._engine.connect()


def fold(text: str | None) -> str | None:
    """A text as it is compared without regard to case: `fold` in SQL, whose own `lower` knows ASCII alone."""
    return None if text is None else normalize("NFC", normalize("NFC", text).casefold())


def damage(path: Path) -> str | None:
    """What SQLite's quick check finds wrong with a database file, or None. Changes nothing; it may be in use."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
    except sqlite3.Error as error:
        return str(error)
    return None if found == ["ok"] else "; ".join(map(str, found))


def copy_database(source: sqlite3.Connection, target: Path) -> None:
    """A copy of a database as `source`, in whose transaction it is made, sees it; on disk afterwards.

    Raises:
        CorruptError: the database can't be read.
        StorageFullError: there is no room for the copy.
    """
    target.unlink(missing_ok=True)
    make_empty(target)
    with errors_by_name(), closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE").close()
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _make_engine(path: Path, synchronous: str) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=NullPool,
        hide_parameters=True,  # an error's text goes to the log, and payloads are none of its business
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_S, "cached_statements": 256},
        json_serializer=lambda value: msgspec.json.encode(value).decode(),
        json_deserializer=msgspec.json.decode,
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: sqlite3.Connection, _record: Any) -> None:
        connection.create_function("fold", 1, fold, deterministic=True)
        connection.isolation_level = None  # the driver begins nothing by itself; `begin` below does
        for pragma in (
            "journal_mode=WAL",
            f"synchronous={synchronous}",
            "foreign_keys=ON",
            "cache_size=-512",
            "temp_store=MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        """SQLAlchemy notices a transaction at its first statement; `_transaction` has begun it by then."""
        driver = driver_of(connection)
        if not driver.in_transaction:
            driver.execute("BEGIN IMMEDIATE").close()

    return engine


@contextmanager
def _transaction(
    connection: Connection, *, may_wait: bool = True, turnstile: Turnstile | None = None, is_durable: bool = False
) -> Iterator[None]:
    """Begun and ended on the driver: SQLAlchemy takes part only where one of its statements is run. `turnstile`: it
    writes."""
    driver = driver_of(connection)
    if turnstile is not None:
        _begin_write(driver, may_wait, turnstile)
    else:
        driver.execute("BEGIN").close()
    try:
        yield
        started = time.perf_counter()
        if connection.in_transaction():
            connection.commit()
        else:
            driver.commit()
        if is_durable:
            COMMIT.observe(time.perf_counter() - started)
    except BaseException:
        if connection.in_transaction():
            connection.rollback()
        if driver.in_transaction:
            driver.rollback()
        raise


def _begin_write(driver: sqlite3.Connection, may_wait: bool, turnstile: Turnstile) -> None:
    """Take the write lock; wait for another process to give it back, if that is allowed.

    SQLite's own waiting sleeps 1, 2, 5, 10, 15, 20 ... ms, which is longer than most transactions take.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    is_mine = False
    try:
        while True:
            is_mine = is_mine or turnstile.enter()
            try:
                if is_mine or time.monotonic() > deadline:
                    driver.execute("BEGIN IMMEDIATE").close()
                    return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
            if not may_wait:
                raise TakenError(TAKEN)
            time.sleep(BUSY_POLL_S)
    finally:
        if is_mine:
            turnstile.leave()


@contextmanager
def errors_by_name() -> Iterator[None]:
    """The driver's errors as ours: busy is CapacityError, a full disk StorageFullError, the others CorruptError."""
    try:
        yield
    except (OperationalError, sqlite3.OperationalError) as error:
        origin = error.orig if isinstance(error, OperationalError) else error
        if _is_busy(origin):
            raise CapacityError(
                f"the database was busy for {BUSY_TIMEOUT_S:g} s; send the request again, and look for other programs "
                "that hold it open"
            ) from error
        if _is_full(origin):
            raise StorageFullError("the disk is full: free space, then send the request again") from error
        raise CorruptError(f"the database can't be used: {origin}; {CURE}") from error
    except (DatabaseError, sqlite3.DatabaseError) as error:
        if type(error) not in (DatabaseError, sqlite3.DatabaseError):  # others are of one statement: callers judge
            raise
        origin = error.orig if isinstance(error, DatabaseError) else error
        raise CorruptError(f"the database can't be read: {origin}; {CURE}") from error


def _is_busy(error: object) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _is_full(error: object) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL

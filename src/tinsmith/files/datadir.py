"""The small files at the top of a data directory: serve.lock, server.json, admin.key and signing.key.

Owns who serves the directory and how a client on this machine finds that server. What `server.json` says is believed
only while a server holds the lock; the lock goes with its holder, `kill -9` included.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tinsmith.errors import ConfigError
from tinsmith.files.private import opener

LOCK_TRIES = 10  # `holder` may have the lock for an instant while it looks
LOCK_PAUSE_S = 0.05
SOCKET_DIR_PREFIX = "tinsmith-"
SIGNING_BYTES = 32


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What server.json says. worker_pids: by base model; a second process under `NAME 2`, a sampling one under
    `sampler NAME`. certificate: the file of the one that the server shows; empty: it speaks http. restarts: how often
    each child was started again after its death, since the server's start. oom_kills: processes that the system had
    killed for want of memory when a child was started last; None: unknown. places: (base model, role) of each worker
    that is meant to be there, by its slot, whether or not its process lives."""

    version: str
    url: str
    port: int
    pid: int
    api_pid: int
    worker_pids: dict[str, int]
    certificate: str = ""
    restarts: dict[str, int] = field(default_factory=dict)
    oom_kills: int | None = None
    places: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the lock, and the directory of its sockets."""

    pid: int
    socket_dir: str


class DataDir:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_file = path / "serve.lock"
        self._info_file = path / "server.json"
        self._key_file = path / "admin.key"
        self._signing_file = path / "signing.key"

    @property
    def admin_key_file(self) -> Path:
        return self._key_file

    def make(self) -> None:
        """Make the directory, for its owner's eyes alone, if it isn't there.

        Raises:
            ConfigError: it can't be made or written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--data-dir {self.path} can't be made: {error.strerror}; name another") from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ConfigError(f"--data-dir {self.path} can't be written by this user; name another")

    @property
    def is_open_to_others(self) -> bool:
        """Whether other users may list or enter the directory; the files in it are closed to them all the same."""
        return bool(self.path.stat().st_mode & 0o077)

    @contextlib.contextmanager
    def locked(self, socket_dir: Path) -> Iterator[None]:
        """Hold the directory; the sockets of a holder that was killed are cleared away.

        Raises:
            ConfigError: another server holds it.
        """
        with open(self._lock_file, "a+", encoding="utf-8", opener=opener) as file:
            self._acquire(file.fileno())
            self._clear(self._recorded())
            file.truncate(0)
            file.write(f"{os.getpid()}\n{socket_dir}\n")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def holder(self) -> Holder | None:
        """The server that has this directory now, if any."""
        try:
            file = self._lock_file.open(encoding="utf-8")
        except OSError:
            return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return self._recorded() or Holder(0, "")
        return None

    def info(self) -> ServerInfo | None:
        """What the running server says of itself; None if none runs."""
        holder = self.holder()
        info = self.left_info()
        return info if holder is not None and info is not None and info.pid == holder.pid else None

    def left_info(self) -> ServerInfo | None:
        """What server.json says, even if its server has gone without removing it."""
        try:
            return ServerInfo(**json.loads(self._info_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write_info(self, info: ServerInfo) -> None:
        _write_atomically(self._info_file, json.dumps(asdict(info), indent=2) + "\n", 0o600)

    def remove_info(self) -> None:
        self._info_file.unlink(missing_ok=True)

    def admin_key(self) -> str | None:
        try:
            return self._key_file.read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self._key_file} can't be read: {error.strerror}") from None

    def write_admin_key(self, secret: str) -> None:
        _write_atomically(self._key_file, secret + "\n", 0o600)

    def signing_secret(self) -> bytes:
        """The secret that this directory's links and tokens are signed with; made at the first call, for its owner's
        eyes alone. Of two processes that make it at once, both get the same.

        Raises:
            ConfigError: the file can't be read or written, or is damaged.
        """
        try:
            if not self._signing_file.exists():
                _write_once(self._signing_file, secrets.token_hex(SIGNING_BYTES) + "\n", 0o600)
            secret = bytes.fromhex(self._signing_file.read_text(encoding="ascii"))
        except OSError as error:
            raise ConfigError(f"{self._signing_file} can't be read or written: {error.strerror}") from None
        except ValueError:
            secret = b""
        if len(secret) != SIGNING_BYTES:
            raise ConfigError(
                f"{self._signing_file} is damaged: remove it, and a new one is made; links made before end with it"
            )
        return secret

    def _acquire(self, fd: int) -> None:
        for attempt in range(LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if attempt + 1 < LOCK_TRIES:
                    time.sleep(LOCK_PAUSE_S)
            else:
                return
        holder = self._recorded()
        who = f"pid {holder.pid}" if holder is not None else "another process"
        raise ConfigError(
            f"{self.path} is already served by a tinsmith ({who}); stop it, or name another directory with --data-dir"
        )

    def _recorded(self) -> Holder | None:
        lines = self._lock_file.read_text(encoding="utf-8").splitlines()
        return Holder(int(lines[0]), lines[1]) if len(lines) > 1 and lines[0].isdigit() else None

    @staticmethod
    def _clear(left: Holder | None) -> None:
        if left is not None and Path(left.socket_dir).name.startswith(SOCKET_DIR_PREFIX):
            shutil.rmtree(left.socket_dir, ignore_errors=True)


def _write_atomically(path: Path, text: str, mode: int) -> None:
    _write_part(path, text, mode).replace(path)


def _write_once(path: Path, text: str, mode: int) -> None:
    """Write the file unless it is there by the time it could be."""
    part = _write_part(path, text, mode)
    try:
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(part)
    finally:
        part.unlink()


def _write_part(path: Path, text: str, mode: int) -> Path:
    """The text on disk in a file beside `path`, to be moved there."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return part

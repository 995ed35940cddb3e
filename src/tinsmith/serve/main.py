"""`tinsmith serve`: settings become processes, one for the API and one or two for each base model.

Owns the start (models, data directory, port, first key), the supervision and the clean end. It loads neither torch
nor the HTTP framework, so that it stays up whatever they do. It holds three things that outlive its children: the
lock of the data directory, the listening socket (a restarted API is on the same port, clients only wait) and the pipe
whose closing ends them if it is killed itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import structlog
from rich.console import Console

from tinsmith import __version__
from tinsmith.admin import ensure_admin_key
from tinsmith.bases.catalog import BaseRef, describe, parse_all
from tinsmith.bases.hub import fetch
from tinsmith.bases.weight_headers import file_bytes
from tinsmith.cli.client import Client
from tinsmith.config import METRICS_DIR, Settings, child_env
from tinsmith.errors import ConfigError, TinsmithError
from tinsmith.files.datadir import SOCKET_DIR_PREFIX, DataDir, ServerInfo
from tinsmith.files.private import close_to_others
from tinsmith.ipc.heartbeat import Heart
from tinsmith.ipc.relay import Relay, RelayStream
from tinsmith.machine.cpu import math_env
from tinsmith.machine.host_memory import num_oom_kills
from tinsmith.observe import logs
from tinsmith.serve.child import ChildSpec
from tinsmith.serve.loading_bars import LoadingBars
from tinsmith.serve.placement import num_threads, places
from tinsmith.serve.supervisor import Patience, Supervisor, available_cores
from tinsmith.store import DATABASE_FILE, FILES, Store, open_store
from tinsmith.tls import Certificate

log = structlog.get_logger("tinsmith.serve")

API = "api"
BACKLOG = 2048
CONTENTS = (DATABASE_FILE, f"{DATABASE_FILE}-wal", f"{DATABASE_FILE}-shm", FILES)
HELD_PORT_S = 6.0  # the API of a killed server ends within 5 s and frees its port
READY_POLL_S = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RELIEF_SIGNAL = signal.SIGUSR1  # a new API process takes over before the old one ends
MAX_SOCKET_DIR_CHARS = 70  # a unix socket's path has room for about 100
ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
# glibc keeps freed memory between passes: fetching it anew took up to a sixth of a large pass. oneDNN keeps so many
# prepared kernels: of ragged passes hardly any is met again, and the 1,024 that it keeps by itself are 100 MB and more
WORKER_DEFAULTS = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "MALLOC_MMAP_THRESHOLD_": str(128 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}

# each of the API's threads would have an arena of its own, which keeps what was freed there
API_DEFAULTS = {"MALLOC_ARENA_MAX": "2"}


def serve(settings: Settings) -> int:
    """Serve until Ctrl-C or SIGTERM; 0 after a clean stop.

    Raises:
        ConfigError: the settings, a model, the directory or the port can't be used; nothing is left running.
    """
    signal.signal(RELIEF_SIGNAL, signal.SIG_IGN)  # there is nothing to relieve yet
    out = Console(highlight=False, soft_wrap=True)
    refs = parse_all(settings.base_model)
    if settings.has_tls:
        Certificate(Path(settings.tls_certificate), Path(settings.tls_key))
    data_dir = DataDir(settings.data_dir)
    data_dir.make()
    if data_dir.is_open_to_others:
        out.print(f"others on this machine may look into {data_dir.path}: `chmod 700` it if that isn't meant")
        for path in close_to_others(data_dir.path / name for name in CONTENTS):
            out.print(f"others on this machine may read {path}, which is another user's: close it to them as that user")
    with contextlib.ExitStack() as held:
        held.callback(os.umask, os.umask(0o077))  # files of the server and its children are their owner's alone
        sockets = held.enter_context(_socket_dir())
        left = data_dir.left_info()
        held.enter_context(data_dir.locked(sockets))
        listener = held.enter_context(
            contextlib.closing(bind(settings.host, settings.port, left is not None and left.port == settings.port))
        )
        refs = tuple(fetch(ref, out.print) for ref in refs)
        for ref in refs:
            describe(ref, data_dir=data_dir.path)
        resolved = _resolve(settings, refs, listener)
        secret = ensure_admin_key(data_dir, settings.sqlite_synchronous)
        with contextlib.closing(open_store(data_dir.path)) as store:
            excuse_left(store, [place.slot for place in places(resolved, refs)], left, num_oom_kills())
            store.replays.forget()
        listener.listen(BACKLOG)
        return _Serving(resolved, refs, data_dir, listener, sockets, out).run(secret)


def excuse_left(store: Store, slots: Sequence[str], left: ServerInfo | None, oom_kills: int | None) -> None:
    """The whole server ended, by `kill -9`, with its machine, or in haste: what its workers were at is not suspected
    for that, unless memory ran out meanwhile. A worker that dies under a living server is another matter (`_vacate`).

    Args:
        left: what the last server said of itself; None: it ended by itself.
        oom_kills: as they are counted now.
    """
    before = None if left is None else left.oom_kills
    ran_out = before is not None and oom_kills is not None and oom_kills > before
    try:
        for slot in slots:
            store.workers.vacate(slot, is_excused=not ran_out)
    except (TinsmithError, OSError) as error:
        log.error("what the last server left can't be given up; its next workers take it as it is", error=str(error))


class _Serving:
    """One server while it runs."""

    def __init__(
        self,
        settings: Settings,
        refs: Sequence[BaseRef],
        data_dir: DataDir,
        listener: socket.socket,
        sockets: Path,
        out: Console,
    ) -> None:
        self._settings = settings
        self._refs = refs
        self._data_dir = data_dir
        self._out = out
        self._url = settings.public_url.rstrip("/") or local_url(settings)
        self._started = time.monotonic()
        self._deaths: Counter[str] = Counter()
        self._err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._relay = Relay(self._write_line)
        self._read_fd, self._write_fd = os.pipe()
        self._heart = Heart()
        self._places = places(settings, refs)
        self._file_bytes = {place.child_name: file_bytes(place.ref.directory) for place in self._places}
        self._supervisor = Supervisor(
            child_specs(settings, refs, sockets, listener.fileno(), self._read_fd, self._heart.inherited_fd),
            on_line=self._on_line,
            on_start=self._record,
            on_death=self._vacate,
            patience=Patience(settings.hang_timeout_s),
            on_turn=self._heart.beat,
        )
        self._ended = threading.Event()

    def run(self, secret: str | None) -> int:
        stream = RelayStream(self._relay, self._err.is_terminal)
        logs.configure(self._settings, process="serve", stream=stream)
        before = {number: signal.signal(number, self._on_signal) for number in (*STOP_SIGNALS, RELIEF_SIGNAL)}
        watcher = threading.Thread(target=self._say_when_ready, name="ready", daemon=True)
        try:
            self._greet(secret)
            watcher.start()
            self._supervisor.run()
        finally:
            self._ended.set()
            self._data_dir.remove_info()
            os.close(self._read_fd)
            os.close(self._write_fd)
            self._heart.close()
            if watcher.ident is not None:
                watcher.join(2.0)
            self._relay.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        self._out.print("stopped")
        return 0

    def _on_signal(self, number: int, frame: object) -> None:
        """Only an event is put: the interrupted code may hold any lock."""
        if number == RELIEF_SIGNAL:
            self._supervisor.relieve()
        else:
            self._supervisor.stop()

    def _record(self) -> None:
        """Write server.json for the children as they are now."""
        api, *workers = self._supervisor.children
        pids = {
            place.child_name.removeprefix("worker "): child.pid
            for place, child in zip(self._places, workers, strict=True)
        }
        settings = self._settings
        deaths = {child.spec.name: self._deaths[child.spec.name] for child in self._supervisor.children}
        info = ServerInfo(
            __version__, self._url, settings.port, os.getpid(), api.pid, pids, settings.tls_certificate, deaths,
            num_oom_kills(), {place.slot: [place.ref.name, place.role.value] for place in self._places},
        )  # fmt: skip
        try:
            self._data_dir.write_info(info)
        except OSError as error:
            log.error("server.json can't be written", error=str(error))

    def _vacate(self, name: str, is_excused: bool) -> None:
        """A dead worker's place is given up at once, so that nothing waits for its lease, and healthz says so."""
        self._deaths[name] += 1
        slots = [place.slot for place in self._places if name == place.child_name]
        if not slots:
            return
        try:
            with contextlib.closing(open_store(self._data_dir.path)) as store:
                store.workers.vacate(slots[0], is_excused=is_excused)
        except (TinsmithError, OSError) as error:
            log.error("a dead worker's place can't be given up; its lease runs out by itself", error=str(error))

    def _greet(self, secret: str | None) -> None:
        say = self._out.print
        say(f"tinsmith {__version__} serves {', '.join(ref.name for ref in self._refs)} from {self._data_dir.path}")
        if secret is not None:
            say(f"first start: the administrator's key, shown once and kept in {self._data_dir.admin_key_file}")
        say(f"  export TINKER_BASE_URL={self._url}", markup=False)
        key_file = shlex.quote(str(self._data_dir.admin_key_file))
        kept = f'"$(cat {key_file})"'
        say(f"  export TINKER_API_KEY={secret or kept}", markup=False)
        say(f"API reference: {self._url}/schema", markup=False)

    def _say_when_ready(self) -> None:
        client = Client(local_url(self._settings), certificate=self._settings.tls_certificate)
        names = ", ".join(ref.name for ref in self._refs)
        with LoadingBars(self._err, self._file_bytes) as bars:
            while not client.is_ready():
                for child in self._supervisor.children[1:]:
                    process = child.process
                    if process is not None:
                        bars.show(child.spec.name, process.percent_read, is_serving=process.is_serving)
                if self._ended.wait(READY_POLL_S):
                    return
        self._out.print(f"ready after {time.monotonic() - self._started:.1f} s: {names}")

    def _on_line(self, name: str, line: str) -> None:
        if self._settings.log_format == "text":
            self._relay.put(f"[{name}] {line}")
        elif line.startswith("{"):
            self._relay.put(line)
        else:
            self._relay.put(json.dumps({"process": name, "level": "warning", "event": line}))

    def _write_line(self, line: str) -> None:
        if self._err.is_terminal:
            self._err.print(line)  # above the bars
        else:
            print(line, file=sys.stderr, flush=True)


def child_specs(
    settings: Settings, refs: Sequence[BaseRef], sockets: Path, listen_fd: int, parent_fd: int, heart_fd: int
) -> list[ChildSpec]:
    """The API first, then the workers of each base, in the order of `refs`."""
    workers = places(settings, refs)
    common = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        METRICS_DIR: str(sockets / "metrics"),
    }
    api = [sys.executable, "-m", "tinsmith.api", "--fd", str(listen_fd), "--bell", str(sockets / "api.sock")]
    for place in workers:
        api += ["--worker-bell", f"{place.ref.name}={place.bell(sockets)}"]
    specs = [
        ChildSpec(
            API,
            (*api, "--parent-fd", str(parent_fd), "--heart-fd", str(heart_fd)),
            child_env(settings, {**math_env(), **API_DEFAULTS}, **common, OMP_NUM_THREADS="1"),
            (listen_fd, parent_fd, heart_fd),
            has_pulse=True,
            can_overlap=True,
        )
    ]
    for place in workers:
        argv = (
            *(sys.executable, "-m", "tinsmith.worker", "--base", str(place.ref)),
            *("--slot", place.slot, "--role", place.role.value, "--bell", str(place.bell(sockets))),
            *("--api-bell", str(sockets / "api.sock"), "--parent-fd", str(parent_fd)),
        )
        own = place.settings(settings)
        env = child_env(own, {**math_env(), **WORKER_DEFAULTS}, **common, OMP_NUM_THREADS=str(own.threads))
        specs.append(ChildSpec(place.child_name, argv, env, (parent_fd,), has_pulse=True))
    return specs


def bind(host: str, port: int, may_be_left: bool) -> socket.socket:
    """A bound TCP socket, not listening yet. `may_be_left`: children of a killed server may hold the port for a moment.

    Raises:
        ConfigError: the port is taken, or the address isn't this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    family, kind, proto, _, address = found[0]
    deadline = time.monotonic() + (HELD_PORT_S if may_be_left else 0.0)
    while True:
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(READY_POLL_S)
                continue
            raise ConfigError(_bind_trouble(host, port, error)) from None
        return sock


def local_url(settings: Settings) -> str:
    """How this machine reaches the server."""
    host = ANY_HOST.get(settings.host, settings.host)
    scheme = "https" if settings.has_tls else "http"
    return f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"


def _bind_trouble(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken; stop what listens there, or choose another with --port (0: a free one)"
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by this user; choose one above 1023 with --port"
    return f"can't listen on {host}:{port}: {error.strerror}; choose another --host"


def _resolve(settings: Settings, refs: Sequence[BaseRef], listener: socket.socket) -> Settings:
    """The settings as the children get them: nothing left to look up, download or choose."""
    return replace(
        settings,
        base_model=tuple(map(str, refs)),
        port=int(listener.getsockname()[1]),
        threads=num_threads(settings, available_cores()),
        log_format=logs.log_format(settings, sys.stderr),
    )


@contextlib.contextmanager
def _socket_dir() -> Iterator[Path]:
    """A private directory with a short path, for as long as the block runs."""
    parent = tempfile.gettempdir()
    short = parent if len(parent) <= MAX_SOCKET_DIR_CHARS else "/tmp"
    with tempfile.TemporaryDirectory(prefix=SOCKET_DIR_PREFIX, dir=short, ignore_cleanup_errors=True) as path:
        (Path(path) / "metrics").mkdir()
        yield Path(path)

"""Keeps child processes alive: starts them, restarts the dead, backs off from those that keep dying, stops all.

Knows processes, not what they do. One thread decides (`run`); helper threads only wait for exits and read output. A
child has its own process group, so that Ctrl-C reaches the supervisor alone, and its output goes through a relay that
never blocks it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from tinsmith.errors import ConfigError

log = structlog.get_logger("tinsmith.serve")

UNUSABLE = 2  # the exit status of a child that says: not with these settings
AGAIN_S = 1.0  # one press of Ctrl-C may arrive twice, through a wrapper such as timeout or make
LAST_LINES = 20
MAX_LINE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start one child. pass_fds: file descriptors it inherits, under the same numbers."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before a restart: not at all, then 1, 2, 4 ... `max_s` for deaths in a row.

    A child that lived for `steady_s` starts afresh.
    """

    steady_s: float = 20.0
    max_s: float = 30.0

    def after(self, num_deaths: int, uptime_s: float) -> tuple[int, float]:
        """Deaths in a row, this one included, and the seconds to wait. `num_deaths` does not include it."""
        before = 0 if uptime_s >= self.steady_s else num_deaths
        return before + 1, min(self.max_s, 2.0 ** (before - 1)) if before else 0.0


class Child:
    """One supervised process, through all its restarts."""

    def __init__(self, spec: ChildSpec, on_line: Callable[[str, str], None], on_exit: Callable[[Child], None]) -> None:
        self.spec = spec
        self.num_starts = 0
        self.num_deaths = 0
        self.restart_at: float | None = None
        self.started_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._on_line = on_line
        self._on_exit = on_exit

    @property
    def pid(self) -> int:
        """Of the newest process; 0 before the first."""
        return 0 if self._process is None else self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def status(self) -> int:
        """Exit status of the newest process; negative for a signal."""
        code = None if self._process is None else self._process.returncode
        return 0 if code is None else code

    @property
    def last_lines(self) -> list[str]:
        return list(self._last_lines)

    def start(self) -> None:
        """Start a process and the two threads that follow it.

        Raises:
            OSError: the machine can't start it.
        """
        self.restart_at = None
        self.num_starts += 1
        self.started_at = time.monotonic()
        self._last_lines.clear()
        process = subprocess.Popen(
            self.spec.argv,
            env=dict(self.spec.env),
            pass_fds=self.spec.pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self._process = process
        reader = threading.Thread(target=self._read, args=(process,), name=f"read {self.spec.name}", daemon=True)
        reader.start()
        threading.Thread(target=self._wait, args=(process, reader), name=f"wait {self.spec.name}", daemon=True).start()

    def send(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as out:
            while raw := out.readline(MAX_LINE_BYTES):
                line = raw.decode(errors="replace").rstrip()
                self._last_lines.append(line)
                self._on_line(self.spec.name, line)

    def _wait(self, process: subprocess.Popen[bytes], reader: threading.Thread) -> None:
        process.wait()
        reader.join(1.0)  # its last words; a grandchild may hold the pipe open for longer
        self._on_exit(self)


class Supervisor:
    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        on_line: Callable[[str, str], None],
        on_start: Callable[[], None],
        on_death: Callable[[str], None] = lambda name: None,
        backoff: Backoff | None = None,
        grace_s: float = 300.0,
    ) -> None:
        """`on_line(name, line)`: a child's output, from a helper thread. `on_start`: after each (re)start of a child.
        `on_death(name)`: after a child's death, before its restart.
        `grace_s`: how long children may take to stop."""
        self._events: queue.SimpleQueue[Child | None] = queue.SimpleQueue()  # None: stop. Its put is safe in a signal
        self.children = [Child(spec, on_line, self._events.put) for spec in specs]
        self._on_start = on_start
        self._on_death = on_death
        self._backoff = backoff or Backoff()
        self._grace_s = grace_s

    def stop(self) -> None:
        """Ask `run` to end; a second time: to end at once. May be called from a signal handler or another thread."""
        self._events.put(None)

    def run(self) -> None:
        """Start all children and keep them running until `stop`; returns once all of them have ended.

        Raises:
            ConfigError: a child says on its first start that it can't work with its settings.
            OSError: a child could not be started the first time.
        """
        try:
            for child in self.children:
                child.start()
            self._on_start()
            self._keep()
        finally:
            self._end()

    def _keep(self) -> None:
        while True:
            due = [child.restart_at for child in self.children if child.restart_at is not None]
            try:
                child = self._events.get(timeout=max(0.0, min(due) - time.monotonic()) if due else None)
            except queue.Empty:
                self._restart_due()
                continue
            if child is None:
                return
            self._died(child)
            self._restart_due()

    def _died(self, child: Child) -> None:
        uptime_s = time.monotonic() - child.started_at
        why = describe_exit(child.status)
        if child.status == UNUSABLE and child.num_starts == 1:
            raise ConfigError(
                f"{child.spec.name} can't start: {_gist(child.last_lines[-1]) if child.last_lines else why}"
            )
        self._on_death(child.spec.name)
        child.num_deaths, wait_s = self._backoff.after(child.num_deaths, uptime_s)
        child.restart_at = time.monotonic() + wait_s
        log.error(
            f"{child.spec.name} died: {why}; restarting " + (f"in {wait_s:g} s" if wait_s else "at once"),
            uptime_s=round(uptime_s, 1),
            deaths_in_a_row=child.num_deaths,
            last_lines=child.last_lines if child.num_deaths > 1 else child.last_lines[-3:],
        )

    def _restart_due(self) -> None:
        now = time.monotonic()
        for child in self.children:
            if child.restart_at is not None and child.restart_at <= now:
                try:
                    child.start()
                except OSError as error:
                    child.num_deaths, wait_s = self._backoff.after(max(1, child.num_deaths), 0.0)
                    child.restart_at = now + wait_s
                    log.error(f"{child.spec.name} could not be started: {error}; trying again in {wait_s:g} s")
                else:
                    log.info(f"{child.spec.name} restarted", pid=child.pid)
                    self._on_start()

    def _end(self) -> None:
        """SIGTERM to all, then SIGKILL to those that are left after the grace, or after a second `stop`."""
        log.info("stopping: what is under way is finished first (asked again: at once)")
        for child in self.children:
            child.send(signal.SIGTERM)
        asked = time.monotonic()
        deadline = asked + self._grace_s
        while any(child.is_running for child in self.children):
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                log.warning("stopping took too long; ending by force", grace_s=self._grace_s)
                break
            if event is None and time.monotonic() - asked > AGAIN_S:
                log.warning("asked twice; ending by force")
                break
        for child in self.children:
            if child.is_running:
                child.send(signal.SIGKILL)
        while any(child.is_running for child in self.children):
            self._events.get()


def describe_exit(status: int) -> str:
    """An exit status in words: signals by name."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gist(line: str) -> str:
    """What a log line says: of a JSON line its error, or else its event; another line as it is."""
    try:
        said = json.loads(line)
    except ValueError:
        return line
    return str(said.get("error") or said.get("event") or line) if isinstance(said, dict) else line

"""Keeps child processes alive: starts them, restarts the dead, ends those that hang, relieves, stops all.

Knows processes, not what they do. One thread decides (`run`); helper threads only wait for exits and read output
(child.py). A child that keeps dying is restarted after pauses that grow; one that has been silent for too long is
killed, and then restarted like any other. A process that can overlap is relieved without a gap: the new one serves
before the old one is told to finish.
"""

from __future__ import annotations

import enum
import json
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from tinsmith.errors import ConfigError
from tinsmith.ipc.pulse import BEAT_S
from tinsmith.machine.host_memory import num_oom_kills
from tinsmith.serve.child import Child, ChildSpec, Process

log = structlog.get_logger("tinsmith.serve")

UNUSABLE = 2  # the exit status of a child that says: not with these settings
AGAIN_S = 1.0  # one press of Ctrl-C may arrive twice, through a wrapper such as timeout or make
AWAY_S = 5 * BEAT_S  # a longer pause of this loop says that it was stopped itself
OOM_S = 10.0  # who is killed so soon after another for whom memory ran out died of it too: both may have been counted
LEAVE_S = 60.0  # for a process that was relieved


class Ask(enum.Enum):
    STOP = enum.auto()
    RELIEVE = enum.auto()


_Event: TypeAlias = tuple[Child, Process] | Ask


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


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a child may be silent before it counts as hung: once it serves, while it loads (its first sign has been
    heard), and before that, while it reads its code; one that is stopped does neither. Seconds."""

    serving_s: float = 60.0
    starting_s: float = 300.0
    loading_s: float = 120.0

    def of(self, process: Process) -> float:
        if process.is_serving or process.is_stopped:
            return self.serving_s
        return max(self.serving_s, self.loading_s if process.was_heard else self.starting_s)


class Supervisor:
    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        on_line: Callable[[str, str], None],
        on_start: Callable[[], None],
        on_death: Callable[[str, bool], None] = lambda name, is_excused: None,
        backoff: Backoff | None = None,
        patience: Patience | None = None,
        grace_s: float = 300.0,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_line(name, line)`: a child's output, from a helper thread. `on_start`: after each (re)start of a child.
        `on_death(name, is_excused)`: after a child's death, before its restart. is_excused: it was killed from outside,
        and not because memory ran out.
        `grace_s`: how long children may take to stop. `on_turn`: about once a second, from the thread that decides."""
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()  # its put is safe in a signal handler
        self.children = [
            Child(spec, on_line, lambda child, process: self._events.put((child, process))) for spec in specs
        ]
        self._on_start = on_start
        self._on_death = on_death
        self._backoff = backoff or Backoff()
        self._patience = patience or Patience()
        self._grace_s = grace_s
        self._on_turn = on_turn
        self._listened_at = time.monotonic()
        self._num_oom_kills, self._ran_out_at = num_oom_kills(), float("-inf")

    def stop(self) -> None:
        """Ask `run` to end; a second time: to end at once. May be called from a signal handler or another thread."""
        self._events.put(Ask.STOP)

    def relieve(self) -> None:
        """Ask for new processes in the place of those that can overlap. May be called as `stop`."""
        self._events.put(Ask.RELIEVE)

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
            self._on_turn()
            due = [child.restart_at for child in self.children if child.restart_at is not None]
            try:
                event = self._events.get(timeout=max(0.0, min([BEAT_S, *(at - time.monotonic() for at in due)])))
            except queue.Empty:
                event = None
            if event is Ask.STOP:
                return
            if event is Ask.RELIEVE:
                self._begin_relief()
            elif event is not None:
                self._ended(*event)
            self._listen()
            self._restart_due()

    def _listen(self) -> None:
        """Hear all children: end those that hang, and let successors take over that serve."""
        now = time.monotonic()
        was_away = now - self._listened_at > AWAY_S  # this process was stopped, and perhaps all of them were
        self._listened_at = now
        for child in self.children:
            for process in child.processes:
                silent_s = process.silent_s(now)
                if was_away:
                    process.heard_at = now
                elif silent_s > self._patience.of(process) and process.is_running:
                    log.error(f"{child.spec.name} hangs: silent for {silent_s:.0f} s; ending it", pid=process.pid)
                    process.heard_at = now
                    process.send(signal.SIGKILL)
            if child.successor is not None and child.successor.is_serving:
                child.relieve(now)
                log.info(f"{child.spec.name} relieved; the old one finishes what it has", pid=child.pid)
                self._on_start()
            for process, since in child.leaving.items():
                if now - since > LEAVE_S:
                    process.send(signal.SIGKILL)

    def _begin_relief(self) -> None:
        for child in self.children:
            if child.spec.can_overlap:
                try:
                    child.start_successor()
                except OSError as error:
                    log.error(f"{child.spec.name} can't be relieved: {error}")

    def _ended(self, child: Child, process: Process) -> None:
        process.ended()
        if process in child.leaving:
            del child.leaving[process]
        elif process is child.successor:
            child.successor = None
            why = describe_exit(process.status)
            log.error(
                f"{child.spec.name}: the new process died ({why}), the old one stays", last_lines=process.last_lines
            )
        elif process is child.process:
            self._died(child, process)

    def _died(self, child: Child, process: Process) -> None:
        uptime_s = time.monotonic() - process.started_at
        why = describe_exit(process.status)
        if process.status == UNUSABLE and child.num_starts == 1:
            raise ConfigError(
                f"{child.spec.name} can't start: {_gist(process.last_lines[-1]) if process.last_lines else why}"
            )
        is_killed = process.status == -signal.SIGKILL and not process.was_killed
        self._on_death(child.spec.name, is_killed and not self._may_have_run_out())
        if child.successor is not None:
            child.process, child.successor = child.successor, None
            log.error(f"{child.spec.name} died: {why}; its successor has started already")
            self._on_start()
            return
        has_served = process.spec.has_pulse and process.is_serving  # so it isn't its start that fails
        num_deaths = min(child.num_deaths, 1) if has_served else child.num_deaths
        child.num_deaths, wait_s = self._backoff.after(num_deaths, uptime_s)
        child.restart_at = time.monotonic() + wait_s
        log.error(
            f"{child.spec.name} died: {why}; restarting " + (f"in {wait_s:g} s" if wait_s else "at once"),
            uptime_s=round(uptime_s, 1),
            deaths_in_a_row=child.num_deaths,
            last_lines=process.last_lines if child.num_deaths > 1 else process.last_lines[-3:],
        )

    def _may_have_run_out(self) -> bool:
        """Whether memory ran out for what died just now, as far as the system tells."""
        num_kills = num_oom_kills()
        if num_kills != self._num_oom_kills:
            self._ran_out_at = time.monotonic()
        self._num_oom_kills = num_kills
        return num_kills is None or time.monotonic() - self._ran_out_at < OOM_S

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
            self._on_turn()
            try:
                event = self._events.get(timeout=max(0.0, min(BEAT_S, deadline - time.monotonic())))
            except queue.Empty:
                event = None
            if time.monotonic() >= deadline:
                log.warning("stopping took too long; ending by force", grace_s=self._grace_s)
                break
            if event is Ask.STOP and time.monotonic() - asked > AGAIN_S:
                log.warning("asked twice; ending by force")
                break
            self._end_silent()
        for child in self.children:
            child.send(signal.SIGKILL)
        while any(child.is_running for child in self.children):
            self._events.get()

    def _end_silent(self) -> None:
        """One that hangs can't be waited for; one that only starts has nothing to finish, and gets no longer."""
        now = time.monotonic()
        for process in (one for child in self.children for one in child.processes):
            if process.silent_s(now) > self._patience.serving_s and process.is_running:
                log.error(f"{process.spec.name} hangs, and can't be stopped: ending it", pid=process.pid)
                process.send(signal.SIGKILL)


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

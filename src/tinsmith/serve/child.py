"""One process of a server: started, heard, told to end. Its place is a `Child`, which sees many a `Process`.

A process has its own process group, so that Ctrl-C reaches the supervisor alone, and its output is read by a thread
that never blocks it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tinsmith.ipc.pulse import SERVING, Stethoscope, percent_read

LAST_LINES = 20
MAX_LINE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start one child. pass_fds: file descriptors it inherits, under the same numbers.

    has_pulse: it takes `--pulse-fd` and beats there. can_overlap: a second one may serve beside it for a while, and
    SIGUSR1 has the first one finish what it has.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()
    has_pulse: bool = False
    can_overlap: bool = False


class Process:
    """One process of a child, from its start."""

    def __init__(
        self, spec: ChildSpec, on_line: Callable[[str, str], None], on_exit: Callable[[Process], None]
    ) -> None:
        """Raises: OSError: the machine can't start it."""
        self.spec = spec
        self.started_at = self.heard_at = time.monotonic()
        self.is_serving = not spec.has_pulse
        self.was_heard = False
        self.was_killed = False  # by us
        self.percent_read: int | None = None  # of its weights, as it said last
        self._on_line = on_line
        self._on_exit = on_exit
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._pulse = Stethoscope() if spec.has_pulse else None
        fds = () if self._pulse is None else (self._pulse.inherited_fd,)
        try:
            self._process = subprocess.Popen(
                (*spec.argv, *(text for fd in fds for text in ("--pulse-fd", str(fd)))),
                env=dict(spec.env),
                pass_fds=(*spec.pass_fds, *fds),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except OSError:
            self._close_pulse()
            raise
        finally:
            if self._pulse is not None:
                self._pulse.given()
        reader = threading.Thread(target=self._read, name=f"read {spec.name}", daemon=True)
        reader.start()
        threading.Thread(target=self._wait, args=(reader,), name=f"wait {spec.name}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def is_stopped(self) -> bool:
        """It was stopped from outside (SIGSTOP), so that it is not merely slow. False where the system can't tell."""
        if sys.platform == "darwin":
            return False
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        return False

    @property
    def status(self) -> int:
        """Exit status; negative for a signal."""
        return self._process.returncode or 0

    @property
    def last_lines(self) -> list[str]:
        return list(self._last_lines)

    def send(self, number: signal.Signals) -> None:
        self.was_killed = self.was_killed or number is signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def silent_s(self, now: float) -> float:
        """Seconds since its last sign of life (or its start), after having listened."""
        if self._pulse is None:
            return 0.0
        heard = self._pulse.hear()
        if heard:
            self.heard_at, self.was_heard = now, True
            self.is_serving = self.is_serving or SERVING in heard
            self.percent_read = percent_read(heard)
        return now - self.heard_at

    def ended(self) -> None:
        """It is known to have ended."""
        self._close_pulse()

    def _close_pulse(self) -> None:
        if self._pulse is not None:
            self._pulse.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as out:
            while raw := out.readline(MAX_LINE_BYTES):
                line = raw.decode(errors="replace").rstrip()
                self._last_lines.append(line)
                self._on_line(self.spec.name, line)

    def _wait(self, reader: threading.Thread) -> None:
        self._process.wait()
        reader.join(1.0)  # its last words; a grandchild may hold the pipe open for longer
        self._on_exit(self)


class Child:
    """One supervised place, through all its processes: the one that serves, its successor, those that finish."""

    def __init__(
        self, spec: ChildSpec, on_line: Callable[[str, str], None], on_exit: Callable[[Child, Process], None]
    ) -> None:
        self.spec = spec
        self.num_starts = 0
        self.num_deaths = 0
        self.restart_at: float | None = None
        self.process: Process | None = None
        self.successor: Process | None = None
        self.leaving: dict[Process, float] = {}  # since when
        self._on_line = on_line
        self._on_exit = on_exit

    @property
    def pid(self) -> int:
        """Of the newest process that is to serve; 0 before the first."""
        return 0 if self.process is None else self.process.pid

    @property
    def processes(self) -> list[Process]:
        """All that may still run."""
        return [one for one in (self.process, self.successor, *self.leaving) if one is not None]

    @property
    def is_running(self) -> bool:
        return any(process.is_running for process in self.processes)

    def start(self) -> None:
        """Raises: OSError: the machine can't start it."""
        self.restart_at = None
        self.num_starts += 1
        self.process = self._make()

    def start_successor(self) -> None:
        """A second process, which is to relieve the first one. Raises: OSError: the machine can't start it."""
        if self.successor is None and self.process is not None:
            self.successor = self._make()

    def relieve(self, now: float) -> None:
        """The successor serves: the first one finishes what it has."""
        assert self.successor is not None
        assert self.process is not None
        self.process.send(signal.SIGUSR1)
        self.leaving[self.process] = now
        self.process, self.successor = self.successor, None

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send(number)

    def _make(self) -> Process:
        return Process(self.spec, self._on_line, lambda process: self._on_exit(self, process))

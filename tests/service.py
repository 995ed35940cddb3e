"""A real `tinsmith serve` in a process of its own, for tests that drive it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

READY_WITHIN_S = 120.0


class Service:
    """A running server. `info()` is its server.json, which changes when a child is restarted.

    It is deterministic, since tests compare bits; the flag `--no-deterministic` gives one as users have it by default.
    It computes with one thread: others run beside it, and its model is small.
    """

    def __init__(self, data_dir: Path, *flags: str, ready_within_s: float = READY_WITHIN_S) -> None:
        self.data_dir = data_dir
        self.flags = flags
        self.ready_within_s = ready_within_s
        self.log = data_dir.parent / f"{data_dir.name}.log"
        self.process = self._start()
        self.url = self.wait_ready()
        self.key = (data_dir / "admin.key").read_text().strip()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tinsmith", "serve", "--data-dir", str(self.data_dir)]
        with self.log.open("ab") as out:
            return subprocess.Popen(
                [*command, "--port", "0", "--deterministic", "--threads", "1", *self.flags],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
            )

    def info(self) -> dict[str, Any]:
        return json.loads((self.data_dir / "server.json").read_text())

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.info()['url']}/api/v1/healthz", timeout=2) as answer:
                return answer.status == 200
        except (OSError, ValueError):
            return False

    def wait_ready(self) -> str:
        try:
            until(self.is_ready, self.ready_within_s, lambda: self.log.read_text(errors="replace")[-4000:])
        except AssertionError:
            self.kill()
            raise
        return self.info()["url"]

    def kill_worker(self) -> int:
        (pid,) = self.info()["worker_pids"].values()
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill_api(self) -> int:
        pid = self.info()["api_pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = self._start()
        self.url = self.wait_ready()


@contextlib.contextmanager
def running(data_dir: Path, *flags: str, ready_within_s: float = READY_WITHIN_S) -> Iterator[Service]:
    service = Service(data_dir, *flags, ready_within_s=ready_within_s)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.stop()


def until(condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = str) -> None:
    """Wait for `condition`; fail with `explain()` if it doesn't come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s\n{explain()}")
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False

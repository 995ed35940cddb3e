"""A `tinsmith serve` to be measured: started in processes of its own, with what they cost in CPU time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLL_S = 0.02
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class Server:
    """A `tinsmith serve` and its processes. seconds: from start to ready."""

    def __init__(self, data_dir: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "tinsmith", "serve", "--port", "0", "--data-dir", str(data_dir), *flags]
        started = time.perf_counter()
        with (data_dir.parent / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._data_dir = data_dir
        while not self._is_ready():
            if self._process.poll() is not None:
                raise SystemExit((data_dir.parent / "server.log").read_text()[-2000:])
            time.sleep(POLL_S)
        self.seconds = time.perf_counter() - started
        self.key = (data_dir / "admin.key").read_text().strip()
        self.data_dir = data_dir
        self.url: str = self._info()["url"]
        self.look()

    def look(self) -> None:
        """See which processes there are now: they are other ones after a restart."""
        info = self._info()
        self.api_pid: int = info["api_pid"]
        self.worker_pids: list[int] = list(info["worker_pids"].values())
        self.pids: list[int] = [self._process.pid, self.api_pid, *self.worker_pids]

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = json.loads((self._data_dir / "server.json").read_text())
        return info

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._info()['url']}/api/v1/healthz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):
            return False

    def memory_mib(self, kind: str) -> float:
        """Sum over the processes; `Rss` counts shared pages in each, `Pss` once."""
        total = 0
        for pid in self.pids:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(f"{kind}:"):
                    total += int(line.split()[1])
        return total / 1024

    def cpu_s(self, *pids: int) -> float:
        """CPU seconds of these processes so far; of all, if none is named."""
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids or self.pids]
        return sum(int(stat[11]) + int(stat[12]) for stat in stats) * TICK_S

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


@contextlib.contextmanager
def serving(data_dir: Path, *flags: str) -> Iterator[Server]:
    server = Server(data_dir, *flags)
    try:
        yield server
    finally:
        server.stop()

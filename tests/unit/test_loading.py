"""What is said while weights are read: lines in the log, bars on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console
from structlog.testing import capture_logs

from tinsmith.ipc.pulse import SERVING, percent_read
from tinsmith.serve.loading_bars import LoadingBars
from tinsmith.worker.loading import Loading

GB = 10**9
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(seconds: float, num_weights: int, stall_s: float = 0.0) -> list[str]:
    """Of the log, while that many weights are read one after another, and nothing for a while in the middle."""
    clock = Clock()
    with capture_logs() as said:
        loading = Loading("a/b", "0", clock)
        for number in range(1, num_weights + 1):
            clock.now += seconds / num_weights + (stall_s if number == num_weights // 2 else 0.0)
            loading.tell(number * GB, num_weights * GB)
    return [line["event"] for line in said]


def test_the_log_has_few_lines_however_long_it_takes() -> None:
    assert lines_of(4.0, 100) == []
    assert lines_of(21.0, 100) == [f"reading the base's weights: {share}%" for share in (24, 48, 72, 96)]
    assert lines_of(100.0, 1000) == [f"reading the base's weights: {10 * tenth}%" for tenth in range(1, 11)]
    assert len(lines_of(1200.0, 1000)) == 20, "of slow reading, one a minute"
    assert len(lines_of(50.0, 1000, stall_s=500.0)) <= 11


def test_the_pulse_tells_the_share_until_it_serves() -> None:
    loading = Loading("a/b", "0", Clock())
    assert percent_read(loading.sign()) == 0
    loading.tell(3 * GB, 8 * GB)
    assert percent_read(loading.sign()) == 37
    loading.is_done = True
    assert loading.sign() == SERVING


def console_on(stream: io.StringIO, *, is_terminal: bool) -> Console:
    return Console(file=stream, force_terminal=is_terminal, width=120, highlight=False, markup=False, color_system=None)


def drawn(stream: io.StringIO) -> list[str]:
    """The rows that were drawn since the last call."""
    text = ESCAPES.sub("", stream.getvalue()).replace("\r", "\n")
    stream.seek(0)
    stream.truncate()
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_a_terminal_has_a_bar_for_each_worker() -> None:
    stream = io.StringIO()
    with LoadingBars(console_on(stream, is_terminal=True), {"worker a/[b]": 16 * GB, "sampler c": 2 * GB}) as bars:
        bars.refresh()
        assert [row.split(":")[0] for row in drawn(stream)[-2:]] == ["worker a/[b]", "sampler c"]
        bars.show("worker a/[b]", 25, is_serving=False)
        bars.show("sampler c", 100, is_serving=False)
        bars.refresh()
        first, second = drawn(stream)[-2:]
        assert re.match(r"worker a/\[b\]: reading +━+╸? +4.0/16.0 GB", first), first
        assert re.match(r"sampler c: opening +━{40} 2.0/2.0 GB", second), second
        bars.show("sampler c", None, is_serving=True)
        bars.show("worker a/[b]", None, is_serving=False)  # it died, and begins again
        bars.refresh()
        first, second = drawn(stream)[-2:]
        assert first.startswith("worker a/[b]: starting")
        assert " 0.0/16.0 GB" in first
        assert second.startswith("sampler c: ready")


def test_elsewhere_there_is_none() -> None:
    stream = io.StringIO()
    with LoadingBars(console_on(stream, is_terminal=False), {"worker a": GB}) as bars:
        bars.show("worker a", 25, is_serving=False)
        bars.refresh()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_server_draws_its_bars_on_a_terminal_alone(tmp_path: Path, is_terminal: bool) -> None:
    reading, writing = pty.openpty() if is_terminal else os.pipe()
    command = [sys.executable, "-m", "tinsmith", "serve", "--data-dir", str(tmp_path / "data"), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--device", "fake"],
        stdout=subprocess.PIPE,
        stderr=writing,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        text=True,
    )
    os.close(writing)
    seen: list[bytes] = []
    reader = threading.Thread(target=drain, args=(reading, seen))
    reader.start()
    try:
        assert server.stdout is not None
        assert any(line.startswith("ready after") for line in server.stdout)
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
    finally:
        server.kill()
        server.wait()
        reader.join()
        os.close(reading)
    text = ESCAPES.sub("", b"".join(seen).decode(errors="replace"))
    assert ("worker tinsmith/tiny: starting" in text) == is_terminal


def drain(fd: int, seen: list[bytes]) -> None:
    """Until nobody writes any more; a terminal says that by an error."""
    with contextlib.suppress(OSError):
        while part := os.read(fd, 65536):
            seen.append(part)

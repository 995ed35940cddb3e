"""`tinsmith top`: rates and quantiles of two readings, a screen that fits, and a terminal that is left as it was."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tinsmith.cli import main as cli
from tinsmith.errors import ConfigError, ForbiddenError
from tinsmith.top import main as top_main
from tinsmith.top.reading import Reading, frame, parse
from tinsmith.top.view import Screen

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def text(trained: float, *, passes: float = 0, tenants: int = 2, waits: tuple[float, float] = (0, 0)) -> str:
    lines = [
        'tinsmith_info{version="1.2.3"} 1',
        f'tinsmith_tokens_total{{kind="trained"}} {trained}',
        f"tinsmith_pass_seconds_count {passes}",
        f"tinsmith_pass_seconds_sum {passes * 0.25}",
        f"tinsmith_pass_runs_count {passes}",
        f"tinsmith_pass_runs_sum {passes * 6}",
        f'tinsmith_queue_wait_seconds_bucket{{kind="sample",le="0.1"}} {waits[0]}',
        f'tinsmith_queue_wait_seconds_bucket{{kind="sample",le="1.0"}} {waits[1]}',
        f'tinsmith_queue_wait_seconds_bucket{{kind="sample",le="+Inf"}} {waits[1]}',
        'tinsmith_worker_ready{worker="0",base_model="tinsmith/tiny",role="all"} 1',
        'tinsmith_worker_ready{worker="0-sample",base_model="tinsmith/tiny",role="sample"} 0',
        f'tinsmith_worker_busy_seconds_total{{worker="0"}} {trained / 1000}',
        'tinsmith_kv_used_bytes{worker="0"} 3e8',
        'tinsmith_kv_free_bytes{worker="0"} 7e8',
        'tinsmith_process_memory_bytes{process="worker tinsmith/tiny"} 1073741824',
        'tinsmith_restarts_total{process="worker tinsmith/tiny"} 2',
        'tinsmith_disk_used_bytes{kind="database"} 5e6',
        "tinsmith_disk_free_bytes 6e10",
        'tinsmith_runs{status="ready"} 99',
        'tinsmith_runs{status="corrupted"} 1',
    ]
    for number in range(tenants):
        lines += [
            f'tinsmith_queue_depth{{tenant="tenant-{number}"}} {number}',
            f'tinsmith_queue_oldest_seconds{{tenant="tenant-{number}"}} {number * 10}',
            f'tinsmith_tenant_tokens_total{{tenant="tenant-{number}",kind="trained"}} {trained / tenants}',
        ]
    return "\n".join(lines) + "\n"


def run_of(number: int, tenant: str = "alice") -> dict[str, Any]:
    return {
        "run_id": f"s{number:024d}:train:{number}", "tenant": tenant, "base_model": "tinsmith/tiny",
        "status": "ready", "seq_id": 1234 + number, "snapshot_seq_id": -1, "waiting": number,
        "last_request_at": "2026-01-01T11:59:30+00:00",
    }  # fmt: skip


def lines_of(now: Reading, before: Reading, width: int = 80, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(Screen(frame(before, now), "http://127.0.0.1:8000", NOW, hint="  q quits"))
    return console.export_text().splitlines()


def test_rates_means_and_quantiles_are_of_what_happened_between() -> None:
    before = parse(text(1000, passes=10, waits=(100, 100)), 50.0)
    seen = frame(before, parse(text(1600, passes=14, waits=(104, 120)), 52.0))
    assert seen.tokens["trained"] == 300
    assert seen.passes == 2
    assert (seen.pass_s, seen.pass_runs, seen.pass_tenants) == (0.25, 6, None)
    assert seen.wait_s == 1.0
    assert seen.first_token_s is None
    assert seen.workers[0].busy == pytest.approx(0.3)
    assert (seen.num_runs, seen.num_corrupted, seen.waiting, seen.oldest_s) == (100, 1, 1, 10)
    assert [(line.name, line.is_ready, line.restarts) for line in seen.workers] == [
        ("sampler tinsmith/tiny", False, 0), ("worker tinsmith/tiny", True, 2),
    ][::-1]  # fmt: skip


def test_a_counter_that_began_anew_counts_from_zero() -> None:
    seen = frame(parse(text(5000), 1.0), parse(text(400), 2.0))
    assert seen.tokens["trained"] == 400


def test_what_is_beyond_the_last_bucket_is_said_so() -> None:
    later = text(1, waits=(0, 0)).replace('le="+Inf"} 0', 'le="+Inf"} 5')
    assert frame(parse(text(1), 1.0), parse(later, 2.0)).wait_s == math.inf


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 50), (60, 18)])
def test_the_screen_fits(width: int, height: int) -> None:
    runs = [run_of(number) for number in range(50)]
    before, now = parse(text(1e6, tenants=30), 1.0, runs), parse(text(4e9, passes=9, tenants=30), 2.0, runs)
    lines = lines_of(now, before, width, height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    shown = "\n".join(lines)
    assert "tenant-2" in shown
    assert ":train:0" in shown or width < 80
    if width == 80:
        assert "worker tinsmith/tiny" in shown
        assert len(lines) >= height - 2


def test_names_of_others_move_no_cursor() -> None:
    runs = [run_of(1, tenant="\x1b[2Jevil\x07[red]")]
    shown = "\n".join(lines_of(parse(text(1), 2.0, runs), parse(text(1), 1.0)))
    assert "\x1b" not in shown
    assert "?[2Jevil?[red]" in shown


class Stub(ThreadingHTTPServer):
    status = 200
    key = ""


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self.server.key = self.headers.get("X-API-Key", "")
        body = text(1).encode() if self.path == "/metrics" else json.dumps({"runs": [run_of(1)]}).encode()
        if self.server.status != 200:
            body = json.dumps({"detail": "this needs an admin key"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("TINKER_API_KEY", "tml-remote")
    server = Stub(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url_of(stub: Stub) -> str:
    return f"http://127.0.0.1:{stub.server_port}"


def failure(*args: str) -> BaseException | None:
    return CliRunner().invoke(cli.app, ["top", *args]).exception


@pytest.mark.parametrize("flags", [["--once"], []], ids=["once", "no terminal"])
def test_one_screen_of_a_server_elsewhere(stub: Stub, flags: list[str]) -> None:
    done = CliRunner().invoke(cli.app, ["top", "--url", url_of(stub), "--interval", "0.5", *flags])
    assert done.exit_code == 0
    assert "worker tinsmith/tiny" in done.stdout
    assert "\x1b" not in done.stdout
    assert stub.key == "tml-remote"


def test_what_is_wrong_is_said_with_its_cure(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.status = 403
    refused = failure("--url", url_of(stub))
    assert isinstance(refused, ForbiddenError)
    assert "administrator's key" in refused.message
    away = failure("--url", "http://127.0.0.1:9")
    assert isinstance(away, ConfigError)
    assert "no server answers at http://127.0.0.1:9" in away.message
    assert isinstance(failure("--interval", "0.1"), ConfigError)
    assert isinstance(failure("--url", "nonsense"), ConfigError)
    monkeypatch.delenv("TINKER_API_KEY")
    keyless = failure("--url", url_of(stub))
    assert isinstance(keyless, ConfigError)
    assert "TINKER_API_KEY" in keyless.message


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: who is started in the background may have SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_is_lost_where_it_is_raised_ends_it_all_the_same() -> None:
    with top_main._interrupts() as interrupted:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("end", ["q", "ctrl-c"])
def test_the_terminal_is_left_as_it_was(stub: Stub, end: str) -> None:
    keyboard, screen = pty.openpty()
    before = termios.tcgetattr(screen)
    command = [sys.executable, "-m", "tinsmith", "top", "--url", url_of(stub), "--interval", "0.5"]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    top = subprocess.Popen(command, stdin=screen, stdout=screen, stderr=screen, env=env, start_new_session=True)
    try:
        seen = _read_until(keyboard, b"q quits")
        stub.status = 503
        seen += _read_until(keyboard, b"trying again")
        if end == "q":
            os.write(keyboard, b"q")
        else:
            top.send_signal(signal.SIGINT)
        seen += _read_until(keyboard, b"\x1b[?1049l")
        assert top.wait(20) == 0
        assert b"\x1b[?1049h" in seen  # the alternate screen, and back from it
        assert b"Traceback" not in seen
        assert termios.tcgetattr(screen)[3] == before[3]
    finally:
        with contextlib.suppress(ProcessLookupError):
            top.kill()
        top.wait()
        os.close(keyboard)
        os.close(screen)


def _read_until(file: int, wanted: bytes, seconds: float = 60.0) -> bytes:
    seen = b""
    until = time.monotonic() + seconds
    while wanted not in seen:
        assert time.monotonic() < until, seen[-2000:]
        if select.select([file], [], [], 0.2)[0]:
            seen += os.read(file, 65536)
    return seen

"""The API as a process of its own: an inherited socket, a clean stop on SIGTERM, a successor on the same port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tinsmith.config import Settings
from tinsmith.store import open_store


def start(sock: socket.socket, settings: Settings, root: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "tinsmith.api", "--fd", str(sock.fileno()), "--bell", str(root / "api.sock")]
    argv += ["--worker-bell", f"tinsmith/tiny={root / 'worker.sock'}"]
    return subprocess.Popen(argv, env={**os.environ, **settings.as_env()}, pass_fds=[sock.fileno()])


def get(url: str, **headers: str) -> httpx.Response:
    """The socket listens before the process does, so a request may wait for its start."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return httpx.get(url, headers=headers, timeout=20)
        except httpx.ConnectError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_restart_keeps_the_port_and_readiness_is_the_workers(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    store = open_store(settings.data_dir)
    _, secret = store.tenants.create_key(store.tenants.create("a").tenant_id, "k")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/api/v1"
        for is_ready in (False, True):
            process = start(sock, settings, tmp_path)
            try:
                assert get(f"{url}/healthz").status_code == (200 if is_ready else 503)
                models = get(f"{url}/get_server_capabilities", **{"X-API-Key": secret}).json()["supported_models"]
                assert [model["model_name"] for model in models] == ["tinsmith/tiny"]
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
            store.workers.set_ready(store.workers.register("w", "tinsmith/tiny", 60.0, time.time()))
    store.close()


def test_a_base_that_is_no_model_is_said_so(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", base_model=(f"x={tmp_path}",))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        assert start(sock, settings, tmp_path).wait(20) == 2

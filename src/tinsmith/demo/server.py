"""A server for the demonstration: the one that TINKER_BASE_URL names, or one started for it and stopped afterwards."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tinsmith.config import client_address
from tinsmith.errors import ConfigError

READY_WITHIN_S = 120.0


@contextlib.contextmanager
def server() -> Iterator[tuple[str, str]]:
    """The URL and key to use.

    Raises:
        ConfigError: TINKER_BASE_URL is set without a key, or nothing answers there; the server doesn't get ready.
    """
    address = client_address()
    if address is None:
        with started_server() as address:
            yield address
        return
    if not address[1]:
        raise ConfigError("TINKER_BASE_URL is set, but TINKER_API_KEY is not: export the key that the server printed")
    try:
        with urllib.request.urlopen(f"{address[0]}/api/v1/healthz", timeout=10):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no server is ready at TINKER_BASE_URL={address[0]} ({error}): start it, or unset the variable"
        ) from None
    yield address


@contextlib.contextmanager
def started_server() -> Iterator[tuple[str, str]]:
    """`tinsmith serve` on a free port with a data directory of its own, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="tinsmith-demo-") as directory:
        data_dir = Path(directory) / "data"
        log = Path(directory) / "serve.log"
        command = [sys.executable, "-m", "tinsmith", "serve", "--port", "0", "--data-dir", str(data_dir)]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            url = _wait_until_ready(process, data_dir, log)
            yield url, (data_dir / "admin.key").read_text().strip()
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], data_dir: Path, log: Path) -> str:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConfigError(f"the server ended while starting:\n{log.read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(OSError, ValueError):
            url: str = json.loads((data_dir / "server.json").read_text())["url"]
            with urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=2) as answer:
                if answer.status == 200:
                    return url
        time.sleep(0.1)
    tail = log.read_text(errors="replace")[-2000:]
    raise ConfigError(f"the server was not ready within {READY_WITHIN_S:.0f} s:\n{tail}")

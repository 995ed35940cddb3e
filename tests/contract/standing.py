"""A house behind a live server, for the tests of a module: a fixture of their own would start one for each."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.contract.conftest import House
from tinsmith.api.main import make_server
from tinsmith.api.waiters import Waiters
from tinsmith.config import Settings


@contextmanager
def standing(root: Path, **settings: Any) -> Iterator[tuple[House, str]]:
    """(the house, where its server listens). A worker by hand is at work."""
    defaults: dict[str, Any] = {"data_dir": root / "data", "poll_hold_s": 0.5, "scan_interval_s": 0.05}
    with closing(House(root, Settings(**{**defaults, **settings}))) as house:
        house.make_worker().start()
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        server = make_server(replace(house.services, waiters=Waiters(None, 0.02)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="uvicorn")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield house, f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)

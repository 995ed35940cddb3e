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

from tests.contract.conftest import BASE, House
from tinsmith.api.main import make_server
from tinsmith.api.waiters import Waiters
from tinsmith.bases.layer_table import Layer, write_layers
from tinsmith.config import Settings

QUERY = "model.layers.0.self_attn.q_proj"
LAYERS = (
    Layer(QUERY, "attn", 6, 6, QUERY),
    Layer("model.layers.0.mlp.experts.w1", "mlp", 6, 4, "model.layers.0.mlp.experts.w1", 1, 3),
    Layer("model.layers.0.mlp.experts.w3", "mlp", 6, 4, "model.layers.0.mlp.experts.w1", 1, 3),
    Layer("model.layers.0.mlp.experts.w2", "mlp", 4, 6, "model.layers.0.mlp.experts.w2", 3, 1),
    Layer("lm_head", "unembed", 6, 50, "lm_head"),
)


@contextmanager
def standing(root: Path, **settings: Any) -> Iterator[tuple[House, str]]:
    """(the house, where its server listens). A worker by hand is at work."""
    defaults: dict[str, Any] = {"data_dir": root / "data", "poll_hold_s": 0.5, "scan_interval_s": 0.05}
    with closing(House(root, Settings(**{**defaults, **settings}))) as house:
        house.make_worker().start()
        write_layers(house.settings.data_dir, BASE, LAYERS)
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

"""For those who run the server: `/metrics` for Prometheus, and the runs that were busy last. Both name tenants, so they
are for administrators alone; `listening` answers without a key, on an address of its own.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import structlog
from litestar import Response, get
from msgspec import Struct

from tinsmith.api.paging import iso_time
from tinsmith.api.services import ServicesDep
from tinsmith.config import LOOPBACK
from tinsmith.errors import ConfigError
from tinsmith.observe.metrics import MEDIA

log = structlog.get_logger("tinsmith.api")

PATH = "/metrics"
MAX_RUNS = 50
TIMEOUT_S = 10.0


class RunSeen(Struct):
    """waiting: its queued requests. seq_id: the last that has arrived with all before it; snapshot_seq_id: the last
    that is covered by a snapshot, -1 for none."""

    run_id: str
    tenant: str
    base_model: str
    status: str
    seq_id: int
    snapshot_seq_id: int
    waiting: int
    last_request_at: str


class RunsSeen(Struct):
    runs: list[RunSeen]


@get(PATH, media_type="text/plain", include_in_schema=False)
async def get_metrics(services: ServicesDep) -> Response[bytes]:
    return Response(await services.work(services.watched.text), media_type=MEDIA)


@get("/admin/runs")
async def latest_runs(services: ServicesDep) -> RunsSeen:
    """The runs of all tenants that were asked for something last, at most 50, newest first."""
    rows = await services.work(services.store.overview.latest_runs, MAX_RUNS)
    return RunsSeen(
        runs=[
            RunSeen(
                run_id=row.run_id,
                tenant=row.tenant,
                base_model=row.base_model,
                status=row.status,
                seq_id=row.head_seq,
                snapshot_seq_id=row.snapshot_seq,
                waiting=row.num_waiting,
                last_request_at=iso_time(row.last_request_at),
            )
            for row in rows
        ]
    )


@contextmanager
def listening(address: str, text: Callable[[], bytes]) -> Iterator[None]:
    """Answer `GET /metrics` at HOST:PORT, without a key, for as long as the block runs. Empty: nowhere.

    Raises:
        ConfigError: the address is no HOST:PORT, or is taken.
    """
    if not address:
        yield
        return
    host, _, port = address.rpartition(":")
    try:
        server = _Server((host.strip("[]") or "127.0.0.1", int(port)), text)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--metrics-address {address}: {error}; name a free HOST:PORT") from None
    if server.server_address[0] not in LOOPBACK:
        log.warning("figures can be read without a key, by all who reach this address", address=address)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_port = True  # the next API process may listen before this one has ended

    def __init__(self, address: tuple[str, int], text: Callable[[], bytes]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)
        self.text = text


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = TIMEOUT_S  # of a client that says nothing

    def do_GET(self) -> None:
        is_found = self.path.partition("?")[0] == PATH
        body = self.server.text() if is_found else b"GET /metrics\n"
        self.send_response(200 if is_found else 404)
        self.send_header("Content-Type", MEDIA)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a scrape is no event."""

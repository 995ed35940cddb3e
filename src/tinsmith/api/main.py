"""The API process: settings to services, services to a server on a socket that is already bound.

Started by `serve` with an inherited socket, so that port 0 and restarts keep the port. SIGTERM and SIGINT end it
cleanly: open polls are answered at once with 408 (clients ask again, the next process answers), running requests are
finished.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import structlog
import uvicorn

from tinsmith import crashpoints, heap, lifeline, observe, series, tracing
from tinsmith.api.app import BUDGET, KEYS, build_app, with_edge
from tinsmith.api.connection import HEADER_BYTES, Connection, most_connections, raise_file_limit
from tinsmith.api.express import Express
from tinsmith.api.metrics import listening
from tinsmith.api.pieces import Pieces
from tinsmith.api.services import ServedBase, Services
from tinsmith.api.waiters import Waiters
from tinsmith.bases import describe, parse_all, tokenizer_files
from tinsmith.bell import Bell, Ringer
from tinsmith.blobs import Blobs
from tinsmith.config import Settings, metrics_dir
from tinsmith.datadir import DataDir
from tinsmith.errors import TinsmithError
from tinsmith.janitor import sweeping
from tinsmith.metrics import Counting
from tinsmith.signing import Signer
from tinsmith.store import Store, open_store
from tinsmith.tokenline import TokenLine, line_path

log = structlog.get_logger("tinsmith.api")

EXIT_UNUSABLE = 2
GRACE_S = 10
BACKLOG = 2048


class Server(uvicorn.Server):
    """Ends the long polls as soon as it is told to stop, so that stopping waits for none of them.

    A signal that was obeyed is not raised again, as uvicorn would: that ends the process before the store is closed.
    """

    def __init__(self, config: uvicorn.Config, waiters: Waiters) -> None:
        super().__init__(config)
        self._waiters = waiters

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._waiters.close()
        await super().shutdown(sockets)


def build_services(
    settings: Settings,
    store: Store,
    bell: Bell | None,
    worker_bells: Mapping[str, Sequence[Path]],
    line: TokenLine | None = None,
) -> Services:
    """What the routes work with, for the settings' bases.

    Args:
        bell: rung by workers when ops have ended; None: found out by scanning alone.
        worker_bells: by base model, the bells of its workers.
        line: on which workers tell of samples under way; None: answers are streamed once they are whole.

    Raises:
        ConfigError: a base's directory is missing or not a model's, or the signing secret can't be read or made.
    """
    bases: dict[str, ServedBase] = {}
    for ref in parse_all(settings.base_model):
        files = {file.name: file for file in tokenizer_files(ref.directory)}
        bases[ref.name] = ServedBase(info=describe(ref), tokenizer_files=files)
    return Services(
        settings=settings,
        store=store,
        blobs=Blobs(settings.data_dir / "blobs"),
        bases=bases,
        waiters=Waiters(bell, settings.scan_interval_s),
        ringers={base: [Ringer(path) for path in paths] for base, paths in worker_bells.items()},
        ready_bases=lambda: store.workers.ready_bases(time.time()),
        signer=Signer(DataDir(settings.data_dir).signing_secret()),
        pieces=Pieces(line),
    )


def make_server(services: Services) -> Server:
    """A uvicorn server over the services; run it with `run(sockets=[...])`."""
    app = build_app(services)
    express = Express(services, app.state[KEYS], app.state[BUDGET])
    config = uvicorn.Config(
        with_edge(app),
        host=services.settings.host,
        port=services.settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_S,
        lifespan="on",
        http=cast("type[asyncio.Protocol]", partial(Connection, express)),
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
        limit_concurrency=most_connections(),
    )
    return Server(config, services.waiters)


def serve_api(
    settings: Settings,
    sock: socket.socket | None,
    bell_path: Path,
    worker_bell_paths: Mapping[str, Sequence[Path]],
    counting: Counting,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        sock: bound and listening or not; None: bind `settings.host` and `settings.port`.
        bell_path: where this process listens for workers' rings.
        worker_bell_paths: by base model, where its workers listen.
        counting: what this process counts, begun.

    Raises:
        ConfigError: a base's directory is missing or not a model's, or the address for metrics can't be used.
    """
    store = open_store(settings.data_dir, synchronous=settings.sqlite_synchronous)
    try:
        with closing(Bell(bell_path)) as bell, closing(TokenLine(line_path(bell_path))) as line:
            services = replace(build_services(settings, store, bell, worker_bell_paths, line), counting=counting)
            try:
                server = make_server(services)
                heap.settle()
                listens = listening(settings.metrics_address, services.watched.text)
                with listens, sweeping(store, services.blobs, settings):
                    server.run(sockets=None if sock is None else [sock])
            finally:
                services.close()
                counting.flush()
    finally:
        store.close()


def main(argv: Sequence[str] | None = None) -> int:
    """0 after a clean stop, 2 if the settings or the data directory can't be used."""
    args = _arguments().parse_args(argv)
    settings = Settings.load()
    observe.configure(settings, process="api")
    counting = Counting(series.TABLE, "api", metrics_dir())
    counting.start()
    crashpoints.arm_from(settings.crash_point)
    raise_file_limit()
    if args.parent_fd is not None:
        lifeline.watch(args.parent_fd)
    sock = None if args.fd is None else socket.socket(fileno=args.fd)
    bells: dict[str, list[Path]] = {}
    for base, _, path in (text.rpartition("=") for text in args.worker_bell):
        bells.setdefault(base, []).append(Path(path))
    try:
        tracing.start(settings, "api")
        serve_api(settings, sock, args.bell, bells, counting)
    except TinsmithError as error:
        log.error("the API can't start", error=error.message)
        return EXIT_UNUSABLE
    finally:
        tracing.stop()
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tinsmith.api", description="The API process; `serve` starts it.")
    parser.add_argument("--fd", type=int, help="an inherited socket to listen on; without it host and port are bound")
    parser.add_argument("--bell", type=Path, required=True, help="socket file on which workers ring")
    parser.add_argument(
        "--worker-bell", action="append", default=[], metavar="BASE=PATH", help="a worker's socket file"
    )
    parser.add_argument("--parent-fd", type=int, help="pipe whose closing means that the parent has gone")
    return parser

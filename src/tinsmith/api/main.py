"""The API process: settings to services, services to a server on a socket that is already bound.

Started by `serve` with an inherited socket, so that port 0 and restarts keep the port. SIGTERM and SIGINT end it
cleanly: open polls are answered at once with 408 (clients ask again, the next process answers), running requests are
finished.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

import structlog
import uvicorn

from tinsmith import crashpoints
from tinsmith.api.app import BUDGET, KEYS, build_app, with_edge
from tinsmith.api.connection import HEADER_BYTES, Connection, most_connections, raise_file_limit
from tinsmith.api.crowd import Crowd
from tinsmith.api.express import Express
from tinsmith.api.handshake import Handshake, use_small_buffers
from tinsmith.api.metrics import listening
from tinsmith.api.pieces import Pieces
from tinsmith.api.services import ServedBase, Services
from tinsmith.api.unpolled import give_up_unpolled
from tinsmith.api.waiters import Waiters
from tinsmith.bases.catalog import describe, parse_all
from tinsmith.bases.tokenizer_files import directory_of, tokenizer_files
from tinsmith.config import Settings, metrics_dir
from tinsmith.errors import TinsmithError
from tinsmith.files.blobs import Blobs
from tinsmith.files.datadir import DataDir
from tinsmith.ipc import lifeline
from tinsmith.ipc.bell import Bell, Ringer
from tinsmith.ipc.heartbeat import Ear
from tinsmith.ipc.pulse import BEAT_S, STARTING, Pulse
from tinsmith.ipc.tokenline import TokenLine, line_path
from tinsmith.machine import heap
from tinsmith.observe import logs, series, tracing
from tinsmith.observe.metrics import Counting
from tinsmith.signing import Signer
from tinsmith.store import Store, open_store
from tinsmith.store.quota_rules import Prices
from tinsmith.tls import Certificate
from tinsmith.upkeep.janitor import sweeping

log = structlog.get_logger("tinsmith.api")

EXIT_UNUSABLE = 2
GRACE_S = 10
LINGER_S = 5.0  # longer than a client takes to ask again; less than GRACE_S
CERTIFICATE_LOOK_S = 10.0
REVOKED_LOOK_S = 0.5
BACKLOG = 2048
AT_ONCE = 32  # taken from it in one turn of the event loop, which has turned away what is too many a few turns later
BELIEVED = ("127.0.0.1", "::1", "::ffff:127.0.0.1")  # proxies, when they say for whom they ask


class Server(uvicorn.Server):
    """Ends the long polls as soon as it is told to stop, so that stopping waits for none of them.

    Told by SIGUSR1 that another process has taken over, it accepts nothing more, and answers what still comes on its
    open connections; each is closed with its next answer, or after `LINGER_S` without a request.

    A signal that was obeyed is not raised again, as uvicorn would: that ends the process before the store is closed.
    """

    def __init__(
        self, config: uvicorn.Config, services: Services, pulse: Pulse, certificate: Certificate | None = None
    ) -> None:
        super().__init__(config)
        self._services, self._waiters = services, services.waiters
        self._pulse = pulse
        self._certificate = certificate
        self._looking: asyncio.Task[None] | None = None
        self._is_relieved = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening_socket in (each for server in self.servers for each in server.sockets):
            with socket.socket(fileno=os.dup(listening_socket.fileno())) as duplicate:
                duplicate.listen(BACKLOG)  # asyncio takes as many in one turn as it was told may wait
        if self._certificate is not None:
            self._looking = asyncio.create_task(_keep_fresh(self._certificate), name="certificate")
        if not self.should_exit:
            self._beat(asyncio.get_running_loop())

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._pulse.beat()
        loop.call_later(BEAT_S, self._beat, loop)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_relief)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _linger(self) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection | Handshake):
                connection.linger(LINGER_S)

    def _on_relief(self, number: int, frame: FrameType | None) -> None:
        self._is_relieved = True
        self.handle_exit(number, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._waiters.close()
        if self._looking is not None:
            self._looking.cancel()
        if self._is_relieved:
            self._linger()
            asyncio.get_running_loop().call_later(0.1, self._linger)  # those that were just being accepted
        heeding = asyncio.create_task(_heed_revocations(self._services), name="revocations")
        try:
            await super().shutdown(sockets)
        finally:
            heeding.cancel()


async def _heed_revocations(services: Services) -> None:
    """Another process may serve by now, and be told; what goes on here with the same key ends too."""
    while True:
        for key_id in services.underway.key_ids():
            row = await services.work(services.store.tenants.key, key_id)
            is_rotated = row.successor_id is not None and (row.expires_at or 0.0) <= time.time()
            if row.revoked_at is not None or is_rotated:
                services.underway.revoked(key_id)
        await asyncio.sleep(REVOKED_LOOK_S)


async def _keep_fresh(certificate: Certificate) -> None:
    while True:
        await asyncio.sleep(CERTIFICATE_LOOK_S)
        await asyncio.to_thread(certificate.load_if_changed)


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
    shares_factors = settings.expert_adapters == "shared"
    for ref in parse_all(settings.base_model):
        info = describe(
            ref,
            shares_factors=shares_factors,
            max_context=settings.max_context_tokens,
            data_dir=settings.data_dir,
        )
        files = {file.name: file for file in tokenizer_files(directory_of(info))}
        bases[ref.name] = ServedBase(info=info, tokenizer_files=files)
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


def make_server(services: Services, pulse: Pulse | None = None) -> Server:
    """A uvicorn server over the services; run it with `run(sockets=[...])`. It beats on `pulse` while it serves."""
    app = build_app(services)
    settings = services.settings
    certificate = Certificate(Path(settings.tls_certificate), Path(settings.tls_key)) if settings.has_tls else None
    crowd = Crowd(most_connections())
    connect = partial(Connection, Express(services, app.state[KEYS], app.state[BUDGET]), crowd)
    protocol: Callable[..., asyncio.Protocol] = connect
    if certificate is not None:
        use_small_buffers()
        protocol = partial(Handshake, certificate.context, crowd, connect)
    config = uvicorn.Config(
        with_edge(app, is_tls=settings.has_tls),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=list(BELIEVED),
        backlog=AT_ONCE,
        timeout_graceful_shutdown=GRACE_S,
        lifespan="on",
        http=cast("type[asyncio.Protocol]", protocol),
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return Server(config, services, pulse or Pulse(None), certificate)


def serve_api(
    settings: Settings,
    sock: socket.socket | None,
    bell_path: Path,
    worker_bell_paths: Mapping[str, Sequence[Path]],
    counting: Counting,
    pulse: Pulse | None = None,
    heart_fd: int | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until SIGUSR1: then what comes on connections that are open is answered still.

    Args:
        sock: bound and listening or not; None: bind `settings.host` and `settings.port`.
        bell_path: where this process listens for workers' rings.
        worker_bell_paths: by base model, where its workers listen.
        counting: what this process counts, begun.
        heart_fd: where the supervisor shows that it lives (`ipc/heartbeat.py`); None: there is none.

    Raises:
        ConfigError: a base's directory is missing or not a model's, or the address for metrics can't be used.
    """
    store = open_store(settings.data_dir, synchronous=settings.sqlite_synchronous, prices=Prices.of_settings(settings))
    try:
        with closing(Bell(bell_path)) as bell, closing(TokenLine(line_path(bell_path))) as line:
            services = replace(
                build_services(settings, store, bell, worker_bell_paths, line),
                counting=counting,
                supervisor=Ear(heart_fd, settings.hang_timeout_s),
            )
            try:
                server = make_server(services, pulse)
                heap.settle()
                listens = listening(settings.metrics_address, services.watched.text)
                with listens, sweeping(store, services.blobs, settings, partial(_beside_the_janitor, services)):
                    server.run(sockets=None if sock is None else [sock])
            finally:
                services.close()
                counting.flush()
    finally:
        store.close()


def _beside_the_janitor(services: Services, now: float) -> None:
    services.disk.measure(services.store, services.blobs)
    give_up_unpolled(services, now)
    if services.supervisor.trouble is not None:
        log.error(services.supervisor.trouble)


def main(argv: Sequence[str] | None = None) -> int:
    """0 after a clean stop, 2 if the settings or the data directory can't be used."""
    args = _arguments().parse_args(argv)
    pulse = Pulse(args.pulse_fd)
    pulse.beat(STARTING)
    settings = Settings.load()
    logs.configure(settings, process="api")
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
        serve_api(settings, sock, args.bell, bells, counting, pulse, args.heart_fd)
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
    parser.add_argument("--pulse-fd", type=int, help="pipe on which this process shows that it lives")
    parser.add_argument("--heart-fd", type=int, help="file in which the parent shows that it lives")
    return parser

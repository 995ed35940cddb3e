"""The worker process: one base model, one engine, one loop. Started by `serve`, or alone on the same data directory."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from tinsmith import crashpoints
from tinsmith.bases.catalog import BaseRef, describe, parse
from tinsmith.bases.layer_table import write_layers
from tinsmith.bases.weight_table import write_weights
from tinsmith.config import Settings, metrics_dir
from tinsmith.engine import Engine
from tinsmith.errors import CapacityError, FencedError, TinsmithError, UserError
from tinsmith.files.blobs import Blobs
from tinsmith.ipc import lifeline
from tinsmith.ipc.bell import Bell, Ringer
from tinsmith.ipc.pulse import Pulse
from tinsmith.ipc.tokenline import TokenSender, line_path
from tinsmith.machine import heap
from tinsmith.observe import logs, series, tracing
from tinsmith.observe.metrics import Counting
from tinsmith.store import Store, open_store
from tinsmith.store.quota_rules import Prices
from tinsmith.store.rows import WorkerId
from tinsmith.types import BaseInfo, Role
from tinsmith.worker.busy import Busy
from tinsmith.worker.loading import Loading
from tinsmith.worker.loop import Worker
from tinsmith.worker.slim import leave_out_unused
from tinsmith.worker.watchdog import Watchdog, watch

log = structlog.get_logger("tinsmith.worker")

OOM_SCORE = Path("/proc/self/oom_score_adj")  # Linux: the kernel's own choice of whom to kill is moved by this
EXIT_FENCED = 75
EXIT_UNUSABLE = 2
EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one base model until SIGTERM.

    Returns:
        0 after a clean stop, 2 if the base or the settings can't be used, 75 if fenced off; 1 for what may be better at
        the next start, such as a full disk.
    """
    args = _arguments().parse_args(argv)
    settings = Settings.load()
    logs.configure(settings, process=f"worker {args.slot}")
    counting = Counting(series.TABLE, f"worker-{args.slot}", metrics_dir())
    counting.start()
    if args.parent_fd is not None:
        lifeline.watch(args.parent_fd)
    with contextlib.suppress(OSError):
        OOM_SCORE.write_text("500")  # what it loses is computed again: it goes before the API and `serve` do
    base = parse(args.base)
    stop = threading.Event()
    own_bell = Ringer(args.bell)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end(*_: object) -> None:
        stop.set()
        own_bell.ring()

    signal.signal(signal.SIGTERM, end)
    store = open_store(settings.data_dir, synchronous=settings.sqlite_synchronous, prices=Prices.of_settings(settings))
    try:
        tracing.start(settings, f"worker {args.slot}")
        with Bell(args.bell) as bell:
            line = TokenSender(line_path(args.api_bell))
            api, pulse = Ringer(args.api_bell), Pulse(args.pulse_fd)
            _serve(args.slot, Role(args.role), base, settings, store, bell, api, own_bell, line, pulse, stop)
    except FencedError as error:
        log.error("another worker took over", slot=args.slot, error=error.message)
        return EXIT_FENCED
    except UserError as error:
        log.error("the worker can't start", base=base.name, error=error.message)
        return EXIT_UNUSABLE
    except TinsmithError as error:
        log.error("the worker ends, to be started again", base=base.name, error=error.message)
        return EXIT_FAILED
    finally:
        counting.flush()
        tracing.stop()
        store.close()
    return 0


def _serve(
    slot: str,
    role: Role,
    base: BaseRef,
    settings: Settings,
    store: Store,
    bell: Bell,
    api: Ringer,
    own_bell: Ringer,
    line: TokenSender,
    pulse: Pulse,
    stop: threading.Event,
) -> None:
    busy, watchdog = Busy(), Watchdog(settings.pass_timeout_s)
    has_ended, loading = threading.Event(), Loading(base.name, slot)
    watch(watchdog, pulse, has_ended, loading.sign)
    me = store.workers.register(slot, base.name, settings.lease_s, time.time(), role)
    renewing = threading.Thread(
        target=_renew, args=(store, me, settings.lease_s, busy, stop), name="lease", daemon=True
    )
    renewing.start()
    started = time.monotonic()
    info = describe(base, max_context=settings.max_context_tokens, data_dir=settings.data_dir)
    engine = make_engine(info, settings, role, loading.tell)
    crashpoints.arm_from(settings.crash_point)  # its checks of its own programs pass such points too
    write_layers(settings.data_dir, base.name, engine.layers)
    if settings.full_fine_tuning:
        write_weights(settings.data_dir, base.name, engine.full_weights)
    heap.settle()
    store.workers.set_ready(me)
    loading.is_done = True
    pulse.beat(loading.sign())  # at once: one that is stopped now would count as loading
    api.ring()
    log.info("worker ready", base=base.name, seconds=round(time.monotonic() - started, 2))
    blobs = Blobs(settings.data_dir / "blobs")
    worker = Worker(me, store, blobs, engine, settings, bell, api, own_bell.ring, line, role, busy, watchdog)
    run_until(worker, me, store, stop)
    store.workers.deregister(me)


def run_until(worker: Worker, me: WorkerId, store: Store, stop: threading.Event) -> None:
    """Work until `stop` is set. Where a full disk or a busy database ends it, no request is to blame: they are queued
    as if untried.

    Raises: as `Worker.run`.
    """
    try:
        worker.run(stop)
    except CapacityError:
        with contextlib.suppress(TinsmithError):
            store.workers.deregister(me, is_untried=True)
        raise


def make_engine(
    info: BaseInfo, settings: Settings, role: Role = Role.ALL, progress: Callable[[int, int], None] | None = None
) -> Engine:
    """The engine of the settings' device; one that never trains measures no passes.

    progress: is told bytes of weights that were read, and all of them.

    Imported here: torch takes seconds to load, and the worker takes over its dead predecessor's place before that.
    """
    name, module = ("FakeEngine", "fake_engine") if settings.device == "fake" else ("TorchEngine", "torch_engine")
    leave_out_unused(settings.device)
    with heap.undisturbed():
        made = getattr(importlib.import_module(f"tinsmith.{module}"), name)
    if settings.device == "fake":
        fake: Engine = made(info, settings.pass_max_tokens)
        return fake
    engine: Engine = made(info, settings, trains=role is not Role.SAMPLE, progress=progress)
    return engine


def _renew(store: Store, me: WorkerId, lease_s: float, busy: Busy, stop: threading.Event) -> None:
    """Keep the lease while the loop is inside a long pass; end the process at once if it is lost."""
    while not stop.wait(lease_s / 3):
        try:
            store.workers.renew(me, lease_s, time.time(), busy.seconds)
        except FencedError as error:
            log.error("lease lost", slot=me.slot, error=error.message)
            os._exit(EXIT_FENCED)
        except TinsmithError as error:
            log.error("the lease can't be renewed; trying again", slot=me.slot, error=error.message)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tinsmith.worker", description=__doc__)
    parser.add_argument("--base", required=True, help="NAME=PATH of the base model to serve")
    parser.add_argument("--slot", required=True, help="this worker's lasting name; a new process under it takes over")
    parser.add_argument(
        "--role", choices=[*Role], default=Role.ALL, help="what this worker does of what the base is for"
    )
    parser.add_argument("--bell", required=True, type=Path, help="socket on which this worker is woken")
    parser.add_argument("--api-bell", required=True, type=Path, help="socket of the API process")
    parser.add_argument("--parent-fd", type=int, default=None, help="pipe that closes when the parent is gone")
    parser.add_argument("--pulse-fd", type=int, default=None, help="pipe on which this process shows that it lives")
    return parser

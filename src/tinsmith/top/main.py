"""The loop of `tinsmith top`: read, draw, wait for a key. Leaves the terminal as it found it."""

from __future__ import annotations

import select
import signal
import sys
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from tinsmith.cli.client import Client, connect
from tinsmith.config import Settings, client_key
from tinsmith.errors import ConfigError, ForbiddenError, TinsmithError
from tinsmith.files.datadir import DataDir
from tinsmith.top.reading import Reading, frame, parse
from tinsmith.top.view import Screen

MIN_INTERVAL_S = 0.5
WINDOW_S = 3.0  # rates are over so long
NEEDS_ADMIN = "tinsmith top shows all tenants, so it needs an administrator's key: export one as TINKER_API_KEY"


def top_command(
    url: Annotated[
        str | None, typer.Option("--url", help="A server elsewhere; its administrator's key in TINKER_API_KEY.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one screen and end, as without a terminal.")] = False,
    interval: Annotated[float, typer.Option("--interval", help="Seconds between two readings.")] = 1.0,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="The running server's data directory. TINSMITH_DATA_DIR")
    ] = None,
) -> None:
    """Watch a server: tokens a second, passes, queue, workers, tenants, runs, disk. q or Ctrl-C ends it."""
    if interval < MIN_INTERVAL_S:
        raise ConfigError(f"--interval must be {MIN_INTERVAL_S:g} or more, not {interval:g}")
    client = _client(url, data_dir)
    console = Console(highlight=False)
    before = read(client)
    if once or not console.is_terminal:
        time.sleep(interval)
        console.print(Screen(frame(before, read(client)), client.url, datetime.now(UTC)))
        return
    _watch(client, console, before, interval)


def read(client: Client) -> Reading:
    """Raises: TinsmithError: the server is away, or the key is none of an administrator."""
    try:
        text = client.text("/metrics")
        runs = client.call("GET", "/admin/runs")["runs"]
        return parse(text, time.monotonic(), runs)
    except ForbiddenError:
        raise ForbiddenError(NEEDS_ADMIN) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{client.url} did not answer as a tinsmith server of this version does ({error})") from None


def _watch(client: Client, console: Console, before: Reading, interval: float) -> None:
    readings = deque([before], maxlen=max(2, round(WINDOW_S / interval) + 1))
    seen = frame(before, before)
    trouble = ""
    hint = "  q quits"
    with _interrupts() as interrupted, _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(Screen(seen, client.url, datetime.now(UTC), hint=hint), refresh=True)
        try:
            while not _is_over(keys, interval) and not interrupted.is_set():
                try:
                    readings.append(read(client))
                    seen, trouble = frame(readings[0], readings[-1]), ""
                except TinsmithError:
                    trouble = "no answer: trying again"
                live.update(Screen(seen, client.url, datetime.now(UTC), trouble, hint), refresh=True)
        except KeyboardInterrupt:
            return


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C, which is raised as well: what is raised while a finalizer runs is lost."""
    interrupted = threading.Event()

    def interrupt(number: int, at: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _is_over(keys: int | None, seconds: float) -> bool:
    """Wait so long, or until q is pressed."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if keys is None:
            time.sleep(left)
        elif select.select([keys], [], [], left)[0]:
            pressed = sys.stdin.read(1)
            if pressed in ("q", "Q", "\x1b", ""):
                return True
    return False


@contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal's file, giving keys as they are pressed; None if nobody can press any."""
    if not sys.stdin.isatty():
        yield None
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _client(url: str | None, data_dir: Path | None) -> Client:
    if url is None:
        return connect(DataDir(Settings.load(data_dir=data_dir).data_dir))
    key = client_key()
    if not key:
        raise ConfigError(f"--url needs a key: {NEEDS_ADMIN}")
    return Client(url, key)

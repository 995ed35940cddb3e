"""Bars of bytes for long work on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def byte_bars(console: Console, *, is_shown: bool = True) -> Progress:
    """Bars that are gone when the work is done; none where the console is no terminal."""
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (is_shown and console.is_terminal), transient=True)


@contextmanager
def byte_bar(what: str, *, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal's error stream, to be told bytes done and bytes in all; none where that is no terminal."""
    with byte_bars(Console(stderr=True), is_shown=is_shown) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)

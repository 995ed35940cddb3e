"""A frame as lines of a terminal, within its width and height."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tinsmith.top.reading import Frame, TenantLine, WorkerLine

BAR_CELLS = 8
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
FIXED_LINES = 8  # the head and the rules
MOST_WORKERS = 4
MOST_TENANTS = 6
MAX_NAME = 20
SESSION_CHARS = 9


class Screen:
    """What rich draws. trouble: said in place of the time, if not empty."""

    def __init__(self, seen: Frame, url: str, now: datetime, trouble: str = "", hint: str = "") -> None:
        self._seen, self._url, self._now, self._trouble, self._hint = seen, url, now, trouble, hint

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seen, height = self._seen, options.height or console.height
        num_workers = min(MOST_WORKERS, len(seen.workers))
        left = max(4, height - FIXED_LINES - num_workers - 2)
        num_tenants = min(MOST_TENANTS, len(seen.tenants), max(1, left // 2))
        num_runs = max(1, left - num_tenants - 2)
        yield self._head(options.max_width)
        yield _figures(seen)
        yield Rule(style="dim")
        yield _workers(seen.workers, num_workers)
        yield _disk(seen)
        yield Rule(style="dim")
        yield _tenants(seen.tenants, num_tenants)
        yield Rule(style="dim")
        yield _runs(seen, num_runs, self._now)

    def _head(self, width: int) -> Text:
        end = self._trouble or f"{self._now:%H:%M:%S}{self._hint}"
        begin = f"tinsmith {_clean(self._seen.version)}  {_clean(self._url)}"
        lost = f"{self._seen.num_corrupted} corrupted  " if self._seen.num_corrupted else ""
        room = max(0, width - len(end) - len(lost) - 2)
        line = Text(begin[:room].ljust(room + 2), style="bold")
        line.append(lost, style="bold red")
        line.append(end, style="bold red" if self._trouble else "dim")
        return line


def _figures(seen: Frame) -> Group:
    tokens = "  ".join(f"{kind} {_number(rate)}" for kind, rate in seen.tokens.items())
    passes = "none"
    if seen.pass_runs is not None:
        passes = (
            f"{_number(seen.passes)}/s  runs {_number(seen.pass_runs)}  tenants {_number(seen.pass_tenants)}  "
            f"tokens {_number(seen.pass_tokens)}  each {_seconds(seen.pass_s)}"
        )
    queue = f"{seen.waiting} wait, oldest {_seconds(seen.oldest_s)}  {seen.running} run  {seen.num_polls} polls"
    rates = f"requests {_number(seen.ops)}/s  refused {_number(seen.refused)}/s"
    slow = f"wait {_seconds(seen.wait_s)}  first token {_seconds(seen.first_token_s)}  HTTP {_seconds(seen.http_s)}"
    return Group(
        _line("tokens/s", tokens), _line("passes", passes), _line("queue", f"{queue}  {rates}"), _line("p95", slow)
    )


def _line(name: str, text: str) -> Text:
    return Text.assemble((name.ljust(10), "cyan"), text, no_wrap=True, overflow="ellipsis")


def _table(*columns: str) -> Table:
    """The first column grows, the others are as wide as what is in them and stand to the right."""
    table = Table.grid(padding=(0, 2), expand=True)
    for index, name in enumerate(columns):
        table.add_column(
            name,
            ratio=1 if not index else None,
            justify="right" if index else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    table.add_row(*(Text(name, style="dim") for name in columns))
    return table


def _workers(lines: Sequence[WorkerLine], most: int) -> Table:
    table = _table("WORKER", "", "BUSY", "MEMORY", "RUNS", "SAMPLES", "KV", "DIED")
    for line in lines[:most]:
        state = Text("ready", style="green") if line.is_ready else Text("away", style="bold red")
        kv = "-"
        if line.kv_total:
            share = line.kv_used / line.kv_total
            full = round(share * BAR_CELLS)
            kv = f"{'█' * full}{'░' * (BAR_CELLS - full)} {share:4.0%}"
        table.add_row(
            _clean(line.name), state, "-" if line.busy is None else f"{line.busy:.0%}", _bytes(line.memory_bytes),
            str(line.num_runs), str(line.num_samples), kv, _alarming(line.restarts),
        )  # fmt: skip
    return table


def _disk(seen: Frame) -> Text:
    used = "  ".join(
        f"{_clean(kind)} {_bytes(size)}" for kind, size in sorted(seen.disk.items(), key=lambda item: -item[1])
    )
    api = f"api {_bytes(seen.memory.get('api', 0))}"
    return _line("disk", f"{_bytes(seen.disk_free)} free  {used}  snapshots {_bytes(seen.snapshot_bytes)}  {api}")


def _tenants(lines: Sequence[TenantLine], most: int) -> Table:
    table = _table("TENANT", "WAITING", "OLDEST", "WAITED", "TRAINED/S", "SAMPLED/S")
    for line in lines[:most]:
        table.add_row(
            _clean(line.name, MAX_NAME), str(line.waiting), _seconds(line.oldest_s if line.waiting else None),
            _seconds(line.wait_s), _number(line.trained), _number(line.sampled),
        )  # fmt: skip
    return table


def _runs(seen: Frame, most: int, now: datetime) -> Table:
    table = _table(f"RUN ({seen.num_runs})", "TENANT", "STATUS", "SEQ", "ON DISK", "WAITING", "LAST")
    for run in seen.runs[:most]:
        table.add_row(*_run(run, now))
    return table


def _run(run: Mapping[str, Any], now: datetime) -> tuple[Text, ...]:
    status = str(run["status"])
    ago = (now - datetime.fromisoformat(run["last_request_at"]).astimezone(UTC)).total_seconds()
    style = {"ready": "green", "corrupted": "bold red"}.get(status, "")
    snapshot = int(run["snapshot_seq_id"])
    cells = (
        str(int(run["seq_id"])), str(snapshot) if snapshot >= 0 else "-", str(int(run["waiting"])),
        _seconds(max(0.0, ago)),
    )  # fmt: skip
    session, _, number = str(run["run_id"]).partition(":")
    run_id = _clean(f"{_clean(session, SESSION_CHARS)}:{number}" if number else session)
    return run_id, _clean(run["tenant"], MAX_NAME), Text(_clean(status).plain, style=style), *map(Text, cells)


def _clean(name: object, most: int = 200) -> Text:
    """What others chose, as one line of a terminal: nothing in it moves the cursor or colours the screen."""
    shown = "".join(char if char.isprintable() else "?" for char in str(name)[: most + 1])
    return Text(shown if len(shown) <= most else f"{shown[: most - 1]}…")


def _alarming(count: int) -> Text:
    return Text(str(count), style="yellow" if count else "")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 1e6:
        return f"{value / 1e6:.1f} M"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _bytes(size: float) -> str:
    power, value = 0, float(size)
    while value >= 999.5 and power < len(UNITS) - 1:
        power, value = power + 1, value / 1024
    return f"{value:.0f} {UNITS[power]}" if value >= 10 or not power else f"{value:.1f} {UNITS[power]}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds == math.inf:
        return "> 5 min"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

"""Traces through both processes: what a request waited for and with whom it was computed, as spans of OpenTelemetry.

Off unless a collector is named, and then free of cost: the library is an extra (`tinsmith[otel]`) that only `otel`
imports. A request's place in its trace goes with its row (`carry`), so that the worker's spans hang below the API's
and a restart loses none of them. Spans bear ids and counts, never prompts or keys.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

from tinsmith.config import Settings
from tinsmith.errors import ConfigError
from tinsmith.store.rows import OpRow

META = "traceparent"  # in an op's meta, as W3C Trace Context writes it
PLACE: ContextVar[str | None] = ContextVar("traceparent", default=None)  # of the request under way, if it is traced
UNASKED = (
    "healthz",
    "retrieve_future",
    "retrieve_futures",
    "session_heartbeat",
    "telemetry",
    "metrics",
    "dynamic_config",
)


class Asked(Protocol):
    """A request that is traced."""

    def answered(self, status: int, route: str, tenant: str) -> None: ...

    def handed_on(self) -> None:
        """Others answer it, below a span of their own: this one is not kept."""


class Spans(Protocol):
    """See `otel.Spans`. Times are unix seconds."""

    def request(self, method: str, path: str, traceparent: str, request_id: str) -> AbstractContextManager[Asked]: ...

    def op(self, op: OpRow, outcome: str, code: str, now: float) -> None: ...

    def computed(self, ops: Sequence[OpRow], began_at: float, ended_at: float, counts: Mapping[str, int]) -> None: ...

    def snapshot(self, run_id: str, tenant_id: str, began_at: float, ended_at: float, num_bytes: int) -> None: ...

    def stop(self) -> None: ...


_OFF: AbstractContextManager[None] = nullcontext()
_spans: Spans | None = None


def start(settings: Settings, process: str, exporter: Any = None) -> None:
    """Trace from now on, if a collector is named. `exporter`: where spans go in its place.

    Raises:
        ConfigError: what this needs is not installed.
    """
    global _spans  # noqa: PLW0603 - one for the process, as loggers are
    if not settings.otlp_endpoint and exporter is None:
        return
    try:
        otel = importlib.import_module("tinsmith.observe.otel")
    except ModuleNotFoundError as error:
        raise ConfigError(f"--otlp-endpoint needs {error.name}: pip install 'tinsmith[otel]'") from None
    _spans = otel.Spans(settings, process, exporter)


def stop() -> None:
    """Send what is left, and trace no more."""
    global _spans  # noqa: PLW0603
    if _spans is not None:
        _spans.stop()
        _spans = None


def request(method: str, path: str, traceparent: bytes, request_id: str) -> AbstractContextManager[Asked | None]:
    """Around an HTTP request's answer. Polls and heartbeats are traced only where the client asks for it."""
    if _spans is None or (not traceparent and path.endswith(UNASKED)):
        return _OFF
    return _spans.request(method, path, traceparent.decode("latin-1"), request_id)


def carry(meta: dict[str, Any]) -> dict[str, Any]:
    """An op's meta with the place of the request under way in its trace."""
    place = PLACE.get()
    return meta if place is None else {**meta, META: place}


def op(row: OpRow, outcome: str, code: str, now: float) -> None:
    """A request came to its end: what it waited, and what it was computed."""
    if _spans is not None and META in row.meta:
        _spans.op(row, outcome, code, now)


def computed(ops: Sequence[OpRow], began_at: float, ended_at: float, counts: Mapping[str, int]) -> None:
    """These shared a pass."""
    if _spans is not None:
        traced = [row for row in ops if META in row.meta]
        if traced:
            _spans.computed(traced, began_at, ended_at, counts)


def snapshot(run_id: str, tenant_id: str, began_at: float, ended_at: float, num_bytes: int) -> None:
    """A run's state was written."""
    if _spans is not None:
        _spans.snapshot(run_id, tenant_id, began_at, ended_at, num_bytes)

"""Logging: structlog and the standard library's loggers in one stream, as JSON lines or as text.

Set up by one call of `configure`, never on import. No secret leaves through here: values under telling names and
anything that looks like a key are masked before a line is rendered.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Protocol

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from tinsmith.config import Settings

MASK = "***"
SECRET_NAMES = frozenset(
    {"api_key", "x-api-key", "authorization", "secret", "password", "token", "jwt", "key", "cookie", "set-cookie"}
)
SECRET_VALUES = re.compile(r"\b(tml-|hf_)[A-Za-z0-9_-]{8,}|\bBearer\s+\S{8,}|\beyJ[\w-]+\.[\w-]+\.[\w-]*")
QUIET = {"httpx": logging.WARNING, "PIL": logging.WARNING, "alembic": logging.WARNING, "uvicorn": logging.WARNING}


class LogStream(Protocol):
    """Where lines go: what a logging handler and a renderer ask of a stream."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...


def configure(settings: Settings, process: str, stream: LogStream | None = None) -> None:
    """Send all logs of this process to `stream` (stderr by default), each line marked with `process`."""
    out: LogStream = sys.stderr if stream is None else stream
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_rendering(settings, process, out),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name, least in QUIET.items():
        logging.getLogger(name).setLevel(max(level, least))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def log_format(settings: Settings, stream: LogStream) -> str:
    """json or text: `auto` is text on a terminal."""
    if settings.log_format != "auto":
        return settings.log_format
    return "text" if stream.isatty() else "json"


def redact(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """A structlog processor that masks secrets by the name they stand under and by their look."""
    return {name: _masked(name, value) for name, value in event.items()}


def _masked(name: str, value: object) -> object:
    if name.lower() in SECRET_NAMES and value is not None:
        return MASK
    if isinstance(value, str):
        return SECRET_VALUES.sub(_mask_match, value)
    if isinstance(value, Mapping):
        return {inner: _masked(str(inner), v) for inner, v in value.items()}
    if isinstance(value, list | tuple):
        return [_masked("", v) for v in value]
    return value


def _mask_match(found: re.Match[str]) -> str:
    return f"{found.group(1) or ''}{MASK}"


def _rendering(settings: Settings, process: str, out: LogStream) -> list[Processor]:
    def mark(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return {**event, "process": process}

    if log_format(settings, out) == "json":
        return [mark, structlog.processors.format_exc_info, redact, structlog.processors.JSONRenderer()]
    return [
        structlog.processors.format_exc_info,
        redact,
        structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback),
    ]

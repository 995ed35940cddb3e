"""A setting as a field of the table, and as text: what a flag is called, what an environment variable holds."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

from tinsmith.errors import ConfigError

ENV_PREFIX = "TINSMITH_"


def setting(default: Any, help: str, *, unit: str = "", group: str = "server") -> Any:
    """A field of `Settings`; `unit` is shown in help and docs."""
    return field(default=default, metadata={"help": help, "unit": unit, "group": group})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def parse(name: str, kind: Any, raw: str) -> Any:
    """Raises: ConfigError: it is no value of that kind."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[raw.strip().lower()]
        if kind is int:
            return int(raw)
        if kind is float:
            return float(raw)
        if kind is Path:
            return Path(raw)
        if kind is str:
            return raw
        return tuple(part.strip() for part in raw.split(",") if part.strip())
    except (ValueError, KeyError):
        raise ConfigError(f"{ENV_PREFIX}{name.upper()}={raw!r} is not a {getattr(kind, '__name__', 'list')}") from None


def absolute(path: str) -> str:
    """The path as it is meant from here; empty stays empty."""
    return str(Path(path).expanduser().absolute()) if path else ""

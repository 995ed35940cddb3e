"""Command-line flags from the settings table: one typer option a setting, in a help panel a group.

The table is the only source of names, types, defaults and help; a flag that is not given stays None, so that the
environment and then the default decide.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from tinsmith.config import Settings, env_name


def with_settings(command: Callable[[Settings], Any]) -> Callable[..., Any]:
    """A typer command with a flag for each setting, from one that takes `Settings`."""
    types = get_type_hints(Settings)
    parameters = [_parameter(f, types[f.name]) for f in fields(Settings)]

    def run(**flags: Any) -> Any:
        given: dict[str, Any] = {n: tuple(v) or None if isinstance(v, list) else v for n, v in flags.items()}
        return command(Settings.load(**given))

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def show_default(f: Field[Any]) -> str:
    """A setting's default as help and docs print it."""
    default = f.default
    if isinstance(default, tuple):
        return ", ".join(default) or "none"
    if isinstance(default, bool):
        return "true" if default else "false"
    if isinstance(default, float) and default.is_integer():
        return str(int(default))
    return str(default) if default != "" else "none"


def flag_of(f: Field[Any]) -> str:
    return "--" + f.name.replace("_", "-")


def _parameter(f: Field[Any], kind: Any) -> inspect.Parameter:
    flag = flag_of(f)
    names = (flag, flag.replace("--", "--no-", 1)) if kind is bool else (flag,)
    unit = f.metadata["unit"]
    option = typer.Option(
        "/".join(names),
        help=f.metadata["help"] + (f" [dim]({unit})[/dim]" if unit else "") + f" [dim]{env_name(f)}[/dim]",
        show_default=show_default(f),
        rich_help_panel=f.metadata["group"].capitalize(),
    )
    shape: Any = list[str] | None if kind not in (bool, int, float, str, Path) else kind | None
    return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[shape, option])

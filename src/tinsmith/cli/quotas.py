"""`tinsmith admin`: quotas of a running server. Parses and prints; the server does the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tinsmith.cli.client import connect
from tinsmith.config import Settings
from tinsmith.errors import ConfigError, NotFoundError
from tinsmith.files.datadir import DataDir
from tinsmith.store.quota_rules import MEANINGS, Quota

SUFFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

admin = typer.Typer(help="Rule the tenants of a running server: quotas and weights.", no_args_is_help=True)

DataDirFlag = Annotated[
    Path | None, typer.Option("--data-dir", help="The running server's data directory. TINSMITH_DATA_DIR")
]


@admin.command("quotas")
def list_quotas(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant.")] = None, data_dir: DataDirFlag = None
) -> None:
    """List what tenants use, and the quotas that bound it."""
    client = connect(DataDir(Settings.load(data_dir=data_dir).data_dir))
    scopes = client.call("GET", "/admin/quotas")["scopes"]
    chosen = [scope for scope in scopes if tenant in (None, scope["tenant"])]
    if tenant is not None and not chosen:
        raise NotFoundError(f"no tenant is called {tenant!r}; `tinsmith admin quotas` lists all")
    _show(chosen)


@admin.command("set-quota", epilog="Quotas: " + "; ".join(f"{quota} ({MEANINGS[quota]})" for quota in Quota))
def set_quota(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.")],
    quotas: Annotated[
        list[str], typer.Argument(help="NAME=AMOUNT, such as tokens_per_day=5M; NAME=none takes it away.")
    ],
    key: Annotated[str | None, typer.Option("--key", help="Of this key of the tenant alone, by its id.")] = None,
    data_dir: DataDirFlag = None,
) -> None:
    """Set quotas of a tenant, or of one of its keys. Whoever is over one waits; nothing that was accepted fails."""
    body = {"tenant": tenant, "key_id": key, "quotas": dict(_parse(text) for text in quotas)}
    client = connect(DataDir(Settings.load(data_dir=data_dir).data_dir))
    _show(client.call("PUT", "/admin/quotas", body)["scopes"])


def _parse(text: str) -> tuple[str, float | None]:
    name, is_there, amount = text.partition("=")
    if not is_there or name not in list(Quota):
        raise ConfigError(f"{text!r}: write NAME=AMOUNT, where NAME is one of {', '.join(Quota)}")
    if amount == "none":
        return name, None
    suffix = amount[-1:] if amount[-1:] in SUFFIXES else ""
    try:
        number = float(amount.removesuffix(suffix).replace("_", "")) * SUFFIXES[suffix]
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ConfigError(f"{text!r}: an amount is a number of 0 or more, such as 500k, 5M or 2.5G, or none")
    return name, number


def _show(scopes: Sequence[dict[str, Any]]) -> None:
    table = Table("tenant", "key", "quota")
    table.add_column("used", justify="right", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    for scope in scopes:
        whose = (scope["tenant"], "" if scope["key_id"] is None else f"{scope['key_id']} ({scope['key_name']})")
        for quota in scope["quotas"]:
            limit = "" if quota["limit"] is None else _number(quota["quota"], quota["limit"])
            table.add_row(*whose, quota["quota"], _number(quota["quota"], quota["used"]), limit)
    Console(markup=False, emoji=False).print(table)


def _number(quota: str, amount: float) -> str:
    return f"{amount:,.2f}" if quota == Quota.USD_PER_MONTH else f"{amount:,.0f}"


@admin.command("weight")
def set_weight(
    tenant: Annotated[str, typer.Argument(help="The tenant's name, from `tinsmith keys list`.")],
    weight: Annotated[float, typer.Argument(help="Between 0.01 and 100; every tenant has 1 at first.")],
    data_dir: DataDirFlag = None,
) -> None:
    """Set how much of the engine a tenant gets while others want it too: with 2, twice what one with 1 gets."""
    client = connect(DataDir(Settings.load(data_dir=data_dir).data_dir))
    made = client.call("POST", "/admin/weights", {"tenant": tenant, "weight": weight})
    typer.echo(f"{made['tenant']} has the weight {made['weight']:g}")


@admin.command("weights")
def list_weights(data_dir: DataDirFlag = None) -> None:
    """List the weights of all tenants."""
    table = Table("tenant", "weight")
    client = connect(DataDir(Settings.load(data_dir=data_dir).data_dir))
    for row in client.call("GET", "/admin/weights")["weights"]:
        table.add_row(row["tenant"], f"{row['weight']:g}")
    Console(markup=False, emoji=False).print(table)

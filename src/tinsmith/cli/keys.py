"""`tinsmith keys`: make, list, rotate and revoke keys of a running server, through its HTTP API."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tinsmith.cli.client import Client, connect
from tinsmith.config import Settings
from tinsmith.errors import ConfigError, NotFoundError
from tinsmith.files.datadir import DataDir
from tinsmith.scopes import Scope

keys = typer.Typer(help="Make, list, rotate and revoke keys of a running server.", no_args_is_help=True)

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
DURATION = re.compile(r"(\d{1,9})([smhd]?)")

DataDirFlag = Annotated[
    Path | None, typer.Option("--data-dir", help="The running server's data directory. TINSMITH_DATA_DIR")
]
KeyId = Annotated[str, typer.Argument(help="The key's id, from `tinsmith keys list`.")]
ExpiresFlag = Annotated[
    str | None, typer.Option("--expires", help="It works for so long: 90d, 12h, 30m or 60s. Without it, until revoked.")
]


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option("--name", help="Whose key it is; shown in lists.")],
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", help="The tenant it belongs to, made if new; by default called as the key."),
    ] = None,
    scope: Annotated[
        Scope | None,
        typer.Option(
            "--scope",
            help="What it is for: read (look), sample (and sample), full (and train, save, share, delete), admin (and "
            "manage keys). Default: full.",
        ),
    ] = None,
    expires: ExpiresFlag = None,
    admin: Annotated[bool, typer.Option("--admin", help="The same as --scope admin.")] = False,
    data_dir: DataDirFlag = None,
) -> None:
    """Make a key. Its secret is printed now and never again."""
    for flag, value in (("--name", name), ("--tenant", tenant)):
        if value is not None and not value.strip():
            raise ConfigError(f"{flag} must not be empty")
    if admin and scope not in (None, Scope.ADMIN):
        raise ConfigError(f"--admin and --scope {scope} contradict each other: give one of them")
    chosen = Scope.ADMIN if admin else scope or Scope.FULL
    body = {"name": name, "tenant": tenant or name, "scope": chosen.value, **_expiring(expires)}
    key = _client(data_dir).call("POST", "/admin/keys", body)
    _show_once(key)


@keys.command("list")
def list_keys(data_dir: DataDirFlag = None) -> None:
    """List all keys, those that don't work any more too. Secrets are not kept."""
    table = Table()
    table.add_column("id", no_wrap=True, min_width=17)
    for column in ("name", "tenant", "scope"):
        table.add_column(column)
    for column in ("created", "expires", "revoked"):
        table.add_column(column, no_wrap=True)
    for key in _client(data_dir).call("GET", "/admin/keys")["keys"]:
        cells = (key["key_id"], key["name"], key["tenant"], key["scope"])
        times = (_day_and_time(key.get(f"{what}_at") or "") for what in ("created", "expires", "revoked"))
        table.add_row(*cells, *times)
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200  # for a program that reads it: nothing is cut
    console.print(table)


@keys.command("rotate")
def rotate_key(
    key_id: KeyId,
    grace: Annotated[
        str, typer.Option("--grace", help="For how long it works beside its successor; 0 ends it.")
    ] = "1d",
    expires: ExpiresFlag = None,
    data_dir: DataDirFlag = None,
) -> None:
    """Make a successor of a key, of the same tenant, name and scope. Its secret is printed now and never again.

    The server's own key in DATA_DIR/admin.key is replaced there.
    """
    body = {"grace_s": _seconds("--grace", grace), **_expiring(expires)}
    client = _client(data_dir)
    held = _held(data_dir, client)
    key = _call(client, "POST", key_id, "/rotate", body)
    if held is not None and held[1] == key_id:
        held[0].write_admin_key(key["secret"])
    _show_once(key)


@keys.command("revoke")
def revoke_key(key_id: KeyId, data_dir: DataDirFlag = None) -> None:
    """Revoke a key: it stops working at once, with all tokens and links that were made with it."""
    key = _call(_client(data_dir), "DELETE", key_id)
    typer.echo(f"revoked {key['key_id']} ({key['name']})")


def _call(client: Client, method: str, key_id: str, verb: str = "", body: Any = None) -> Any:
    try:
        return client.call(method, f"/admin/keys/{urllib.parse.quote(key_id, safe='')}{verb}", body)
    except NotFoundError as error:
        raise NotFoundError(f"{error.message}; `tinsmith keys list` shows the ids of all keys") from None


def _held(data_dir: Path | None, client: Client) -> tuple[DataDir, str] | None:
    """The running server's data directory and the id of the key in its admin.key, if that is what the client uses."""
    found = DataDir(Settings.load(data_dir=data_dir).data_dir)
    if found.info() is None or found.admin_key() is None:
        return None
    return found, client.call("GET", "/auth/apikey/me")["note"]


def _show_once(key: dict[str, Any]) -> None:
    typer.echo(key["secret"])
    Console(stderr=True, highlight=False, markup=False).print(
        f"key {key['key_id']} for tenant {key['tenant']}; it is not shown again"
    )


def _expiring(expires: str | None) -> dict[str, int]:
    if expires is None:
        return {}
    seconds = _seconds("--expires", expires)
    if not seconds:
        raise ConfigError("--expires must be longer than 0")
    return {"expires_s": seconds}


def _seconds(flag: str, text: str) -> int:
    """Raises: ConfigError: no duration."""
    found = DURATION.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{flag} is a number of seconds, or one with s, m, h or d behind it, not {text!r}")
    return int(found[1]) * UNITS_S[found[2] or "s"]


def _day_and_time(iso: str) -> str:
    """ "2026-01-31 12:34" of an ISO time in UTC."""
    return iso[:16].replace("T", " ")


def _client(data_dir: Path | None) -> Client:
    return connect(DataDir(Settings.load(data_dir=data_dir).data_dir))

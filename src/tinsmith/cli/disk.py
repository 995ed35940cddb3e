"""`tinsmith disk`: what a data directory takes, by kind and by tenant. Parses and prints."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tinsmith.errors import ConfigError
from tinsmith.files.blobs import Blobs
from tinsmith.store import DATABASE_FILE, open_as_it_is
from tinsmith.upkeep.disk_use import KINDS, measure, size

BLOBS = "blobs"
MOST_TENANTS = 20  # in the table, those with the most


def disk_command(
    data_dir: Annotated[Path, typer.Argument(help="A data directory.", metavar="DATA_DIR")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print bytes as JSON, for programs.", show_default=False)
    ] = False,
) -> None:
    """Show what a data directory takes on its disk, by kind and by tenant; the server may be running."""
    if not (data_dir / DATABASE_FILE).is_file():
        raise ConfigError(f"{data_dir} is no data directory: it has no {DATABASE_FILE}")
    with closing(open_as_it_is(data_dir / DATABASE_FILE)) as store:
        use = measure(data_dir, store, Blobs(data_dir / BLOBS))
        names = store.files.tenant_names()
    tenants = {names.get(tenant_id, tenant_id): found for tenant_id, found in use.bytes_by_tenant.items() if tenant_id}
    if as_json:
        totals = {"total": use.total_bytes, "free": use.free_bytes, "tenants": tenants}
        typer.echo(json.dumps({**use.bytes_by_kind, **totals}, indent=2))
        return
    table = Table("what")
    table.add_column("on disk", justify="right", no_wrap=True)
    for kind in KINDS:
        table.add_row(kind, size(use.bytes_by_kind[kind]))
    table.add_section()
    for name, found in sorted(tenants.items(), key=lambda item: -item[1])[:MOST_TENANTS]:
        table.add_row(f"tenant {name}", size(found))
    table.add_section()
    table.add_row("all of it", size(use.total_bytes))
    table.add_row("free on this disk", size(use.free_bytes))
    Console(markup=False, emoji=False).print(table)

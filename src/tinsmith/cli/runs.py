"""`tinsmith runs`: what an owner does to training runs by hand. Parses and prints; the server does the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from tinsmith.cli.client import server_of
from tinsmith.errors import ConfigError

RUN_ID = re.compile(r"[\w:-]+", re.ASCII)

runs = typer.Typer(help="Your training runs.", no_args_is_help=True)


@runs.callback()
def all_runs() -> None:
    """Your training runs."""


@runs.command("delete")
def delete_run(
    run_id: Annotated[str, typer.Argument(help="The run's id, as `tinker run list` shows it.", metavar="RUN_ID")],
    with_checkpoints: Annotated[
        bool, typer.Option("--with-checkpoints", help="Delete its checkpoints with it.", show_default=False)
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="The running server's data directory. TINSMITH_DATA_DIR")
    ] = None,
) -> None:
    """Delete a training run whose requests have ended: its state and its log go, for good.

    It is a run of the tenant of TINKER_API_KEY on the server in TINKER_BASE_URL, else of the administrator's on this
    machine. Refused while it has checkpoints, unless they are to be deleted with it.
    """
    if not RUN_ID.fullmatch(run_id):
        raise ConfigError(f"{run_id!r} is no id of a run: give one such as s1234:train:0")
    query = "?with_checkpoints=true" if with_checkpoints else ""
    server_of(data_dir).call("DELETE", f"/training_runs/{run_id}{query}")
    typer.echo(f"{run_id}: deleted")

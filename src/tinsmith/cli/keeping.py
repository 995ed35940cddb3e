"""`tinsmith verify`, `backup` and `restore`: what an operator does to a data directory as a whole.

Parses and prints; the work is done in `verify` and `backup`.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tinsmith.cli.byte_bar import byte_bar
from tinsmith.errors import ConfigError
from tinsmith.files.blobs import Blobs
from tinsmith.files.datadir import DataDir
from tinsmith.store import DATABASE_FILE, open_as_it_is
from tinsmith.upkeep import backup as copies
from tinsmith.upkeep.verify import Report, verify

MOST_SHOWN = 100

Place = Annotated[Path, typer.Argument(help="A data directory.", metavar="DATA_DIR")]


def verify_command(
    data_dir: Place,
    is_repairing: Annotated[
        bool, typer.Option("--repair", help="Mend what can be; the server must be stopped.", show_default=False)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for programs.", show_default=False)
    ] = False,
) -> None:
    """Check every row and file of a data directory against one another; the server may be running.

    Ends with 0 if all is sound, with 1 if something is damaged or missing.
    """
    if not (data_dir / DATABASE_FILE).is_file():
        raise ConfigError(f"{data_dir} is no data directory: it has no {DATABASE_FILE}")
    with ExitStack() as stack:
        if is_repairing:
            stack.enter_context(DataDir(data_dir).locked(data_dir))
        store = stack.enter_context(closing(open_as_it_is(data_dir / DATABASE_FILE)))
        progress = stack.enter_context(byte_bar("checking", is_shown=not as_json))
        report = verify(store, Blobs(data_dir / copies.BLOBS), is_repairing=is_repairing, progress=progress)
    if as_json:
        typer.echo(json.dumps({"is_sound": report.is_sound, **asdict(report)}, indent=2))
    else:
        _show(report)
    raise typer.Exit(0 if report.is_sound else 1)


def backup_command(
    data_dir: Place,
    target: Annotated[
        Path, typer.Argument(help="A new directory, or an earlier backup to bring up to date.", metavar="BACKUP")
    ],
) -> None:
    """Copy a data directory as it is at one moment, while the server runs or not.

    Every row and every new file is checked on the way; over an earlier backup only new files are copied. Ends with 0 if
    all is sound, with 1 if something at the source is damaged: it is named, and all else is in the backup.
    """
    with byte_bar("copying") as progress:
        copied = copies.back_up(data_dir, target, progress)
    typer.echo(f"{target}: {copied.num_files} files, {_size(copied.num_bytes)}, {copied.num_new} of them new")
    _tell_damage(copied, data_dir)
    if copied.damaged_rows:
        typer.echo(f"damaged rows are in {target} as they are: keep an earlier backup until they are mended", err=True)
    raise typer.Exit(0 if copied.is_whole else 1)


def restore_command(
    backup: Annotated[Path, typer.Argument(help="What `tinsmith backup` made.", metavar="BACKUP")],
    data_dir: Annotated[Path, typer.Argument(help="A new or empty directory.", metavar="DATA_DIR")],
    is_leaving_out_damaged: Annotated[
        bool,
        typer.Option("--leave-out-damaged", help="Restore what is whole, and name what is not.", show_default=False),
    ] = False,
) -> None:
    """Make a data directory from a backup, every row and file checked on the way.

    A damaged backup is refused; with --leave-out-damaged all that is whole comes back, and it ends with 1.
    """
    with byte_bar("restoring") as progress:
        copied = copies.restore(backup, data_dir, progress, is_leaving_out_damaged=is_leaving_out_damaged)
    typer.echo(
        f"{data_dir}: {copied.num_files} files, {_size(copied.num_bytes)}; "
        f"start it with `tinsmith serve --data-dir {data_dir}`"
    )
    _tell_damage(copied, data_dir)
    raise typer.Exit(0 if copied.is_whole else 1)


def _tell_damage(copied: copies.Copied, cured_in: Path) -> None:
    """On the error stream, with the cure."""
    troubles = [*copied.damaged, *copied.damaged_rows]
    for trouble in troubles[:MOST_SHOWN]:
        typer.echo(f"damaged: {trouble}", err=True)
    if len(troubles) > MOST_SHOWN:
        typer.echo(f"and {len(troubles) - MOST_SHOWN} more", err=True)
    if troubles:
        typer.echo(f"`tinsmith verify {cured_in}` says what to do about each", err=True)


def _show(report: Report) -> None:
    console = Console(markup=False, emoji=False)  # `:train:` in a run's id is no picture of a train
    if report.findings:
        table = Table("what", "trouble", "what to do")
        for finding in report.findings[:MOST_SHOWN]:
            table.add_row(finding.owner, finding.problem, "repaired" if finding.is_repaired else finding.cure)
        console.print(table)
        if len(report.findings) > MOST_SHOWN:
            console.print(f"and {len(report.findings) - MOST_SHOWN} more: --json shows all")
    for run_id, at in report.replaced[:MOST_SHOWN]:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
        console.print(f"{run_id}: a damaged snapshot was replaced, last {when}; look at the disk", highlight=False)
    if report.is_cut_short:
        console.print("the database lacks what files are held against: none was read, and nothing was repaired")
    if report.num_unchecked:
        console.print(
            f"{report.num_unchecked} payloads and results in rows were written before those had checksums: "
            "they can't be checked",
            highlight=False,
        )
    if report.num_unchecked_rows:
        console.print(
            f"{report.num_unchecked_rows} requests and runs were written before what else stands in their rows had "
            "checksums: only what can't be is seen there",
            highlight=False,
        )
    done = "removed" if report.removed else "--repair removes them"
    if report.leftovers:
        size = _size(sum(file.size for file in report.leftovers))
        console.print(f"{len(report.leftovers)} files that nothing names, {size}: {done}", highlight=False)
    verdict = "all is sound" if report.is_sound else f"{len(report.findings)} troubles"
    console.print(f"{report.num_files} files, {_size(report.num_bytes)}: {verdict}", highlight=False)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"

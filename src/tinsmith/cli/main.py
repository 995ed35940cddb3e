"""The command line: `serve` and its relatives, and thin clients of the HTTP API.

Parses, prints and chooses the exit code (0; 1 for a failure; 2 for a mistake in the call or the settings); what is
done is done elsewhere. Loads neither torch nor the HTTP framework.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tinsmith import __version__
from tinsmith.cli import doctor
from tinsmith.cli.disk import disk_command
from tinsmith.cli.export import export_command
from tinsmith.cli.flags import with_settings
from tinsmith.cli.importing import import_command
from tinsmith.cli.keeping import backup_command, restore_command, verify_command
from tinsmith.cli.keys import keys
from tinsmith.cli.quotas import admin
from tinsmith.cli.runs import runs
from tinsmith.config import Settings
from tinsmith.errors import ConfigError, TinsmithError
from tinsmith.files.datadir import DataDir
from tinsmith.serve.main import serve
from tinsmith.store import open_store
from tinsmith.top.main import top_command

app = typer.Typer(
    name="tinsmith",
    help="A self-hosted post-training service that speaks the Tinker API.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(keys, name="keys")
app.add_typer(admin, name="admin")
app.add_typer(runs, name="runs")


def main() -> int:
    """Run the command line; the process's exit status. A typed error becomes one line."""
    try:
        return int(app(standalone_mode=True) or 0)
    except ConfigError as error:
        return _fail(error, 2)
    except TinsmithError as error:
        return _fail(error, 1)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tinsmith {__version__}")
        raise typer.Exit


@app.callback()
def tinsmith(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """A self-hosted post-training service that speaks the Tinker API."""


def _serve(settings: Settings) -> None:
    """Start the server: the API and one worker for each base model, restarted when they die, until Ctrl-C."""
    raise typer.Exit(serve(settings))


def _doctor(settings: Settings) -> None:
    """Check this machine for the settings given, and say what to do about each trouble."""
    console = Console(soft_wrap=False, emoji=False)
    with console.status("checking"):
        checks = doctor.examine(settings)
    console.print(doctor.table(checks))
    for check in checks:
        if check.cure:
            console.print(f"{check.name}: {check.cure}", markup=False, highlight=False)
    raise typer.Exit(1 if any(check.level is doctor.Level.FAIL for check in checks) else 0)


def _migrate(settings: Settings) -> None:
    """Bring the database of a data directory to this version's schema; `serve` does so by itself."""
    data_dir = DataDir(settings.data_dir)
    data_dir.make()
    with contextlib.closing(open_store(data_dir.path, synchronous=settings.sqlite_synchronous)):
        typer.echo(f"{data_dir.path}: the database is up to date")


app.command("serve")(with_settings(_serve))
app.command("doctor")(with_settings(_doctor))
app.command("migrate")(with_settings(_migrate))
app.command("verify")(verify_command)
app.command("disk")(disk_command)
app.command("backup")(backup_command)
app.command("restore")(restore_command)
app.command("export")(export_command)
app.command("import")(import_command)
app.command("top")(top_command)


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the curves go.")] = Path("curves"),
) -> None:
    """Train the shipped model through the official SDK, live: six fine-tunes at once, then reinforcement learning."""
    raise typer.Exit(_demo_main()(out))


@app.command("version")
def version() -> None:
    """Print the version."""
    typer.echo(f"tinsmith {__version__}")


def _demo_main() -> Callable[[Path], Any]:
    try:
        return importlib.import_module("tinsmith.demo.main").main  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise ConfigError(f"the demonstration needs {error.name}: pip install 'tinsmith[demo]'") from None


def _fail(error: TinsmithError, status: int) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    return status

"""Brings a database to the schema of this version, before anybody reads it.

Alembic does the work, without an ini file: its logging stays as the program has set it up. A lock file keeps two
processes that start together from both doing it; the whole upgrade is one transaction.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from tinsmith.crashpoints import crash_point
from tinsmith.errors import ConfigError
from tinsmith.files.private import opener
from tinsmith.store.database import Database

SCRIPTS = Path(__file__).parent / "migrations"


def upgrade(database: Database, lock_file: Path) -> None:
    """Raises: ConfigError: the database is of a newer version."""
    config, scripts = _scripts()
    with _locked(lock_file), database.write() as conn:
        current = MigrationContext.configure(conn).get_current_revision()
        if current == scripts.get_current_head():
            return
        if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
            raise ConfigError(f"the database is of a newer tinsmith (schema {current}); upgrade tinsmith")
        config.attributes["connection"] = conn
        command.upgrade(config, "head")
        crash_point("migrate.before_commit")
    crash_point("migrate.after_commit")


def check_schema(database: Database) -> None:
    """Raises: ConfigError: the database is of another version than this one."""
    with database.read() as conn:
        current = MigrationContext.configure(conn).get_current_revision()
    _, scripts = _scripts()
    if current != scripts.get_current_head():
        is_known = current is None or current in {script.revision for script in scripts.walk_revisions()}
        cure = "run `tinsmith migrate` first" if is_known else "upgrade tinsmith"
        raise ConfigError(f"the database is of another tinsmith (schema {current or 'none'}): {cure}")


def _scripts() -> tuple[Config, ScriptDirectory]:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    return config, ScriptDirectory.from_config(config)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab", opener=opener) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

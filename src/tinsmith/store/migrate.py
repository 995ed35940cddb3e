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

from tinsmith.errors import ConfigError
from tinsmith.store.database import Database

SCRIPTS = Path(__file__).parent / "migrations"


def upgrade(database: Database, lock_file: Path) -> None:
    """Raises: ConfigError: the database is of a newer version."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with _locked(lock_file), database.write() as conn:
        current = MigrationContext.configure(conn).get_current_revision()
        if current == scripts.get_current_head():
            return
        if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
            raise ConfigError(f"the database is of a newer tinsmith (schema {current}); upgrade tinsmith")
        config.attributes["connection"] = conn
        command.upgrade(config, "head")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

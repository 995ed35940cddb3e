"""The store: the only code that speaks SQL, and the truth about every request.

`open_store` makes or upgrades the database and hands out one object a noun. Callers see frozen rows (rows.py) and typed
errors; transactions, connections and statements stay inside. Any method may be called from any thread, and several
processes may have the same store open. A method that takes a tenant answers another tenant's object like one that
doesn't exist.
"""

from __future__ import annotations

import os
from pathlib import Path

from tinsmith.errors import ConfigError
from tinsmith.store.audit import Audit
from tinsmith.store.burdens import Burdens
from tinsmith.store.checkpoints import Checkpoints
from tinsmith.store.copies import Copies
from tinsmith.store.database import CURE, Database, damage, errors_by_name
from tinsmith.store.endings import Endings
from tinsmith.store.figures import Overview
from tinsmith.store.files import Files
from tinsmith.store.gone import GoneRuns
from tinsmith.store.imports import Imports
from tinsmith.store.ledger import Ledger
from tinsmith.store.loads import Loads
from tinsmith.store.losses import Losses
from tinsmith.store.mends import Mends
from tinsmith.store.migrate import check_schema, upgrade
from tinsmith.store.ops import Ops
from tinsmith.store.places import Places
from tinsmith.store.quota_rules import FREE, Prices
from tinsmith.store.quotas import Quotas
from tinsmith.store.replays import Replays
from tinsmith.store.routes import RecordedRoutes
from tinsmith.store.runs import Runs
from tinsmith.store.samplers import Samplers
from tinsmith.store.session_search import SessionSearch
from tinsmith.store.sessions import Sessions
from tinsmith.store.silence import Silence
from tinsmith.store.tenants import Tenants
from tinsmith.store.traces import Traces
from tinsmith.store.upkeep import Upkeep
from tinsmith.store.waiting import Waiting
from tinsmith.store.weights import Weights
from tinsmith.store.workers import Workers

DATABASE_FILE = "tinsmith.db"
FILES = "blobs"  # of the data directory: where the files lie that rows name


class Store:
    def __init__(self, database: Database, prices: Prices = FREE) -> None:
        self._database = database
        self.quotas = Quotas(database, prices)
        self.tenants = Tenants(database)
        self.sessions = Sessions(database)
        self.routes = RecordedRoutes(database)
        self.runs = Runs(database)
        self.gone = GoneRuns(database)
        self.ops = Ops(database, self.quotas)
        self.loads = Loads(database)
        self.replays = Replays(database)
        self.mends = Mends(database)
        self.waiting = Waiting(database)
        self.weights = Weights(database)
        self.endings = Endings(database)
        self.places = Places(database)
        self.files = Files(database)
        self.checkpoints = Checkpoints(database)
        self.copies = Copies(database)
        self.imports = Imports(database, self.quotas)
        self.samplers = Samplers(database)
        self.losses = Losses(database)
        self.workers = Workers(database)
        self.burdens = Burdens(database)
        self.ledger = Ledger(database)
        self.audit = Audit(database)
        self.session_search = SessionSearch(database)
        self.traces = Traces(database)
        self.silence = Silence(database)
        self.upkeep = Upkeep(database)
        self.overview = Overview(database)

    def close(self) -> None:
        """Close all connections. Calls made afterwards raise RuntimeError."""
        self._database.close()


def open_store(data_dir: Path, *, synchronous: str = "FULL", prices: Prices = FREE) -> Store:
    """The store in `data_dir`, which is made if it is missing; its database is brought to the newest schema first.
    `prices`: of tokens, for quotas of money.

    Raises:
        ConfigError: another value of `synchronous` than FULL and NORMAL, or the database is of a newer tinsmith, or it
            is lost: a new one would know none of the files that are there, and they would be taken for leftovers.
        CorruptError: the file is no database, or can't be read or written.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / DATABASE_FILE
    _refuse_lost(path)
    database = Database(path, synchronous=synchronous)
    with errors_by_name():
        upgrade(database, path.with_suffix(".lock"))
    return Store(database, prices)


def open_as_it_is(path: Path) -> Store:
    """The store of a database file that is there and of this version: nothing is made or upgraded.

    Raises:
        ConfigError: there's no such file, or it is of another version.
        CorruptError: the file is no database, or can't be read.
    """
    if not path.is_file():
        raise ConfigError(f"there is no database {path}")
    _refuse_lost(path)
    database = Database(path)
    with errors_by_name():
        check_schema(database)
    return Store(database)


def _refuse_lost(path: Path) -> None:
    """Raises: ConfigError: there are files, and no database that names them."""
    is_there = any(file.is_file() and file.stat().st_size for file in (path, path.with_name(f"{path.name}-wal")))
    if not is_there and any(names for _, _, names in os.walk(path.parent / FILES)):
        raise ConfigError(
            f"{path} is missing or empty, and {path.parent / FILES} holds files that it named: put the database back, "
            "or restore a backup into another directory; to begin anew, name another directory or move the files away"
        )


__all__ = ["CURE", "DATABASE_FILE", "FILES", "Store", "damage", "open_as_it_is", "open_store"]

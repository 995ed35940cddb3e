"""Checkpoints that came from elsewhere: a run that holds them, in a session that has ended, all in one transaction.

Their file is on disk before. The run is one that can't be trained, as that of a copy; who goes on makes one from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import bindparam, select

from tinsmith.errors import UserError
from tinsmith.store.audit import note
from tinsmith.store.checkpoints import put_checkpoint
from tinsmith.store.copies import open_ended, put_untrainable
from tinsmith.store.database import Database
from tinsmith.store.gone import require_there
from tinsmith.store.quotas import Quotas
from tinsmith.store.rows import NewCheckpoint, NewRun, Principal
from tinsmith.store.schema import runs

IMPORTED = "imported"  # finish_reason of a session that was made for an import
DIGEST = "imported_sha256"  # in the metadata of the run: of what was sent

_RUN = select(runs.c.user_metadata).where(
    runs.c.run_id == bindparam("run_id"), runs.c.tenant_id == bindparam("tenant_id")
)


@dataclass(frozen=True, slots=True)
class NewImport:
    """run: the run to be made, with `DIGEST` in its metadata. checkpoints: of that run."""

    run: NewRun
    checkpoints: Sequence[NewCheckpoint]
    by: Principal
    project_id: str | None = None


class Imports:
    def __init__(self, database: Database, quotas: Quotas) -> None:
        self._database = database
        self._quotas = quotas

    def create(self, new: NewImport, now: float, *, most_sessions: int | None = None) -> bool:
        """Whether it was made now; False: an equal request made it before, and the file that came now isn't needed.

        most_sessions: as for `Copies.create`.

        Raises:
            CapacityError: too many sessions were opened lately.
            UserError: something else has been imported under this key.
            GoneError: what was imported under it before was let go.
            QuotaError: there is no room for it in a quota of the tenant or the key.
        """
        run = new.run
        with self._database.write() as conn:
            values = {"run_id": run.spec.run_id, "tenant_id": run.tenant_id}
            there = conn.execute(_RUN, values).first()
            if there is not None:
                require_there(conn, run.spec.run_id)
                if there.user_metadata.get(DIGEST) != run.user_metadata[DIGEST]:
                    raise UserError("this X-Idempotency-Key has been used for something else: take a new one")
                return False
            self._quotas.require_storage(new.by, sum(each.size_bytes for each in new.checkpoints), now, conn)
            open_ended(conn, run.session_id, run.tenant_id, new.project_id, new.by, IMPORTED, now, most_sessions)
            put_untrainable(conn, run, now)
            for checkpoint in new.checkpoints:
                put_checkpoint(conn, run.tenant_id, checkpoint, now, new.by.key_id)
                path = f"tinker://{checkpoint.run_id}/{checkpoint.kind}/{checkpoint.name}"
                about = {"model_id": run.spec.run_id, "tinker_path": path, "sha256": run.user_metadata[DIGEST]}
                note(conn, "checkpoint_import", run.tenant_id, new.by, about, now)
        return True

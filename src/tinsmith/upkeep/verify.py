"""Holds a data directory's rows and files against one another, and repairs what can be.

Whoever runs it while a server works sees no false alarm: files are listed before the rows are read, what is missing or
damaged is looked up once more, and a file without a row is called a leftover only once it is older than any request
that may be about to name it. What stays true: a repair never touches what a row names, but for what is damaged and not
needed: a lost result, whose request then says so, and a snapshot of a run that can be computed again without it.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from tinsmith.crashpoints import crash_point
from tinsmith.errors import CorruptError, NotFoundError, UserError
from tinsmith.files.blobs import Blobs, StoredFile
from tinsmith.files.checkpoint_file import read_state_header
from tinsmith.store import Store
from tinsmith.store.checksums import CHANGED, ROW_CHANGED
from tinsmith.store.upkeep import Naming, Reference, RowFault
from tinsmith.types import BlobKey, OpId

LEFTOVER_AFTER_S = 3600.0

_CURES = {
    Naming.PAYLOAD: "the request can't be carried out: restore a backup, or go on from a checkpoint of its run",
    Naming.RESULT: "with --repair the request says that its result is gone",
    Naming.ROUTES: "with --repair, training on what was sampled has its experts chosen anew",
    Naming.PIN: "its run can't be computed again from its log: restore a backup, or go on from another checkpoint",
    Naming.SNAPSHOT: "its run can't be loaded: restore a backup, or go on from a checkpoint in a new run",
    Naming.PREVIOUS: "nothing is lost as long as the newest is whole; the next snapshot takes its place",
    Naming.SAMPLER: "it answers with an error: restore a backup, or make a new sampler of the run",
    Naming.LOSS: "requests that use it fail: restore a backup, or send the loss again",
    Naming.CHECKPOINT: "restore a backup, or delete the checkpoint and save it again",
}


_CHANGED_CURE = "it isn't carried out, and its run is given up if that takes it: restore a backup"
_SPARED = "nothing is lost: its run goes on from the snapshot before it, or from its log; look at the disk"


@dataclass(frozen=True, slots=True)
class _Repair:
    """now: unix seconds."""

    is_wanted: bool
    now: float


@dataclass(frozen=True, slots=True)
class Finding:
    """owner: the row or file; cure: what to do about it; empty once it was repaired."""

    owner: str
    problem: str
    cure: str = ""
    is_repaired: bool = False


@dataclass(slots=True)
class Report:
    """num_files and num_bytes: of those that were read and checked. leftovers: files that no row names.

    num_unchecked: payloads and results in rows that were written before there were checksums of them.
    num_unchecked_rows: requests and runs of which all else was.

    replaced: runs of which a damaged snapshot was replaced while they were served, and when that was last (unix
    seconds): nothing of them is lost, and something is wrong with the disk. is_cut_short: the database lacks tables or
    columns, so no file was held against a row and nothing was repaired.
    """

    num_files: int = 0
    num_bytes: int = 0
    num_unchecked: int = 0
    num_unchecked_rows: int = 0
    findings: list[Finding] = field(default_factory=list)
    leftovers: list[StoredFile] = field(default_factory=list)
    replaced: list[tuple[str, float]] = field(default_factory=list)
    removed: bool = False
    is_cut_short: bool = False

    @property
    def is_sound(self) -> bool:
        return all(finding.is_repaired for finding in self.findings)


def verify(
    store: Store,
    blobs: Blobs,
    *,
    is_repairing: bool = False,
    now: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Read every file that a row names, and check all rows.

    Args:
        is_repairing: nobody else may use the directory then.
        now: unix seconds.
        progress: told the bytes that were read, and those there are.
    """
    now = time.time() if now is None else now
    report = Report()
    faults = store.upkeep.faults(now)
    if any(fault.is_of_schema for fault in faults):
        report.findings += map(_fault, faults)
        report.is_cut_short = True
        return report
    repair = _Repair(is_repairing, now)
    if is_repairing:
        report.findings += [Finding(odd.owner, odd.problem, is_repaired=True) for odd in store.mends.mend(now)]
    _check_inline(store, report, repair)
    if any(finding.is_repaired for finding in report.findings):
        faults = store.upkeep.faults(now)
    report.findings += map(_fault, faults)
    report.replaced = store.upkeep.damaged_snapshots()
    files = {file.key: file for file in blobs.files()}
    named = _by_file(store.upkeep.references())
    total = sum(files[key].size for key in named if key in files)
    suspects: dict[BlobKey, str] = {}
    for key, references in named.items():
        file = files.get(key)
        trouble = check_file(blobs, key, references)
        if trouble is not None:
            suspects[key] = trouble
        if file is not None:
            report.num_files += 1
            report.num_bytes += file.size
            progress(report.num_bytes, total)
    if suspects:
        report.findings += _suspected(store, suspects, repair)
        if is_repairing:
            named = _by_file(store.upkeep.references())
    youngest = math.inf if is_repairing else now - LEFTOVER_AFTER_S
    due = store.upkeep.buried()
    report.leftovers = [
        file for key, file in files.items() if key not in named and key not in due and file.changed_at < youngest
    ]
    if is_repairing:
        for file in report.leftovers:
            blobs.discard(file)
        report.removed = bool(report.leftovers)
    return report


def _suspected(store: Store, suspects: Mapping[BlobKey, str], repair: _Repair) -> list[Finding]:
    """Of the files in which something is wrong, those that rows still name."""
    still_named = _by_file(store.upkeep.references())
    return [
        _finding(store, reference.naming, reference.owner, trouble, suspects, repair)
        for key, trouble in suspects.items()
        for reference in still_named.get(key, ())
    ]


def check_file(blobs: Blobs, key: BlobKey, references: Iterable[Reference]) -> str | None:
    """What is wrong with a file as the rows name it; None: nothing."""
    references = tuple(references)
    for reference in references:
        if reference.naming.is_private and not key.startswith(f"tenants/{reference.tenant_id}/"):
            return f"its file {key} is another tenant's"
    try:
        with blobs.open_checked(key) as file:
            size = file.seek(0, 2)
            for reference in references:
                if reference.size not in (None, size):
                    return f"its file {key} has {size} bytes and its row says {reference.size}"
            if any(reference.is_state for reference in references):
                read_state_header(file)
    except NotFoundError:
        return f"its file {key} is missing"
    except (CorruptError, UserError) as error:
        return error.message
    except OSError as error:
        return f"its file {key} can't be read: {error.strerror}"
    return None


def _fault(fault: RowFault) -> Finding:
    return Finding(fault.owner, fault.problem, "--repair makes it right" if fault.is_mendable else "restore a backup")


def _check_inline(store: Store, report: Report, repair: _Repair) -> None:
    for naming, checked in store.upkeep.inline().items():
        report.num_unchecked += checked.num_unchecked
        for op_id in checked.damaged:
            report.findings.append(_finding(store, naming, op_id, CHANGED, (), repair))

    rows = store.upkeep.rows()
    report.num_unchecked_rows = rows.num_unchecked
    report.findings += [Finding(op_id, ROW_CHANGED, _CHANGED_CURE) for op_id in rows.damaged]


def _finding(
    store: Store, naming: Naming, of: str, trouble: str, suspects: Container[BlobKey], repair: _Repair
) -> Finding:
    """What is wrong, and what to do about it, or that it was done. of: its row; suspects: all damaged files."""
    owner = f"{naming} of {of}"
    cure = _CURES[naming]
    mend: Callable[[], None] | None = None
    if naming is Naming.RESULT:
        mend = partial(store.upkeep.give_up_result, OpId(of))
    elif naming is Naming.ROUTES:
        mend = partial(store.upkeep.give_up_routes, OpId(of))
    elif naming is Naming.SNAPSHOT:
        spare = store.upkeep.spare(of)
        if spare is not None and spare.blob not in suspects:
            cure = _SPARED
            mend = partial(store.upkeep.go_back, of, repair.now)
    elif naming is Naming.PREVIOUS and store.upkeep.newest(of) not in suspects:
        mend = partial(store.upkeep.forget_previous, of)
    if mend is not None and repair.is_wanted:
        mend()
        crash_point("repair.half_done")
        return Finding(owner, trouble, is_repaired=True)
    return Finding(owner, trouble, cure)


def _by_file(references: Iterable[Reference]) -> dict[BlobKey, list[Reference]]:
    named: dict[BlobKey, list[Reference]] = defaultdict(list)
    for reference in references:
        named[reference.blob].append(reference)
    return dict(named)

"""What of a database can be made right from the rest of it, and what is at odds there: tallies of the ledger, indices,
replays of requests that are not there.

A tenant's tally is the sum of its ledger over a day or a month, and no key has used more than its tenant has. The
ledger is what is billed, so it is what a tally is corrected by. Old tallies are dropped, so one that is missing is at
odds only in the day and the month that quotas ask about now. Mending is for a database that nobody else uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, Index, delete, func, insert, inspect, literal, select, update
from sqlalchemy.exc import IntegrityError

from tinsmith.store.database import Database
from tinsmith.store.quota_rules import day_of, month_of
from tinsmith.store.schema import keys, metadata, ops, replays, tallies, tenants, usage, usage_days

DAY_S = 24 * 3600

Tally = tuple[str, str, str]  # scope, period, kind


@dataclass(frozen=True, slots=True)
class Odd:
    """owner: the row or table; problem: what of it is at odds, which `Mends.mend` makes right."""

    owner: str
    problem: str


class Mends:
    def __init__(self, database: Database) -> None:
        self._database = database

    def mend(self, now: float) -> list[Odd]:
        """Make right what can be; what that was. The tables and columns have to be there. now: unix seconds."""
        mended: list[Odd] = []
        for index in self._lacking():
            try:
                with self._database.write() as conn:
                    index.create(conn)
            except IntegrityError:  # rows that it forbids have come since: a check names them, or the index
                continue
            mended.append(_lacks(index))
        with self._database.write() as conn:
            for tally, right in _wrong_tallies(conn, now):
                _correct(conn, tally, right)
                mended.append(_differs(tally))
            stray = [Odd(*row) for row in conn.execute(STRAY_REPLAYS)]
            conn.execute(delete(replays).where(replays.c.op_id.in_(_STRAY)))
        return mended + stray

    def _lacking(self) -> list[Index]:
        with self._database.read() as conn:
            return lacking_indices(conn)


def lacking_indices(conn: Connection) -> list[Index]:
    """Those that this version needs and the database lacks, of tables that are there."""
    there = inspect(conn)
    names = set(there.get_table_names())
    return [
        index
        for table in metadata.sorted_tables
        if table.name in names
        for found in [{index["name"] for index in there.get_indexes(table.name)}]
        for index in sorted(table.indexes, key=lambda index: str(index.name))
        if index.name not in found
    ]


def odds(conn: Connection, now: float, limit: int) -> Iterator[Odd]:
    """All of it, at most `limit` of each kind. The tables and columns have to be there."""
    yield from map(_lacks, lacking_indices(conn))
    wrong = _wrong_tallies(conn, now)
    yield from (_differs(tally) for tally, _ in wrong[:limit])
    yield from (Odd(*row) for row in conn.execute(STRAY_REPLAYS.limit(limit)))


_STRAY = select(replays.c.op_id).where((replays.c.num_begun < 1) | replays.c.op_id.not_in(select(ops.c.op_id)))
STRAY_REPLAYS = select(
    replays.c.op_id, literal("it is said to be computed again, and there is no such request, or never was begun")
).where(replays.c.op_id.in_(_STRAY))


def _lacks(index: Index) -> Odd:
    return Odd(str(index.table.name if index.table is not None else ""), f"its index {index.name} is gone")


def _differs(tally: Tally) -> Odd:
    scope, period, kind = tally
    return Odd(f"tally of {scope}", f"its {kind} of {period} is not what the ledger says; quotas are judged by it")


def _wrong_tallies(conn: Connection, now: float) -> list[tuple[Tally, int | None]]:
    """(which, what it has to be; None: there is no such tenant or key). What the ledger can't say (less than nothing)
    is left as it is."""
    told: dict[Tally, int] = {(row.scope, row.period, row.kind): row.quantity for row in conn.execute(select(tallies))}
    current = {day_of(now), month_of(now)}
    owners = set(conn.execute(select(tenants.c.tenant_id)).scalars())
    tenant_of = {row.key_id: row.tenant_id for row in conn.execute(select(keys.c.key_id, keys.c.tenant_id))}
    periods = current | {period for _, period, _ in told}
    owed = _ledger(conn, min(start for period in periods if (start := _begin(period)) is not None))
    right: dict[Tally, int | None] = {tally: quantity for tally, quantity in owed.items() if tally[1] in current}
    for tally, quantity in told.items():
        scope, period, kind = tally
        if scope in owners:
            right[tally] = owed[tally]
        elif scope in tenant_of:
            right[tally] = min(quantity, owed[tenant_of[scope], period, kind])
        else:
            right[tally] = None
    return sorted(
        (tally, quantity)
        for tally, quantity in right.items()
        if quantity is None or (quantity >= 0 and told.get(tally, 0) != quantity)
    )


def _begin(period: str) -> int | None:
    """Unix seconds at which a day or a month began; None: it is neither."""
    try:
        form = "%Y-%m-%d" if period.count("-") > 1 else "%Y-%m"
        return int(datetime.strptime(period, form).replace(tzinfo=UTC).timestamp())
    except ValueError:
        return None


def _ledger(conn: Connection, start: int) -> Counter[Tally]:
    """What each tenant used from `start` on, by day and by month."""
    owed: Counter[Tally] = Counter()
    for table, begun in ((usage, usage.c.hour), (usage_days, usage_days.c.day)):
        day = (begun - begun % DAY_S).label("day")
        sums = (
            select(table.c.tenant_id, day, table.c.kind, func.sum(table.c.quantity))
            .where(begun >= start)
            .group_by(table.c.tenant_id, day, table.c.kind)
        )
        for tenant_id, at, kind, quantity in conn.execute(sums):
            for period in (day_of(at), month_of(at)):
                owed[tenant_id, period, kind] += quantity
    return owed


def _correct(conn: Connection, tally: Tally, right: int | None) -> None:
    scope, period, kind = tally
    which = (tallies.c.scope == scope, tallies.c.period == period, tallies.c.kind == kind)
    if right is None:
        conn.execute(delete(tallies).where(*which))
    elif not conn.execute(update(tallies).where(*which).values(quantity=right)).rowcount:
        conn.execute(insert(tallies).values(scope=scope, period=period, kind=kind, quantity=right))

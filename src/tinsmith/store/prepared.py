"""Statements of the hot paths: their text is made once, and run on the driver without the toolkit in between.

A Core statement that runs a thousand times a second costs ten times as much in SQLAlchemy as in the database. What is
prepared here is still written in Core, compiled by the connection's own dialect, and converts its values by the
columns' types; it runs in the same transaction as everything else on that connection. What stays true:

* Every value is a bound parameter; the text never depends on one, so lists (`IN`) can't be prepared.
* Rows are plain tuples in the order of the select list.
* A text that is none, since a bit of it flipped, is read with `\\x80` in place of that byte: the driver would raise,
  and one row keep all others from being read. Whoever needs a row whole looks at its checksum.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import Connection, Dialect
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.selectable import Select

NO_TEXT = "Could not decode to UTF-8"

Convert: TypeAlias = Callable[[Any], Any]
Values: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Text:
    """A statement in one dialect. parameters: their names by place, with what converts each (None: as it is)."""

    sql: str
    parameters: tuple[tuple[str, Convert | None], ...]
    constants: Values
    results: tuple[tuple[int, Convert], ...]

    def bind(self, values: Values) -> list[Any]:
        if self.constants:
            values = {**self.constants, **values}
        return [values[name] if convert is None else convert(values[name]) for name, convert in self.parameters]


class Prepared:
    """A Core statement, to be called on a connection in a transaction.

    Args:
        statement: a select, or an insert, update or delete with or without RETURNING.
        column_keys: the parameters that an insert is given, where they aren't all columns of its table.
    """

    def __init__(
        self, statement: Select[*tuple[Any, ...]] | UpdateBase, column_keys: Sequence[str] | None = None
    ) -> None:
        self._statement = statement
        self._column_keys = None if column_keys is None else list(column_keys)
        self._texts: dict[str, _Text] = {}

    def all(self, conn: Connection, values: Values) -> list[Any]:
        """All rows."""
        text = self._text(conn.dialect)
        driver = driver_of(conn)
        rows: list[Any]
        try:
            rows = driver.execute(text.sql, text.bind(values)).fetchall()
        except sqlite3.OperationalError as error:
            if NO_TEXT not in str(error) or not self._statement.is_select:
                raise
            with readable(conn):
                rows = driver.execute(text.sql, text.bind(values)).fetchall()
        return [_convert(row, text.results) for row in rows] if text.results else rows

    def first(self, conn: Connection, values: Values) -> Any:
        """The first row, or None."""
        text = self._text(conn.dialect)
        cursor = driver_of(conn).execute(text.sql, text.bind(values))
        try:
            row = cursor.fetchone()
        except sqlite3.OperationalError as error:
            if NO_TEXT not in str(error):
                raise
            with readable(conn):
                row = cursor.fetchone()  # the statement stands at this row still
        cursor.close()
        return row if row is None or not text.results else _convert(row, text.results)

    def run(self, conn: Connection, values: Values) -> int:
        """For its effect; how many rows it touched."""
        text = self._text(conn.dialect)
        count: int = driver_of(conn).execute(text.sql, text.bind(values)).rowcount
        return count

    def run_many(self, conn: Connection, rows: Iterable[Values]) -> None:
        """For its effect, once for each."""
        text = self._text(conn.dialect)
        driver_of(conn).executemany(text.sql, [text.bind(values) for values in rows])

    def _text(self, dialect: Dialect) -> _Text:
        text = self._texts.get(dialect.name)
        if text is None:
            text = self._texts[dialect.name] = _compile(self._statement, dialect, self._column_keys)
        return text


@contextmanager
def readable(conn: Connection) -> Iterator[None]:
    """Texts that are none are read all the same while the block runs: each byte that is no part of one as `\\x80`."""
    driver = driver_of(conn)
    driver.text_factory = lambda raw: raw.decode(errors="backslashreplace")
    try:
        yield
    finally:
        driver.text_factory = str


def driver_of(conn: Connection) -> Any:
    """The driver's own connection."""
    driver = conn.connection.driver_connection
    if driver is None:
        raise RuntimeError("the connection is closed")
    return driver


def _convert(row: Sequence[Any], results: Sequence[tuple[int, Convert]]) -> tuple[Any, ...]:
    converted = list(row)
    for place, convert in results:
        converted[place] = convert(converted[place])
    return tuple(converted)


def _compile(statement: Any, dialect: Dialect, column_keys: list[str] | None) -> _Text:
    compiled = statement.compile(dialect=dialect, column_keys=column_keys)
    if not isinstance(compiled, SQLCompiler) or not compiled.positional or compiled.positiontup is None:
        raise TypeError(f"{dialect.name} can't prepare {statement}")
    if compiled.post_compile_params or compiled.literal_execute_params:
        raise TypeError(f"a list can't be prepared: {statement}")
    parameters = []
    for name in compiled.positiontup:
        kind = compiled.binds[name].type.dialect_impl(dialect)
        parameters.append((name, kind.bind_processor(dialect)))
    constants = {name: bind.effective_value for name, bind in compiled.binds.items() if not bind.required}
    results = []
    columns = statement.exported_columns if hasattr(statement, "exported_columns") else ()
    for place, column in enumerate(columns):
        convert = column.type.dialect_impl(dialect).result_processor(dialect, None)
        if convert is not None:
            results.append((place, convert))
    return _Text(str(compiled), tuple(parameters), constants, tuple(results))

"""A transaction: reads at once, writes together.

Synchronous on purpose; only the threads of threads.py use it (docs/adr/0002-store-threads.md).
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any, Final, TypeAlias

from swarm.base.priority import ahead_of_others
from swarm.errors import StoreError
from swarm.store.sql.connection import Connection, is_complete
from swarm.store.sql.dialect import Dialect, Sql, Statement, explain
from swarm.store.sql.reads import IN_CHUNK, Read, among, chars, undecoded
from swarm.store.sql.rows import iso
from swarm.store.sql.wake import Wake

Row: TypeAlias = Any  # a named tuple: attributes are the statement's columns, whatever another tool put into them


_ONE_ROW: Final = set[Sql]()


def one_row(sql: str) -> Sql:
    """A statement that changes exactly one row, or else nothing of its transaction may count: see `Tx.many`."""
    statement = Sql(sql)
    _ONE_ROW.add(statement)
    return statement


_UNTOLD: Final = set[Sql]()


def untold(statement: Sql) -> Sql:
    """A change that nobody waits for: see `Dialect.tell`."""
    _UNTOLD.add(statement)
    return statement


_TABLE: Final = re.compile(r"(?:INSERT INTO|UPDATE|DELETE FROM) (\w+)")


@cache
def _table(statement: str) -> str | None:
    """Which it changes."""
    found = _TABLE.match(statement)
    return found[1] if found is not None else None


@cache
def _now_ms(dialect: Dialect) -> Sql:
    return Sql(f"SELECT {dialect.now_ms} AS now_ms")


@cache
def _written_by_others(dialect: Dialect) -> Sql:
    return Sql(f"SELECT {dialect.written_by_others} AS number")


@cache
def _row_type(columns: tuple[str, ...]) -> Callable[[Iterable[Any]], Any]:
    row: Any = namedtuple("Row", columns)  # type: ignore[misc]  # the names come from our own statements
    make: Callable[[Iterable[Any]], Any] = row._make
    return make


_COMMIT: Final = "COMMIT", (), False


class Outdated(Exception):
    """Another program wrote, or is writing, since an optimistic transaction began: nothing of it was written."""


_Unwritten: TypeAlias = list[tuple[Sql, Sequence[Mapping[str, Any]]]]


class NotExact(Exception):
    """A shared transaction needs to be an exact one: nothing of it was written."""


class Tx:
    """An open transaction. A row is a named tuple of its statement's columns.

    Changes are written before the next read, or else together with the commit: while a transaction reads and computes,
    it holds no lock that another program's INSERT could meet.
    """

    def __init__(
        self,
        connection: Connection,
        dialect: Dialect,
        wakes: Iterable[Wake] = (),
        *,
        shared: bool = False,
        timed: bool = False,
    ) -> None:
        self.connection = connection
        self.dialect = dialect
        self._shared = shared
        self._timed = timed  # it will ask what time it is: that goes with its first statement
        self._wakes, self._muted = wakes, list[Wake]()
        self._cursor = connection.driver.cursor()
        self._unwritten: _Unwritten = []
        self._if_undone: list[Callable[[], None]] = []
        self._locked = False
        self.visited = False  # a program has opened the database, or closed it, since this began
        self.joined = False  # it serves requests for two functions
        self._begin: str | None = None  # sent together with the first statement
        self._told = set[str]()  # tables whose changes others may wait for
        self._ahead = dict[object, list[Row]]()
        self._once = dict[object, Row | None]()

    @cached_property
    def now_ms(self) -> int:
        """Milliseconds since 1970 by the database's clock, read once: a transaction has one point in time."""
        (row,) = self.all(_now_ms(self.dialect))
        return int(row.now_ms)

    @cached_property
    def now(self) -> str:
        return iso(self.now_ms)

    @property
    def knows_time(self) -> bool:
        return "now_ms" in self.__dict__

    @property
    def number(self) -> str:
        """By which `was_committed` knows it later. '': not needed, since every COMMIT has an answer."""
        return str(self.all(Sql(self.dialect.number))[0].number) if self.dialect.number is not None else ""

    def was_committed(self, number: str) -> bool:
        """Was the transaction of that number? Raises StoreError while its server has not noticed yet that nobody waits
        for it."""
        became = self.all(Sql(self.dialect.became), id=number)[0].became if number else None
        if became == "in progress":
            raise StoreError("the database still has a transaction whose connection broke")
        return bool(became == "committed")

    @property
    def written_by_others(self) -> int:
        """Another number than before whenever another connection has changed the database."""
        sql = _written_by_others(self.dialect)  # own changes don't matter to it
        return int(self._execute(sql, {}).fetchone()[0])

    def all(self, statement: Sql, **values: Any) -> list[Row]:
        return self._rows(statement, values)

    def once(self, statement: Sql, **values: Any) -> Row | None:
        """`first`, of what this transaction does not change: read once."""
        key = statement, tuple(values.items())
        if key not in self._once:
            self._once[key] = self.first(statement, **values)
        return self._once[key]

    def ahead(self, reads: Iterable[Read]) -> None:
        """These will be read, unless something is written before: on one way to the server and back, together with the
        changes so far. Nothing, for a database that is no server."""
        if self.dialect.exchange is None:
            return
        if self._unwritten:
            self._ahead.clear()
        asked = {(one[0], tuple(one[1].items())): one for one in reads}
        new = {key: one for key, one in asked.items() if key not in self._ahead and key not in self._once}
        if len(new) < 2:
            return
        answers = self._send(*[(self._text(one), values, True) for one, values in new.values()])
        for (key, (one, _)), answer in zip(new.items(), answers, strict=True):
            self._ahead[key] = self._rows_of(answer, one)

    def some(self, statement: Sql, most_chars: int | None, **values: Any) -> tuple[list[Row], bool]:
        """The first rows, up to the one with which their texts are longer than that; and whether others may follow."""
        if most_chars is None:
            return self._rows(statement, values), False
        found: Iterable[Row]
        if (known := self._known(statement, values)) is not None:
            found = known
        else:
            cursor = self._execute(statement, values)
            found = map(self._row_type(cursor, statement), cursor)
        rows, left = list[Row](), most_chars
        for row in found:
            rows.append(row)
            if (left := left - chars(row)) < 0:
                break
        return rows, left < 0

    def first(self, statement: Sql, **values: Any) -> Row | None:
        rows = self.all(statement, **values)
        return rows[0] if rows else None

    def run(self, statement: Sql, **values: Any) -> None:
        self.many(statement, [values])

    def many(self, statement: Sql, rows: Sequence[Mapping[str, Any]]) -> None:
        """The same statement for each row. Raises the driver's error if one that is marked by `one_row` changed none:
        a trigger with RAISE(IGNORE) drops a change without an error."""
        if rows:
            self._unwritten.append((statement, rows))
            if statement not in _UNTOLD:
                self._note(statement)

    def _note(self, statement: str) -> None:
        if self.dialect.tell is not None and (table := _table(statement)) is not None:
            self._told.add(table)

    def _execute(self, sql: str, values: Mapping[str, Any]) -> Any:
        """A cursor."""
        self._note(sql)  # some change, and return rows
        if self.dialect.exchange is not None:
            return self._send((self._text(sql), values, True))[-1]
        writes = _table(sql) is not None  # then SQLite would take the lock by itself, and nobody would know
        if writes or self._unwritten:
            self.let_in(writes=writes)
            self.write(lock=writes)
        return self._run(self._cursor, self._text(sql), values)

    @staticmethod
    def _run(cursor: Any, sql: str, values: Mapping[str, Any]) -> Any:
        try:
            return cursor.execute(sql, values)
        except UnicodeEncodeError:
            return cursor.execute(*undecoded(sql, values))

    def write(self, *, lock: bool = False, commit: bool = False) -> None:
        """Write the changes made so far. Takes the write lock, if there are any, or by ``lock``."""
        driver = self.connection.driver
        if self.dialect.exchange is not None:
            if self._unwritten:
                self._send()
            return
        unwritten = self._take_unwritten()
        if (unwritten or lock) and not self._locked and self.dialect.lock is not None:
            # By a statement of its own: the driver parses one that was refused once at every use, under the lock.
            self._take_lock(self.dialect.lock)
        for statement, rows in unwritten:
            if self._write_rows(statement, rows) != len(rows) and statement in _ONE_ROW:
                raise self.dialect.driver_error("a trigger ignored it, or removed the row")
        if commit:
            driver.commit()

    def _write_rows(self, statement: Sql, rows: Sequence[Mapping[str, Any]]) -> int:
        """How many were changed."""
        left = iter(rows)
        try:
            self._cursor.executemany(statement, left)
            return int(self._cursor.rowcount)
        except UnicodeEncodeError:
            written = len(rows) - len(list(left)) - 1  # before the one that raised this
        return written + sum(int(self._run(self._cursor, statement, row).rowcount) for row in rows[written:])

    def _take_unwritten(self) -> _Unwritten:
        unwritten, self._unwritten = self._unwritten, []
        if unwritten:
            self._ahead.clear()
        return unwritten

    def _send(self, *last: Statement) -> list[Any]:
        """The transaction's begin, its changes so far, and ``last``, on one way to the server and back, which stops at
        the first error. The answers to ``last``."""
        answers, error = self._exchange(last)
        if error is not None:
            raise error
        return answers

    def _exchange(self, last: Sequence[Statement]) -> tuple[list[Any], Exception | None]:
        driver, changes, exchange = self.connection.driver, self.dialect.changes, self.dialect.exchange
        assert changes is not None and exchange is not None
        found = [changes(driver, str(one), rows, one in _ONE_ROW) for one, rows in self._take_unwritten()]
        begin, self._begin = self._begin, None
        timed = begin is not None and self._timed and not self.knows_time
        before: list[Statement] = [(begin, (), False)] if begin is not None else []
        before += [(self._text(_now_ms(self.dialect)), {}, True)] if timed else []
        for text, values, prepare in found:  # one for all rows, or one for each
            before += [(text, row, True) for row in values] if prepare else [(text, values, False)]
        answers, error = exchange(driver, [*before, *last]) if before or last else ([], None)
        if timed and len(answers) > 1:
            self.now_ms = int(answers[1].fetchone()[0])
        return list(answers[len(before) :]), error

    def _text(self, statement: str) -> str:
        return statement if self.dialect.translate is None else self.dialect.translate(str(statement))

    def begin(self, statement: str) -> None:
        if self.dialect.exchange is not None:
            self._begin = statement
        elif statement == self.dialect.begin_write:
            self._take_lock(statement)
        else:
            self._cursor.execute(statement)

    def keep_others_out(self) -> None:
        """Before anything is read, the time too: see `Dialect.alone`."""
        begin, self._begin = self._begin, None
        for statement in filter(None, (begin, *self.dialect.alone)):
            self.connection.driver.execute(statement, prepare=False)

    def let_in(self, *, writes: bool = False) -> None:
        """Before it takes the write lock, wait for programs that have just opened the database. ``writes``: also if
        there are no changes so far."""
        newcomers = self.connection.newcomers
        if newcomers is not None and not self._locked and (writes or self._unwritten):
            self.visited |= newcomers.let_in() is not None

    def _take_lock(self, statement: str) -> None:
        self._muted = list(self._wakes)
        for wake in self._muted:
            wake.mute()
        began = time.monotonic()
        try:
            self._cursor.execute(statement)
            self._locked = True
        finally:
            self.connection.lock_seconds += time.monotonic() - began

    def commit(self) -> None:
        if self.dialect.exchange is not None:
            self._commit_on_server()
            return
        if not self._unwritten and not self._locked:
            self.connection.driver.commit()
            return
        self._warm_up()
        with ahead_of_others():
            self.write(commit=True)

    def _commit_on_server(self) -> None:
        """And tell others, on one way to the server and back. Whether that can be told changes nothing that is
        committed."""
        if self._begin is not None and not self._unwritten:
            return  # nothing was asked
        told = self.dialect.tell(self._told) if self.dialect.tell is not None else None
        with ahead_of_others():
            answers, error = self._exchange((_COMMIT, (told, (), False)) if told is not None else (_COMMIT,))
        if not any(answer.statusmessage == "COMMIT" for answer in answers):  # ROLLBACK, after an error before it
            raise error or self.dialect.driver_error("the transaction was not committed")

    def _warm_up(self) -> None:
        """Read what will be written, before the lock is taken."""
        ids = [rows[0]["ticket_id"] for _, rows in self._unwritten if "ticket_id" in rows[0]]
        if ids and not self._locked and self.dialect.warm_up is not None:
            with contextlib.suppress(self.dialect.driver_error):  # another program removed a table
                self._run(self._cursor, self.dialect.warm_up, {"ticket_id": ids[0]}).fetchall()

    def exact(self) -> None:
        """What follows depends on rows that the transaction has read, but not locked. Raises NotExact in a shared one:
        then it runs again, as one that is refused if another transaction comes between."""
        if self._shared:
            raise NotExact

    def if_undone(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` unless this transaction is committed: it may run again."""
        self._if_undone.append(undo)

    def roll_back(self) -> None:
        for undo in self._if_undone:
            undo()
        try:
            self.dialect.roll_back(self.connection.driver)
        except self.dialect.driver_error:  # the connection is lost: its server rolls back
            self.connection.close()

    def end(self) -> None:
        """The transaction is over. Its cursor is closed here: later, the garbage collector would do that on any thread,
        and while the connection waits for another program's lock, wait for it with the GIL, so that all threads stand.
        """
        self._cursor.close()
        self._ahead.clear()
        self._once.clear()
        muted, self._muted = self._muted, []
        for wake in muted:
            wake.unmute()

    def all_in(self, statement: Sql, ids: Iterable[str], **others: Any) -> list[Row]:
        """Rows of a statement with ``IN :ids``, for any number of ids."""
        wanted, found = list(ids), []
        for start in range(0, len(wanted), IN_CHUNK):
            found += self._rows(*among(statement, wanted[start : start + IN_CHUNK], **others))
        return found

    def stream(self, statement: Sql, **values: Any) -> Iterator[Row]:
        """Rows one by one, on a separate cursor, for results that may not fit into memory."""
        self.write()
        if self._begin is not None:
            self._send()
        with contextlib.closing(self.dialect.streaming(self.connection.driver)) as cursor:
            self._run(cursor, self._text(statement), values)
            make = self._row_type(cursor, statement)
            while rows := cursor.fetchmany(1000):
                yield from map(make, rows)

    def _rows(self, sql: str, values: Mapping[str, Any]) -> list[Row]:
        if (known := self._known(sql, values)) is not None:
            return known
        return self._rows_of(self._execute(sql, values), sql)

    def _rows_of(self, cursor: Any, sql: str) -> list[Row]:
        rows = cursor.fetchall()
        return list(map(self._row_type(cursor, sql), rows)) if rows else []

    def _row_type(self, cursor: Any, sql: str) -> Callable[[Iterable[Any]], Any]:
        """Kept for each statement: psycopg's description of a result costs more than its rows."""
        if (found := self.connection.row_types.get(sql)) is None:
            found = _row_type(tuple(column[0] for column in cursor.description))
            self.connection.row_types[sql] = found
        return found

    def _known(self, sql: str, values: Mapping[str, Any]) -> list[Row] | None:
        """What was read ahead."""
        return self._ahead.pop((sql, tuple(values.items())), None) if self._ahead and not self._unwritten else None

    def is_of_database(self, error: BaseException) -> bool:
        """Is the database at fault, and not one statement?"""
        complete = partial(is_complete, self.connection, self.dialect)
        return explain(self.dialect, error, place="", busy_timeout_seconds=0.0, complete=complete) is not None

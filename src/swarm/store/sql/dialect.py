"""What differs between databases. There is one module for each (`sqlite`); every other statement is the same SQL for
all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

from swarm.errors import Locked, StoreError
from swarm.store.sql.wake import Wake

# Messages with the fields of `explain`.
NOT_MIGRATED: Final = (
    "the database {place} doesn't have the tables this version of Swarm needs ({error}); run `swarm init`"
)
OUT_OF_MEMORY: Final = "out of memory in the database {place}"

# In a text that was meant to be a URL: all between the user's name and the last @.
_ATTEMPT: Final = re.compile(r"(?:- host: .*?, hostaddr: .*?: )?connection failed: ")
_ATTEMPTS: Final = "Multiple connection attempts failed"
_PASSWORD: Final = re.compile(r"^((?:[^:]*://)?+[^:]*):.*(?=@)", re.S)
# PostgreSQL takes it there as well; and somebody may have written no URL, but what libpq takes in its place.
# Also as it does not take it, PASSWORD say: that is told as a mistake.
_IN_QUERY: Final = re.compile(r"([?&])([^=&]*)=[^&]*", re.S)
_IN_WORDS: Final = re.compile(r"(\w*password\w*\s*=\s*)(?:'(?:[^'\\]|\\.)*'?|.*?(?=\s\w+\s*=|\Z))", re.S | re.I)


def without_password(url: str) -> str:
    url = _PASSWORD.sub(r"\1:***", url)
    return _IN_QUERY.sub(_hidden, url) if "://" in url else _IN_WORDS.sub(r"\1***", url)


def _hidden(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}=***" if "password" in unquote(found[2]).lower() else found[0]


class Sql(str):
    """A statement, with `:name` for its parameters. Made once, at import. Two of the same text are two: `one_row` may
    mark one of them."""

    __slots__ = ()
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__


# As the driver takes it, with its values, and whether it may be prepared for the next time.
Statement: TypeAlias = tuple[str, Mapping[str, Any] | Sequence[Any], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    name: str
    driver: str  # SQLAlchemy's name of it
    # SQL expression: milliseconds since 1970 by the clock that decides leases; tests move it (table `clock`).
    now_ms: str
    # SQL expression: a number that changes whenever another connection has changed the database.
    written_by_others: str
    columns: str  # SQL that returns (table, column) for every table of the database
    has_revision: str  # SQL that returns a row if the table alembic_version exists
    names: str  # SQL that returns the name of each table, index and trigger
    # SQL: can a row of :table be gone without a trace? Without our trigger, or by a REPLACE of SQLite that meets a
    # unique index of another program, which runs no trigger.
    untraced: str
    tidy: str | None  # a statement at the beginning of a writing connection
    begin_write: str  # starts a transaction that no other writer can get between
    begin_optimistic: str  # starts one that is refused, at a write or at its end, if another writer got between
    # Starts one that sees what others commit meanwhile, and locks the rows that it depends on: it is never refused, and
    # engines don't wait for each other. None: there is none.
    begin_shared: str | None
    begin_read: str
    roll_back: Callable[[Any], None]  # (driver's connection)
    begin_migration: str
    # If an event may become visible after one with a higher number (store/tickets/settled.py): SQL that returns the
    # newest event's number and `them`, which means the transactions that are under way, '' if there is none; and
    # whether those of :them that write events, and began after :since, have ended.
    newest_event: str | None
    has_ended: str
    # (tables that a transaction has changed): SQL that tells those who wait for changes, after the COMMIT; None if
    # nobody waits for these. None for a database whose files tell it.
    tell: Callable[[AbstractSet[str]], str | None] | None
    # The number of this transaction, and what became of the one with the number `:id` ('committed', 'aborted', 'in
    # progress'; NULL: nobody knows), whose COMMIT had no answer; None: there is always one.
    number: str | None
    became: str
    lock: str | None  # takes the write lock, and changes nothing. None: there is none
    warm_up: str | None  # reads what changes of a :ticket_id are about to write
    # Of a transaction that others came between, before it takes the lock from the start. None: there is no such lock,
    # and it is tried again until the busy timeout.
    tries: int | None
    # Statements that keep others from writing tickets, for a transaction that has been refused too often. They may
    # fail as locked: it is then tried without them.
    alone: tuple[str, ...]
    translate: Callable[[str], str] | None  # a statement as the driver takes it
    streaming: Callable[[Any], Any]  # (driver's connection): a cursor for results that may not fit into memory
    # (driver's connection, statements): sends them together. Their answers, as cursors, up to the first error, after
    # which nothing is executed; and that error. None: each is executed by itself.
    exchange: Callable[[Any, Sequence[Statement]], tuple[Sequence[Any], Exception | None]] | None
    # (driver's connection, statement, rows, whether each must change exactly one row): what to send, the values for it,
    # and whether it is a statement for each row, to be prepared; else it is one for all.
    changes: Callable[[Any, str, Sequence[Mapping[str, Any]], bool], tuple[str, Sequence[Any], bool]] | None
    connect: Callable[[str, bool, float], Any]  # (URL, will write, busy timeout in seconds): the driver's connection
    is_stale: Callable[[Any], bool]  # (driver's connection, in no transaction): was it lost since its last use?
    # (URL, also commits that only add events). Raises StoreError
    watching: Callable[[str, bool], AbstractAsyncContextManager[Wake]]
    file: Callable[[str], Path | None]  # of a URL. None: this database is not a file. Raises UsageError
    driver_error: type[Exception]  # the base class of the driver's exceptions
    # The message for an error of the database itself, None for all others.
    explain: Callable[[BaseException], str | None]
    # Another transaction has, or had, the write lock, or came between.
    is_locked: Callable[[BaseException | None], bool]


def said(error: BaseException) -> str:
    """The driver's words on one line. psycopg says the same for each address of a host, and libpq with and without TLS:
    that is told once."""
    lines = (_ATTEMPT.sub("", line.strip()) for line in str(error).splitlines())
    return " ".join(dict.fromkeys(" ".join(line.split()) for line in lines if line and not line.startswith(_ATTEMPTS)))


def explain(
    dialect: Dialect,
    error: BaseException,
    *,
    place: str,
    busy_timeout_seconds: float,
    complete: Callable[[], bool] = lambda: False,
) -> StoreError | None:
    """None for an error that is due to the statement and not to the database. ``complete``: are Swarm's own tables all
    there? Then it is another program's trigger that names a missing one."""
    # MemoryError: Python's, or the driver's own
    text = OUT_OF_MEMORY if isinstance(error, MemoryError) else dialect.explain(error)
    if text is NOT_MIGRATED and complete():
        return None
    if text is None:
        return None
    kind = Locked if isinstance(error, Exception) and dialect.is_locked(error) else StoreError
    return kind(text.format(place=place, busy=busy_timeout_seconds, error=said(error)))

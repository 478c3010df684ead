"""What differs between databases. There is one module for each (`sqlite`); every other statement is the same SQL for
all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy.engine import URL
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Text

from swarm.errors import StoreError

# Messages with the fields of `explain`.
NOT_MIGRATED: Final = (
    "the database {place} doesn't have the tables this version of Swarm needs ({error}); run `swarm init`"
)
OUT_OF_MEMORY: Final = "out of memory in the database {place}"


class utc_now(FunctionElement[str]):
    """ISO-8601 UTC text with milliseconds, by the database's clock: the default of every column that people read."""

    type = Text()
    inherit_cache = True


@compiles(utc_now, "sqlite")
def _(element: utc_now, compiler: Any, **options: Any) -> str:
    return "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"


@compiles(utc_now, "postgresql")
def _(element: utc_now, compiler: Any, **options: Any) -> str:
    return "to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    name: str
    # SQL expression: milliseconds since 1970 by the clock that decides leases; tests move it (table `clock`).
    now_ms: str
    # SQL expression: a number that changes whenever another connection has changed the database.
    written_by_others: str
    columns: str  # SQL that returns (table, column) for every table of the database
    tidy: str  # a statement at the beginning of a writing connection
    begin_write: str  # starts a transaction that no other writer can get between
    begin_read: str
    on_connect: Callable[[Any, bool, float], None]  # (driver's connection, will write, busy timeout in seconds)
    file: Callable[[URL], Path | None]  # None: this database is not a file. Raises UsageError
    driver_error: type[Exception]  # the base class of the driver's exceptions
    # The message for an error of the database itself, None for all others.
    explain: Callable[[BaseException], str | None]
    is_locked: Callable[[BaseException | None], bool]  # another transaction has, or had, the write lock


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
    cause = getattr(error, "orig", None) or error
    # MemoryError: Python's, or the driver's own
    text = OUT_OF_MEMORY if isinstance(cause, MemoryError) else dialect.explain(cause)
    if text is NOT_MIGRATED and complete():
        return None
    return StoreError(text.format(place=place, busy=busy_timeout_seconds, error=cause)) if text else None

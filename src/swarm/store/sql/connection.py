"""A connection of one thread, and what goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from swarm.store.sql import files
from swarm.store.sql.dialect import Dialect
from swarm.store.sql.newcomers import Newcomers


@dataclass(slots=True)
class Connection:
    """The driver's connection. ``opened``: the files as they were then, to which it may write. ``newcomers``: they
    write first. ``lock_seconds``: waited for the write lock, in this transaction."""

    driver: Any
    write: bool
    opened: files.OpenFiles | None = None
    newcomers: Newcomers | None = None
    lock_seconds: float = 0.0
    row_types: dict[str, Callable[[Iterable[Any]], Any]] = field(default_factory=dict)

    def close(self) -> None:
        if self.newcomers is not None:
            self.newcomers.close()
        self.driver.close()


def is_complete(connection: Connection, dialect: Dialect) -> bool:
    """Are all tables and columns that Swarm needs there?"""
    from swarm.store.sql.schema import metadata

    try:
        connection.driver.rollback()  # after an error, PostgreSQL answers nothing else
        present = set(connection.driver.cursor().execute(dialect.columns).fetchall())
    except dialect.driver_error:
        return False
    return all((table.name, column.name) in present for table in metadata.tables.values() for column in table.columns)

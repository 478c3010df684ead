"""The versions of the tables. Each brings them up; none brings them back."""

from typing import NoReturn

from swarm.errors import StoreError


def no_way_back() -> NoReturn:
    """What Alembic calls to downgrade, which no command of Swarm does."""
    raise StoreError("a database is not brought back to an older version: restore the backup from before the upgrade")

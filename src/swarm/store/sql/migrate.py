"""Makes and upgrades the tables, by Alembic. Loaded only then: Alembic and SQLAlchemy take longer to import than most
commands take to run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from swarm.store.sql.dialect import Dialect

MIGRATIONS: Final = Path(__file__).parents[1] / "migrations"


class UnknownRevision(Exception):
    """The database's revision, which none of the migrations is."""


class RevisionLost(Exception):
    """There are tables, and no row that says which revision they are."""


def upgrade(driver: Any, dialect: Dialect) -> None:
    """Bring the database behind the driver's connection to the newest revision, in one transaction.

    Raises UnknownRevision, RevisionLost, and the driver's errors.
    """
    engine = sa.create_engine(f"{dialect.driver}://", creator=lambda: driver, poolclass=sa.StaticPool)
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(dialect.begin_migration) and None)
    try:
        with engine.connect() as connection, connection.begin():
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
            found = MigrationContext.configure(connection).get_current_revision()
            if found is not None and found not in known:
                raise UnknownRevision(found)
            if found is None and sa.inspect(connection).has_table("tickets"):
                raise RevisionLost
            command.upgrade(config, "head")
    except sa.exc.DBAPIError as error:
        raise error.orig or error from error

"""The tables of version 0.1.0."""

import sqlite3
from pathlib import Path

from alembic import op

from swarm.store.migrations import no_way_back

revision = "v0_1_0"  # databases made before the first release are at "0001", and are refused
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        return  # v0_2_1 is the first for it
    script = Path(__file__).with_name("0001_first.sqlite.sql").read_text(encoding="utf-8")
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if line.rstrip().endswith(";") and sqlite3.complete_statement(statement):  # a trigger has semicolons within
            op.get_bind().exec_driver_sql(statement)
            statement = ""


downgrade = no_way_back

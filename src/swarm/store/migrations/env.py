"""Alembic's entry: runs the migrations on the connection that database.py hands over, inside its transaction."""

from alembic import context

from swarm.store.sql.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()

"""The database: schema, migrations, and every statement that Swarm runs."""

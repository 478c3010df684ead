"""`swarm db …`: the database as a whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from swarm.base.plain import plain
from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui.render import counted, size

app = new_app("db", "Back the database up, put a backup back, and let other programs INSERT.")


@command(app, "backup", examples=["swarm db backup /backups/monday", "swarm db backup ./before --json"], json=True)
async def backup(
    cli: Cli, place: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory for the backup.")]
) -> None:
    """Write the database and the agents' programs into a new directory, while engines run.

    It holds what tickets and agents say, and sealed secrets, but not their key: keep that apart.
    """
    from swarm.admin import backup

    settings = cli.settings
    made = await backup.make(settings.database, settings.agents, place.absolute(), now_ms=time.time_ns() // 1_000_000)
    key = settings.data_dir / "secret.key"
    if not cli.out.json and key.exists():
        cli.out.note(f"the key of the secrets is not in it: {plain(str(key))}")
    cli.out.result(made, f"{plain(str(made.place))}: {made.database}, {size(made.bytes)}")


@command(app, "restore", examples=["swarm db restore /backups/monday --replace"], json=True)
async def restore(
    cli: Cli,
    place: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `swarm db backup` wrote.")],
    replace: Annotated[bool, typer.Option("--replace", help="Although the database there has tickets.")] = False,
) -> None:
    """Put a backup in the database's place, when no engine runs. An SQLite database that was there is kept beside it.

    Tickets are as they were then: what has ended since runs again, so cancel what must not before an engine starts.
    """
    from swarm.admin import backup

    settings = cli.settings
    done = await backup.put_back(settings.database, settings.agents, place.absolute(), replace=replace)
    if done.kept is not None and not cli.out.json:
        cli.out.note(f"the database that was there is kept: {plain(str(done.kept))}")
    cli.out.result(done, f"as it was at {done.backup.at}; {counted(done.agents, 'agent')} added; now `swarm prove`")


@command(app, "grants", examples=["swarm db grants ci", "swarm db grants ci --run"], json=True)
async def grants(
    cli: Cli,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="Of PostgreSQL: CREATE ROLE ci LOGIN PASSWORD '…'.")],
    run: Annotated[bool, typer.Option("--run", help="Run it, as the user of the database's URL.")] = False,
) -> None:
    """Print the SQL that lets a role of PostgreSQL INSERT tickets, their dependencies and sandboxes, and read them.

    It may do nothing else with them. The SQL may run again at any time.
    """
    async with cli.store() as store:
        sql = await store.grants(role, run=run)
    if cli.out.json:
        cli.out.dump({"role": role, "sql": sql, "ran": run})
    else:
        cli.out.text(f"{sql}\n")

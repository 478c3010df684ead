"""`swarm notice …`: signed POSTs to others when something happens."""

from __future__ import annotations

from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui.table import Column

app = new_app("notice", "Tell other programs when tickets end, a person is asked, or a budget is used up.")

_Id = Annotated[str, typer.Argument(metavar="ID", help="Of the notice, or its beginning.")]


@command(
    app,
    "add",
    examples=[
        "swarm notice add https://ci.example.org/hook --on ended",
        "swarm notice add https://chat.example.org/x --on failed --on approval --project night",
    ],
    json=True,
)
async def add(
    cli: Cli,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the POSTs go.")],
    on: Annotated[
        list[str], typer.Option("--on", metavar="KIND", help="ended, failed, approval or budget; again for more.")
    ],
    project: Annotated[str | None, typer.Option("--project", metavar="NAME", help="Only tickets of this one.")] = None,
) -> None:
    """Add a notice, and print the secret that its POSTs are signed with: this is the only time that it is shown.

    `swarm serve` sends them: when it doesn't run, they wait.
    """
    from swarm.api import notices
    from swarm.app import serve, wiring
    from swarm.errors import UsageError
    from swarm.store.registry.notices import NoticeKind

    if wrong := [one for one in on if one not in tuple(NoticeKind)]:
        raise UsageError(f"--on takes {', '.join(NoticeKind)}, not {wrong[0]!r}")
    async with cli.store() as store:
        vault = wiring.vault(cli.settings, store)
        kinds = [NoticeKind(one) for one in on]
        row, secret = await notices.add(store, vault, url=url, kinds=kinds, project_id=project, by=cli.user)
        never = serve.sender(cli.settings, store).never_sent(url)
    if not cli.out.json:
        cli.out.note(f"notice {row.id}")
    if never:
        cli.out.note(f"nothing will be sent there: {never}")
    cli.out.result({"notice": row, "secret": secret}, secret)


@command(app, "list", examples=["swarm notice list", "swarm notice list --json"], json=True)
async def list_(cli: Cli) -> None:
    """List notices: who is told what, and how the last one went."""
    async with cli.store() as store:
        rows = await store.notices()
    lines = [(row.id, row.url, ", ".join(row.kinds), row.project_id, row.sent_at, row.error) for row in rows]
    columns = ("ID", "URL", "ON", Column("PROJECT", drop=1), "LAST SENT", "ERROR")
    cli.out.listing(rows, columns, lines, empty="no notices")


@command(app, "rm", examples=["swarm notice rm 019c1f6e"])
async def rm(cli: Cli, id: _Id) -> None:
    """Remove a notice."""
    from swarm.api import notices
    from swarm.app import wiring

    async with cli.store() as store:
        row = await notices.remove(store, wiring.vault(cli.settings, store), id, by=cli.user)
    cli.out.line(f"notice {row.id} is removed")


@command(app, "test", examples=["swarm notice test 019c1f6e"])
async def test(cli: Cli, id: _Id) -> int:
    """Send a test to a notice's address, from here. Exit status 1 if it is not taken."""
    from swarm.app import serve

    async with cli.store() as store:
        why = await serve.sender(cli.settings, store).test(await store.notice(id))
    if why:
        cli.out.error(f"it was not taken: {why}")
        return 1
    cli.out.line("it was taken")
    return 0

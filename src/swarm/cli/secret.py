"""`swarm secret …`: secrets for agents, and keys for the gateway's services. Values are never arguments."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui.table import Column

app = new_app(
    "secret", "Set, list and remove secrets. They are encrypted at rest; an agent gets those that its manifest names."
)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The name that manifests use.")]
_Agent = Annotated[str | None, typer.Option("--agent", "-a", metavar="NAME", help="Only for this agent.")]
_Workflow = Annotated[
    str | None, typer.Option("--workflow", "-w", metavar="NAME", help="Only for steps of this workflow.")
]
_Webhook = Annotated[str | None, typer.Option("--webhook", metavar="NAME", help="Only for this workflow's webhook.")]


@command(
    app,
    "set",
    examples=[
        "swarm secret set anthropic_api_key",
        "swarm secret set GITHUB_TOKEN --agent release < token.txt",
        "swarm secret set DEPLOY_KEY --agent release < ~/.ssh/deploy",
        "pass show db | swarm secret set DB_PASSWORD --workflow nightly",
    ],
)
async def set_(
    cli: Cli, name: _Name, agent: _Agent = None, workflow: _Workflow = None, webhook: _Webhook = None
) -> None:
    """Set or replace a secret. The value is prompted for, or read from stdin.

    A value of one line loses its line end. One of several lines (a key in PEM form) keeps it: OpenSSH wants it. A byte
    order mark at the beginning, as editors on Windows write it, is dropped: it is no part of the text.
    """
    from swarm.admin.vault import MAX_BYTES, scope_of
    from swarm.app import wiring
    from swarm.errors import UsageError

    scope = scope_of(agent, workflow, webhook)
    if sys.stdin.isatty():
        value = getpass.getpass(f"value of {name} (not shown): ")
    else:
        try:
            value = sys.stdin.buffer.read(MAX_BYTES + 6).decode("utf-8-sig")  # and a mark and a line end, of one line
            line = value.removesuffix("\n").removesuffix("\r")
            value = value if "\n" in line or "\r" in line else line
        except UnicodeDecodeError:
            raise UsageError("the value on stdin is not UTF-8 text") from None
    async with cli.store() as store:
        await wiring.vault(cli.settings, store).set(name, value, scope=scope, by=cli.user)
    cli.out.line(f"secret {name} is set for {scope}")


@command(app, "list", examples=["swarm secret list"], json=True)
async def list_(cli: Cli) -> None:
    """List names and scopes. No command shows values."""
    from swarm.app import wiring

    async with cli.store() as store:
        rows = await wiring.vault(cli.settings, store).list()
    lines = [(row.name, row.scope, row.updated_at) for row in rows]
    cli.out.listing(rows, ("NAME", "SCOPE", Column("UPDATED", drop=1)), lines, empty="no secrets")


@command(app, "rm", examples=["swarm secret rm GITHUB_TOKEN --agent release"])
async def remove(
    cli: Cli, name: _Name, agent: _Agent = None, workflow: _Workflow = None, webhook: _Webhook = None
) -> None:
    """Remove a secret. Running attempts keep it."""
    from swarm.admin.vault import scope_of
    from swarm.app import wiring

    scope = scope_of(agent, workflow, webhook)
    async with cli.store() as store:
        await wiring.vault(cli.settings, store).remove(name, scope=scope, by=cli.user)
    cli.out.line(f"removed secret {name} for {scope}")

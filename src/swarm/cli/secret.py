"""`swarm secret …`: what agents are given by name, and keys of the gateway's services. Values never come in argv."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app

app = new_app("secret", "Secrets: set, list, remove. Sealed at rest; an agent gets those that its manifest names.")

_Name = Annotated[str, typer.Argument(metavar="NAME", help="As manifests name it.", show_default=False)]
_Agent = Annotated[str | None, typer.Option("--agent", "-a", metavar="NAME", help="For this agent alone.")]
_Workflow = Annotated[str | None, typer.Option("--workflow", "-w", metavar="NAME", help="For steps of this workflow.")]
_Webhook = Annotated[str | None, typer.Option("--webhook", metavar="NAME", help="For senders to this workflow.")]


@command(
    app,
    "set",
    examples=[
        "swarm secret set anthropic_api_key",
        "swarm secret set GITHUB_TOKEN --agent release < token.txt",
        "pass show db | swarm secret set DB_PASSWORD --workflow nightly",
    ],
)
async def set_(
    cli: Cli, name: _Name, agent: _Agent = None, workflow: _Workflow = None, webhook: _Webhook = None
) -> None:
    """Set a secret, or replace it. The value is asked for, or read from stdin (without the line's end)."""
    from swarm.admin.vault import MAX_BYTES, scope_of
    from swarm.app import wiring
    from swarm.errors import UsageError

    scope = scope_of(agent, workflow, webhook)
    if sys.stdin.isatty():
        value = getpass.getpass(f"value of {name} (not shown): ")
    else:
        try:
            value = sys.stdin.buffer.read(MAX_BYTES + 3).decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise UsageError("the value on stdin is not UTF-8 text") from None
    async with wiring.store(cli.settings) as store:
        await wiring.vault(cli.settings, store).set(name, value, scope=scope)
    cli.out.line(f"secret {name} is set for {scope}")


@command(app, "list", examples=["swarm secret list"], json=True)
async def list_(cli: Cli) -> None:
    """List names and scopes. Values are not shown by any command."""
    from swarm.app import wiring

    async with wiring.store(cli.settings) as store:
        rows = await wiring.vault(cli.settings, store).list()
    if cli.out.json:
        cli.out.dump(rows)
    else:
        cli.out.table(("NAME", "FOR", "SET"), [(r.name, r.scope, r.updated_at) for r in rows], empty="no secrets")


@command(app, "rm", examples=["swarm secret rm GITHUB_TOKEN --agent release"])
async def remove(
    cli: Cli, name: _Name, agent: _Agent = None, workflow: _Workflow = None, webhook: _Webhook = None
) -> None:
    """Remove a secret. An attempt that runs keeps what it was given."""
    from swarm.admin.vault import scope_of
    from swarm.app import wiring

    scope = scope_of(agent, workflow, webhook)
    async with wiring.store(cli.settings) as store:
        await wiring.vault(cli.settings, store).remove(name, scope=scope)
    cli.out.line(f"secret {name} for {scope} is gone")

"""`swarm token …`: who may call the API of `swarm serve`. `swarm dashboard`: let a browser in."""

from __future__ import annotations

import html
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui.table import Column
from swarm.model import Role

app = new_app("token", "Create, list and revoke tokens for the API of `swarm serve`.")


@command(
    app,
    "create",
    examples=[
        "swarm token create --name ci --role operator",
        "swarm token create --name grafana --role viewer --expires 90d",
        "swarm token create --name team-a --role operator --project a",
    ],
    json=True,
)
async def create(
    cli: Cli,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Whose it is; events name it.")],
    role: Annotated[
        Role,
        typer.Option(
            "--role",
            help="viewer reads; operator also adds, cancels, retries, answers and deletes tickets; admin does all.",
        ),
    ] = Role.VIEWER,
    project: Annotated[
        str | None, typer.Option("--project", metavar="NAME", help="Only tickets of this project exist for it.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="Such as 30d, 12h or 45m. Default: never.")
    ] = None,
) -> None:
    """Create a token and print it: this is the only time that it is shown."""
    from swarm.store.registry.tokens import Actor, checked_name, expires_seconds, new_token

    token, seconds = new_token(), expires_seconds(expires) if expires is not None else None
    actor = Actor(name=checked_name(name), role=role, project_id=project)
    async with cli.store() as store:
        await store.add_token(token, actor, by=cli.user, expires_seconds=seconds)
    cli.out.result({"name": name, "role": role, "project": project, "token": token}, token)


@command(app, "list", examples=["swarm token list", "swarm token list --json"], json=True)
async def list_(cli: Cli) -> None:
    """List tokens and the sessions of browsers: who has them, as what, and when they were used last. No command shows
    a token again."""
    async with cli.store() as store:
        rows = await store.tokens()
    lines = [
        (
            row.name, row.kind, row.role, row.project_id, row.created_by, row.created_at, row.expires_at,
            row.last_used_at, row.id,
        )
        for row in rows
    ]  # fmt: skip
    columns = (
        "NAME", "KIND", "ROLE", Column("PROJECT", drop=1), Column("CREATED BY", drop=3), Column("CREATED", drop=2),
        "EXPIRES", "LAST USED", "ID",
    )  # fmt: skip
    cli.out.listing(rows, columns, lines, empty="no tokens")


@command(app, "revoke", examples=["swarm token revoke ci"])
async def revoke(
    cli: Cli, name: Annotated[str, typer.Argument(metavar="NAME", help="Name, or id of a token or session.")]
) -> None:
    """Revoke a token, and end the sessions of browsers that it let in. What it began goes on.

    A name ends all that have it, sessions that a link of `swarm dashboard` began too; an id of a session ends that one.
    """
    async with cli.store() as store:
        row = await store.revoke_token(name, by=cli.user)
    cli.out.line(f"{row.kind} {row.name} is revoked")


def register(program: typer.Typer) -> None:
    examples = ["swarm dashboard", "swarm dashboard --role viewer", "swarm dashboard --no-open"]
    command(program, examples=examples, json=True)(dashboard)


async def dashboard(
    cli: Cli,
    role: Annotated[Role, typer.Option("--role", help="What this browser may do.")] = Role.ADMIN,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Where the server is reached, if by another address than its own."),
    ] = None,
    open_: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open a browser. Default: at a terminal with a display."),
    ] = None,
) -> None:
    """Print a link that lets a browser in, once, within five minutes; open it where there is a display."""
    from swarm.app import address
    from swarm.errors import HostError, NotFound
    from swarm.store.registry.tokens import LINK_SECONDS, Actor, new_token

    server = address.running(cli.settings)
    if url is None and server is None and address.hidden(cli.settings):
        raise HostError(f"this user may not look into {cli.settings.data_dir}: run this as the user of `swarm serve`")
    if url is None and server is None:
        raise NotFound("no server of this home runs: start one with `swarm serve`, or `swarm-engine start --serve`")
    code, user = new_token(), cli.user
    async with cli.store() as store:
        actor = Actor(name=user, role=role)
        await store.add_token(code, actor, by=user, kind="link", expires_seconds=LINK_SECONDS)
    place = url or (server.public_url or server.url if server is not None else "")
    link = f"{place.rstrip('/')}/login?code={code}"
    cli.out.result({"url": link, "seconds": LINK_SECONDS}, link)
    at_a_display = sys.stdout.isatty() and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if open_ or (open_ is None and at_a_display and not cli.out.json and "SUDO_USER" not in os.environ):
        await _open(cli, link)


async def _open(cli: Cli, link: str) -> None:
    """By way of a file that only this user can read: every user of this host sees the arguments of a program."""
    from swarm.base import files, process
    from swarm.errors import HostError

    page = cli.settings.data_dir / "dashboard.html"
    text = f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(link)}"><title>Swarm</title>'
    try:
        with files.host_errors(f"can't write {page}"):
            files.write_atomically(page, text, mode=0o600)
        argv = ["xdg-open", page.as_uri()]
        await process.spawn(argv, output=Path(os.devnull), env=dict(os.environ), die_with_parent=False)
    except HostError as error:
        cli.out.note(f"no browser is opened ({error}): open the link yourself")

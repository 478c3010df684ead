"""`swarm serve`: the HTTP server."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, stopped_by_signals


def register(app: typer.Typer) -> None:
    command(app, examples=["swarm serve", "swarm serve --port 9000"])(serve)


async def serve(
    cli: Cli,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any free one.")] = 8420,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let --host be an address that other hosts can reach.")
    ] = False,
) -> None:
    """Take webhooks: POST /hooks/NAME, signed, becomes a ticket that runs the workflow NAME. Nothing else is served.

    It makes tickets, and runs none: that is the engine's (`swarm-engine start`). Ctrl+C or SIGTERM stops it, once what
    it is answering has been answered.
    """
    from swarm.app import serve
    from swarm.base.log import configure

    configure(debug=cli.debug, info=True)
    async with serve.served(cli.settings, host=host, port=port, remote=allow_remote) as (url, served):
        cli.out.line(f"serving POST {url}/hooks/NAME; Ctrl+C stops it")
        stop = asyncio.Event()
        with stopped_by_signals(stop.set):
            told = asyncio.create_task(stop.wait())
            await asyncio.wait({told, served}, return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
    if served.done() and not stop.is_set():
        served.result()

"""`swarm serve`: the HTTP server."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, stopped_by_signals


def register(app: typer.Typer) -> None:
    command(app, examples=["swarm serve", "swarm serve --port 9000"])(serve)


async def serve(
    cli: Cli,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="Port to listen on; 0 takes a free one.")
    ] = 8420,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Allow a --host that other hosts can reach.")
    ] = False,
    public_url: Annotated[
        str | None,
        typer.Option("--public-url", metavar="URL", help="How browsers reach it behind a proxy, if there is one."),
    ] = None,
    json_log: Annotated[bool, typer.Option("--json-log", hidden=True, help="Log lines as JSON.")] = False,
) -> None:
    """Serve the dashboard, the API, webhooks and metrics over HTTP.

    `swarm dashboard` lets a browser in, `swarm token create` a program; a signed POST /hooks/NAME adds a ticket that
    runs the workflow NAME. Tickets are run by an engine: `swarm-engine start`, which with --serve runs this server too.
    Ctrl+C or SIGTERM stops the server, once open requests are answered.
    """
    from swarm import config
    from swarm.app import address, serve
    from swarm.base import priority
    from swarm.base.log import configure, logger

    configure(debug=cli.debug, info=True, as_json=json_log)
    # Engines on the same CPUs go first: whoever looks at a page can wait for a millisecond.
    priority.lower(os.getpid(), priority.BELOW_ENGINE)
    settings = config.load(home=cli.settings.home, public_url=public_url and public_url.rstrip("/"))
    async with serve.served(settings, host=host, port=port, remote=allow_remote) as (url, served):
        gc.freeze()  # what was loaded stays: a full collection would look at it again each time, for 40 ms
        with address.written(settings, url):
            logger("swarm.serve").info("server serves", url=url)
            cli.out.line(f"serving {url}; `swarm dashboard` lets a browser in; Ctrl+C stops it")
            stop = asyncio.Event()
            with stopped_by_signals(stop.set):
                stopping = asyncio.create_task(stop.wait())
                await asyncio.wait({stopping, served}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
    if served.done() and not stop.is_set():
        served.result()

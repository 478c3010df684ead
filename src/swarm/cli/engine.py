"""`swarm-engine`: run tickets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.frame import Cli, command, new_app, start, stopped_by_signals
from swarm.cli.inputs import TicketId
from swarm.cli.ui import render
from swarm.cli.unit import unit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from swarm.app.address import Address
    from swarm.config import Settings
    from swarm.model import Ticket

app = new_app(
    "swarm-engine",
    "Run tickets, each in its own microVM. `swarm` adds, shows and cancels them, and does all else.",
    examples=[
        "swarm-engine start --foreground --max-vms=2",
        "swarm-engine run-ticket test-echo-002 --wait",
        "swarm-engine status",
        "swarm-engine stop",
    ],
)


_OOM_SCORE = 100


class LogFormat(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


class DriverName(StrEnum):
    AUTO = "auto"
    FIRECRACKER = "firecracker"
    QEMU = "qemu"
    PROCESS = "process"


_Driver = Annotated[DriverName | None, typer.Option("--driver", help="Driver that runs the VMs (SWARM_DRIVER).")]


@command(
    app,
    "start",
    examples=[
        "swarm-engine start --foreground --max-vms=2",
        "swarm-engine start --max-vms=8 --warm=2 --grace=120",
        "swarm-engine start --serve",
        "swarm-engine start --foreground --log-format=json",
    ],
)
async def start_(
    cli: Cli,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Don't go into the background; Ctrl+C stops it.")
    ] = False,
    max_vms: Annotated[
        int | None,
        typer.Option(
            "--max-vms",
            envvar="SWARM_MAX_VMS",
            min=1,
            max=60000,
            metavar="N",
            help="VMs at once. Default: 2 per usable CPU.",
        ),
    ] = None,
    max_sandboxes: Annotated[
        int | None,
        typer.Option(
            "--max-sandboxes",
            envvar="SWARM_MAX_SANDBOXES",
            min=0,
            max=60000,
            metavar="N",
            help="Sandboxes that run at once; paused ones don't count. Default: 16 per usable CPU.",
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            "--grace", envvar="SWARM_GRACE", min=0, metavar="S", help="Seconds that running tickets get after a stop."
        ),
    ] = 60.0,
    warm: Annotated[
        str,
        typer.Option(
            "--warm",
            envvar="SWARM_WARM",
            metavar="N|auto",
            help="VMs of each kind in use to keep ready. auto: by demand.",
        ),
    ] = "0",
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="auto: a live view on a terminal, otherwise text.")
    ] = (LogFormat.AUTO),
    driver: _Driver = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Also run `swarm serve` on this host's loopback, until the engine ends.")
    ] = False,
    serve_port: Annotated[
        int, typer.Option("--serve-port", min=0, max=65535, metavar="N", help="Its port; 0 takes a free one.")
    ] = 8420,
    pid_file: Annotated[Path | None, typer.Option("--pid-file", hidden=True)] = None,
) -> None:
    """Run all ready tickets, until stopped. Without --foreground, in the background: see status and stop.

    After Ctrl+C or SIGTERM it starts no more tickets. Running ones get --grace seconds; then their VMs are killed,
    their steps go back to the queue, and the attempt is not counted. A second signal ends the grace at once. Sandboxes
    are paused; the next engine resumes those that are used.
    """
    from swarm.app import wiring
    from swarm.cli import service

    max_vms = max_vms or wiring.default_max_vms()
    max_sandboxes = wiring.default_max_sandboxes() if max_sandboxes is None else max_sandboxes
    keep_warm = _warm(warm)
    if not foreground:
        argv = [f"--max-vms={max_vms}", f"--max-sandboxes={max_sandboxes}", f"--grace={grace:g}", f"--warm={warm}"]
        argv += [f"--driver={driver}"] if driver else []
        argv += ["--log-format=json"] if log_format is LogFormat.JSON else []
        argv += ["--serve", f"--serve-port={serve_port}"] if serve else []
        async with cli.store() as store:
            ours = await service.start(cli.settings, store, argv)
        cli.out.line(f"the engine runs in process {ours.pid}; its log is {service.log_file(cli.settings)}")
        if serve:
            server = await service.server_ready(cli.settings)
            said = "the server does not answer yet: see the log" if server is None else _server_line(server)
            cli.out.line(said)
        return
    settings = _with_driver(cli.settings, driver)
    with service.pid_written(pid_file):
        await _serve(
            cli, settings, max_vms=max_vms, max_sandboxes=max_sandboxes, grace_seconds=grace, warm=keep_warm,
            log_format=log_format, port=serve_port if serve else None,
        )  # fmt: skip


def _with_driver(settings: Settings, driver: DriverName | None) -> Settings:
    return settings.model_copy(update={"driver": str(driver)}) if driver else settings


def _warm(text: str) -> int | None:
    """The number of VMs; None for 'auto'."""
    from swarm.errors import UsageError

    if text == "auto":
        return None
    if not text.isdecimal() or int(text) > 1000:
        raise UsageError(f"--warm takes a number of VMs up to 1000, or auto, not {text!r}")
    return int(text)


async def _serve(
    cli: Cli,
    settings: Settings,
    *,
    max_vms: int,
    max_sandboxes: int,
    grace_seconds: float,
    warm: int | None,
    log_format: LogFormat,
    port: int | None,
) -> None:
    """``port``: of the HTTP server; None: there is none."""
    from swarm.app import wiring
    from swarm.base import crash_points
    from swarm.base.log import configure, logger
    from swarm.cli import service
    from swarm.cli.ui import live

    if os.environ.get("SWARM_FAULT"):  # for crash tests
        crash_points.arm(os.environ["SWARM_FAULT"])
    with_view = live.wanted(log_format)
    configure(debug=cli.debug, info=not with_view, as_json=log_format is LogFormat.JSON)
    log = logger("swarm.engine")
    _set_limits()
    view = live.View()
    as_json = log_format is LogFormat.JSON
    output = service.log_file(settings) if with_view else None  # lines would tear the view
    async with (
        wiring.store(settings) as store,
        service.with_server(settings, port, as_json=as_json, output=output)
        if port is not None
        else contextlib.nullcontext(),
        wiring.dispatcher(
            settings,
            store,
            max_vms=max_vms,
            max_sandboxes=max_sandboxes,
            grace_seconds=grace_seconds,
            ended=view.ended,
            warm=warm,
        ) as dispatcher,
    ):
        await service.forget_dead(store)
        with stopped_by_signals(dispatcher.stop):
            if with_view:
                async with view.showing(dispatcher, store):
                    await dispatcher.run()
            else:
                await dispatcher.run()
    log.info("engine stopped")  # and so have its VMs, slots and database connections


def _set_limits() -> None:
    """As many file descriptors as this host permits: a VM needs about ten. When memory is short, the kernel kills VMs
    first, then the engine, then what else runs on the host, unless its operator has decided otherwise."""
    from swarm.base import process

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if Path("/proc/self/oom_score_adj").read_text() == "0\n":
        process.expendable(os.getpid(), _OOM_SCORE)


@command(
    app,
    "stop",
    examples=[
        "swarm-engine stop",
        "swarm-engine stop --now",
        "swarm-engine stop --timeout 10",
        "swarm-engine stop --serve",
    ],
)
async def stop(
    cli: Cli,
    now: Annotated[
        bool, typer.Option("--now", help="Without grace: running steps go back to the queue at once.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, metavar="S", help="Wait at most this many seconds.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Also stop a `swarm serve` that runs by itself.")] = False,
) -> int:
    """Stop every engine of this home on this host, and wait until it has ended; so has its server.

    Running tickets get the grace that the engine was started with. Exit status 1 if an engine still runs.
    """
    from swarm.cli import service

    found = await service.engines(cli.settings)
    if not found:
        cli.out.line("no engine runs")
    ended = await asyncio.gather(*(service.stop(one, now=now, timeout_seconds=timeout) for one in found))
    for one, gone in zip(found, ended, strict=True):
        if gone:
            cli.out.line(f"engine {one.pid} stopped")
        else:
            cli.out.error(f"engine {one.pid} still runs after {timeout:g} s: use --now, or wait longer")
    if serve and (server := service.server(cli.settings)) is not None:
        if await service.stop(server, now=False, timeout_seconds=timeout):
            cli.out.line(f"server {server.pid} stopped")
        else:
            cli.out.error(f"server {server.pid} still runs after {timeout:g} s: wait longer")
            return 1
    return 0 if all(ended) else 1


@command(
    app,
    "run-ticket",
    examples=[
        "swarm-engine run-ticket test-echo-002 --wait",
        "swarm-engine run-ticket test-echo-002 --wait --timeout 60",
    ],
    json=True,
)
async def run_ticket(
    cli: Cli,
    id: TicketId,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended, and print the result.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", min=0.001, metavar="S", help="Stop it after this many seconds; its steps go back to the queue."
        ),
    ] = None,
    driver: _Driver = None,
) -> int:
    """Run one ticket now; without --wait, in the background. Exit status with --wait: 0 if it is done, 1 otherwise.

    With --wait, what its agents print goes to stderr while it runs, the result to stdout.
    """
    from swarm.app import ticket_runs
    from swarm.cli import follow

    settings = _with_driver(cli.settings, driver)
    async with cli.store() as store:
        id = await store.ticket_id(id)
    if not wait:
        pid = await ticket_runs.run_ticket_in_background(settings, id, timeout_seconds=timeout)
        line = f"ticket {id} runs in process {pid}; `swarm ticket show {id}` shows its state"
        cli.out.result({"ticket_id": id, "pid": pid}, line)
        return 0

    def waits(ticket: Ticket) -> None:
        cli.out.note(f"ticket {ticket.id} waits for a person: `swarm ticket show {ticket.id}` shows for what")

    def says(step: str, _share: float) -> None:
        if not cli.out.json:
            cli.out.note(step)

    async with cli.store() as store:
        async with follow.live(cli, store, id):
            ticket, attempts = await ticket_runs.run_ticket(
                settings, id, timeout_seconds=timeout, waits=waits, progress=says
            )
        runs, steps = await store.runs(id), await store.steps(id)
        names = await store.names((ticket.agent_id, ticket.workflow_id))
    if cli.out.json:
        cli.out.dump({"ticket": ticket, "runs": runs, "steps": steps, "attempts": attempts})
    else:
        render.show_ticket(cli.out, ticket, names)
        if ticket.execution_mode == "workflow":
            render.show_steps(cli.out, ticket, runs, steps)
        elif attempts:
            cli.out.line("time")
            render.show_timings(cli.out, attempts[-1].timings)
    return 0 if ticket.state == "done" else 1


@command(app, "status", examples=["swarm-engine status", "swarm-engine status --json"], json=True)
async def status(cli: Cli) -> None:
    """Show the engines, the server, the queue, and the number of VMs on this host."""
    from swarm.admin import status as admin
    from swarm.app import address, wiring
    from swarm.base.plain import plain

    async with cli.store() as store:
        found = await admin.status(store, wiring.inventory(cli.settings))
    server = address.running(cli.settings)
    if cli.out.json:
        cli.out.dump(plain(found) | {"server": server})
        return
    queue, live = found.queue, [engine.info for engine in found.engines if engine.alive]
    for engine in found.engines:
        cli.out.line(render.engine_line(engine))
    if not found.engines:
        cli.out.line("no engine runs; start one with `swarm-engine start`")
    if server is not None:
        cli.out.line(_server_line(server))
    oldest = queue.oldest_ready_ms
    cli.out.fields(
        {
            "ready": queue.ready,
            "running": queue.running,
            "in back-off": queue.delayed or None,
            "blocked": queue.blocked,
            "waiting for a person": queue.waiting or None,
            "oldest ready": None if oldest is None else render.duration(oldest),
            "VMs": sum(vm.alive for vm in found.vms),
            "ended": f"{sum(int(info.get('per_minute') or 0) for info in live)} per minute",
            "waiting for": _said(live, "waits_for") if queue.ready else None,
            "waiting for a host": "; ".join(str(one).partition(" a host ")[2] for one in found.elsewhere) or None,
            "sandboxes wait for": _said(live, "sandboxes_wait_for"),
            "settings differ": "; ".join(found.settings_differ) or None,
        }
    )


command(app, "unit", examples=["swarm-engine unit", "swarm-engine unit --max-vms=8 --grace=120"])(unit)


def _said(live: Sequence[Mapping[str, object]], what: str) -> str | None:
    return next((why for info in live if (why := str(info.get(what) or ""))), None)


def _server_line(server: Address) -> str:
    return f"server {server.pid} serves {server.url}; `swarm dashboard` lets a browser in"


def run() -> None:
    start(app, "swarm-engine")


if __name__ == "__main__":
    run()

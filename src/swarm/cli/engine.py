"""`swarm-engine`: run tickets."""

from __future__ import annotations

import asyncio
import os
import resource
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.frame import Cli, command, new_app, start, stopped_by_signals
from swarm.cli.ui import render

if TYPE_CHECKING:
    from swarm.config import Settings
    from swarm.model import Ticket
    from swarm.store.sql.rows import WorkerRow

app = new_app(
    "swarm-engine",
    "Run tickets, each by its agent in a microVM of its own.",
    examples=[
        "swarm-engine start --foreground --max-vms=2",
        "swarm-engine run-ticket test-echo-002 --wait",
        "swarm-engine status",
        "swarm-engine stop",
    ],
)


class LogFormat(StrEnum):
    AUTO = "auto"  # a live view in a terminal, else text
    TEXT = "text"
    JSON = "json"


class DriverName(StrEnum):
    AUTO = "auto"
    FIRECRACKER = "firecracker"
    QEMU = "qemu"
    PROCESS = "process"


@command(
    app,
    "start",
    examples=[
        "swarm-engine start --foreground --max-vms=2",
        "swarm-engine start --max-vms=8 --warm=2 --grace=120",
        "swarm-engine start --foreground --log-format=json",
    ],
)
async def start_(
    cli: Cli,
    foreground: Annotated[bool, typer.Option("--foreground", "-f", help="Stay here; Ctrl+C stops it.")] = False,
    max_vms: Annotated[
        int | None, typer.Option("--max-vms", min=1, max=60000, metavar="N", help="VMs at once. Default: 2 per CPU.")
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, metavar="S", help="How long running tickets may go on after a stop.")
    ] = 60.0,
    warm: Annotated[
        str,
        typer.Option("--warm", metavar="N|auto", help="VMs to keep ready ahead, of each kind in use. auto: by demand."),
    ] = "0",
    log_format: Annotated[LogFormat, typer.Option("--log-format", help="auto: a live view in a terminal.")] = (
        LogFormat.AUTO
    ),
    driver: Annotated[DriverName | None, typer.Option("--driver", help="What runs the VMs (SWARM_DRIVER).")] = None,
    pid_file: Annotated[Path | None, typer.Option("--pid-file", hidden=True)] = None,
) -> None:
    """Serve tickets: see each ready one, run it, until told to stop.

    Ctrl+C or SIGTERM: no new tickets; those that run get --grace seconds, then their VMs are killed and they go back,
    and the try is not counted. A second one: now. Without --foreground it runs in the background; see status and stop.
    """
    from swarm.app import wiring
    from swarm.cli import service

    max_vms = max_vms or 2 * (os.cpu_count() or 1)
    ready = _warm(warm)
    if not foreground:
        argv = [f"--max-vms={max_vms}", f"--grace={grace:g}", f"--warm={warm}"]
        argv += [f"--driver={driver}"] if driver else []
        argv += ["--log-format=json"] if log_format is LogFormat.JSON else []
        async with wiring.store(cli.settings) as store:
            ours = await service.start(cli.settings, store, argv)
        cli.out.line(f"the engine runs in process {ours.pid}; its log is {service.log_file(cli.settings)}")
        return
    settings = cli.settings.model_copy(update={"driver": str(driver)}) if driver else cli.settings
    with service.pid_written(pid_file):
        await _serve(cli, settings, max_vms=max_vms, grace_seconds=grace, warm=ready, log_format=log_format)


def _warm(text: str) -> int | None:
    """How many; None for 'auto'."""
    from swarm.errors import UsageError

    if text == "auto":
        return None
    if not text.isdecimal() or int(text) > 1000:
        raise UsageError(f"--warm takes a number of VMs, or auto, not {text!r}")
    return int(text)


async def _serve(
    cli: Cli, settings: Settings, *, max_vms: int, grace_seconds: float, warm: int | None, log_format: LogFormat
) -> None:
    import structlog

    from swarm.app import wiring
    from swarm.base import crash_points
    from swarm.base.log import configure
    from swarm.cli import service
    from swarm.cli.ui import live

    if os.environ.get("SWARM_FAULT"):  # crash tests
        crash_points.arm(os.environ["SWARM_FAULT"])
    lively = live.wanted(log_format)
    configure(debug=cli.debug, info=not lively, as_json=log_format is LogFormat.JSON)
    log = structlog.get_logger("swarm.engine.engine")
    _raise_limits()
    view = live.View()
    async with (
        wiring.store(settings) as store,
        wiring.dispatcher(
            settings, store, max_vms=max_vms, grace_seconds=grace_seconds, ended=view.ended, warm=warm
        ) as dispatcher,
    ):
        await service.forget_dead(store)
        with stopped_by_signals(dispatcher.stop):
            if lively:
                async with view.showing(dispatcher, store):
                    await dispatcher.run()
            else:
                await dispatcher.run()
    log.info("engine stopped")  # its VMs, slots and database too


def _raise_limits() -> None:
    """A VM takes some ten descriptors: as many as this host lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@command(app, "stop", examples=["swarm-engine stop", "swarm-engine stop --now", "swarm-engine stop --timeout 10"])
async def stop(
    cli: Cli,
    now: Annotated[bool, typer.Option("--now", help="Without grace: tickets that run go back at once.")] = False,
    timeout: Annotated[float | None, typer.Option("--timeout", min=0, metavar="S", help="Wait no longer.")] = None,
) -> int:
    """Stop every engine of this home on this host, and wait until it is gone.

    Tickets that run get the grace that the engine was started with. Exit status 1 if one is still there.
    """
    from swarm.cli import service

    found = await service.engines(cli.settings)
    if not found:
        cli.out.line("no engine runs")
        return 0
    ended = await asyncio.gather(*(service.stop(one, now=now, timeout_seconds=timeout) for one in found))
    for one, gone in zip(found, ended, strict=True):
        if gone:
            cli.out.line(f"engine {one.pid} stopped")
        else:
            cli.out.error(f"engine {one.pid} still runs after {timeout:g} s: --now, or wait longer")
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
    id: Annotated[str, typer.Argument(metavar="ID", help="The ticket's id.", show_default=False)],  # noqa: A002
    wait: Annotated[bool, typer.Option("--wait", help="Stay until it has ended, and print what came of it.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", min=0.001, metavar="S", help="Give up after S seconds; the ticket goes back to 'ready'."
        ),
    ] = None,
) -> int:
    """Run one ticket now. Exit status 0 if it is done, 1 if it failed.

    Without --wait a process in the background runs it, and this one ends at once.
    """
    from swarm.app import wiring

    if not wait:
        pid = await wiring.run_ticket_in_background(cli.settings, id, timeout_seconds=timeout)
        if cli.out.json:
            cli.out.dump({"ticket_id": id, "pid": pid})
        else:
            cli.out.line(f"ticket {id} runs in process {pid}; `swarm ticket show` tells how it goes")
        return 0

    def waits(ticket: Ticket) -> None:
        cli.out.note(f"ticket {ticket.id} waits for a person: `swarm ticket show {ticket.id}` says for what")

    ticket, attempts = await wiring.run_ticket(cli.settings, id, timeout_seconds=timeout, waits=waits)
    async with wiring.store(cli.settings) as store:
        runs, steps = await store.runs(id), await store.steps(id)
    if cli.out.json:
        cli.out.dump({"ticket": ticket, "runs": runs, "steps": steps, "attempts": attempts})
    else:
        render.show_ticket(cli.out, ticket)
        if ticket.execution_mode == "workflow":
            render.show_steps(cli.out, ticket, runs, steps)
        elif attempts:
            cli.out.line("time")
            render.show_timings(cli.out, attempts[-1].timings)
    return 0 if ticket.state == "done" else 1


@command(app, "status", examples=["swarm-engine status", "swarm-engine status --json"], json=True)
async def status(cli: Cli) -> None:
    """Show the engines, the queue, and the VMs of this host."""
    from dataclasses import asdict

    from swarm.app import wiring
    from swarm.cli import service

    async with wiring.store(cli.settings) as store:
        queue, workers = await store.queue(), await store.workers()
    vms = wiring.inventory(cli.settings).records()
    alive = {row.id: row.seen_ms_ago < service.SILENT_AFTER_SECONDS * 1000 for row in workers}
    if cli.out.json:
        engines = [{**asdict(row), "alive": alive[row.id]} for row in workers]
        cli.out.dump({"queue": queue, "vms": vms, "engines": engines})
        return
    for row in workers:
        cli.out.line(_engine_line(row, alive=alive[row.id]))
    if not workers:
        cli.out.line("no engine runs: `swarm-engine start` starts one")
    oldest = queue.oldest_ready_ms
    cli.out.fields(
        {
            "ready": queue.ready,
            "running": queue.running,
            "in back-off": queue.delayed or None,
            "blocked": queue.blocked,
            "waiting for a person": queue.waiting or None,
            "oldest ready": None if oldest is None else render.duration(oldest),
            "VMs": sum(vm.alive for vm in vms),
            "ended": f"{sum(int(row.info.get('per_minute') or 0) for row in workers if alive[row.id])} per minute",
            "waiting for": next((why for row in workers if (why := str(row.info.get("waits_for") or ""))), None)
            if queue.ready
            else None,
        }
    )


def _engine_line(row: WorkerRow, *, alive: bool) -> str:
    info, where = row.info, f"engine {row.pid} on {row.host}"
    if not alive:
        return f"{where}: silent for {render.duration(row.seen_ms_ago)}; what it ran goes back when its leases end"
    doing = "stopping" if info.get("stopping") else "serving"
    return f"{where}: {doing}, {info.get('running')} of {info.get('max_vms')} VMs, driver {info.get('driver')}"


def run() -> None:
    start(app, "swarm-engine")


if __name__ == "__main__":
    run()

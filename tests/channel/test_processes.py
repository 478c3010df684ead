"""Programs in a guest by `exec`: a real agentd on this host."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm.channel import Guest, processes
from swarm.channel.conversation import Open
from swarm.channel.processes import Order, run
from swarm.errors import GuestRefused
from tests.channel import agentd_here


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Open]:
    async with agentd_here.running(tmp_path) as it:
        guest = Guest(it.vm.endpoint, agentd_here.TOKEN)
        yield guest.open
        await guest.close()


def sh(script: str, **options: object) -> Order:
    return Order(argv=["/bin/sh", "-c", script], **options)  # type: ignore[arg-type]


async def test_output_status_and_input(there: Open) -> None:
    done = await run(there, sh("cat; echo problem >&2; exit 3", stdin=b"given"))
    assert (done.stdout, done.stderr, done.ended.status) == (b"given", b"problem\n", 3)


async def test_a_program_that_is_not_there(there: Open) -> None:
    for order in (Order(argv=["/no/such"]), Order(argv=["true"], cwd="/no/such")):
        with pytest.raises(GuestRefused, match="No such file or directory") as caught:
            await run(there, order)
        assert caught.value.kind == "CannotStart"
    assert await processes.processes(there) == []


async def test_a_terminal_has_a_size(there: Open) -> None:
    async with processes.start(there, sh("stty size; read x; stty size", pty=(91, 33))) as process:
        stream = aiter(process)
        assert await anext(stream) == ("stdout", b"33 91\r\n")
        await process.resize(100, 40)
        await process.write(b"\n")
        done = await process.collect(1000)
    assert b"40 100" in done.stdout


async def test_one_in_the_background_is_found_again(there: Open) -> None:
    script = "read x; echo $x; read x; exit $x"
    async with processes.start(there, sh(script, open_stdin=True, background=True, process="it")) as process:
        await process.write(b"first\n")
        assert await anext(aiter(process)) == ("stdout", b"first\n")
    async with processes.attach(there, "it") as process:
        assert await anext(aiter(process)) == ("stdout", b"first\n")
        await process.write(b"7\n")
        assert (await process.exit()).code == 7
    (listed,) = await processes.processes(there)
    assert listed.ended is not None
    assert listed.ended.code == 7


async def test_leaving_kills_it_and_all_that_it_started(there: Open, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with processes.start(there, sh(f"setsid sh -c 'echo here; exec sleep 1000' > {pipe} & sleep 1000")):
        reader = await asyncio.to_thread(pipe.open, "rb")
        assert await asyncio.to_thread(reader.readline) == b"here\n"
    with reader:
        assert await asyncio.to_thread(reader.read) == b""  # nobody has it open any more

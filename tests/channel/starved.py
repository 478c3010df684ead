"""A process that runs out of memory while it sends, again and again: `python -m tests.channel.starved`.

A server that reads nothing fills the socket; from then on what is sent has to be kept. With each try a little more
memory is allowed, so that some run out of it in the middle of asyncio's own write. After each, a connection with the
same descriptor must hear what it is told. Prints how many tries ran out of memory, and how many of those that came
after heard nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import sys
import tempfile
from pathlib import Path

from swarm.channel import Channel
from swarm.errors import ChannelError

_STEP_BYTES = 16 << 10


def allow(bytes_more: int | None) -> None:
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmData")]
    limit = resource.RLIM_INFINITY if bytes_more is None else (int(line.split()[1]) << 10) + bytes_more
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


async def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(scratch, "socket"))
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        starved = deaf = served = more = 0
        payload = b"x" * (1 << 20)
        while served < 2:
            channel = Channel(*await asyncio.open_unix_connection(path), b"t" * 32, 0.05)
            theirs, _ = await loop.sock_accept(listener)
            allow(more)
            more += _STEP_BYTES
            try:
                await channel.put({"x": payload}, dest="/work")
            except MemoryError:
                starved += 1
            except ChannelError:  # all was sent or kept, and nobody answered
                served += 1
            finally:
                allow(None)
            channel.close()
            theirs.close()
            await asyncio.sleep(0)  # the socket is closed in the loop's next turn
            reader, writer = await asyncio.open_unix_connection(path)
            theirs, _ = await loop.sock_accept(listener)
            theirs.send(b"hello")
            try:
                await asyncio.wait_for(reader.readexactly(5), 60 if deaf == 0 else 1)
            except TimeoutError:
                deaf += 1
            writer.transport.abort()
            theirs.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    sys.stdout.write(f"{starved} {deaf}\n")


if __name__ == "__main__":
    asyncio.run(main())

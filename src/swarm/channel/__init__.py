"""Runs commands and copies files in a guest: the client of guest/agentd.py.

::

    async with Channel.connect(vm.endpoint, token=token, timeout_seconds=30) as channel:
        await channel.renew(identity)
        await channel.put({"input.json": data}, dest="/work")
        exit = await channel.run(["/agent/main.py"], warm=True, timeout_seconds=600, on_output=print)
        output = await channel.get("/work/output.json", limit_bytes=16 << 20)

agentd answers in order, so calls can be pipelined: ``asyncio.gather(channel.renew(…), channel.run(…))`` costs one
round trip, and a call is skipped if the one sent before it failed. A protocol violation, an unexpected frame, or a
cancellation or timeout during a call closes the connection for good. Closing it kills the running agent.

What goes on both ways is a `Conversation`, any number at once::

    guest = Guest(vm.endpoint, token)
    async with processes.start(guest.open, Order(argv=["/bin/sh"], pty=(80, 24))) as process:
        await process.write(b"exit 3\\n")
        async for stream, data in process: ...
        ended = await process.exit()
"""

from swarm.channel.client import Channel
from swarm.channel.conversation import Conversation, Open
from swarm.channel.guest import Guest
from swarm.channel.values import Exit, Hello, Identity, Renewed

__all__ = ["Channel", "Conversation", "Exit", "Guest", "Hello", "Identity", "Open", "Renewed"]

"""How the host runs commands and moves files in a guest: the client of guest/agentd.py.

::

    async with Channel.connect(vm.endpoint, token=token, timeout_seconds=30) as channel:
        await channel.renew(identity)
        await channel.put({"input.json": data}, dest="/work")
        exit = await channel.run(["/agent/main.py"], warm=True, timeout_seconds=600, on_output=print)
        output = await channel.get("/work/output.json", limit_bytes=16 << 20)

agentd answers in order, so calls may be sent ahead: ``asyncio.gather(channel.renew(…), channel.run(…))`` costs one
round trip, and a call is skipped when the one sent before it failed. A broken rule, a late or foreign frame, a
cancellation or timeout in the middle of a call closes the connection for good; closing it kills what runs.
"""

from swarm.channel.client import Channel
from swarm.channel.values import Exit, Hello, Identity, Renewed

__all__ = ["Channel", "Exit", "Hello", "Identity", "Renewed"]

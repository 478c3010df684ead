"""What is done in a VM before anybody's agent: once in each template, and once in each machine of the pool.

A part of what shapes a template, so its text is in the template's key.
"""

from __future__ import annotations

import os
import secrets

from swarm.channel import Channel, Identity
from swarm.vm.slots import ssh

# What agents in Python import most. In a clone, where no code is translated yet, `import pathlib` alone takes 80 ms. An
# agent that needs none of it pays nothing: the pages are the template's. Without what loads OpenSSL (ssl, http.client,
# urllib.request): to renew its random state costs each agent 40 ms. Who needs that declares it in `preload`.
COMMON_MODULES = (
    "json", "re", "pathlib", "dataclasses", "datetime", "typing", "enum", "collections", "functools", "itertools",
    "contextlib", "io", "math", "random", "base64", "string", "textwrap", "shutil", "tempfile",
    "subprocess", "traceback",
)  # fmt: skip
# Twice what the kernel's generator holds.
SEED_BYTES = 64


async def warm_template(channel: Channel, token: bytes, *, work_disk: bool) -> None:
    """Do what every clone will: files are copied up, pages read, sockets opened, threads started and interpreter state
    made once, here, not in each clone. The identity is nobody's: its host key opens nothing and every clone gets its
    own before it is used."""
    nobody = Identity(
        generation="template",
        seed=os.urandom(SEED_BYTES),
        hostname="vm0",  # no longer than any other: a file that does not shrink is written over
        machine_id="0" * 32,
        ssh_host_key=ssh.new_key().private.decode(),
        authorized_keys="",
        token=token,
        work_disk=work_disk,  # a template's memory must not know a disk that its clones don't have
    )
    await channel.renew(nobody)
    program = f"/agent/{secrets.token_hex(8)}.py"
    code = b"import json, pathlib, sys\njson.dumps(json.loads('{}'))\n"
    await channel.put({program.removeprefix("/agent/"): code}, dest="/agent", owner="root")
    for _ in range(3):
        await channel.run([program], warm=True, cwd="/", timeout_seconds=60)
    if work_disk:  # its bitmaps are read, and need not be in each clone
        await channel.put({".rehearsal": b"."}, dest="/work")
        await channel.run(["/bin/sh", "-c", "rm /work/.rehearsal && sync"], user="root", cwd="/", timeout_seconds=60)
    await channel.run(["/bin/rm", program], user="root", cwd="/", timeout_seconds=60)
    await channel.renew(nobody)  # agentd forks the next agent's process ahead: that one is in the template


_PRACTICE = b'''"""Practice: what an agent does."""

import json
from pathlib import Path


def main() -> None:
    given = json.loads(Path(".practice").read_text(encoding="utf-8"))
    ticket = given["ticket"]
    print(f"ready: {ticket['id']}, {given['step']['attempt']}", flush=True)
    result = {"inputs": given["inputs"], "text": f"Practice of {ticket['id']}", "nothing": ticket["title"]}
    Path(".practised").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
'''
_INPUT = b'{"inputs": {"n": 1}, "ticket": {"id": "practice", "title": null}, "step": {"id": "practice", "attempt": 1}}'
_CLEAN = "rm -f /agent/.practice.py /work/.practice /work/.practised"


async def warm_vm(channel: Channel) -> None:
    """Walk an agent's whole way with a program of ours, which leaves nothing but itself done. What comes after a second
    renewal is an agent's first run again, so the caller renews."""
    await channel.put({".practice.py": _PRACTICE}, dest="/agent", owner="root")
    await channel.put({".practice": _INPUT}, dest="/work", owner="agent")
    await channel.run(["/agent/.practice.py"], warm=True, timeout_seconds=60)
    await channel.get("/work/.practised", limit_bytes=1000)
    await channel.run(["/bin/sh", "-c", _CLEAN], user="root", cwd="/", timeout_seconds=60)

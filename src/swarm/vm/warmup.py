"""What is done in a VM before any agent: once in each template, and once in each VM of the pool.

It shapes a template, so the text of this file is in the template's key.
"""

from __future__ import annotations

import contextlib
import os
import secrets

from swarm.channel import Channel, Identity
from swarm.errors import AgentFailed, AgentTimeout, BootFailed
from swarm.vm.driver import Root, VmSpec
from swarm.vm.slots import ssh

# What agents in Python import most. In a clone, where no code is translated yet, `import pathlib` alone takes 80 ms. It
# costs nothing for agents that don't need it: the pages are the template's. Modules that load OpenSSL (ssl,
# http.client, urllib.request) are missing: renewing its random state costs each agent 40 ms. `preload` can add them.
COMMON_MODULES = (
    "json", "re", "pathlib", "dataclasses", "datetime", "typing", "enum", "collections", "functools", "itertools",
    "contextlib", "io", "math", "random", "base64", "string", "textwrap", "shutil", "tempfile",
    "subprocess", "traceback",
)  # fmt: skip
# Twice the state of the kernel's generator.
SEED_BYTES = 64
# Of an image's Python, until it waits for an agent; and with modules of the agent's choice.
_INTERPRETER_SECONDS, _PRELOAD_SECONDS = 30.0, 120.0


def told_to_guest(spec: VmSpec) -> dict[str, object] | None:
    """What agentd must know of the imported image that agents see, if they see one: see `Channel.renew`."""
    root = spec.layer.root if spec.layer else None
    if root is None:
        return None
    told: dict[str, object] = {"user": list(root.user), "env": dict(root.env)}
    if spec.interpreter and root.python:
        modules = {"common": list(COMMON_MODULES), "preload": list(spec.preload)}
        told["interpreter"] = {"python": root.python, **modules, "seconds": interpreter_seconds(spec)}
    return told


def interpreter_seconds(spec: VmSpec) -> float:
    """How much longer a renewal may take because the image's Python is started in it."""
    return (_PRELOAD_SECONDS if spec.preload else _INTERPRETER_SECONDS) if spec.interpreter else 0.0


async def warm_template(channel: Channel, token: bytes, *, spec: VmSpec, work_disk: bool) -> None:
    """Do once here what every clone would do: copy files up, read pages, open sockets, start threads, make interpreter
    state. The identity is a placeholder: its host key is used nowhere, and every clone gets its own before it is
    used. Raises BootFailed that names what can't be preloaded."""
    await _check_preloads(channel)
    image = told_to_guest(spec)
    placeholder = Identity(
        generation="template",
        seed=os.urandom(SEED_BYTES),
        hostname="vm0",  # as short as any: a file that does not shrink is overwritten in place
        machine_id="0" * 32,
        ssh_host_key=ssh.new_key().private.decode(),
        authorized_keys="",
        token=token,
        work_disk=work_disk,  # a template's memory must not know a disk that its clones don't have
    )
    await channel.renew(placeholder, image=image)
    if spec.layer and spec.layer.root:
        await _read_programs(channel, spec.layer.root, python=not spec.interpreter)
        for _ in range(3):
            await warm_image(channel)
        await channel.renew(placeholder)
        await _check_preloads(channel)  # the image's Python has imported them only now
        return
    program = f"/agent/{secrets.token_hex(8)}.py"
    code = b"import json, pathlib, sys\njson.dumps(json.loads('{}'))\n"
    await channel.put({program.removeprefix("/agent/"): code}, dest="/agent", owner="root")
    for _ in range(3):
        await channel.run([program], warm=True, cwd="/", timeout_seconds=60)
    if work_disk:  # its bitmaps are read here, not in each clone
        await channel.put({".warmup": b"."}, dest="/work")
        await channel.run(["/bin/sh", "-c", "rm /work/.warmup && sync"], user="root", cwd="/", timeout_seconds=60)
    await channel.run(["/bin/rm", program], user="root", cwd="/", timeout_seconds=60)
    await channel.renew(placeholder)  # agentd forks the next agent's process ahead, so the template contains it


async def _check_preloads(channel: Channel) -> None:
    if failed := (await channel.hello()).preload_failed:
        said = "; ".join(f"{name}: {why[:200]}" for name, why in failed.items())
        raise BootFailed(f"preloads of the agent's manifest can't be imported: {said}", retryable=False)


# A program that needs no file but its own: an image may have none. (ELF, x86-64: exit(0).)
_NOTHING = bytes.fromhex(
    "7f454c4602010100000000000000000002003e0001000000780040000000000040000000000000000000000000000000"
    "000000004000380001000000000000000100000005000000000000000000000000004000000000000000400000000000"
    "81000000000000008100000000000000001000000000000031ffb83c0000000f05"
)
# It runs in the guest's interpreter, which can import nothing that it has not imported yet.
_CLEAN_IMAGE = b"""\
import os
for name in ("/agent/.practice", "/agent/.clean.py", "/work/.practice"):
    os.remove(name)
os.sync()
"""


async def _read_programs(channel: Channel, root: Root, *, python: bool) -> None:
    """Start what most programs of an image are started by, if it is there, so that clones need not read it from disk.
    What it says doesn't matter; that it does something useful is not expected of it."""
    imports = [[root.python, "-B", "-c", f"import {', '.join(COMMON_MODULES)}"]] if root.python and python else []
    for argv in (["/bin/sh", "-c", ":"], *imports):
        with contextlib.suppress(AgentFailed, AgentTimeout):
            await channel.run(argv, timeout_seconds=60)


async def warm_image(channel: Channel) -> None:
    """As `warm_vm`, where agents see an image's files: practice of what every agent needs, and its traces removed."""
    await channel.put({".practice": _NOTHING}, dest="/agent", owner="root", mode=0o755)
    await channel.put({".practice": _INPUT}, dest="/work", owner="agent")
    await channel.run(["/agent/.practice"], timeout_seconds=60)
    await channel.get("/work/.practice", limit_bytes=1000)
    await channel.put({".clean.py": _CLEAN_IMAGE}, dest="/agent", owner="root")
    await channel.run(["/agent/.clean.py"], warm=True, user="root", timeout_seconds=60)


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
    """Run a program of ours in all the steps of an agent, and remove its traces. After another renewal, the next run is
    an agent's first again, so the caller renews."""
    await channel.put({".practice.py": _PRACTICE}, dest="/agent", owner="root")
    await channel.put({".practice": _INPUT}, dest="/work", owner="agent")
    await channel.run(["/agent/.practice.py"], warm=True, timeout_seconds=60)
    await channel.get("/work/.practised", limit_bytes=1000)
    await channel.run(["/bin/sh", "-c", _CLEAN], user="root", cwd="/", timeout_seconds=60)

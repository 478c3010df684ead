"""`swarm run`: a command in a fresh VM, with this directory's files in it. Nothing of it stays."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from swarm.cli import remote
from swarm.cli.frame import Cli, command
from swarm.cli.remote import OWN_FAULT, Env, Words, variables

if TYPE_CHECKING:
    from swarm.cli.moving import Picked
    from swarm.engine.oneoff import CommandVm
    from swarm.model import Agent

_TOLD: Final = 10  # files that are named one by one

Secret = Annotated[
    list[str] | None,
    typer.Option("--secret", metavar="NAME", help="A secret of Swarm's, as a variable; what is printed hides it."),
]
Net = Annotated[
    str,
    typer.Option(
        "--net", metavar="POLICY", help="What it may reach: none, open, gateway[:NAME,…], allow:DOMAIN,…; ';' between."
    ),
]


def register(app: typer.Typer) -> None:
    command(
        app,
        "run",
        examples=[
            "swarm run python3 -m unittest",
            "swarm run --requirements requirements.txt --out 'report/*.xml' -- pytest -q",
            "swarm run --net allow:pypi.org,files.pythonhosted.org -- sh -c 'pip download six && ls'",
            "swarm run --no-files bash",
            "cat data.csv | swarm run -- python3 count.py > counts.txt",
        ],
        runs="here",
        fault=OWN_FAULT,
    )(run)


async def run(
    cli: Cli,
    argv: Words,
    dir: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Whose files it finds in /work. Default: this directory.")
    ] = Path(),
    all_files: Annotated[
        bool, typer.Option("--all-files", help="All files, those that git ignores and .git too, whatever their size.")
    ] = False,
    no_files: Annotated[bool, typer.Option("--no-files", help="None of these files.")] = False,
    out: Annotated[
        list[str] | None,
        typer.Option(
            "--out",
            metavar="GLOB",
            help="Files and directories of /work to bring back into DIR, in place of what is there.",
        ),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option("--agent", "-a", metavar="AGENT", help="In a VM like this agent's, with its files in /agent."),
    ] = None,
    requirements: Annotated[
        list[str] | None,
        typer.Option(
            "--requirements", "-r", metavar="FILE|REQ", help="Install these from PyPI before; kept as a layer."
        ),
    ] = None,
    packages: Annotated[
        list[str] | None,
        typer.Option("--packages", metavar="NAME,…", help="Install these from Debian before; kept as a layer."),
    ] = None,
    net: Net = "none",
    env: Env = None,
    secret: Secret = None,
    memory: Annotated[
        int | None, typer.Option("--memory", min=128, max=1 << 20, metavar="MB", help="Default: 256, or the agent's.")
    ] = None,
    cpus: Annotated[
        int | None, typer.Option("--cpus", min=1, max=256, metavar="N", help="Default: 1, or the agent's.")
    ] = None,
    disk: Annotated[
        int | None, typer.Option("--disk", min=16, max=1 << 20, metavar="MB", help="Default: 2048, or the agent's.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0.001, metavar="S", help="End it after so many seconds.")
    ] = None,
) -> int:
    """Run a command in a fresh VM, with the files of this directory in /work. Its exit status is the command's.

    Of a git work tree those files go that belong to it: tracked and new ones, not the ignored ones. On a terminal the
    command has one too: keys go to it, Ctrl+C as well, and a second one within a second ends the VM. Otherwise pipes
    stay pipes. It needs no engine, and leaves what --out brings back, and what makes the next one faster: the template
    of a VM of this size, and layers. One that was killed leaves its VM to the next one, or to swarm-cleanup.

    Exit status: 128 and the signal's number if a signal ended the command, 124 if the time was over, 127 if there is
    no such program, 126 if it can't be started, 125 if Swarm itself failed.
    """
    from swarm.cli import moving

    for pattern in out or ():
        moving.parts_of(pattern)  # what is wrong with it is told before anything is run
    if cli.settings.driver == "process":
        cli.out.note("note: it runs without a VM, as a plain process of this host: no isolation, no limits")
    like = await _agent(
        cli, agent, requirements=requirements or [], packages=packages or [], net=net, secrets=secret or [],
        memory_mb=memory, vcpus=cpus, disk_mb=disk,
    )  # fmt: skip
    return await _run(
        cli,
        like,
        argv,
        top=None if no_files else dir,
        all_files=all_files,
        out=out or [],
        env=variables(env or []),
        timeout_seconds=timeout,
    )


async def _run(
    cli: Cli,
    like: Agent,
    argv: Sequence[str],
    *,
    top: Path | None,
    all_files: bool,
    out: Sequence[str],
    env: Mapping[str, str],
    timeout_seconds: float | None,
) -> int:
    from swarm.app import oneoff
    from swarm.base.aio import cancel_all
    from swarm.base.clock import Timeline
    from swarm.cli import follow, moving

    told: set[str] = set()

    def step(what: str, _share: float) -> None:
        if what not in told:
            told.add(what)
            cli.out.note(what)

    brought: list[str] = []
    not_reached: dict[str, str] = {}

    def egress(_kind: str, data: Mapping[str, object]) -> None:
        if isinstance(why := data.get("refused"), str) and "host" in data:
            not_reached[str(data["host"])] = why

    picking = asyncio.ensure_future(moving.pick(top, all_files=all_files)) if top else None
    try:
        async with oneoff.command_vms(
            cli.settings, books=bool(like.secrets) or like.network != "none", progress=step
        ) as vms:
            if picking and picking.done():
                picking.result()  # what is wrong with it is told before a VM starts
            async with vms.vm(
                like, Timeline(), on_build=lambda seconds: cli.out.note(follow.making_template(seconds)), record=egress
            ) as ours:
                if picking:
                    await ours.live.while_alive(_send(cli, ours, await picking))
                if like.path != Path():
                    await ours.live.while_alive(ours.live.channel.put_tree(like.path, dest="/agent"))
                command = remote.Command(
                    argv=argv, env={**like.env, **ours.env, **env}, timeout_seconds=timeout_seconds
                )
                guest = ours.live.channel.converse
                status = await ours.live.while_alive(remote.execute(cli, guest, command, redactor=ours.redactor))
                if out:
                    back = moving.bring_back(
                        guest, out, top or Path(), limit_bytes=like.disk_mb << 20, brought=brought.append,
                        note=cli.out.note,
                    )  # fmt: skip
                    await ours.live.while_alive(back)
        if brought:
            more = f" and {len(brought) - _TOLD} more" if len(brought) > _TOLD else ""
            cli.out.note(f"brought back: {', '.join(brought[:_TOLD])}{more}")
        for host, why in list(not_reached.items())[:_TOLD]:
            cli.out.note(f"it could not reach {host}: {why}")
        return status
    finally:
        if picking:
            await cancel_all([picking])


async def _send(cli: Cli, ours: CommandVm, picked: Picked) -> None:
    from swarm.cli import moving

    for what in picked.left_out[:_TOLD]:
        cli.out.note(f"left out: {what}")
    if len(picked.left_out) > _TOLD:
        cli.out.note(f"left out: {len(picked.left_out) - _TOLD} more of this kind")
    if picked.files:
        await moving.send(ours.live.channel, picked)


async def _agent(
    cli: Cli, name: str | None, *, requirements: Sequence[str], packages: Sequence[str], net: str,
    secrets: Sequence[str], memory_mb: int | None, vcpus: int | None, disk_mb: int | None,
) -> Agent:  # fmt: skip
    """What the VM must be like, as the agent that would need it. Its layer is there, built now if it was not. It has
    no path if none of its files are needed. Raises UsageError."""
    from swarm import agents
    from swarm.cli.agent import built
    from swarm.errors import UsageError
    from swarm.gateway import policy
    from swarm.model import Agent

    try:
        policy.parse(net)
    except UsageError as error:
        raise UsageError(f"--net {net}: {error}") from None
    if name is None:
        like = Agent(id="run", name="run", version="1", path=Path(), entry=("sh",), runtime="exec")
    else:
        async with cli.store() as store:
            like = await agents.Installed(cli.settings.agents, store).here(await store.agent(name))
    like = replace(
        like,
        network=net,
        secrets=tuple(secrets),
        requirements=(*like.requirements, *pinned(requirements)),
        packages=(*like.packages, *(one for many in packages for one in many.split(",") if one)),
        memory_mb=memory_mb or like.memory_mb,
        vcpus=vcpus or like.vcpus,
        disk_mb=disk_mb or like.disk_mb,
    )
    if like.imported and (requirements or packages):
        raise UsageError(
            f"what the image {like.image!r} lacks can't be added for one run: `requirements` in agent.yaml"
        )
    if like.needs_layer or like.imported:
        await built(cli, like)
    return like


def pinned(given: Sequence[str]) -> list[str]:
    """Requirements, and those in the files that are named. Raises UsageError."""
    from swarm.errors import UsageError
    from swarm.fields import REQUIREMENT

    found = []
    for one in given:
        file = Path(one)
        if not file.is_file():
            if file.suffix == ".txt" or "/" in one:
                raise UsageError(f"--requirements {one}: there is no such file")
            found.append(one)
            continue
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--requirements {one}: it can't be read: {error}") from None
        for line in lines:
            text = re.sub(r"(^|\s)#.*", "", line).strip()
            if text.startswith("-"):
                raise UsageError(f"--requirements {one}: options of pip, such as {text!r}, are not supported there")
            if text:
                found.append(re.sub(r"\s", "", text.partition(";")[0]))
    for one in found:
        if not re.fullmatch(REQUIREMENT, one):
            raise UsageError(
                f"--requirements: {one[:100]!r} is not pinned as name==version, and so would not be the same tomorrow; "
                "`pip freeze` and `pip-compile` write such lists"
            )
    return found

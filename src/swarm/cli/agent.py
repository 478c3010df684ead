"""`swarm agent …`: write, test, register, show and run agents. docs/agents.md tells how to write one."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.inputs import Input, InputJson, Inputs, read_inputs, schema_of
from swarm.cli.ui.table import Column

if TYPE_CHECKING:
    from swarm.agents import Package
    from swarm.model import Agent
    from swarm.vm.driver import Layer

app = new_app("agent", "Write, test, register, show, run and remove agents.")

_Ref = Annotated[str, typer.Argument(metavar="AGENT", help="Name, name@version or id.")]
_NO_VM = (
    "it runs without a VM, as a plain process on this host: no isolation, no limits; --vm runs it as tickets are run"
)


@command(app, "init", examples=["swarm agent init word-count", "swarm agent init shout --lang sh"])
async def init(
    cli: Cli,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the agent, and of the new directory.")],
    lang: Annotated[str, typer.Option("--lang", metavar="LANGUAGE", help="python, sh or node.")] = "python",
) -> None:
    """Write a new agent, ready to test and change, into the directory NAME."""
    from swarm import agents

    manifest = agents.template(lang, name, Path(name))
    cli.out.line(
        f"wrote {manifest.parent}; change it, then run `swarm agent test {name}/` and `swarm agent add {name}/`"
    )


@command(
    app,
    "add",
    examples=[
        "swarm agent add word-count/",
        "swarm agent add word-count.tar.gz",
        "swarm agent add --dev word-count/ && swarm ticket add Try --agent word-count --input text=hi --wait",
    ],
    json=True,
)
async def add(
    cli: Cli,
    source: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="A directory or a .tar.gz.")],
    dev: Annotated[
        bool, typer.Option("--dev", help="While you write it: replace this version, if it is registered.")
    ] = False,
) -> None:
    """Register an agent, after building the layer for its requirements and packages.

    Registering it again changes nothing; other content with a registered version is refused, unless --dev is given.
    Steps that run then end with the files they began with. All later ones, retries and those of workflows that run
    among them, get the new files.
    """
    from swarm import agents
    from swarm.admin import packages

    with agents.opened(source) as directory:
        await built_image(cli, agents.read_package(directory), trusted=source.is_dir())
        await built(cli, agents.read(directory))  # first, so that an agent that can't run is not registered
        async with cli.store() as store:
            agent = await packages.add_agent(store, directory, cli.settings.agents, replace=dev, by=cli.user)
    cli.out.result(agent, f"{agent.name}@{agent.version}, id {agent.id}")


@command(app, "list", examples=["swarm agent list", "swarm agent list --json"], json=True)
async def list_(cli: Cli) -> int:
    """List the registered agents. Exit status 1 if the row of one is broken."""
    from swarm.errors import StoreError

    problem = ""
    async with cli.store() as store:
        agents = await store.agents(broken=False)
        try:
            await store.agents()
        except StoreError as error:
            problem = str(error)
    rows = [(a.name, a.version, a.id, a.runtime, f"{a.memory_mb} MB", a.network, a.description) for a in agents]
    columns = (
        "NAME", "VERSION", Column("ID", drop=5), Column("RUNTIME", drop=1), Column("MEMORY", drop=2, right=True),
        Column("NETWORK", drop=3, least=10), Column("DESCRIPTION", drop=4, least=16),
    )  # fmt: skip
    cli.out.listing(agents, columns, rows, empty="no agents: run `swarm init`")
    if problem:
        cli.out.error(problem)
    return 1 if problem else 0


@command(app, "show", examples=["swarm agent show echo", "swarm agent show echo@1.0.0 --json"], json=True)
async def show(cli: Cli, agent: _Ref) -> None:
    """Show an agent: its program, its limits, and where its files are."""
    from swarm.base.plain import plain

    async with cli.store() as store:
        found = await store.agent(agent)
    if cli.out.json:
        cli.out.dump(found)
        return
    texts = {"inputs_schema": found.inputs_schema, "outputs_schema": found.outputs_schema}
    values = plain(found) | texts
    cli.out.fields({name: _shown(value) for name, value in values.items() if value not in ([], {}, "")})


@command(app, "rm", examples=["swarm agent rm word-count@1.2.0"])
async def rm(cli: Cli, agent: _Ref) -> None:
    """Remove an agent and its files. Refused while an unfinished ticket or a workflow needs it."""
    from swarm.admin import packages

    async with cli.store() as store:
        removed = await packages.remove_agent(store, agent, cli.settings.agents, by=cli.user)
    cli.out.line(f"removed {removed.name}@{removed.version}")


@command(app, "build", examples=["swarm agent build", "swarm agent build claude"])
async def build(
    cli: Cli,
    agent: Annotated[
        list[str] | None,
        typer.Argument(metavar="AGENT|DIR", help="Registered agents, or directories. Default: all registered agents."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build layers, even if they exist here or elsewhere.")] = False,
) -> int:
    """Build agents' images, and layers for their requirements and packages, or fetch them from hosts that have them.

    Needs root and the network; running agents does not.
    """
    from swarm import agents
    from swarm.errors import SwarmError
    from swarm.model import BUILT

    found, registered = [agents.read(Path(one)) for one in agent or [] if _is_path(one)], []
    if names := [one for one in agent or [] if not _is_path(one)]:
        async with cli.store() as store:
            registered = [await store.agent(name) for name in names]
    elif not agent:
        async with cli.store() as store:
            all_ = await store.agents(broken=False)
        registered = [one for one in all_ if one.needs_layer or (one.image or "").startswith(BUILT)]
    status, ours = 0, len(found)
    found += registered
    for number, one in enumerate(found):
        try:
            if number >= ours:
                async with cli.store() as store:
                    one = await agents.Installed(cli.settings.agents, store).here(one)
            await built_image(cli, agents.read_package(one.path), trusted=True, force=force)
            layer = await built(cli, one, force=force)
        except SwarmError as error:
            if len(found) == 1:
                raise
            cli.out.error(f"{one.name}@{one.version}: {error}")
            status = 1
            continue
        cli.out.line(f"{one.name}@{one.version}: " + (f"layer {layer.digest[:12]}" if layer else "needs no layer"))
    if not found:
        cli.out.note("no registered agent needs a layer")
    return status


@command(app, "layers", examples=["swarm agent layers", "swarm agent layers --rm-unused"], json=True)
async def layers_(
    cli: Cli,
    rm_unused: Annotated[
        bool, typer.Option("--rm-unused", help="Remove those that no registered agent needs with the current image.")
    ] = False,
) -> None:
    """List the layers, what is in them, and which agents need them."""
    from dataclasses import asdict

    from swarm.admin import layers
    from swarm.app import wiring
    from swarm.cli.ui import render

    built = wiring.guest_layers(cli.settings)
    async with cli.store() as store:
        found = await layers.in_use(store, cli.settings.agents, wiring.images(cli.settings), built)
    if rm_unused:
        for info in [info for info, users in found if not users]:
            built.remove(info.key)
            cli.out.note(f"removed {info.key[:12]}")
        found = [(info, users) for info, users in found if users]
    values = [{**asdict(info), "agents": users} for info, users in found]
    rows = [
        (
            i.key,
            i.built_at,
            render.size(i.size_bytes),
            " ".join(users) or "-",
            " ".join(i.requirements + i.packages + i.npm),
        )
        for i, users in found
    ]
    columns = (
        Column("LAYER", digest=True), Column("BUILT", drop=1), Column("SIZE", drop=2, right=True),
        Column("AGENTS", least=16), Column("CONTENT", drop=3, least=16),
    )  # fmt: skip
    cli.out.listing(values, columns, rows, empty="no layers")


_Source = Annotated[str, typer.Argument(metavar="DIR|AGENT", help="A directory, a .tar.gz or a registered agent.")]


@command(app, "test", examples=["swarm agent test word-count/", "swarm agent test shell"], json=True)
async def test(
    cli: Cli,
    source: _Source,
    in_vm: Annotated[
        bool | None,
        typer.Option("--vm/--no-vm", help="In VMs, as tickets are run; or as plain processes. See above."),
    ] = None,
) -> int:
    """Run the examples in an agent's manifest and compare their results. Exit status 1 if one differs.

    A directory is your own program: it runs as a plain process of this host, unless --vm is given. What somebody else
    may have written, a .tar.gz or a registered agent, runs in VMs (which needs root and the image), unless --no-vm is.
    """
    from swarm.app import oneoff as oneoff_wiring
    from swarm.cli.ui.output import GREEN, RED
    from swarm.engine import oneoff
    from swarm.errors import UsageError

    results: list[dict[str, object]] = []
    vm = not Path(source).is_dir() if in_vm is None else in_vm
    with ExitStack() as stack:
        package = await _package(cli, source, stack, vm=vm)
        if not package.examples:
            raise UsageError(
                f"the agent {package.agent.name!r} has no `examples` in its agent.yaml: there is nothing to test"
            )
        await built(cli, package.agent, vm=vm)
        async with oneoff_wiring.engine(cli.settings, vm=vm) as engine:
            async for example, wrong in oneoff.examples(engine, package):
                results.append({"example": example.name, "passed": not wrong, "wrong": wrong})
                if not cli.out.json:
                    cli.out.marked("fail" if wrong else "ok  ", RED if wrong else GREEN, example.name)
                    for line in wrong:
                        cli.out.line(f"      {line}")
    if cli.out.json:
        cli.out.dump(results)
    return 0 if all(result["passed"] for result in results) else 1


@command(
    app,
    "run",
    examples=[
        "swarm agent run echo --input name=Ada",
        "swarm agent run word-count/ --inputs @inputs.json --no-vm",
    ],
)
async def run(
    cli: Cli,
    source: _Source,
    inputs: Inputs = None,
    input_json: InputJson = None,
    input: Input = None,  # noqa: A002
    vm: Annotated[
        bool, typer.Option("--vm/--no-vm", help="Run it in a VM, as tickets are run; or as a plain process.")
    ] = True,
) -> int:
    """Run an agent once, without a ticket. Its outputs go to stdout, as JSON; what it prints goes to stderr."""
    from swarm.app import oneoff as oneoff_wiring
    from swarm.base.printable import clean
    from swarm.engine import oneoff
    from swarm.model import Failed, Succeeded

    with ExitStack() as stack:
        package = await _package(cli, source, stack, vm=vm)
        given = read_inputs(inputs, input_json, input, schema_of(package.agent, None))
        await built(cli, package.agent, vm=vm)

        def printed(_stream: str, data: bytes) -> None:
            sys.stderr.write(clean(data.decode(errors="replace"), one_line=False))
            sys.stderr.flush()

        async with oneoff_wiring.engine(cli.settings, vm=vm) as engine:
            outcome = await oneoff.run(engine, package.agent, given, on_output=printed)
    if isinstance(outcome, Succeeded):
        import json

        cli.out.dump(json.loads(outcome.outputs))
        return 0
    cli.out.error(outcome.message.partition("\nThe last that it printed:")[0])  # the rest is on stderr already
    return 2 if isinstance(outcome, Failed) and outcome.reason == "input_invalid" else 1


async def _package(cli: Cli, source: str, stack: ExitStack, *, vm: bool) -> Package:
    """The package in a directory or an archive (unpacked until ``stack`` ends), or of a registered agent."""
    from dataclasses import replace

    from swarm import agents
    from swarm.engine import oneoff

    if _is_path(source):
        package = agents.read_package(stack.enter_context(agents.opened(Path(source))))
        if vm:
            await built_image(cli, package, trusted=Path(source).is_dir())
    else:
        async with cli.store() as store:
            found, installed = await store.agent(source), agents.Installed(cli.settings.agents, store)
            package = replace(await installed.check(found), agent=await installed.here(found))
    if vm:
        return package
    cli.out.note(f"note: {_NO_VM}")
    return replace(package, agent=oneoff.without_vm(package.agent))


def _is_path(source: str) -> bool:
    return "/" in source or Path(source).exists()


async def built_image(cli: Cli, package: Package, *, trusted: bool, force: bool = False) -> None:
    """Build the image of the agent's `build`, or of what it adds to an image, unless it is here, or on a host that
    shares it. ``trusted``: its author is, with running programs in containers of this host."""
    import tempfile

    from swarm import agents
    from swarm.app import oneoff, wiring
    from swarm.errors import ImageError, NotFound, UsageError
    from swarm.vm.image.oci import additions
    from swarm.vm.image.oci.build import Recipe

    if not package.build and not package.base:
        return
    agent, name = package.agent, package.agent.image or ""
    added = additions.Additions(
        base=package.base, requirements=agent.requirements, packages=agent.packages, npm=agent.npm
    )
    async with oneoff.others(cli.settings) as others:
        images = wiring.imported(cli.settings, others)
        if package.base:
            if not force and await additions.here(images, added, name=name):
                return
        elif not force:
            with suppress(NotFound, ImageError):
                await images.layer(name)
                return
        if not trusted:
            raise UsageError(
                f"building the image of {agent.name} runs its author's programs on this host, in containers: unpack "
                f"it, look at its {'Dockerfile' if package.build else 'agent.yaml'}, and give the directory"
            )
        if (build := package.build) is None:
            with cli.out.progress(f"image of {agent.name}") as progress:
                await additions.add(images, added, name=name, fresh=force, progress=progress)
            return
        with tempfile.TemporaryDirectory(prefix="swarm-build-") as scratch:
            copy = agents.install(agent.path, Path(scratch)).path  # just the files that name the image
            recipe = Recipe(
                dockerfile=copy / build.dockerfile,
                context=copy / build.context,
                args=build.args,
                target=build.target,
                fresh=force,
            )
            with cli.out.progress(f"image of {agent.name}") as progress:
                await images.build(recipe, name=name, progress=progress)


async def built(cli: Cli, agent: Agent, *, vm: bool = True, force: bool = False) -> Layer | None:
    """The agent's layer, with a progress bar while it is built; None if it needs none."""
    from swarm.admin import layers
    from swarm.app import oneoff, wiring

    if not agent.needs_layer and not agent.imported:
        return None
    settings = cli.settings if vm else cli.settings.model_copy(update={"driver": "process"})
    async with oneoff.others(settings) as others:
        source, store = wiring.image_source(settings, others), wiring.layers(settings, others)
        with cli.out.progress(f"layer of {agent.name}") as progress:
            layer = await layers.build(agent, source, store, force=force, progress=progress)
    for one in layer.lacks if layer else ():
        cli.out.note(f"layer of {agent.name}: {one}")
    return layer


def _shown(value: object) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_shown(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else value

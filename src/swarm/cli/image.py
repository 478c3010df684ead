"""`swarm image …`: the guest image that VMs boot, and imported images. docs/images.md"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui import render
from swarm.cli.ui.table import Column

app = new_app("image", "Build guest images; import, list and remove others.")

PlainHttp = Annotated[
    bool, typer.Option("--plain-http", help="Reach the registry without TLS, or with any certificate.")
]
CertDir = Annotated[
    Path | None,
    typer.Option("--cert-dir", metavar="DIR", help="*.crt of authorities that sign the registry's certificate."),
]
_AuthFile = Annotated[
    Path | None,
    typer.Option("--auth-file", metavar="FILE", help="Credentials. Default: those of `swarm registry login`."),
]


@command(
    app,
    "build",
    examples=[
        "swarm image build",
        'swarm image build --kernel ./vmlinux --boot-args "nomodule"',
        "swarm image build --dockerfile tools/Dockerfile --build-arg VERSION=2 --name tools:2",
    ],
    json=True,
)
async def build(
    cli: Cli,
    force: Annotated[bool, typer.Option("--force", help="Build it, even if it exists here or elsewhere.")] = False,
    kernel: Annotated[
        Path | None,
        typer.Option(
            "--kernel",
            metavar="FILE",
            help="Boot this kernel instead of the distribution's.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    boot_args: Annotated[
        str | None, typer.Option("--boot-args", metavar="ARGS", help="Arguments for that kernel's command line.")
    ] = None,
    dockerfile: Annotated[
        Path | None,
        typer.Option("--dockerfile", metavar="FILE", help="Build the image of this Dockerfile, for agents to run on."),
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What agents call that image.")] = "",
    context: Annotated[
        Path | None,
        typer.Option("--context", metavar="DIR", help="What its COPY reads. Default: the Dockerfile's directory."),
    ] = None,
    build_arg: Annotated[
        list[str] | None, typer.Option("--build-arg", metavar="NAME=VALUE", help="For its ARG. No secrets.")
    ] = None,
    target: Annotated[str, typer.Option("--target", metavar="STAGE", help="Default: its last stage.")] = "",
    secret: Annotated[
        list[str] | None,
        typer.Option("--secret", metavar="id=ID,src=FILE", help="For its RUN --mount=type=secret,id=ID."),
    ] = None,
    no_network: Annotated[bool, typer.Option("--no-network", help="Its RUN gets no network.")] = False,
    plain_http: PlainHttp = False,
    cert_dir: CertDir = None,
    auth_file: _AuthFile = None,
) -> None:
    """Build the guest image, or with --dockerfile one for agents to run on. Needs root.

    The guest image is fetched from another host, or built from the distribution's packages, if it doesn't exist.
    An image of a Dockerfile is built by buildah and imported; the same inputs build nothing. docs/images.md
    """
    from swarm.app import oneoff, wiring
    from swarm.errors import UsageError

    if dockerfile is not None:
        from swarm.vm.image.oci.build import Recipe
        from swarm.vm.image.oci.build import secret as parsed
        from swarm.vm.image.oci.fetch import Access

        if not name or force or kernel or boot_args is not None:
            raise UsageError("--dockerfile goes with --name, and not with --force, --kernel and --boot-args")
        recipe = Recipe(
            dockerfile=dockerfile, context=context or dockerfile.parent, args=build_arg or (), target=target,
            secrets=[parsed(one) for one in secret or ()], network=not no_network,
        )  # fmt: skip
        access = Access(plain_http=plain_http, cert_dir=str(cert_dir or ""), auth_file=str(auth_file or ""))
        with cli.out.progress(name) as progress:
            made, new = await wiring.imported(cli.settings).build(recipe, name=name, access=access, progress=progress)
        await cli.record("image.import", name=made.name)
        cli.out.result(made, f"{made.name} {made.digest}" + ("" if new else ", which was here"))
        return
    if name or context or build_arg or target or secret or no_network or plain_http or cert_dir or auth_file:
        raise UsageError("that option needs --dockerfile")
    keep = wiring.images_of_templates(cli.settings)
    async with oneoff.others(cli.settings) as others:
        images = wiring.images(cli.settings, others)
        with cli.out.progress("guest image") as progress:
            image = await images.build(force=force, kernel=kernel, boot_args=boot_args, keep=keep, progress=progress)
    cli.out.result(image, f"image {image.digest[:12]} in {image.dir}")


_Reference = Annotated[
    str, typer.Argument(metavar="REF", help="NAME:TAG or another reference that skopeo knows. See above.")
]


@command(
    app,
    "import",
    examples=[
        "swarm image import python:3.12-slim",
        "swarm image import docker-archive:saved.tar --name mine:1",
        "swarm image import oci:layout:tag",
    ],
    json=True,
)
async def import_(
    cli: Cli,
    reference: _Reference,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What agents call it. Default: the reference.")
    ] = "",
    plain_http: PlainHttp = False,
    cert_dir: CertDir = None,
    auth_file: _AuthFile = None,
) -> None:
    """Import an OCI or Docker image, for agents to run on. Needs root.

    REF is NAME:TAG, NAME@DIGEST (docker://, from a registry), oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE,
    docker-daemon:NAME:TAG or containers-storage:NAME. The name keeps meaning what it was now, until it is imported
    or pulled again. docs/images.md
    """
    from swarm.app import wiring
    from swarm.vm.image.oci.fetch import Access

    access = Access(plain_http=plain_http, cert_dir=str(cert_dir or ""), auth_file=str(auth_file or ""))
    with cli.out.progress(reference) as progress:
        made, new = await wiring.imported(cli.settings).import_(reference, name=name, access=access, progress=progress)
    await cli.record("image.import", name=made.name)
    cli.out.result(made, f"{made.name} {made.digest}" + ("" if new else ", which was here"))


@command(
    app,
    "pull",
    examples=["swarm image pull --update", "swarm image pull python:3.12-slim --update"],
    json=True,
)
async def pull(
    cli: Cli,
    name: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Imported images. Default: all that have a registry.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Import those again whose name means another image by now.")
    ] = False,
) -> int:
    """Ask where imported images came from whether their names mean others by now, and import those with --update."""
    from swarm.app import wiring
    from swarm.errors import NotFound, SwarmError
    from swarm.vm.image.oci.reference import known_as
    from swarm.vm.image.oci.store import missing

    imported, status, told = wiring.imported(cli.settings), 0, []
    names = imported.names()
    for one in name or ():
        if known_as(one) not in names:
            raise NotFound(missing(one))
    wanted = [names[known_as(one)] for one in name] if name else list(names.values())
    for was in wanted:
        if not name and not was.source.startswith("docker://"):
            continue
        try:
            said = "is what it was"
            if await imported.is_behind(was):
                said = "means another image by now: --update imports it"
                if update:
                    with cli.out.progress(was.name) as progress:
                        made, _ = await imported.import_(
                            was.source, name=was.name, access=was.access, progress=progress
                        )
                    await cli.record("image.import", name=made.name)
                    said = "is what it was" if made.key == was.key else f"is {made.digest} now"
        except SwarmError as error:
            if name and len(wanted) == 1:
                raise
            said, status = str(error), 1
        told.append({"name": was.name, "said": said})
        if not cli.out.json:
            cli.out.line(f"{was.name} {said}")
    if cli.out.json:
        cli.out.dump(told)
    elif not told:
        cli.out.note("no image was imported from a registry")
    return status


@command(app, "list", examples=["swarm image list", "swarm image list --json"], json=True)
async def list_(cli: Cli) -> None:
    """List Swarm's own images, which VMs boot, and the imported ones, which agents see instead."""
    from swarm.admin import imported
    from swarm.app import wiring

    found = wiring.images(cli.settings).list()
    others = imported.listed(wiring.imported(cli.settings), await _users(cli))
    rows = [(i.digest, "-", i.built_at, render.size(i.size_bytes), f"kernel {i.kernel_version}", "-") for i in found]
    rows += [
        (o.digest.removeprefix("sha256:"), o.name or "-", o.imported_at, render.size(o.size_bytes), o.source or "-",
         " ".join(o.agents) or "-")
        for o in others
    ]  # fmt: skip
    columns = (
        Column("DIGEST", digest=True), Column("NAME", least=12), Column("BUILT", drop=2),
        Column("SIZE", drop=1, right=True), Column("FROM", drop=4, least=8), Column("AGENTS", drop=3, least=8),
    )  # fmt: skip
    cli.out.listing([*found, *others], columns, rows, empty="no image: run `swarm image build`")


async def _users(cli: Cli) -> dict[str, list[str]]:
    from swarm.admin import imported
    from swarm.errors import StoreError

    try:
        async with cli.store() as store:
            return await imported.users(store)
    except StoreError:
        return {}


@command(app, "show", examples=["swarm image show python:3.12-slim"], json=True)
async def show(
    cli: Cli,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Name, digest or key of an imported image.")],
) -> None:
    """Show an imported image: where it came from, what it says about its programs, who uses it."""
    import shlex

    from swarm.admin import imported
    from swarm.app import wiring

    store = wiring.imported(cli.settings)
    info = store.info(image)
    names = [one for one in imported.listed(store, await _users(cli)) if one.key == info.key]
    if cli.out.json:
        cli.out.dump({"image": info, "names": names})
        return
    uid, gid, groups, home = info.root.user
    cli.out.fields(
        {
            "names": " ".join(one.name for one in info.names) or "-",
            "digest": info.digest,
            "config": info.config_digest,
            "from": "\n".join(f"{one.source} {one.digest}, {one.imported_at}" for one in info.names) or None,
            "layers": info.layers,
            "fetched": render.size(info.fetched_bytes),
            "size": render.size(info.size_bytes),
            "runs": shlex.join(info.root.entry) or "-",
            "user": f"{uid}:{gid}" + (f", groups {' '.join(map(str, groups))}" if groups else "") + f", home {home}",
            "directory": info.root.cwd,
            "env": "\n".join(f"{variable}={value}" for variable, value in info.root.env.items()) or None,
            "python": info.root.python or "-",
            "agents": " ".join(sorted({agent for one in names for agent in one.agents})) or "-",
            "files": store.dir / info.key,
        }
    )


@command(app, "rm", examples=["swarm image rm 4be1b6c3a8d2", "swarm image rm python:3.12-slim"])
async def rm(
    cli: Cli,
    digest: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Digests of Swarm's own images, or names or digests of imported ones."),
    ],
) -> None:
    """Remove images. VMs that run from one go on."""
    from swarm.app import wiring
    from swarm.model import names_imported

    images, imported = wiring.images(cli.settings), wiring.imported(cli.settings)
    for one in digest:
        if names_imported(one) or any(info.key.startswith(one) for info in imported.list()):
            await imported.remove(one)
            name, shown = one, one
        else:
            name = images.remove((await images.find(one)).digest)
            shown = name[:12]
        await cli.record("image.remove", name=name)
        cli.out.line(f"removed {shown}")


@command(app, "verify", examples=["swarm image verify"], json=True)
async def verify(
    cli: Cli,
    image: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Imported images. Default: all of them.")
    ] = None,
) -> int:
    """Read imported images whole, and compare them with what was imported. Exit status 1 if one was changed."""
    import asyncio

    from swarm.app import wiring
    from swarm.vm.image.oci.store import anew

    store = wiring.imported(cli.settings)
    told = []
    for info in [store.info(one) for one in image] if image else store.list():
        name = info.names[0].name if info.names else info.key
        wrong = await asyncio.to_thread(store.damage, info)
        told.append({"name": name, "key": info.key, "wrong": wrong})
        if not cli.out.json:
            cli.out.line(f"{name} {wrong or 'is as it was imported'}")
            if wrong:
                cli.out.note(anew(name, info.names[0].source if info.names else "") + " again")
    if cli.out.json:
        cli.out.dump(told)
    elif not told:
        cli.out.note("no image was imported")
    return 1 if any(one["wrong"] for one in told) else 0


@command(app, "prune", examples=["swarm image prune", "swarm image prune --all"])
async def prune(
    cli: Cli,
    all_: Annotated[bool, typer.Option("--all", help="Also remove names that no registered agent uses.")] = False,
) -> None:
    """Remove imported images without a name, what was fetched for images that are gone, and the cache of builds.

    An image that a snapshot needs stays.
    """
    from swarm.admin import imported
    from swarm.app import wiring

    store = wiring.imported(cli.settings)
    unused = []
    if all_:
        async with cli.store() as opened:  # here an error matters: without a database, all would seem unused
            await opened.agents(broken=False)
            used = await imported.users(opened)
        unused = [one.name for one in imported.listed(store, used) if one.name and not one.agents]
    removed, freed = await store.prune(wiring.snapshots(cli.settings).layers(), unused=unused)
    for one in removed:
        await cli.record("image.remove", name=one)
        cli.out.line(f"removed {one}")
    cli.out.line(f"{render.size(freed)} less")

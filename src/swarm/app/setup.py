"""`swarm init`: prepares a home: database, the registry's link, built-in agents and workflows, image, template."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.app import wiring
from swarm.base import files, process
from swarm.base.progress import Progress, silent
from swarm.config import SYSTEM_HOME, Settings
from swarm.errors import Conflict, HostError, ImageError, SwarmError

if TYPE_CHECKING:
    from swarm.store.store import Store
    from swarm.vm.driver import Image


async def init(
    settings: Settings, *, image: bool = True, template: bool = True, progress: Progress = silent
) -> list[str]:
    """Make ``settings.home`` ready for tickets; keep what exists. Returns a line for each thing done.

    Creates and migrates the database, links the registry, adds the built-in agents and workflows, and (with ``image``)
    makes the guest image and (with ``template`` as well) the template of the default VM.
    """
    from swarm.admin import packages
    from swarm.admin.layers import shipped

    lines = []
    # 0700: only the owner may read what tickets and agents say.
    for directory, mode in ((settings.home, 0o755), (settings.data_dir, 0o700), (settings.agents, 0o755)):
        _make(directory, mode)
    async with wiring.store(settings) as opened:
        before, head = await opened.revision(), opened.head()
        await opened.migrate()
        lines.append(
            f"database   {opened.url}: "
            + ("up to date" if before == head else f"migrated from {before}" if before else "created")
        )
        if settings.database.startswith("sqlite:"):
            _link_registry(settings)
            lines.append(f"registry   {settings.registry_link} -> the same database")
        lines += await packages.ship(opened, settings.agents, by=process.user())
        await packages.keep_packages(opened, settings.agents)
    if settings.home == SYSTEM_HOME and os.geteuid() == 0:
        lines.append(f"ssh        {_write_client_config(settings)}: root reaches VMs by a plain `ssh root@<address>`")
    if image:
        async with wiring.store(settings) as opened:
            found = await ensure_image(settings, lambda step, share: progress(f"guest image: {step}", share), opened)
            lines.append(f"image      {found.digest[:12]} in {found.dir}")
            source, layers = wiring.image_source(settings, opened), wiring.layers(settings, opened)
            lines += await shipped(opened, settings.agents, source, layers, progress)
        if template:
            lines += await _default_template(settings, found, progress)
    return lines


async def _default_template(settings: Settings, image: Image, progress: Progress) -> list[str]:
    """So that the first ticket starts as quickly as the second. The home is of use without it, as on a host that can't
    run VMs yet: a line says why it is missing."""
    from swarm.vm.driver import VmSpec

    if settings.driver == "process":
        return []
    try:
        await wiring.sweep(settings)
        launcher = wiring.launcher(settings, await wiring.choice(settings, progress))
        template = await launcher.template(
            VmSpec(image=image),
            on_build=lambda seconds: progress(f"template of the VM: about {seconds} s", 0.9),
        )
    except SwarmError as error:
        return [f"template   not made: {error}"]
    if template is None:
        return []
    return [f"template   {template.key[:12]}, which agents with the default memory and disk start from"]


async def ensure_image(settings: Settings, progress: Progress = silent, others: Store | None = None) -> Image:
    """The image of the current recipe: found, fetched from one of the ``others``, taken from the cache, or built."""
    source = wiring.images(settings, others)
    try:
        return await wiring.images(settings).find()
    except ImageError:
        return await source.build(keep=wiring.images_of_templates(settings), progress=progress)


def _make(directory: Path, mode: int = 0o755) -> None:
    try:
        files.make_directory(directory, mode)
    except OSError as error:
        raise HostError(
            f"can't make {directory}: {error.strerror}; run as root, or choose a home with --home"
        ) from None


def _link_registry(settings: Settings) -> None:
    """The second documented path of the database: a symbolic link to it."""
    link, target = settings.registry_link, settings.data_dir / "swarm.db"
    _make(link.parent)
    if link.is_symlink() and link.readlink() == target:
        return
    if link.exists() and not link.is_symlink():
        raise Conflict(f"{link} is a file, not a link to {target}: move it away, then run this again")
    partial = link.with_name(f".{link.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.rename(link)


def _write_client_config(settings: Settings) -> Path:
    from swarm.vm.slots.ssh import CLIENT_CONFIG

    ssh = wiring.ssh_dir(settings)
    ssh.public_key()  # makes the key now instead of with the first VM
    _make(CLIENT_CONFIG.parent)
    CLIENT_CONFIG.write_text(ssh.client_config(settings.subnet))
    return CLIENT_CONFIG

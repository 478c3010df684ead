"""The root of an imported image on Firecracker, where the work disk is mounted after the restore."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.channel import Channel, Identity, processes
from swarm.channel import guest_files as files
from swarm.channel.processes import Order
from swarm.config import Settings
from swarm.vm.driver import VmSpec
from swarm.vm.warmup import told_to_guest
from tests.vm import firecracker_here
from tests.vm.drivers.test_drivers import Host, Way
from tests.vm.roots_here import Roots

pytestmark = pytest.mark.needs("firecracker")
IDENTITY = Identity(
    generation="g", seed=os.urandom(64), hostname="here", machine_id="1" * 32, ssh_host_key="", authorized_keys="",
    token=os.urandom(16),
)  # fmt: skip


@firecracker_here.slow_where_emulated
async def test_an_agent_sees_the_images_files_alone(settings: Settings, tmp_path: Path) -> None:
    out = bytearray()
    with firecracker_here.on_path():
        image = await firecracker_here.image(settings)
        settings = firecracker_here.with_firecracker(settings, image)
        choice = await wiring.choice(settings)
        user = (1234, 1234, (77,), "/")
        layer = await Roots(tmp_path, image).static(user=user, env={"WHO": "bare"}, python="/busybox")
        spec = VmSpec(image=image, layer=layer, interpreter=True)  # none waits here: a template has no image's root
        template = await wiring.launcher(settings, choice).template(spec)
        assert template
        way = Way(driver=choice.driver, settings=settings, spec=spec, template=template, timeout_seconds=60)
        async with Host(way).place() as (place, slot):
            vm = await way.start(place, slot)
            # Where the kernel is emulated, its mounts and a fork take seconds, on a busy host minutes.
            connecting = Channel.connect(
                vm.endpoint, token=template.token, timeout_seconds=60, io_timeout_seconds=600, listening=True
            )
            try:
                async with connecting as channel:
                    await channel.renew(IDENTITY, image=told_to_guest(spec))
                    for order in ("ls -A /", "id", "env", "cat /proc/mounts", "ls /proc/1/root/"):
                        argv = ["/busybox", *order.split()]
                        ended = await channel.run(argv, timeout_seconds=600, on_output=lambda _, data: out.extend(data))
                        assert ended.clean
                        assert ended.code == (1 if order.startswith("ls /proc") else 0), out
                    done = await processes.run(channel.converse, Order(argv=["/busybox", "cat", "/etc/hostname"]))
                    assert done.stdout == b"here\n"
                    assert (await files.stat(channel.converse, "/busybox")).kind == "file"
            finally:
                await vm.kill()
    said = out.decode()
    assert said.startswith("agent\nbusybox\ndev\netc\nproc\nsys\ntmp\nwork\n")
    assert "uid=1234 gid=1234 groups=77,1234\n" in said
    assert "WHO=bare\n" in said
    assert "image / overlay" in said
    assert "Permission denied" in said

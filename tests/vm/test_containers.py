"""What an agent finds in the kernel, and containers within the VM: the example of docs/images.md. In two VMs: on an
image that has podman and some tools, and on Swarm's own root with the same packages."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest

from swarm.config import Settings
from swarm.vm.driver import Image, Layer
from swarm.vm.image.build import ON_DEMAND
from swarm.vm.launcher import Launcher
from tests import containers_here
from tests.conftest import missing
from tests.vm.roots_here import Roots
from tests.vm.test_imported_root import Guest, guest, launcher, loop

__all__ = ["launcher", "loop"]  # fixtures
pytestmark = pytest.mark.needs("qemu")
FUSE = """
import ctypes, os, struct
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
assert ctypes.CDLL(None).mount(b"test", b"m", b"fuse", 0, options) == 0
assert struct.unpack_from("II", os.read(fd, 1 << 16))[1] == 26, "FUSE_INIT, to whoever serves it"
print("fuse")
"""


@pytest.fixture(scope="module")
def packages(loop: asyncio.Runner, settings: Settings, image: Image) -> Layer:
    found = loop.run(containers_here.layer(settings, image))
    return missing("containers", found) if isinstance(found, str) else found


@pytest.fixture(scope="module")
def rooted(
    loop: asyncio.Runner, launcher: Launcher, image: Image, packages: Layer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """Root of an image."""
    layer = loop.run(Roots(tmp_path_factory.mktemp("roots"), image).whole(packages))
    yield from guest(loop, launcher, image, layer)


@pytest.fixture(scope="module")
def own(loop: asyncio.Runner, launcher: Launcher, image: Image, packages: Layer) -> Iterator[Guest]:
    """User agent, on Swarm's own root."""
    yield from guest(loop, launcher, image, packages)


def script(guest: Guest, text: str) -> str:
    guest.loop.run(guest.live.channel.put({"fuse.py": FUSE.encode()}, dest="/work"))
    return guest.said("sh", "-ec", f"PATH=$PATH:/usr/sbin; exec 2>&1; {text}", timeout_seconds=300)


def test_what_root_of_an_image_needs_of_the_kernel_is_loaded(rooted: Guest) -> None:
    said = script(
        rooted,
        """
        loaded() { for name in $(cut -d' ' -f1 /proc/modules); do echo $name; done; }
        echo before: $(loaded)
        mkdir m lower upper scratch
        echo below > lower/file
        mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=scratch test m; cat m/file; umount m
        truncate -s 8M disk; mkfs.ext4 -q disk; mount -o loop disk m; stat -f -c %T m; umount m
        mksquashfs lower packed -quiet -no-progress; mount -o loop packed m; cat m/file; umount m
        python3 fuse.py; umount m
        ip tuntap add mode tun name tun0; ip -o link show tun0 | cut -d: -f2
        ip link add veth0 type veth peer name veth1; ip link add name br0 type bridge; ip link set veth0 master br0
        tc qdisc add dev veth1 root netem delay 10ms
        nft add table inet mine
        nft add chain inet mine out '{ type nat hook output priority 0; }'
        nft add rule inet mine out tcp dport 80 redirect to 8080; nft list table inet mine | grep redirect
        iptables -t nat -A OUTPUT -p tcp -m comment --comment mine -m owner --uid-owner 5 -j REDIRECT --to-ports 9
        iptables -t nat -S | grep mine
        setpriv --reuid=1000 --regid=1000 --clear-groups unshare -Urmn sh -c 'mount -t tmpfs test /mnt; id -u'
        echo after: $(loaded)
        """,
    )
    before, after = (set(re.findall(rf"^{when}: (.*)$", said, re.MULTILINE)[0].split()) for when in ("before", "after"))
    assert not before & {*ON_DEMAND}, "what nobody needs takes no memory"
    assert {"loop", "squashfs", "fuse", "tun", "bridge", "nft_redir", "nft_compat", "xt_owner"} <= after
    lines = [line.strip() for line in said.splitlines()[1:-1]]
    assert lines == [
        "below", "ext2/ext3", "below", "fuse", "tun0", "tcp dport 80 redirect to :8080",
        "-A OUTPUT -p tcp -m comment --comment mine -m owner --uid-owner 5 -j REDIRECT --to-ports 9", "0",
    ]  # fmt: skip
    assert "Unknown device type" in script(rooted, "ip link add bond0 type bond || true"), "and nothing else is there"


def test_the_pages_example_of_containers(rooted: Guest) -> None:
    async def put() -> None:
        files = containers_here.files()
        await rooted.live.channel.put({"main.sh": files["main.sh"].encode()}, dest="/agent", owner="root")
        await rooted.live.channel.put({"input.json": b'{"inputs": {"n": "one"}}'}, dest="/work")
        await rooted.live.channel.put({"storage.conf": files["storage.conf"].encode()}, dest="/work")

    rooted.loop.run(put())
    rooted.said("sh", "-c", "cp storage.conf /etc/containers/ && rm storage.conf")
    rooted.said("sh", "-e", "/agent/main.sh", timeout_seconds=300)
    assert rooted.loop.run(rooted.live.channel.get("/work/output.json", limit_bytes=100)) == b'{"inputs": {"n": "two"}}'
    said = script(
        rooted,
        """
        look='head -n 1 /proc/mounts; cat /sys/fs/cgroup/pids.max; ip -o -4 address show eth0'
        podman run --detach --pids-limit 9 --volume /work:/work tool sh -c "{ $look; } > /work/seen.part;
            mv /work/seen.part /work/seen; exec sleep 1000" > id
        until [ -e seen ]; do sleep 0.1; done
        cat seen
        """,
    )
    assert re.search(r"^overlay / overlay .*\n9\n.* inet 10\.88\..*\n$", said), said
    assert "sleep" not in script(rooted, "for one in /proc/[0-9]*/cmdline; do cat $one; done"), "it has ended"


def test_what_user_agent_can_do_on_swarms_own_root(own: Guest) -> None:
    said = script(
        own,
        """
        mkdir m lower upper scratch; echo below > lower/file
        unshare -Urm sh -ec '
            mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=scratch test m; cat m/file; umount m
            mount -t tmpfs test m; id -u; python3 fuse.py'
        unshare -Urn sh -ec 'ip tuntap add mode tun name tun0; nft add table inet mine; nft list tables'
        truncate -s 1M disk
        unshare -Urm mount -o loop disk m 2> /dev/null || echo no loop
        mount -t tmpfs test m 2> /dev/null || echo no mount
        podman --storage-driver overlay run --rm --network none --rootfs /work/lower/root /bin/busybox id -u
        """.replace("podman", "mkdir -p lower/root/bin; cp /bin/busybox lower/root/bin; podman"),
    )
    lines = [line for line in said.splitlines() if "level=" not in line]
    assert lines == ["below", "0", "fuse", "table inet mine", "no loop", "no mount", "0"]

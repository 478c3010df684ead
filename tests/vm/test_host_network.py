"""The host's network changes while VMs run: what is forgotten, removed or added, and that work goes on or says why."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import struct
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from swarm.base import process
from swarm.channel.dial import dial
from swarm.errors import HostError
from swarm.vm.driver import AGENTD_PORT, GUEST_ADDRESS, GUEST_MAC, Slot
from swarm.vm.network import netns
from swarm.vm.network.network import Network
from tests.conftest import PATIENCE_SECONDS
from tests.vm.standin import Guest, host_state, nft, talk

pytestmark = pytest.mark.needs("netns")

# As ufw and firewalld have it: nothing comes in but answers. (Also, a rule with `ct` makes the kernel track.)
STATEFUL = """
table inet foreign {
  chain input {
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state invalid drop
    ct state established,related accept
  }
}
"""
LOOSE = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose")
TRACKING = "table inet foreign { chain input { type filter hook input priority 0; ct state new counter; }; }"


def flush_connections() -> None:
    """`conntrack -F` of this thread's namespace: a DELETE without attributes (nfnetlink_conntrack.h)."""
    ctnetlink, delete, request, ack, netfilter = 1, 2, 1, 4, 12
    message = struct.pack("=IHHII", 20, ctnetlink << 8 | delete, request | ack, 1, 0) + struct.pack("=BBH", 2, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netfilter) as sock:
        sock.sendto(message, (0, 0))
        (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
        assert code == 0, os.strerror(-code)


def forget(loose: str, namespace: str | None = None) -> None:
    if namespace:
        netns.enter(namespace)
    LOOSE.write_text(loose)
    flush_connections()


@contextlib.asynccontextmanager
async def connected(slot: Slot) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that the engine would make to agentd: the host's reader, and the guest's writer."""
    async with Guest(slot) as guest:
        sock = await guest._inside(lambda: socket.create_server((str(GUEST_ADDRESS), AGENTD_PORT)))
        accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        server = await asyncio.start_server(lambda _, writer: accepted.put_nowait(writer), sock=sock)
        async with server:
            reader, writer = await dial(slot.agentd, [""])
            guests = await accepted.get()
            guests.write(b"started\n")
            assert await reader.readline() == b"started\n"
            try:
                yield reader, guests
            finally:
                for each in (writer, guests, *(accepted.get_nowait() for _ in range(accepted.qsize()))):
                    each.transport.abort()


@pytest.fixture
async def slot(network: Network) -> AsyncIterator[Slot]:
    yield await network.create(1)
    with contextlib.suppress(Exception):
        await process.run(["nft", "delete", "table", "inet", "foreign"])


@pytest.mark.parametrize("loose", ["1", "0"], ids=["picks up", "picks up nothing"])
async def test_what_connection_tracking_forgets_makes_no_difference(slot: Slot, loose: str) -> None:
    """The guest sends its result when everybody has forgotten that there is a connection. `loose`: whether the kernel
    takes a packet in the middle of a connection for the start of a new one."""
    await nft(TRACKING)
    async with connected(slot) as (reader, guest):
        await netns.in_thread(functools.partial(forget, loose))
        await netns.in_thread(functools.partial(forget, loose, slot.netns))
        guest.write(b"the result\n")
        try:
            async with asyncio.timeout(4):  # before the host sends anything by itself
                assert await reader.readline() == b"the result\n"
        finally:
            LOOSE.write_text("1")  # it may be the host's for all tests


async def test_a_firewall_of_the_host_that_forgets_is_reminded(slot: Slot) -> None:
    await nft(STATEFUL)
    async with connected(slot) as (reader, guest):
        flush_connections()
        guest.write(b"the result\n")
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await reader.readline() == b"the result\n"


# What somebody may do to Swarm's part of the host's network, and what an error then says of it.
LOSSES = {
    "address": (["ip addr flush dev br0"], "br0 has lost its address 10.0.0.1"),
    "down": (["ip link set br0 down"], "br0 is down"),
    "down and up": (["ip link set br0 down", "ip link set br0 up"], ""),  # the neighbours are lost
    "bridge": (["ip link del br0"], "br0 does not exist any more"),
    "port": (["ip link set swarm1 nomaster"], "swarm1 is not on br0 any more"),
    "port down": (["ip link set swarm1 down"], ""),
    "route": (["ip route del 10.0.0.0/16 dev br0"], ""),
    "neighbours": (["ip neigh flush dev br0 nud permanent"], ""),
    "rules": (["nft flush ruleset"], ""),
    "all": (["ip link del br0", "ip route flush proto 83", "nft flush ruleset"], "br0 does not exist any more"),
}


@pytest.mark.parametrize("loss", LOSSES)
async def test_what_the_bridge_loses_is_put_back_and_connections_go_on(network: Network, slot: Slot, loss: str) -> None:
    other = await network.create(2)
    before = await host_state()
    async with connected(slot) as (reader, guest), Guest(other) as second, second.listening(22):
        assert not await network.mend(), "nothing is missing"
        for line in LOSSES[loss][0]:
            await process.run(line.split())
        assert LOSSES[loss][1] in await network.fault(1)
        guest.write(b"the result\n")
        assert await network.mend()
        assert await network.fault(1) == ""
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await reader.readline() == b"the result\n"
        assert await talk(other.address, 22) == b"hello"
        assert not await second.reaches("10.0.0.1", 22) and not await second.reaches(str(slot.address), AGENTD_PORT)
        after = await host_state()
        assert {name: sorted(text.split()) for name, text in after.items()} == {
            name: sorted(text.split()) for name, text in before.items()
        }


async def test_somebody_elses_bridge_of_its_name_is_left_alone(network: Network, slot: Slot) -> None:
    """As netplan or libvirt make one for the LAN: it gets no address, no rules and no VMs."""
    await process.run(["ip", "link", "del", "br0"])
    await process.run(["nft", "delete", "table", "inet", "swarm"])
    await process.run(["ip", "link", "add", "br0", "type", "bridge"])
    try:
        for _ in range(2):
            with pytest.raises(HostError, match="br0"):
                await network.mend()
        shown = (await process.run(["ip", "-d", "link", "show", "br0"])).stdout.decode()
        assert "alias" not in shown and "state DOWN" in shown
        assert b"inet" not in (await process.run(["ip", "addr", "show", "dev", "br0"])).stdout
        assert b"swarm" not in (await process.run(["nft", "list", "tables", "inet"])).stdout
    finally:
        await process.run(["ip", "link", "del", "br0"])
    assert await network.mend(), "and once it is gone, ours is put back"


async def test_without_vms_nothing_is_made_again(network: Network) -> None:
    await network.ensure_host()
    await process.run(["ip", "link", "del", "br0"])
    before = await host_state()
    assert not await network.mend()
    assert await host_state() == before


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("ip link del swarm1", "swarm1 from br0 to vm1 does not exist any more"),
        ("ip netns del vm1", "namespace vm1 does not exist any more"),
        ("ip -n vm1 link del tap0", "tap0 in vm1 does not exist any more"),
        ("ip -n vm1 link set tap0 down", "tap0 in vm1 is down"),
    ],
)
async def test_what_a_vm_has_lost_is_named(network: Network, slot: Slot, lost: str, says: str) -> None:
    async with Guest(slot):
        assert await network.fault(1) == ""
        await process.run(lost.split())
        assert says in await network.fault(1)


# Another program's routes and rules that cover the VMs' addresses: VPNs, policy routing.
ROUTES = {
    "route": (["ip route add 10.0.0.0/24 dev vpn0"], "10.0.0.0/24 on vpn0"),
    "two halves": (["ip route add 0.0.0.0/1 dev vpn0", "ip route add 128.0.0.0/1 dev vpn0"], ""),  # OpenVPN
    "rule": (["ip route add 10.0.0.0/8 dev vpn0 table 52", "ip rule add pref 70 lookup 52"], "10.0.0.0/8 on vpn0"),
    "rule to": (
        ["ip route add 10.0.0.0/8 dev vpn0 table 52", "ip rule add pref 70 to 10.0.0.0/8 lookup 52"],
        "10.0.0.0/8 on vpn0",
    ),
    "not fwmark": (  # as wg-quick makes it
        ["ip route add 10.0.0.0/9 dev vpn0 table 52", "ip rule add pref 70 not fwmark 51820 lookup 52"],
        "10.0.0.0/9 on vpn0",
    ),
    "default": (["ip route add default dev vpn0 table 52", "ip rule add pref 70 not fwmark 51820 lookup 52"], ""),
    "refusal": (
        ["ip route add blackhole 10.0.0.0/17 table 52", "ip rule add pref 70 lookup 52"],
        "10.0.0.0/17",
    ),
}


@pytest.mark.parametrize("strict", ["0", "1"], ids=["", "strict"])
@pytest.mark.parametrize("kind", ROUTES)
async def test_routes_and_rules_of_others_cost_no_connection(
    network: Network, slot: Slot, kind: str, strict: str
) -> None:
    """With `rp_filter` 1, as some distributions have it, the kernel drops what comes by another way than the answer
    would go: only routes that refuse the addresses altogether can do that to VMs. They are named."""
    lines, says = ROUTES[kind]
    filtering = Path("/proc/sys/net/ipv4/conf/all/rp_filter")
    was = filtering.read_text()
    await process.run(["ip", "link", "add", "vpn0", "type", "bridge"])
    try:
        filtering.write_text(strict)
        await process.run(["ip", "link", "set", "vpn0", "up"])
        async with connected(slot) as (reader, guest):
            for line in lines:
                await process.run(line.split())
            assert says in await network.fault(1)
            if kind != "refusal":
                guest.write(b"the result\n")
                async with asyncio.timeout(PATIENCE_SECONDS):
                    assert await reader.readline() == b"the result\n"
                _, writer = await asyncio.wait_for(dial(slot.agentd, [""], listening=True), 60)
                writer.transport.abort()
    finally:
        filtering.write_text(was)
        await process.run(["ip", "link", "del", "vpn0"])
        await process.run(["ip", "route", "flush", "table", "52"], check=False)
        await process.run(["ip", "rule", "del", "pref", "70"], check=False)


@pytest.mark.parametrize("action", ["blackhole", "unreachable", "prohibit"])
@pytest.mark.parametrize("to", ["", "to 10.0.0.0/8"])
async def test_a_rule_that_refuses_the_addresses_is_named(network: Network, slot: Slot, action: str, to: str) -> None:
    """As long as it is there; then work goes on."""
    async with connected(slot) as (reader, guest):
        await process.run(["ip", "rule", "add", "pref", "70", *to.split(), action])
        try:
            assert "the rule 70 (blackhole, unreachable or prohibit" in await network.fault(1)
            guest.write(b"the result\n")
        finally:
            await process.run(["ip", "rule", "del", "pref", "70"])
        assert await network.fault(1) == ""
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await reader.readline() == b"the result\n"


SYN, ACK, FIN, RST, PSH, URG = 0x02, 0x10, 0x01, 0x04, 0x08, 0x20


@pytest.mark.parametrize("hole", ["", "vm"])
async def test_only_answers_leave_a_vm(slot: Slot, hole: str) -> None:
    """Without memory of connections: what could open one, or tell a listening port from a closed one, is dropped. With
    a hole in the VM's own rules, the host's do it."""
    if hole:
        await nft("insert rule ip swarm forward accept\n", slot.netns)
    await nft('table inet foreign { chain input { type filter hook input priority 10; iifname "br0" counter; }; }')

    async def arrived() -> int:
        listed = await process.run(["nft", "list", "table", "inet", "foreign"])
        return int(listed.stdout.decode().split("counter packets ")[1].split()[0])

    async with Guest(slot) as guest:
        for frame in (
            *(ipv4(6, tcp(flags)) for flags in (SYN, 0, FIN, PSH, URG, FIN | PSH | URG, SYN | FIN)),
            ipv4(17, bytes.fromhex("0035003500080000")),
            *(ipv4(1, icmp(kind)) for kind in (3, 5, 8, 11, 13)),
            ipv4(6, tcp(ACK)[8:], offset=1),  # a fragment that would overwrite the flags of one before
            ipv4(6, tcp(ACK)[:8], more=True),  # one too short to have any
            ipv4(47, bytes(20)),
        ):
            guest.send(frame)
        assert await arrived() == 0
        for frame in (*(ipv4(6, tcp(flags)) for flags in (ACK, RST, SYN | ACK, FIN | ACK)), ipv4(1, icmp(0))):
            guest.send(frame)
        assert await arrived() == 5


def checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", total ^ 0xFFFF)


def ipv4(protocol: int, payload: bytes, *, offset: int = 0, more: bool = False) -> bytes:
    """A frame of the guest for the host."""
    fragment = offset | (0x2000 if more else 0)
    addresses = GUEST_ADDRESS.packed + IPv4Address("10.0.0.1").packed
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 7, fragment, 64, protocol, 0) + addresses
    macs = bytes.fromhex("0600ac100001") + bytes.fromhex(GUEST_MAC.replace(":", ""))
    return macs + b"\x08\x00" + header[:10] + checksum(header) + header[12:] + payload


def tcp(flags: int) -> bytes:
    return struct.pack(">HHIIBBHHH", 40000, 7000, 1, 1, 5 << 4, flags, 1000, 0, 0)


def icmp(kind: int) -> bytes:
    body = struct.pack(">BBHHH", kind, 0, 0, 1, 1) + bytes(20)
    return body[:2] + checksum(body) + body[4:]

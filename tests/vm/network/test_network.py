"""The network of VMs, on real namespaces, with stand-ins for the guests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from ipaddress import IPv4Address, IPv4Network

import pytest

from swarm.app import oneoff
from swarm.base import process
from swarm.channel.dial import Endpoint, dial
from swarm.config import Settings
from swarm.errors import Conflict, HostError, NotFound, UsageError
from swarm.vm.driver import AGENTD_PORT, GATEWAY_PORT, GUEST_MAC, PROXY_PORT
from swarm.vm.network import netns
from swarm.vm.network.network import Network
from tests.vm.standin import NOBODY, Guest, connect_as, echo, host_state, ip, nft, pings, talk

pytestmark = pytest.mark.needs("netns")

SUBNET = IPv4Network("10.0.0.0/16")
HOST = "10.0.0.1"


def make(**settings: object) -> Network:
    return Network(**({"subnet": SUBNET, "bridge": "br0"} | settings))  # type: ignore[arg-type]


# --- reaching VMs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "address"),
    [(1, "10.0.0.2"), (254, "10.0.0.255"), (255, "10.0.1.0"), (300, "10.0.1.45"), (65533, "10.0.255.254")],
)
async def test_host_reaches_vm_n(network: Network, n: int, address: str) -> None:
    slot = await network.create(n)
    assert (str(slot.address), slot.netns) == (address, f"vm{n}")
    async with Guest(slot) as guest, guest.listening(22):
        assert await pings(address)
        data = os.urandom(300_000)
        assert await talk(address, 22, data) == b"hello" + data
    shown = await ip("-d", "link", "show", f"tap{n}")
    assert f"swarm{n}@" in shown and "master br0" in shown and "isolated on" in shown
    assert f"vm{n}" in await ip("netns", "list")


@pytest.mark.parametrize("how", ["route", "address", "table"])
async def test_a_foreign_host_with_the_address_of_a_vm_is_not_asked(network: Network, how: str) -> None:
    """A VPN comes up while VMs run, and has a route, a local address, or a table with a rule for VM 1's address."""
    slot = await network.create(1)
    there = {
        "route": [["ip", "route", "add", "10.0.0.2/32", "dev", "vpn0"]],
        "address": [["ip", "addr", "add", "10.0.0.2/32", "dev", "vpn0"]],
        "table": [
            ["ip", "route", "add", "10.0.0.0/24", "dev", "vpn0", "table", "52"],
            ["ip", "rule", "add", "pref", "5270", "lookup", "52"],
        ],
    }[how]

    async def who_answers(interface: str, *, seconds: float = 60) -> bytes:
        endpoint = Endpoint(host=str(slot.address), port=AGENTD_PORT, interface=interface)
        async with asyncio.timeout(seconds):
            reader, writer = await dial(endpoint, [""])
            try:
                return await reader.read(100)
            finally:
                writer.close()

    def stranger() -> socket.socket:
        if how != "address":
            netns.enter("foreign")
        return socket.create_server(("10.0.0.2", AGENTD_PORT))

    async with contextlib.AsyncExitStack() as stack:
        guest = await stack.enter_async_context(Guest(slot))
        await stack.enter_async_context(guest.listening(AGENTD_PORT, b"VM 1"))
        await ip("netns", "add", "foreign")
        stack.push_async_callback(ip, "netns", "del", "foreign")
        await ip("link", "add", "vpn0", "type", "veth", "peer", "name", "eth0", "netns", "foreign")
        stack.push_async_callback(ip, "link", "del", "vpn0")
        await ip("addr", "add", "192.0.2.1/24", "dev", "vpn0")
        await ip("link", "set", "vpn0", "up")
        for line in ("addr add 10.0.0.2/32 dev eth0", "link set eth0 up", "route add 192.0.2.0/24 dev eth0"):
            await ip("-n", "foreign", *line.split())
        greeters: set[asyncio.StreamWriter] = set()
        for argv in there:
            await process.run(argv)
            if "rule" in argv:
                stack.push_async_callback(process.run, ["ip", "rule", "del", "pref", "5270"])
        server = await asyncio.start_server(echo(b"a stranger", greeters), sock=await netns.in_thread(stranger))
        stack.callback(server.close)
        assert await who_answers("") == b"a stranger", "else this test shows nothing"
        if how == "address":  # the kernel takes no packet from outside that claims to come from an address of its own
            with pytest.raises(TimeoutError):
                await who_answers(slot.agentd.interface, seconds=2)
        else:
            assert await who_answers(slot.agentd.interface) == b"VM 1"
        assert "on vpn0 overlaps Swarm's subnet" in await network.clash()


async def test_vms_with_the_same_inner_address_are_told_apart(network: Network) -> None:
    slots = await asyncio.gather(*(network.create(n) for n in (1, 2, 3)))
    async with contextlib.AsyncExitStack() as stack:
        for slot in slots:
            guest = await stack.enter_async_context(Guest(slot))
            await stack.enter_async_context(guest.listening(80, f"VM {slot.n}".encode()))
        assert await asyncio.gather(*(talk(s.address, 80) for s in slots)) == [b"VM 1", b"VM 2", b"VM 3"]


def test_numbers_without_an_address_are_refused() -> None:
    for n in (0, -1, 65534):
        with pytest.raises(UsageError, match="from 1 to 65533"):
            make().address(n)
    assert make(subnet=IPv4Network("10.9.8.0/29")).address(5) == IPv4Address("10.9.8.6")
    with pytest.raises(UsageError, match="from 1 to 5"):
        make(subnet=IPv4Network("10.9.8.0/29")).address(6)
    for name in ("", "a b", "sixteen-letters-", 'br0" drop; #', "-x"):
        with pytest.raises(UsageError, match="name of a bridge"):
            make(bridge=name)


# --- rules ------------------------------------------------------------------------------------------------------------

OPEN_VM = "insert rule ip swarm forward accept\n"  # a hole in a VM's own rules
OPEN_HOST = "insert rule inet swarm input accept\ninsert rule inet swarm forward accept\n"  # one in the host's


@pytest.mark.parametrize("hole", ["", "vm", "host"])
async def test_vms_reach_neither_each_other_nor_the_host(network: Network, hole: str) -> None:
    one, two = await network.create(1), await network.create(2)
    if hole == "vm":
        await nft(OPEN_VM, one.netns)
        await nft(OPEN_VM, two.netns)
    if hole == "host":
        await nft(OPEN_HOST)
    server = await asyncio.start_server(echo(b""), "0.0.0.0", 7000)
    async with server, Guest(one) as first, Guest(two) as second, second.listening(80):
        assert await talk(two.address, 80) == b"hello"
        tried = [(str(two.address), 80), ("172.16.0.2", 81), (HOST, 7000), ("172.16.0.1", 7000), ("192.0.2.1", 80)]
        assert await asyncio.gather(*(first.reaches(*place) for place in tried)) == [False] * len(tried)


async def test_without_the_rules_a_vm_reaches_the_host(network: Network) -> None:
    """So the test above tests something."""
    slot = await network.create(1)
    await nft(OPEN_HOST)
    await nft(OPEN_VM, slot.netns)
    server = await asyncio.start_server(echo(b""), "0.0.0.0", 7000)
    async with server, Guest(slot) as guest:
        assert await guest.reaches(HOST, 7000, seconds=60)


async def test_a_listener_in_a_slot_is_for_its_vm_alone(network: Network) -> None:
    """Each VM has its own listener at the same address; the port is closed without one, and always on the host."""
    one, two = await network.create(1), await network.create(2)
    async with Guest(one) as first, Guest(two) as second:
        assert not await first.reaches("172.16.0.1", GATEWAY_PORT)
        with await network.listen(one, GATEWAY_PORT) as listener, await network.listen(one, 7000):
            listener.setblocking(False)
            asking = asyncio.create_task(first.reaches("172.16.0.1", GATEWAY_PORT, seconds=60))
            connection, (address, _) = await asyncio.get_running_loop().sock_accept(listener)
            connection.close()
            assert await asking
            assert address == "172.16.0.2"
            tried = [("172.16.0.1", 7000), ("172.16.0.1", PROXY_PORT), (HOST, GATEWAY_PORT), (str(one.address), 22)]
            assert await asyncio.gather(*(first.reaches(*place) for place in tried)) == [False] * len(tried)
            others = [("172.16.0.1", GATEWAY_PORT), (str(one.address), GATEWAY_PORT)]
            assert await asyncio.gather(*(second.reaches(*place) for place in others)) == [False] * len(others)
            with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
                socket.create_connection((str(one.address), GATEWAY_PORT), timeout=0.5)
    await network.destroy(2)
    with pytest.raises(NotFound, match="no slot 2"):
        await network.listen(two, GATEWAY_PORT)


async def test_only_root_may_open_agentds_port(network: Network) -> None:
    slot = await network.create(1)
    async with Guest(slot) as guest, guest.listening(AGENTD_PORT), guest.listening(22):
        await connect_as(0, slot.address, AGENTD_PORT)
        await connect_as(NOBODY, slot.address, 22)
        with pytest.raises(ConnectionRefusedError):
            await connect_as(NOBODY, slot.address, AGENTD_PORT)


async def test_spoofed_frames_stop_at_the_tap(network: Network) -> None:
    slot = await network.create(1)
    await nft("""
        table inet watch {
          chain prerouting { type filter hook prerouting priority -400; iifname "tap0" counter; }
        }
        table arp watch {
          chain input { type filter hook input priority 0; iifname "tap0" counter; }
        }
    """, slot.netns)  # fmt: skip

    async def passed() -> int:
        listed = await process.run(["nft", "list", "ruleset"], netns=slot.netns)
        return sum(int(part.split()[0]) for part in listed.stdout.decode().split("counter packets ")[1:])

    mac, wrong, gateway = (
        bytes.fromhex(m.replace(":", "")) for m in (GUEST_MAC, "06:00:ac:10:00:03", "06:00:ac:10:00:01")
    )

    def ipv4(source: str) -> bytes:
        header = bytearray.fromhex("4500001c0000000040110000") + IPv4Address(source).packed + IPv4Address(HOST).packed
        total = sum(int.from_bytes(header[i : i + 2]) for i in range(0, 20, 2))
        header[10:12] = (0xFFFF - (total % 0xFFFF)).to_bytes(2)
        return bytes(header) + bytes.fromhex("0035003500080000")

    def arp(source_mac: bytes, source: str) -> bytes:
        head = bytes.fromhex("0001080006040001") + source_mac + IPv4Address(source).packed
        return head + bytes(6) + IPv4Address("172.16.0.1").packed

    async with Guest(slot) as guest:
        for frame in (
            gateway + mac + b"\x08\x00" + ipv4("172.16.0.1"),
            gateway + mac + b"\x08\x00" + ipv4("10.0.0.2"),
            gateway + mac + b"\x08\x00" + ipv4("127.0.0.1"),
            gateway + wrong + b"\x08\x00" + ipv4("172.16.0.2"),
            gateway + mac + b"\x86\xdd" + bytes.fromhex("6000000000003b40") + bytes(32),
            gateway + mac + b"\x81\x00\x00\x01\x08\x00" + ipv4("172.16.0.2"),
            gateway + mac + b"\x08\x06" + arp(wrong, "172.16.0.2"),
            gateway + mac + b"\x08\x06" + arp(mac, "10.0.0.1"),
        ):
            guest.send(frame)
        assert await passed() == 0
        guest.send(gateway + mac + b"\x08\x00" + ipv4("172.16.0.2"))
        guest.send(gateway + mac + b"\x08\x06" + arp(mac, "172.16.0.2"))
        assert await passed() == 2
        assert await network.refused(slot) == 8
    assert await network.refused(slot) == 8, "its VM's end changes nothing"
    await network.recycle(1)
    assert await network.refused(slot) == 0
    await process.run(["nft", "delete", "table", "netdev", "swarm"], netns=slot.netns)
    with pytest.raises(NotFound, match="is incomplete"):
        await network.recycle(1)
    await network.destroy(1)
    with pytest.raises(NotFound, match="is incomplete"):
        await network.refused(slot)


async def test_nothing_for_a_vm_that_is_gone_leaves_by_the_default_route(network: Network) -> None:
    await network.create(1)
    await ip("link", "add", "outside0", "type", "bridge")
    try:
        await ip("addr", "add", "192.0.2.2/24", "dev", "outside0")
        await ip("link", "set", "outside0", "up")
        await ip("route", "add", "default", "via", "192.0.2.1")
        await network.destroy(1)
        assert "dev br0" in await ip("route", "get", "10.0.0.2")
        await ip("link", "set", "br0", "down")
        with pytest.raises(HostError, match="RTNETLINK"):
            await ip("route", "get", "10.0.0.2")
        assert "dev outside0" in await ip("route", "get", "10.1.0.2")
    finally:
        await ip("link", "del", "outside0")


async def test_ipv6_and_forwarding_are_settings_of_the_namespace_alone(network: Network) -> None:
    async def value(inside: str | None, key: str) -> str:
        return (await process.run(["cat", f"/proc/sys/net/{key}"], netns=inside)).stdout.decode().strip()

    before = await value(None, "ipv4/ip_forward")
    slot = await network.create(1)
    assert await value(slot.netns, "ipv4/ip_forward") == "1"
    assert await value(slot.netns, "ipv6/conf/eth0/disable_ipv6") == "1"
    assert await value(slot.netns, "ipv6/conf/tap0/disable_ipv6") == "1"
    assert await value(None, "ipv4/ip_forward") == before


# --- the host's part --------------------------------------------------------------------------------------------------


async def test_no_user_can_lock_the_network(network: Network) -> None:
    """Who can open a file can lock it: /run/netns is open to everybody."""
    await network.ensure_host()
    code = (
        "import fcntl, os, sys\n"
        "fcntl.flock(os.open('/run/netns', os.O_RDONLY), fcntl.LOCK_EX)\n"
        f"try:\n  os.open({str(netns.LOCK)!r}, os.O_RDONLY)\nexcept PermissionError:\n  print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    nobody = await asyncio.create_subprocess_exec(
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", code,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert nobody.stdout is not None and await nobody.stdout.readline() == b"locked\n"
        await network.create(1)
        await network.destroy(1)
        assert await network.remove_host()
    finally:
        await nobody.communicate(b"")


async def test_the_hosts_part_comes_and_goes_whole(network: Network) -> None:
    await network.ensure_host()
    await network.ensure_host()
    up = await host_state()
    assert "10.0.0.0/16 dev br0" in up["routes"] and "blackhole 10.0.0.0/16" in up["routes"]
    for damage in (
        ["nft", "flush", "ruleset"],
        ["ip", "link", "set", "br0", "down"],
        ["ip", "link", "del", "br0"],
        ["ip", "route", "del", "blackhole", "10.0.0.0/16", "metric", "4294967295"],
    ):
        await process.run(damage)
        await network.ensure_host()
        now = await host_state()
        assert now["nft"] == up["nft"]
        assert sorted(now["routes"].split()) == sorted(up["routes"].split())
    await network.create(1)
    with pytest.raises(Conflict, match="swarm vm1"):
        await network.remove_host()
    await network.destroy(1)
    assert await network.remove_host() == ["bridge br0", "blackhole route 10.0.0.0/16", "nft table inet swarm"]
    assert await network.remove_host() == []


async def test_a_command_takes_the_hosts_part_away_unless_a_vm_uses_it(network: Network) -> None:
    settings = Settings(subnet=network.subnet, bridge=network.bridge, driver="qemu")
    async with oneoff.leaving_no_network(settings):
        await network.ensure_host()
    assert await network.remove_host() == []
    await network.create(1)  # another's
    with pytest.raises(ZeroDivisionError):
        async with oneoff.leaving_no_network(settings):
            raise ZeroDivisionError
    assert await network.recycle(1), "it has its bridge"
    await network.destroy(1)
    with pytest.raises(ZeroDivisionError):
        async with oneoff.leaving_no_network(settings):
            raise ZeroDivisionError
    assert await network.remove_host() == []


async def test_commands_side_by_side_take_the_hosts_part_away_at_last(network: Network) -> None:
    async def runs(n: int) -> None:
        for _ in range(6):
            await network.create(n)
            assert await network.recycle(n), "it has its bridge"
            await network.destroy(n)
            with contextlib.suppress(Conflict):
                await network.remove_host()

    await asyncio.gather(*map(runs, range(1, 5)))
    assert await network.remove_host() == []


async def test_rules_of_an_older_version_are_replaced(network: Network) -> None:
    await network.ensure_host()
    ours = (await host_state())["nft"]
    await nft('delete table inet swarm\nadd table inet swarm { comment "swarm-engine of-older-text" ; }')
    await network.ensure_host()
    assert (await host_state())["nft"] == ours


@pytest.mark.parametrize(
    ("foreign", "undo", "says"),
    [
        (["ip", "addr", "add", "10.0.7.1/24", "dev", "other0"], [], r"10\.0\.7\.0/24 on other0 .*SWARM_SUBNET"),
        (["ip", "route", "add", "10.0.0.0/8", "dev", "other0"], [], r"10\.0\.0\.0/8 on other0 .*SWARM_SUBNET"),
        (["ip", "addr", "add", "10.0.9.9/32", "dev", "other0"], [], r"10\.0\.9\.9/32 on other0 .*SWARM_SUBNET"),
        (["ip", "link", "add", "br0", "type", "bridge"], ["ip", "link", "del", "br0"], "br0 that Swarm .*SWARM_BRIDGE"),
        (["ip", "link", "add", "br0", "type", "veth"], ["ip", "link", "del", "br0"], "br0 that Swarm .*SWARM_BRIDGE"),
        (
            ["nft", "add", "table", "inet", "swarm"],
            ["nft", "delete", "table", "inet", "swarm"],
            "nft table `inet swarm` that Swarm did not make",
        ),
    ],
)
async def test_a_clash_is_named_and_left_alone(
    network: Network, foreign: list[str], undo: list[str], says: str
) -> None:
    await ip("link", "add", "other0", "type", "bridge")
    await ip("link", "set", "other0", "up")
    try:
        await process.run(foreign)
        before = await host_state()
        with pytest.raises(HostError, match=says):
            await network.create(1)
        assert await network.remove_host() == []
        assert await host_state() == before
    finally:
        await ip("link", "del", "other0")
        if undo:
            await process.run(undo)


async def test_changed_settings_are_noticed(network: Network) -> None:
    await network.ensure_host()
    for changed in (make(subnet=IPv4Network("10.77.0.0/16")), make(bridge="br1")):
        with pytest.raises(HostError, match="run swarm-cleanup, or set SWARM_BRIDGE and SWARM_SUBNET back"):
            await changed.create(1)
    assert len(await make(bridge="br1").remove_host()) == 3  # whatever the settings were


def test_without_root_it_says_so() -> None:
    child = os.fork()
    if child == 0:
        os.setuid(NOBODY)
        try:
            asyncio.run(make().create(1))
        except HostError as error:
            os._exit(0 if "root" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- slots ------------------------------------------------------------------------------------------------------------


async def test_foreign_things_in_the_way_of_a_slot_stay(network: Network) -> None:
    await ip("netns", "add", "vm99")
    await ip("link", "add", "tap98", "type", "bridge")
    await ip("link", "add", "swarm97", "type", "bridge")
    try:
        await network.ensure_host()
        before = await host_state()
        with pytest.raises(Conflict, match="vm99 already exists"):
            await network.create(99)
        with pytest.raises(HostError, match="an interface tap98 that Swarm did not make"):
            await network.create(98)
        with pytest.raises(HostError, match="VM 97"):
            await network.create(97)
        assert [await network.destroy(n) for n in (97, 98, 99)] == [False] * 3
        assert await host_state() == before
        assert await network.list() == []
    finally:
        await ip("netns", "del", "vm99")
        await ip("link", "del", "tap98")
        await ip("link", "del", "swarm97")


async def test_a_slot_is_made_once(network: Network) -> None:
    await network.create(1)
    with pytest.raises(Conflict, match="vm1 already exists"):
        await network.create(1)
    assert [slot.n for slot in await network.list()] == [1]
    assert [await network.destroy(1), await network.destroy(1)] == [True, False]


async def test_half_made_slots_are_destroyed(network: Network) -> None:
    await network.ensure_host()
    before = await host_state()
    (netns.RUN / "vm1").touch()  # killed before it was mounted
    await netns.in_thread(lambda: netns.create("vm2"))  # killed before anything was in it
    await network.create(3)
    await ip("link", "del", "tap3")
    await network.create(4)
    await ip("netns", "exec", "vm4", "ip", "link", "del", "tap0")
    assert [slot.n for slot in await network.list()] == [2, 3, 4]
    assert [await network.destroy(n) for n in (1, 2, 3, 4)] == [True] * 4
    assert await host_state() == before


async def test_a_cancelled_create_leaves_nothing(network: Network) -> None:
    await network.ensure_host()
    before = await host_state()
    for turns in (1, 2, 4, 8, 16):
        task = asyncio.create_task(network.create(1))
        for _ in range(turns):
            await asyncio.wait({task}, timeout=0.001)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            assert await host_state() == before
        else:
            await network.destroy(1)


MANY = """
import asyncio, sys
from ipaddress import IPv4Network
from swarm.vm.network.network import Network
async def main():
    network = Network(subnet=IPv4Network("10.0.0.0/16"), bridge="br0")
    for _ in range(2):
        await asyncio.gather(*(network.create(n) for n in range(int(sys.argv[1]), int(sys.argv[1]) + 8)))
        await asyncio.gather(*(network.destroy(n) for n in range(int(sys.argv[1]), int(sys.argv[1]) + 7)))
        await network.destroy(int(sys.argv[1]) + 7) if _ == 0 else None
asyncio.run(main())
"""


async def test_two_processes_make_eight_slots_each_at_once(network: Network) -> None:
    """Neither finds the host's part, so both make it."""
    await asyncio.gather(*(process.run([sys.executable, "-c", MANY, str(first)]) for first in (1, 101)))
    assert [slot.n for slot in await network.list()] == [8, 108]
    async with Guest(network.slot(108)) as guest, guest.listening(22):
        assert await pings(network.address(108))


async def test_a_recycled_slot_is_as_good_as_new(network: Network) -> None:
    """A tap that was reused right after its VM died once took 6 s until TCP connected."""
    slot = await network.create(1)
    seconds = []
    for round_ in range(6):
        async with Guest(slot) as guest, guest.listening(AGENTD_PORT, f"VM {round_}".encode()):
            with pytest.raises(Conflict, match="a VMM still has tap0 open"):
                await network.recycle(1)
            started = time.perf_counter()
            reader, writer = await asyncio.open_connection(str(slot.address), AGENTD_PORT)
            assert await reader.read(100) == f"VM {round_}".encode()
            seconds.append(time.perf_counter() - started)
        # The VM is gone; the connection is not closed on our side, and tries to reach it still.
        writer.write(b"are you there?")
        await network.recycle(1)
        writer.transport.abort()
    assert sorted(seconds)[-2] < 0.9, seconds  # a lost SYN costs 1 s, and so may a busy machine, once

    await ip("netns", "exec", "vm1", "ip", "link", "del", "tap0")
    with pytest.raises(NotFound, match="is incomplete"):
        await network.recycle(1)
    with pytest.raises(NotFound, match="is incomplete"):
        await network.recycle(2)

"""VM n's network slot: namespace ``vm<n>`` with a tap in it, reachable from the host at subnet + n + 1.

::

    host                                    namespace vm<n>, the same in each except eth0
    br0 10.0.0.1/16 ── swarm<n> ═════════ eth0 10.0.0.(n+1)/16 ── NAT 1:1 ── tap0 172.16.0.1/30 ── guest 172.16.0.2
        fixed MAC      isolated port,
                       altname tap<n>

No address is ever resolved: neighbour and forwarding entries are permanent and derived from n, and ports neither learn
nor flood. So a slot can be reused as soon as its VM is dead (`recycle`), and no VM can impersonate another. Everything
of Swarm's carries a mark in the kernel (bridge.py, netns.py). docs/adr/0006-network.md has the reasons.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from swarm.base import process
from swarm.base.aio import finish_uninterrupted
from swarm.base.log import logger
from swarm.errors import Conflict, HostError, NotFound, UsageError
from swarm.vm.driver import GUEST_ADDRESS, GUEST_GATEWAY, GUEST_MAC, TAP_MAC, TAP_NAME, Slot
from swarm.vm.network import netfilter, netns, rules
from swarm.vm.network.bridge import (
    BRIDGE_MAC,
    Bridge,
    host_errors,
    is_our_bridge,
    is_our_port,
    links_named,
    require_root,
    uplink_mac,
)

log = logger(__name__)

_TRIES = 30  # each one that fails takes another process that removes the host's part after its own last VM
UPLINK = "eth0"  # a namespace's own end of its veth pair
# If both ends of a pair happen to have the same index, the kernel treats "carrier on" as not urgent, and the port drops
# everything for up to a second (linkwatch_urgent_event, net/core/link_watch.c). The host's indexes never get this high.
_UPLINK_INDEX = 1 << 30
_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000  # linux/if.h; the second: a process has the tap open
# A card hands over up to 64 KB as one packet. The kernel counts bytes of a rate with 32 bits.
_MIN_BURST_BYTES, _MAX_BURST_BYTES, _MAX_RATE = 128 << 10, 64 << 20, 4_000_000_000
_NO_IPV6_ADDRESS = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})]}  # IN6_ADDR_GEN_MODE_NONE


class Network:
    """The host's part (bridge, route, rules) and its slots. Needs root and `nft`.

    ``owner`` is recorded in the kernel with each slot: the state directory whose locks show who uses the slot.
    """

    def __init__(self, *, subnet: IPv4Network, bridge: str, owner: str = "") -> None:
        self.subnet = subnet
        self.bridge = bridge
        self.gateway = subnet.network_address + 1
        self._bridge = Bridge(subnet=subnet, name=bridge)
        self._owner = owner

    def address(self, n: int) -> IPv4Address:
        """The address of VM n. Raises UsageError if the subnet has none for it."""
        last = self.subnet.num_addresses - 3
        if not 1 <= n <= last:
            raise UsageError(f"VM {n} has no address in {self.subnet}: VMs are numbered from 1 to {last}")
        return self._address(n)

    def _address(self, n: int) -> IPv4Address:
        """Also for a slot that was made under settings with a wider subnet."""
        return self.subnet.network_address + n + 1

    def slot(self, n: int) -> Slot:
        return Slot(n=n, netns=netns_of(n), address=self.address(n), bridge=self.bridge)

    async def ensure_host(self) -> None:
        """See `Bridge.ensure`."""
        await self._bridge.ensure()

    async def remove_host(self) -> list[str]:
        """See `Bridge.remove`."""
        return await self._bridge.remove()

    async def mend(self) -> bool:
        """See `Bridge.mend`."""
        return await self._bridge.mend()

    async def fault(self, n: int) -> str:
        """What is wrong between the host and VM n, for the message of one that can't be reached; or ''. That is what
        Swarm made and somebody removed, or what else on this host now has the addresses of the VMs."""
        try:
            return await netns.in_thread(lambda: self._fault(n)) or await self.clash()
        except HostError as error:
            return str(error)

    async def clash(self) -> str:
        """What else on this host now has the addresses of the VMs; or ''."""
        try:
            await netns.in_thread(self._bridge.check_clashes)
        except HostError as error:
            return str(error)
        return ""

    # --- slots --------------------------------------------------------------------------------------------------------

    async def create(self, n: int) -> Slot:
        """Make slot n, and the host's part if it is missing. A failed or cancelled call leaves nothing of the slot.

        Raises Conflict if the namespace already exists, ours or not; HostError if the host refuses.
        """
        require_root()
        slot, started = self.slot(n), time.perf_counter()
        made = threading.Event()
        try:
            for _ in range(_TRIES):
                async with netns.locked(exclusive=False):  # remove_host waits
                    if await netns.in_thread(lambda: self._create(slot, made)):
                        break
                await self.ensure_host()
            else:
                raise HostError(f"{self.bridge} was removed each time it was made: is swarm-cleanup running elsewhere?")
            links = time.perf_counter()
            text = rules.for_vm(slot.address, UPLINK)
            await process.run(["nft", "-f", "-"], input=text.encode(), netns=slot.netns)
        except BaseException:
            if made.is_set():
                await finish_uninterrupted(self.destroy(n))
            raise
        log.debug("slot made", n=n, links_ms=_ms(links - started), rules_ms=_ms(time.perf_counter() - links))
        return slot

    async def destroy(self, n: int) -> bool:
        """Remove slot n, complete or not. Returns whether anything existed. Never touches what isn't Swarm's.

        The VMM must be dead: a process that is still inside keeps the (disconnected) namespace alive.
        """
        require_root()
        return await netns.in_thread(lambda: self._destroy(n))

    async def recycle(self, n: int) -> Slot:
        """Reset slot n for another VM: nothing of the last VM remains. At least 4 ms.

        All neighbours are permanent, ports learn nothing, and the kernel empties a tap's queue when its VMM closes it.
        So only the namespace's counter of refused frames has to be reset, and the limits of a VM that had some. Raises
        Conflict while a VMM still has the tap open, NotFound if the slot is missing or incomplete (then destroy and
        create it).
        """
        require_root()
        slot = self.slot(n)
        if await netns.in_thread(lambda: self._recycle(slot)):
            await process.run(["nft", "-f", "-"], input=rules.NO_LIMIT.encode(), netns=slot.netns)
        return slot

    async def listen(self, slot: Slot, port: int) -> socket.socket:
        """A TCP socket that listens inside the slot, at the guest's gateway address: only its VM can connect.

        The socket stays there, whichever thread uses it. ~1 ms. Raises NotFound if the slot is gone, HostError.
        """

        def make() -> socket.socket:
            if not netns.enter_ours(slot.netns):
                raise NotFound(f"no slot {slot.n} to listen in")
            with host_errors(f"can't listen on port {port} for VM {slot.n}"):
                return socket.create_server((str(GUEST_GATEWAY), port), backlog=128)

        return await netns.in_thread(make)

    async def refused(self, slot: Slot) -> int:
        """How many frames of the slot's VM were dropped at its tap since the slot was made or recycled: frames with
        another source address or protocol than its guest uses. Raises NotFound, HostError."""

        def count() -> int:
            with host_errors(f"can't read how many frames of VM {slot.n} were refused"):
                try:
                    netns.enter(slot.netns)  # ours: its VM is the caller's
                    return netfilter.counter(rules.TABLE, rules.REFUSED)
                except FileNotFoundError:
                    raise NotFound(f"slot {slot.n} is incomplete") from None

        return await netns.in_thread(count)

    async def owner(self, n: int) -> str:
        """The ``owner`` of slot n, as given to its `Network`; '' if not known."""
        return await netns.in_thread(lambda: netns.owner_of(netns_of(n)))

    async def list(self) -> list[Slot]:
        """Swarm's slots on this host, incomplete ones too, sorted by n."""
        require_root()
        found = [int(m[1]) for name in netns.names() if (m := re.fullmatch(r"vm([1-9][0-9]{0,8})", name))]
        return [
            Slot(n=n, netns=netns_of(n), address=self._address(n), bridge=self.bridge)
            for n in sorted(found)
            if await netns.in_thread(functools.partial(netns.enter_ours, netns_of(n)))
        ]

    def _fault(self, n: int) -> str:
        name = netns_of(n)
        with host_errors(f"can't read the network of VM {n}"), netns.netlink() as host:
            bridge, port = (next(iter(links_named(host, each)), None) for each in (self.bridge, f"swarm{n}"))
            if bridge is None:
                return f"the bridge {self.bridge} does not exist any more"
            if not bridge["flags"] & _IFF_UP:
                return f"the bridge {self.bridge} is down"
            if not self._bridge.has_address(host, bridge["index"]):
                return f"the bridge {self.bridge} has lost its address {self.gateway}"
            if port is None:
                return f"the link swarm{n} from {self.bridge} to {name} does not exist any more"
            if port.get_attr("IFLA_MASTER") != bridge["index"]:
                return f"swarm{n} is not on {self.bridge} any more"
            with netns.netlink_in_ours(name) as here:
                if here is None:
                    return f"the network namespace {name} does not exist any more"
                tap = next(iter(links_named(here, TAP_NAME)), None)
                if tap is None:
                    return f"{TAP_NAME} in {name} does not exist any more"
                if not tap["flags"] & _IFF_UP or not tap["flags"] & _IFF_LOWER_UP:
                    return f"{TAP_NAME} in {name} is down, or no VM is connected to it"
        return ""

    def _create(self, slot: Slot, made: threading.Event) -> bool:
        """Runs in a thread of its own. False if the host's part is missing; then nothing was done."""
        mac, port = uplink_mac(slot.address), f"swarm{slot.n}"
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.ExitStack() as stack, host_errors(f"can't make the network of VM {slot.n}"):
            stack.callback(os.close, outside)
            host = stack.enter_context(netns.netlink())
            bridge = self._bridge.index(host)
            if bridge is None:
                return False
            try:
                netns.create(slot.netns, self._owner)
            except FileExistsError:
                raise Conflict(
                    f"the network namespace {slot.netns} already exists: swarm-cleanup removes it if a dead VM left "
                    f"it (`swarm vm list` shows those alive); else use another number or `ip netns del {slot.netns}`"
                ) from None
            made.set()

            for family in ("all", "default"):
                netns.sysctl(f"ipv6/conf/{family}/disable_ipv6", "1")
            netns.sysctl("ipv4/ip_forward", "1")  # of this namespace only
            here = stack.enter_context(netns.netlink())
            tap = netns.make_tap(TAP_NAME)
            here.link("set", index=tap, address=TAP_MAC, state="up")
            here.addr("add", index=tap, address=str(GUEST_GATEWAY), prefixlen=30)
            here.neigh("add", ifindex=tap, dst=str(GUEST_ADDRESS), lladdr=GUEST_MAC, state="permanent")
            peer = {"ifname": port, "net_ns_fd": outside}
            here.link("add", ifname=UPLINK, index=_UPLINK_INDEX, kind="veth", address=mac, peer=peer)
            uplink = _UPLINK_INDEX
            here.addr("add", index=uplink, address=str(slot.address), prefixlen=self.subnet.prefixlen)
            here.link("set", index=uplink, state="up")
            here.neigh("add", ifindex=uplink, dst=str(self.gateway), lladdr=BRIDGE_MAC, state="permanent")
            here.route("add", dst="0.0.0.0/0", gateway=str(self.gateway))

            index = host.link_lookup(ifname=port)[0]
            _name_port(host, index, slot.n)
            self._bridge.attach(host, bridge, index, slot.n)
            try:
                host.link("property_add", index=index, altname=f"tap{slot.n}")
            except NetlinkError as error:
                if error.code == errno.EEXIST:
                    raise HostError(
                        f"this host has an interface tap{slot.n} that Swarm did not make: remove it, or use a VM "
                        f"number other than {slot.n}"
                    ) from None
                raise
            host.link("set", index=index, state="up")
            netns.await_up(host, index)
            netns.await_up(host, bridge)
        return True

    def _destroy(self, n: int) -> bool:
        found, namespace, address = False, netns_of(n), self._address(n)
        with host_errors(f"can't remove the network of VM {n}"), netns.netlink() as host:
            if netns.enter_ours(namespace):
                found = True
                with netns.netlink() as here:  # remove the pair now: with the namespace it would go some time later
                    for index in here.link_lookup(ifname=UPLINK):
                        _ignoring_absence(here.link, "del", index=index)
                netns.remove(namespace)
            elif netns.is_plain_file(namespace):
                found = True
                netns.remove(namespace)
            for link in links_named(host, f"swarm{n}"):
                if is_our_port(link):
                    found = True
                    _ignoring_absence(host.link, "del", index=link["index"])
            for link in links_named(host, self.bridge):
                if is_our_bridge(link):
                    _ignoring_absence(host.neigh, "del", ifindex=link["index"], dst=str(address))
        return found

    def _recycle(self, slot: Slot) -> bool:
        """Whether its last VM had limits."""
        incomplete = f"slot {slot.n} is incomplete: destroy it and create it again"
        with host_errors(f"can't recycle slot {slot.n}"), netns.netlink() as host:
            bridge = self._bridge.index(host)
            port = next(iter(links_named(host, f"swarm{slot.n}")), None)
            if bridge is None or port is None or port.get_attr("IFLA_MASTER") != bridge:
                raise NotFound(incomplete)
            with netns.netlink_in_ours(slot.netns) as here:
                tap = next(iter(links_named(here, TAP_NAME)), None) if here else None
                if tap is None:
                    raise NotFound(incomplete)
                if tap["flags"] & _IFF_LOWER_UP:
                    raise Conflict(f"slot {slot.n} is in use: a VMM still has {TAP_NAME} open in {slot.netns}")
                try:
                    netfilter.counter(rules.TABLE, rules.REFUSED, reset=True)
                except FileNotFoundError:
                    raise NotFound(incomplete) from None
                entry = {"lladdr": GUEST_MAC, "state": "permanent"}
                here.neigh("replace", ifindex=tap["index"], dst=str(GUEST_ADDRESS), **entry)
                limited: bool = tap.get_attr("IFLA_QDISC") == netns.QDISC
                if limited:
                    here.tc("del", index=tap["index"], root=True)
                return limited


async def limit(slot: Slot, mb_per_second: float) -> None:
    """Limit what the slot's VM sends and receives, each, until the slot is recycled. A second's worth passes at once,
    and what a card sends in one piece. Raises HostError."""
    rate = max(1, round(mb_per_second * 1e6))
    if rate > _MAX_RATE:
        return
    burst = min(max(rate, _MIN_BURST_BYTES), _MAX_BURST_BYTES)

    def receiving() -> None:
        netns.enter(slot.netns)
        netns.limit_receiving(TAP_NAME, rate, burst)

    with host_errors(f"can't limit the network of VM {slot.n}"):
        await netns.in_thread(receiving)
    await process.run(["nft", "-f", "-"], input=rules.for_sender(rate, burst).encode(), netns=slot.netns)


def netns_of(n: int) -> str:
    return f"vm{n}"


def _ignoring_absence(call: Callable[..., object], *args: object, **kwargs: object) -> None:
    try:
        call(*args, **kwargs)
    except NetlinkError as error:
        if error.code not in (errno.ENOENT, errno.ENODEV, errno.ESRCH):
            raise


def _name_port(host: Any, index: int, n: int) -> None:
    """Mark a port as Swarm's, and keep the kernel from giving it an IPv6 address."""
    alias = f"{netns.MARK} vm{n}"
    try:
        host.link("set", index=index, ifalias=alias, IFLA_AF_SPEC=_NO_IPV6_ADDRESS)
    except NetlinkError as error:
        if error.code != errno.EAFNOSUPPORT:  # a kernel without IPv6 (ipv6.disable=1) has nothing to turn off
            raise
        host.link("set", index=index, ifalias=alias)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)

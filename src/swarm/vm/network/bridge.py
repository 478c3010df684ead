"""The host's part of Swarm's network: the bridge, a blackhole route behind it, and the nft table ``inet swarm``.

Each carries a mark in the kernel from its creation, so it is always clear what is Swarm's, even if its maker was killed
half-way: the bridge has a MAC of its own, the route a protocol number, the table a comment. Anything without the mark
belongs to someone else: errors name it, and Swarm leaves it alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from swarm.base import process
from swarm.errors import Conflict, HostError, UsageError
from swarm.vm.network import lacks, netfilter, netns, rules

# A bridge with this address is Swarm's. (06: locally administered; 53:57:41:52 spells SWAR.)
BRIDGE_MAC = "06:00:53:57:41:52"
ROUTE_PROTOCOL = 83  # rtm_protocol of our routes; iproute2 has no name for it
# The kernel numbers a bridge's ports with 10 bits and skips 0 (net/bridge/br_private.h, BR_PORT_BITS).
MAX_PORTS = 1023
# The bridge's index is always this one, if it is free: a socket is bound to an index, so connections to VMs outlive a
# bridge that somebody removes, once it is made again. (The kernel counts upward from 1 and gets nowhere near.)
BRIDGE_INDEX = (1 << 30) + 1

_WORST_METRIC = 0xFFFFFFFF
_BLACKHOLE = 6  # RTN_BLACKHOLE, linux/rtnetlink.h
_IFF_UP = 0x1
_ACT_TO_TABLE = 1  # FR_ACT_TO_TBL, linux/fib_rules.h
_REFUSING = frozenset({6, 7, 8})  # FR_ACT_BLACKHOLE, _UNREACHABLE, _PROHIBIT
_INVERTED = 0x2  # FIB_RULE_INVERT, linux/fib_rules.h
_CONDITIONS = ("FRA_SRC", "FRA_IIFNAME", "FRA_OIFNAME", "FRA_FWMARK")  # of a rule: not for every packet
_NUD_NOARP, _NUD_PERMANENT, _NTF_MASTER = 0x40, 0x80, 0x04  # linux/neighbour.h
_LOOSE = "2"  # of rp_filter


class Bridge:
    """Name, subnet and rules of the bridge; `ensure` makes it."""

    def __init__(self, *, subnet: IPv4Network, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", name):
            raise UsageError(f"invalid name of a bridge {name!r}: use 1 to 15 letters, digits, '_', '.', '-'")
        if subnet.prefixlen > 29:
            raise UsageError(f"the subnet {subnet} is too small for a gateway and VMs: use /29 or wider")
        self.subnet = subnet
        self.name = name
        self.gateway = subnet.network_address + 1
        self._alias = f"{netns.MARK} {subnet}"
        self._rules = rules.for_host(subnet, name)

    async def ensure(self) -> None:
        """Make the bridge, blackhole route and rules if any is missing (a few look-ups, ~2 ms).

        Raises HostError if something else on this host conflicts, with its name and the setting to change.
        """
        require_root()
        if await netns.in_thread(self.is_complete):
            return
        async with netns.locked(exclusive=True):
            if await netns.in_thread(self.is_complete):  # another process was faster
                return
            await netns.in_thread(self.check_clashes)
            # The rules are in place before there is anything to protect.
            await process.run(["nft", "-f", "-"], input=self._rules.encode())
            await netns.in_thread(self._ensure)

    async def mend(self) -> bool:
        """If VMs have ports, put back what the bridge lost, and the ports it lost (somebody removed it, set it down,
        flushed its addresses or neighbours). Connections go on. Returns whether anything was missing. ~3 ms.

        Raises HostError, and changes nothing, when something else on this host conflicts.
        """
        if await netns.in_thread(self._is_whole):
            return False
        async with netns.locked(exclusive=True):
            if await netns.in_thread(self._is_whole):  # a port was just being made
                return False
            await netns.in_thread(self.check_clashes)  # what has its name now may be somebody else's
            await process.run(["nft", "-f", "-"], input=self._rules.encode())
            await netns.in_thread(self._ensure)
        return True

    async def remove(self) -> list[str]:
        """Undo `ensure`, whatever settings it ran with. Returns what was removed.

        Raises Conflict while VMs are still attached.
        """
        require_root()
        async with netns.locked(exclusive=True):
            removed, comment = await netns.in_thread(self._remove)
            if comment is not None and rules.is_ours(comment):
                await process.run(["nft", "delete", "table", "inet", rules.TABLE])
                removed.append(f"nft table inet {rules.TABLE}")
        return removed

    def is_complete(self) -> bool:
        with host_errors("can't read the host's network"), netns.netlink() as host:
            return self.index(host) is not None

    def index(self, host: Any) -> int | None:
        """Index of the bridge; None unless bridge, route and rules all exist and match the current settings."""
        if netfilter.table_comment(rules.TABLE) != rules.comment_of(self._rules):
            return None
        for link in links_named(host, self.name):
            # The alias is set last. The bridge may have been set down since.
            if is_our_bridge(link) and link.get_attr("IFLA_IFALIAS") == self._alias and link["flags"] & _IFF_UP:
                subnets = [f"{r.get_attr('RTA_DST')}/{r['dst_len']}" for r in _our_routes(host)]
                index = int(link["index"])
                return index if str(self.subnet) in subnets and self.has_address(host, index) else None
        return None

    def has_address(self, host: Any, index: int) -> bool:
        """Has the bridge its address, and so the route to the VMs?"""
        addresses = host.get_addr(family=socket.AF_INET, index=index)
        return any(address.get_attr("IFA_LOCAL") == str(self.gateway) for address in addresses)

    def _is_whole(self) -> bool:
        """Is everything there that VMs with ports need? True also without any VM."""
        with host_errors("can't read the host's network"), netns.netlink() as host:
            last = self.subnet.num_addresses - 3  # others' may be beyond this subnet: `_ensure` leaves those alone
            ports = {n: it for it in host.link("dump") if (n := port_of(it)) is not None and n <= last}
            if not ports:
                return True
            if (bridge := self.index(host)) is None:
                return False
            routes = host.route("dump", family=socket.AF_INET, oif=bridge)
            if not any(f"{r.get_attr('RTA_DST')}/{r['dst_len']}" == str(self.subnet) for r in routes):
                return False
            known = {
                entry.get_attr("NDA_DST"): entry.get_attr("NDA_LLADDR")
                for entry in host.get_neighbours(family=socket.AF_INET, ifindex=bridge)
                if entry["state"] & _NUD_PERMANENT
            }
            return all(
                link.get_attr("IFLA_MASTER") == bridge
                and link["flags"] & _IFF_UP
                and known.get(str(self.address(n))) == uplink_mac(self.address(n))
                for n, link in ports.items()
            )

    def address(self, n: int) -> IPv4Address:
        return self.subnet.network_address + n + 1

    def attach(self, host: Any, bridge: int, port: int, n: int) -> None:
        """Make an interface the port of VM ``n``. Frames pass only between it and the bridge itself."""
        address, mac = self.address(n), uplink_mac(self.address(n))
        try:
            host.link("set", index=port, master=bridge)
        except NetlinkError as error:
            if error.code == errno.EXFULL:
                raise HostError(
                    f"{self.name} is full: a Linux bridge has at most {MAX_PORTS} ports, so this host can run "
                    f"at most {MAX_PORTS} VMs at once"
                ) from None
            raise
        host.brport("set", index=port, isolated=1, learning=0, unicast_flood=0, mcast_flood=0, bcast_flood=0)
        host.fdb("replace", ifindex=port, lladdr=mac, state=_NUD_NOARP, flags=_NTF_MASTER)
        host.neigh("replace", ifindex=bridge, dst=str(address), lladdr=mac, state="permanent")

    def check_clashes(self) -> None:
        with host_errors("can't read the host's network"), netns.netlink() as host:
            links = {link["index"]: link for link in host.link("dump")}
            name = {index: link.get_attr("IFLA_IFNAME") for index, link in links.items()}
            for index, link in links.items():
                if name[index] == self.name and not is_our_bridge(link):
                    raise HostError(
                        f"this host has an interface {self.name} that Swarm did not make: set SWARM_BRIDGE (or "
                        f"`bridge` in swarm.toml) to another name, or remove the interface"
                    )
                made_for = link.get_attr("IFLA_IFALIAS") or self._alias
                if is_our_bridge(link) and (name[index] != self.name or made_for != self._alias):
                    raise HostError(
                        f"Swarm's network is up as {name[index]} ({made_for}), but the settings say {self.name} "
                        f"({self._alias}): run swarm-cleanup, or set SWARM_BRIDGE and SWARM_SUBNET back"
                    )
            tables = _tables_for_all(host)
            for route in host.route("dump", family=socket.AF_INET):
                clash = self._clash(route, name, tables)
                if clash:
                    raise HostError(
                        f"{clash} overlaps Swarm's subnet {self.subnet}: set SWARM_SUBNET (or `subnet` in swarm.toml) "
                        f"to a free one, for example 10.213.0.0/16, or remove that route"
                    )
            for rule in host.get_rules(family=socket.AF_INET):
                if clash := self._refusal(rule):
                    raise HostError(
                        f"{clash} covers Swarm's subnet {self.subnet}: remove it (`ip rule`), or set SWARM_SUBNET (or "
                        f"`subnet` in swarm.toml) to another"
                    )
            comment = netfilter.table_comment(rules.TABLE)
            if comment is not None and not rules.is_ours(comment):
                raise HostError(
                    f"this host has an nft table `inet {rules.TABLE}` that Swarm did not make: "
                    f"remove it (`nft delete table inet {rules.TABLE}`) or rename it"
                )

    def _clash(self, route: Any, name: dict[int, str], tables: set[int]) -> str | None:
        table = route.get_attr("RTA_TABLE") or route["table"]
        device = name.get(route.get_attr("RTA_OIF") or 0, "")
        # 0.0.0.0/1 and 128.0.0.0/1 are a default route too: OpenVPN makes these two.
        if table not in tables or device == self.name or route["dst_len"] <= 1 or _is_our_route(route):
            return None
        destination = IPv4Network((route.get_attr("RTA_DST"), route["dst_len"]))
        if not destination.overlaps(self.subnet):
            return None
        return f"the route {destination}" + (f" on {device}" if device else " (blackhole or unreachable)")

    def _refusal(self, rule: Any) -> str | None:
        """A rule that refuses packets to VMs, whatever the routes are."""
        if rule["action"] not in _REFUSING or not _for_all(rule):
            return None
        destination = IPv4Network((rule.get_attr("FRA_DST") or "0.0.0.0", rule["dst_len"]))
        if not destination.overlaps(self.subnet):
            return None
        return f"the rule {rule.get_attr('FRA_PRIORITY') or 0} (blackhole, unreachable or prohibit to {destination})"

    def _ensure(self) -> None:
        with host_errors(f"can't make the bridge {self.name}"), netns.netlink() as host:
            if not links_named(host, self.name):
                self._add(host)
            index = links_named(host, self.name)[0]["index"]
            netns.sysctl(f"ipv6/conf/{self.name}/disable_ipv6", "1")  # of this interface only, and removed with it
            # A VPN may have routes to the same addresses: a strict filter would then drop what VMs answer. The kernel
            # takes the larger value of this interface's and that of all.
            netns.sysctl(f"ipv4/conf/{self.name}/rp_filter", _LOOSE)
            host.addr("replace", index=index, address=str(self.gateway), prefixlen=self.subnet.prefixlen)
            host.link("set", index=index, state="up")
            # It came with the address, and may have been removed since.
            host.route("replace", dst=str(self.subnet), oif=index, scope="link", proto="kernel",
                       prefsrc=str(self.gateway))  # fmt: skip
            # A packet to a VM that is gone must never leave by the default route, even when the bridge is down.
            host.route("replace", dst=str(self.subnet), type="blackhole", priority=_WORST_METRIC, proto=ROUTE_PROTOCOL)
            for link in host.link("dump"):
                if (n := port_of(link)) is not None and n < self.subnet.num_addresses - 2:
                    self.attach(host, index, link["index"], n)
                    host.link("set", index=link["index"], state="up")
            host.link("set", index=index, ifalias=self._alias)

    def _add(self, host: Any) -> None:
        settings = {"ifname": self.name, "kind": "bridge", "address": BRIDGE_MAC, "br_mcast_snooping": 0}
        try:
            host.link("add", index=BRIDGE_INDEX, **settings)
        except NetlinkError as error:
            if error.code != errno.EBUSY:
                raise
            host.link("add", **settings)

    def _remove(self) -> tuple[list[str], str | None]:
        removed = []
        with host_errors("can't remove the bridge"), netns.netlink() as host:
            links = list(host.link("dump"))
            bridges = {link["index"]: link.get_attr("IFLA_IFNAME") for link in links if is_our_bridge(link)}
            ports = [
                str(link.get_attr("IFLA_IFALIAS"))
                for link in links
                if link.get_attr("IFLA_MASTER") in bridges and is_our_port(link)
            ]
            if ports:
                raise Conflict(
                    f"{', '.join(bridges.values())} still carries {len(ports)} of Swarm's VMs ({', '.join(ports[:8])}"
                    f"{', …' if len(ports) > 8 else ''}): remove them first"
                )
            for index, name in bridges.items():
                host.link("del", index=index)
                removed.append(f"bridge {name}")
            for route in _our_routes(host):
                host.route("del", dst=f"{route.get_attr('RTA_DST')}/{route['dst_len']}", type="blackhole",
                           priority=_WORST_METRIC, proto=ROUTE_PROTOCOL)  # fmt: skip
                removed.append(f"blackhole route {route.get_attr('RTA_DST')}/{route['dst_len']}")
            return removed, netfilter.table_comment(rules.TABLE)


def require_root() -> None:
    if os.geteuid() != 0:
        raise HostError("network namespaces need root: run this as root (sudo)")


@contextlib.contextmanager
def host_errors(what: str) -> Iterator[None]:
    """Turn errors of the kernel into HostErrors that begin with ``what``."""
    try:
        yield
    except (OSError, NetlinkError) as error:
        code = error.code if isinstance(error, NetlinkError) else error.errno
        named = isinstance(error, OSError) and error.filename
        detail = f"{os.strerror(code)} (errno {code})" if code and not named else str(error)
        # What was there when the engine started may be gone since.
        raise HostError(f"{what}: {missing if (missing := lacks.told()) else detail}") from error


def links_named(host: Any, name: str) -> list[Any]:
    try:
        return list(host.link("get", ifname=name))
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise
        return []


def is_our_bridge(link: Any) -> bool:
    info = link.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info else None
    return bool(kind == "bridge" and link.get_attr("IFLA_ADDRESS") == BRIDGE_MAC)


def is_our_port(link: Any) -> bool:
    return port_of(link) is not None


def port_of(link: Any) -> int | None:
    """The number of the VM whose port this interface is."""
    found = re.fullmatch(rf"{netns.MARK} vm([1-9][0-9]{{0,8}})", link.get_attr("IFLA_IFALIAS") or "")
    return int(found[1]) if found else None


def uplink_mac(address: IPv4Address) -> str:
    """A locally administered address that no other VM of this host has."""
    return "06:01:" + ":".join(f"{byte:02x}" for byte in address.packed)


def _tables_for_all(host: Any) -> set[int]:
    """The routing tables that a packet to a VM meets: a VPN may have one of its own, before the main one."""
    return {
        rule.get_attr("FRA_TABLE") or rule["table"]
        for rule in host.get_rules(family=socket.AF_INET)
        if rule["action"] == _ACT_TO_TABLE and _for_all(rule)
    }


def _for_all(rule: Any) -> bool:
    """Is the rule for every packet, or (as a VPN's "not fwmark …") for all but a few?"""
    return bool(rule["flags"] & _INVERTED) or not any(rule.get_attr(name) for name in _CONDITIONS)


def _is_our_route(route: Any) -> bool:
    return bool(route["proto"] == ROUTE_PROTOCOL and route["type"] == _BLACKHOLE)


def _our_routes(host: Any) -> list[Any]:
    return [r for r in host.route("dump", family=socket.AF_INET, proto=ROUTE_PROTOCOL) if _is_our_route(r)]

"""Check the way of a packet to one VM, link by link: process, namespace, tap, bridge port, uplink, routing, ping, sshd.

Different faults look alike from outside ("SSH times out"): a tap that is not on the bridge, broken routing in the
namespace, an sshd that waits for entropy. So each link is checked by itself, from the host towards the guest, and links
behind a broken one are not checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from swarm.base.process import run
from swarm.channel import Channel, Hello
from swarm.channel.dial import Endpoint, dial
from swarm.doctor.check import Check, Status, fail, ok, warn
from swarm.errors import SwarmError
from swarm.vm.driver import AGENTD_PORT, GUEST_ADDRESS, GUEST_GATEWAY, TAP_NAME
from swarm.vm.drivers.console import last_lines

_PATH = ("process", "namespace", "bridge port", "tap", "address", "routing", "ping", "agentd", "sshd", "entropy")
_STARVED = "PRNG is not seeded"  # OpenSSH's last message (entropy.c, seed_rng) if the kernel has no random numbers
_UPLINK = "eth0"  # the namespace's own end of the veth pair
_PING_SECONDS = 3
_CONNECT_SECONDS = 5.0
# Without KVM sshd takes a second to send its banner, and several on a busy host.
_BANNER_SECONDS = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedVm:
    """What must be known of a VM to check it. ``how_it_ended`` is '' while its process lives; without ``token`` agentd
    accepts no requests."""

    n: int
    pid: int
    netns: str
    address: IPv4Address
    console: Path
    how_it_ended: str = ""
    owner_pid: int = 0
    token: bytes | None = None
    manual: bool = True


Link = Mapping[str, Any]  # an interface as `ip -json` shows it


async def examine(vm: ExaminedVm, *, bridge: str, subnet: IPv4Network) -> list[Check]:
    """Check one VM, in the order of the path. Names of checks begin with 'VM <n>: '."""
    recreate = (
        f"swarm-spawn-ns {vm.n}   (replaces it)" if vm.manual else f"swarm vm rm {vm.n}   (once its engine has ended)"
    )
    if vm.how_it_ended:
        end = f"process {vm.pid} does not run: {vm.how_it_ended}"
        return [fail(f"VM {vm.n}: process", end, f"swarm vm rm {vm.n}   (the console: {vm.console})")]
    checks = [ok(f"VM {vm.n}: process", f"{vm.pid}"), _namespace(vm, recreate)]
    if checks[-1].status is not Status.FAIL:
        host, inside = await asyncio.gather(_links(None), _links(_inside(vm)))
        checks += [
            _bridge_port(vm, host, bridge, subnet, recreate),
            _tap(vm, inside, recreate),
            _uplink(vm, inside, recreate),
            await _routing(vm, recreate),
        ]
    broken = next((check for check in checks if check.status is Status.FAIL), None)
    if broken is not None:
        # A fault breaks later links too (a lost address takes its routes along), so only the first is reported.
        _, _, what = broken.name.partition(": ")
        tried = checks[: checks.index(broken) + 1]
        skipped = [name for name in _PATH if f"VM {vm.n}: {name}" not in {check.name for check in tried}]
        return [*tried, *(warn(f"VM {vm.n}: {name}", f"not checked: {what} is broken") for name in skipped)]
    checks.append(await _ping(vm, bridge, recreate))
    agentd, hello = await _agentd(vm, bridge)
    return [*checks, agentd, *await _sshd(vm, hello, recreate)]


def _namespace(vm: ExaminedVm, recreate: str) -> Check:
    name = f"VM {vm.n}: namespace"
    used, named = _identity(Path(_inside(vm))), _identity(Path("/run/netns", vm.netns))
    if used is not None and named == used:
        return ok(name, vm.netns)
    # An engine with private mounts (a service's PrivateTmp or ProtectSystem) gave it a name that only it can see.
    roots = (Path(f"/proc/{pid}/root/run/netns") for pid in (vm.owner_pid, vm.pid))
    if used is not None and any(_identity(root / vm.netns) == used for root in roots):
        return ok(name, f"{vm.netns}, named in its engine's own mounts: enter it by `nsenter -t {vm.pid} -n`")
    if used is None or named is None or named[0] != used[0]:  # on another file system: a name without its mount
        if used is not None and used != _identity(Path("/proc/self/ns/net")):
            said = f"nothing here is named {vm.netns}: its name was deleted, or is gone with the mounts it was in"
            return warn(name, f"{said}; enter the VM's namespace by `nsenter -t {vm.pid} -n`", recreate)
        return fail(name, f"the network namespace {vm.netns} does not exist", recreate)
    return fail(name, f"the VM's process is not in the namespace {vm.netns}", recreate)


def _inside(vm: ExaminedVm) -> str:
    """Its namespace, however it is named."""
    return f"/proc/{vm.pid}/ns/net"


def _identity(namespace: Path) -> tuple[int, int] | None:
    try:
        status = namespace.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _tap(vm: ExaminedVm, inside: Sequence[Link], recreate: str) -> Check:
    name = f"VM {vm.n}: tap"
    tap = _named(inside, TAP_NAME)
    if tap is None:
        return fail(name, f"{TAP_NAME} does not exist in {vm.netns}", recreate)
    if "UP" not in tap["flags"]:
        return fail(name, f"{TAP_NAME} in {vm.netns} is down", recreate)
    if "LOWER_UP" not in tap["flags"]:
        return fail(name, f"{TAP_NAME} in {vm.netns} is up, but no VM is connected to it", recreate)
    if str(GUEST_GATEWAY) not in _addresses(tap):
        return fail(name, f"{TAP_NAME} in {vm.netns} has lost its address {GUEST_GATEWAY}", recreate)
    return ok(name, f"{TAP_NAME} in {vm.netns}, {GUEST_GATEWAY}, connected to the VM")


def _bridge_port(vm: ExaminedVm, host: Sequence[Link], bridge: str, subnet: IPv4Network, recreate: str) -> Check:
    name = f"VM {vm.n}: bridge port"
    port, bridge_link = _named(host, f"tap{vm.n}"), _named(host, bridge)
    if bridge_link is None:
        return fail(name, f"the bridge {bridge} does not exist", recreate)
    if "UP" not in bridge_link["flags"]:
        return fail(name, f"the bridge {bridge} is down", recreate)
    if str(subnet.network_address + 1) not in _addresses(bridge_link):
        fix = f"ip addr add {subnet.network_address + 1}/{subnet.prefixlen} dev {bridge}"
        return fail(name, f"the bridge {bridge} has lost its address {subnet.network_address + 1}", fix)
    if port is None:
        return fail(name, f"the link tap{vm.n} does not exist on the host", recreate)
    real = port["ifname"]
    if port.get("master") != bridge:
        where = f"on {port['master']}" if port.get("master") else "on no bridge"
        return fail(
            name,
            f"tap{vm.n} ({real}) is not on {bridge} but {where}: nothing reaches the VM",
            recreate,
        )
    if "UP" not in port["flags"] or "LOWER_UP" not in port["flags"]:
        return fail(name, f"tap{vm.n} ({real}) is on {bridge}, but down", recreate)
    return ok(name, f"tap{vm.n} ({real}) is on {bridge}")


def _uplink(vm: ExaminedVm, inside: Sequence[Link], recreate: str) -> Check:
    name = f"VM {vm.n}: address"
    uplink = _named(inside, _UPLINK)
    if uplink is None:
        return fail(name, f"{_UPLINK} does not exist in {vm.netns}", recreate)
    if "UP" not in uplink["flags"]:
        return fail(name, f"{_UPLINK} in {vm.netns} is down", recreate)
    if str(vm.address) not in _addresses(uplink):
        return fail(name, f"{_UPLINK} in {vm.netns} has lost the VM's address {vm.address}", recreate)
    return ok(name, f"{vm.address} on {_UPLINK} in {vm.netns}")


async def _routing(vm: ExaminedVm, recreate: str) -> Check:
    """Forwarding, the route to the guest and the one back, and the two rules that translate addresses."""
    name = f"VM {vm.n}: routing"
    forward = await _output("cat", "/proc/sys/net/ipv4/ip_forward", netns=_inside(vm))
    if forward.strip() != "1":
        fix = f"ip netns exec {vm.netns} sysctl -w net.ipv4.ip_forward=1"
        return fail(name, f"{vm.netns} does not forward packets (ip_forward is {forward.strip() or 'unreadable'})", fix)
    to_guest = await _output("ip", "route", "get", str(GUEST_ADDRESS), netns=_inside(vm))
    if f"dev {TAP_NAME}" not in to_guest:
        return fail(name, f"{vm.netns} has no route to the guest over {TAP_NAME}", recreate)
    default = await _output("ip", "route", "show", "default", netns=_inside(vm))
    if _UPLINK not in default:
        return fail(name, f"{vm.netns} has no default route: the guest's answers are lost", recreate)
    rules = await _output("nft", "list", "ruleset", netns=_inside(vm))
    for what, rule in (
        ("to the guest", rf"ip daddr set {re.escape(str(GUEST_ADDRESS))}\b"),
        ("from the guest", rf"ip saddr {re.escape(str(GUEST_ADDRESS))} ip saddr set {re.escape(str(vm.address))}\b"),
    ):
        if not re.search(rule, rules):
            return fail(name, f"{vm.netns} does not translate addresses {what}: its nft rule is missing", recreate)
    return ok(name, f"{vm.address} <-> {GUEST_ADDRESS} in {vm.netns}")


async def _ping(vm: ExaminedVm, bridge: str, recreate: str) -> Check:
    name = f"VM {vm.n}: ping"
    done = await run(["ping", "-n", "-c", "1", "-W", str(_PING_SECONDS), "-I", bridge, str(vm.address)], check=False)
    if done.returncode != 0:
        return fail(
            name,
            f"{vm.address} does not answer, though every link to it is up: the guest hangs or has no network",
            f"tail {vm.console}   then: {recreate}",
        )
    taken = re.search(rb"time=([\d.]+) ms", done.stdout)
    return ok(name, f"{vm.address} answers" + (f" in {float(taken[1]):.1f} ms" if taken else ""))


async def _agentd(vm: ExaminedVm, bridge: str) -> tuple[Check, Hello | None]:
    name = f"VM {vm.n}: agentd"
    trouble = [""]
    endpoint = Endpoint(host=str(vm.address), port=AGENTD_PORT, interface=bridge)
    try:
        if vm.token is not None:
            async with Channel.connect(endpoint, token=vm.token, timeout_seconds=_CONNECT_SECONDS) as channel:
                hello = await channel.hello()
            return ok(name, f"answers: kernel {hello.kernel}, up for {hello.uptime_ms / 1000:.0f} s"), hello
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await dial(endpoint, trouble)
        writer.close()
    except (OSError, TimeoutError, SwarmError) as error:
        return fail(name, f"port {AGENTD_PORT}: {error or trouble[0] or 'no answer'}", f"tail {vm.console}"), None
    return ok(name, f"port {AGENTD_PORT} accepts connections (only the VM's engine can send requests)"), None


async def _sshd(vm: ExaminedVm, hello: Hello | None, recreate: str) -> list[Check]:
    """Check sshd and entropy together: while the random pool is empty, sshd sends nothing, and that is the cause."""
    sshd, entropy = f"VM {vm.n}: sshd", f"VM {vm.n}: entropy"
    banner, fault = await _banner(vm.address)
    # agentd was asked before sshd: a kernel short of entropy gathers some as soon as a process waits for it.
    # An sshd that got no random numbers prints so on the console, and ends.
    starved = not banner and any(_STARVED in line for line in last_lines(vm.console, lines=100))
    seeded = (hello.crng_ready if hello else bool(banner)) and not starved
    checks = [
        ok(sshd, banner) if banner else fail(sshd, f"is not up: {fault}", f"tail {vm.console}   then: {recreate}")
    ]
    if seeded:
        return [*checks, ok(entropy, "the guest's random pool is seeded")]
    if hello is None and not starved:
        return [*checks, warn(entropy, "unknown: only the VM's engine can ask its agentd")]
    if not banner:
        checks = [fail(sshd, f"is not up: {fault}. It waits for random numbers", recreate)]
    cause = "the guest's kernel has no random numbers: sshd, and everything else that needs some, waits for them"
    return [*checks, fail(entropy, cause, recreate)]


async def _banner(address: IPv4Address) -> tuple[str, str]:
    """The banner that sshd sends first; or '' and what happened instead."""
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(str(address), 22, limit=1024)
    except TimeoutError:
        return "", "port 22 does not answer"
    except OSError as error:
        return "", f"port 22: {error.strerror or error}"
    try:
        async with asyncio.timeout(_BANNER_SECONDS):
            line = await reader.readline()
    except TimeoutError:
        return "", f"port 22 accepts connections, but sent no SSH banner within {_BANNER_SECONDS:g} s"
    except (OSError, ValueError) as error:
        return "", f"port 22 accepted, then broke the connection: {error}"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    text = line.decode(errors="replace").strip()
    return (text, "") if text.startswith("SSH-2.0-") else ("", f"port 22 sent {text[:60]!r} instead of an SSH banner")


async def _links(netns: str | None) -> list[Link]:
    text = await _output("ip", "-json", "-details", "address", "show", netns=netns)
    found: list[Link] = json.loads(text or "[]")
    return [link for link in found if link]


def _named(links: Sequence[Link], name: str) -> Link | None:
    return next((link for link in links if name == link["ifname"] or name in link.get("altnames", ())), None)


def _addresses(link: Link) -> list[str]:
    return [entry.get("local", "") for entry in link.get("addr_info", ())]


async def _output(*argv: str, netns: str | None) -> str:
    try:
        return (await run(argv, netns=netns, check=False)).stdout.decode(errors="replace")
    except SwarmError:
        return ""

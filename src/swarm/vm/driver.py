"""What a driver must offer, and the values that pass between drivers, images, network and engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from swarm.channel.dial import Endpoint

# Inside every network namespace the same names and addresses, so that one template restores anywhere.
GUEST_ADDRESS = IPv4Address("172.16.0.2")
GUEST_GATEWAY = IPv4Address("172.16.0.1")
GUEST_MAC = "06:00:ac:10:00:02"
TAP_NAME = "tap0"
TAP_MAC = "06:00:ac:10:00:01"
AGENTD_PORT = 1024
# The third disk, after the root and the work disk.
LAYER_DEVICE = "vdc"
# At the guest's own gateway address, and only while its attempt runs: services by name, and the way to allowed domains.
GATEWAY_PORT = 8080
PROXY_PORT = 3128
# VM n's VMM runs as uid and gid BASE_UID + n: no account, no overlap with the ranges that adduser and systemd hand out.
BASE_UID = 1_700_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An immutable kernel + root file system in ``dir``, verified against the digests in its manifest.

    ``kernel`` is a bzImage (QEMU boots it), ``kernel_elf`` the uncompressed ELF inside it (Firecracker boots that).
    ``boot_args`` are those that the kernel itself needs; a driver adds its console and devices. ``initramfs`` is None
    for a kernel that has everything built in and mounts ``root`` itself. ``base`` and ``packages`` (name -> version)
    tell the Debian that ``root`` is made of: what a layer is built upon.
    """

    digest: str
    dir: Path
    kernel: Path
    kernel_elf: Path
    root: Path
    initramfs: Path | None
    boot_args: str
    base: str = ""
    packages: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What an agent's `requirements` and `packages` add to an image's root, read-only; ``digest`` is its content's.

    ``path`` is an erofs file, laid over the root by the guest's init; for the `process` driver a directory of Python
    modules.
    """

    digest: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """The hardware of a VM. Raw disks only: the image's root and a layer (read-only, shared), one sparse work disk."""

    image: Image
    vcpus: int = 1
    memory_mb: int = 256
    disk_mb: int = 2048
    layer: Layer | None = None
    preload: tuple[str, ...] = ()  # Python modules that the guest's warm interpreter imports at boot
    entropy: bool = True  # a virtio-rng device; False only to provoke what `swarm doctor` must find
    # What the work disk and the network card (each way) may carry, 10^6 bytes a second; None is as much as they can.
    disk_mb_per_second: float | None = None
    network_mb_per_second: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Network place number ``n``: a namespace with a tap in it, reachable from the host at ``address``."""

    n: int
    netns: str
    address: IPv4Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A driver's verdict on this host. ``reason`` is a sentence for people in both cases."""

    usable: bool
    reason: str
    accelerator: str = ""  # 'kvm', 'tcg', or '' when it does not apply
    version: str = ""
    snapshots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A booted, paused VM on disk in ``dir``: memory file, device state, the token that its agentd knows."""

    key: str
    dir: Path
    spec: VmSpec
    token: bytes = field(repr=False)


class Vm(Protocol):
    """One running microVM. Serves one attempt, then is destroyed."""

    @property
    def pid(self) -> int: ...
    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def console(self) -> Path: ...

    async def wait(self) -> str:
        """Return when the VMM process is gone, with a sentence that says how it ended. Cancellable."""

    async def printed(self, text: bytes) -> None:
        """Return when the guest has printed ``text`` on its console; for ever if it never does."""

    async def snapshot(self, dir: Path) -> None:  # noqa: A002
        """Write memory and device state into ``dir`` and end this VM. Raises BootFailed."""

    async def kill(self) -> None:
        """End the VM and wait for its death. Idempotent; never raises."""


class Driver(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def networked(self) -> bool:
        """Do its VMs live in a network slot? (The `process` driver's don't.)"""

    async def probe(self) -> Probe:
        """Can this host run guests by this driver? Says why not. Cheap checks first; no guest is booted here."""

    async def boot(
        self,
        spec: VmSpec,
        slot: Slot | None,
        dir: Path,  # noqa: A002
        *,
        outlive: bool = False,
        for_template: bool = False,
    ) -> Vm:
        """Start a VM from its image; return when the VMM runs it (userspace comes later).

        ``dir`` is the VM's own directory: sockets, console.log and the work disk go there. Without a slot the VM has
        no network. With ``outlive`` it goes on when this process ends (`swarm-spawn-ns`). Only one booted
        ``for_template`` can be snapshotted. Raises BootFailed.
        """

    async def restore(self, template: Template, slot: Slot | None, dir: Path, *, outlive: bool = False) -> Vm:  # noqa: A002
        """Start a copy-on-write clone of a template; return when it runs. Raises BootFailed."""


def kernel_command_line(spec: VmSpec, *extra: str) -> str:
    preload = [f"swarm.preload={','.join(spec.preload)}"] if spec.preload else []
    # Without a dot, so that the kernel hands it to init in its environment: there is no /proc to read it from yet.
    layer = [f"swarm_layer={LAYER_DEVICE}"] if spec.layer else []
    return " ".join((spec.image.boot_args, *extra, *layer, *preload)).strip()


def host_tsc_khz() -> int:
    """Frequency of the host's time-stamp counter; 0 where /proc/cpuinfo has no bogomips.

    On x86, Linux derives loops_per_jiffy from the TSC, and prints it as bogomips: two per TSC cycle (calibrate.c).
    """
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("bogomips"):
            return round(float(line.partition(":")[2]) * 500)
    return 0

"""What a VM driver must offer, and the values that drivers, images, network and engine pass to each other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from swarm.channel.dial import Endpoint
from swarm.channel.values import Identity

# The same names and addresses inside every network namespace, so that a template can be restored in any of them.
GUEST_ADDRESS = IPv4Address("172.16.0.2")
GUEST_GATEWAY = IPv4Address("172.16.0.1")
GUEST_MAC = "06:00:ac:10:00:02"
TAP_NAME = "tap0"
TAP_MAC = "06:00:ac:10:00:01"
AGENTD_PORT = 1024
# The third disk, after the root and the work disk: a layer, or an imported image.
LAYER_DEVICE = "vdc"
# At the guest's gateway address, open only while its attempt runs: gateway to services, proxy to allowed domains.
GATEWAY_PORT = 8080
PROXY_PORT = 3128
# VM n's VMM runs as uid and gid BASE_UID + n: without an account, outside the ranges that adduser and systemd allocate.
BASE_UID = 1_700_000_000
OOM_SCORE = 900  # of a VMM: the kernel kills VMs before the engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An immutable kernel and root file system in ``dir``, verified against the digests in its manifest.

    ``kernel`` is a bzImage (for QEMU), ``kernel_elf`` the uncompressed ELF inside it (for Firecracker). ``boot_args``
    are the arguments that the kernel itself needs; a driver adds its console and devices. ``initramfs`` is None for a
    kernel that has everything built in and mounts ``root`` itself. ``base`` and ``packages`` (name -> version) describe
    the Debian in ``root``, on which layers are built.
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
class Root:
    """What an imported OCI image says about the programs that run in it. All of it is the image's own word, checked:
    it has no NUL, `cwd` and `home` are absolute, and numbers fit their types.

    ``user``: uid, gid, further groups, and home directory. ``entry``: its Entrypoint and Cmd, which run if an agent has
    no `entry` of its own; () if it has none. ``python``: path of a Python 3.8 or newer in it, or ''.
    """

    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    cwd: str = "/"
    user: tuple[int, int, tuple[int, ...], str] = (0, 0, (), "/root")
    entry: tuple[str, ...] = ()
    stop_signal: int = 15
    python: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What a guest gets beside its image's root, read-only. ``digest`` is of its content.

    Usually it is what an agent's `requirements` and `packages` add: ``path`` is an erofs file, which the guest's init
    lays over the root; for the `process` driver it is a directory of Python modules. ``lacks``: shared libraries that
    something in it needs and that are not there, each with what to do.

    With a ``root`` it is an imported OCI image instead: the guest lays it over nothing, and agents see it as their
    root. The digest covers ``root`` too.
    """

    digest: str
    path: Path
    lacks: tuple[str, ...] = field(default=(), compare=False)
    root: Root | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """The hardware of a VM. Its disks are raw: the image's root and a layer (read-only, shared), a sparse work disk."""

    image: Image
    vcpus: int = 1
    memory_mb: int = 256
    disk_mb: int = 2048
    layer: Layer | None = None
    preload: tuple[str, ...] = ()  # Python modules that the guest's warm interpreter imports at boot, or the image's
    interpreter: bool = False  # the Python of an imported image waits for the agent
    entropy: bool = True  # a virtio-rng device; False only to test that `swarm doctor` notices its absence
    # Limits of the work disk and the network card (each direction), in 10^6 bytes a second; None is unlimited.
    disk_mb_per_second: float | None = None
    network_mb_per_second: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Network slot ``n``: a namespace with a tap in it, reachable from the host at ``address`` by ``bridge`` alone."""

    n: int
    netns: str
    address: IPv4Address
    bridge: str

    @property
    def agentd(self) -> Endpoint:
        return Endpoint(host=str(self.address), port=AGENTD_PORT, interface=self.bridge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a driver works on this host. ``reason`` is a sentence for the user in both cases."""

    usable: bool
    reason: str
    accelerator: str = ""  # 'kvm', 'tcg', or '' if not applicable
    version: str = ""
    snapshots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A booted, paused VM on disk in ``dir``: memory file and device state. ``token`` is its agentd's."""

    key: str
    dir: Path
    spec: VmSpec
    token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A VM as it was at one moment, on disk in ``dir``: memory, device state, work disk. ``identity`` is what it had.

    ``driver``, ``accelerator`` and ``version`` say what wrote it. ``digest`` is over all of its files; ``size_bytes``
    is what they take on disk. ``disk_still``: a VM that is resumed writes nothing to its work disk before its programs
    go on.
    """

    id: str
    dir: Path
    spec: VmSpec
    driver: str
    accelerator: str
    version: str
    identity: Identity = field(repr=False)
    digest: str = ""
    size_bytes: int = 0
    disk_still: bool = False


# Called just before a VM is stopped; the time until it goes on is what its programs notice.
Freeze = Callable[[], Awaitable[None]]


class Vm(Protocol):
    """A running microVM. It serves one attempt, or one sandbox, and is then destroyed."""

    @property
    def pid(self) -> int: ...
    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def console(self) -> Path: ...

    async def wait(self) -> str:
        """Return when the VMM process is gone: a sentence that says how it ended. Can be cancelled."""

    async def printed(self, text: bytes) -> None:
        """Return when the guest has printed ``text`` on its console. Waits for ever if it never does."""

    async def doing(self) -> str:
        """What its VMM does, in a sentence: it runs the guest, has paused it, or does not answer. Never raises."""

    async def snapshot(self, dir: Path) -> None:
        """Write memory and device state into ``dir`` and end this VM. Raises BootFailed."""

    async def save(self, dir: Path, *, freeze: Freeze) -> None:
        """Write memory, device state and disk, all of one moment, into ``dir``; the VM goes on, also after an error.
        Most is copied while it still runs. Raises BootFailed, OSError."""

    def pausing(self, dir: Path, *, freeze: Freeze) -> AbstractAsyncContextManager[None]:
        """The same, but for the length of the block the VM stands still, and then it ends; if the block fails, it goes
        on."""

    async def kill(self) -> None:
        """End the VM and wait until it is dead. Idempotent; never raises."""


class Driver(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def networked(self) -> bool:
        """Do its VMs need a network slot? (Those of the `process` driver don't.)"""

    async def probe(self) -> Probe:
        """Can this host run guests with this driver, and if not, why? Only cheap checks: no guest is booted."""

    async def boot(
        self,
        spec: VmSpec,
        slot: Slot | None,
        dir: Path,
        *,
        outlive: bool = False,
        for_template: bool = False,
        token: bytes = b"",
    ) -> Vm:
        """Start a VM from its image; return when the VMM runs it (userspace is up later).

        ``dir`` is the VM's own directory: sockets, console.log and the work disk go there. Without a slot the VM has
        no network. With ``outlive`` it keeps running when this process ends (`swarm-spawn-ns`). Only a VM booted
        ``for_template`` can be snapshotted. ``token``: agentd's first; agents of this VM can read it, so it must be
        replaced before one runs. Without one, agentd answers nobody. Raises BootFailed.
        """

    async def restore(self, template: Template, slot: Slot | None, dir: Path, *, outlive: bool = False) -> Vm:
        """Start a copy-on-write clone of a template; return when it runs. Raises BootFailed."""

    async def resume(self, snapshot: Snapshot, slot: Slot | None, dir: Path, *, own: bool) -> Vm:
        """Start a VM from a snapshot; return when it runs. Its programs are as they were: frozen.

        It is a copy-on-write clone, which leaves the snapshot as it is; or, with ``own``, it goes on in the snapshot's
        files, which the caller then removes. Until its programs are thawed the snapshot stays valid: its memory is
        mapped privately, and its disk copied, unless that is still. (Should a guest write to it all the same, the
        snapshot is found to be damaged.) Raises BootFailed.
        """


def kernel_command_line(spec: VmSpec, *extra: str, token: bytes) -> str:
    secret = [f"swarm.token={token.hex()}"] if token else []
    own_root = spec.layer is None or spec.layer.root is None
    preload = [f"swarm.preload={','.join(spec.preload)}"] if spec.preload and own_root else []
    # Without a dot in its name, the kernel passes it to init as environment: init has no /proc to read it from yet.
    layer = [f"swarm_{'root' if spec.layer.root else 'layer'}={LAYER_DEVICE}"] if spec.layer else []
    return " ".join((spec.image.boot_args, *extra, *layer, *preload, *secret)).strip()


def host_tsc_khz() -> int:
    """Frequency of the host's time-stamp counter; 0 if /proc/cpuinfo has no bogomips.

    On x86, Linux derives loops_per_jiffy from the TSC, and prints it as bogomips: two per TSC cycle (calibrate.c).
    """
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("bogomips"):
            return round(float(line.partition(":")[2]) * 500)
    return 0

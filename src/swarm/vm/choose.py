"""Which driver runs VMs on this host: the first that has booted a guest to userspace here.

That `/dev/kvm` is there, or that a VMM starts, proves nothing: some hosts offer a KVM on which no kernel gets anywhere.
So each candidate boots the image once, without a network, and the verdict is kept until something that it depends on
changes: the host's boot, the VMM's version, the image.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from swarm.base.aio import first, undoing
from swarm.errors import HostError, SwarmError
from swarm.vm.driver import Driver, Image, Probe, VmSpec

log = structlog.get_logger(__name__)

# What a guest's init prints when userspace is up; its failures begin in another way.
_USERSPACE = b"swarm-init: up after"
_PROBE_MEMORY_MB = 192
PROBE_PREFIX = "probe-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """``rejected``: why each candidate before the chosen one is not used, a sentence each."""

    driver: Driver
    probe: Probe
    rejected: tuple[str, ...] = ()

    def describe(self) -> str:
        """'qemu (QEMU 7.2.22, without KVM), because qemu with KVM: it ended with …'."""
        what = f"{self.driver.name} ({self.probe.reason})"
        return what if not self.rejected else f"{what}, because {'; '.join(self.rejected)}"


async def choose(
    candidates: Sequence[Driver], image: Image, *, state_dir: Path, cache: Path, timeout_seconds: float = 60.0
) -> Choice:
    """The first usable candidate. Raises HostError with every reason when there is none.

    Probe boots happen in ``state_dir`` and may take ``timeout_seconds``, though a VM that ends before is judged at
    once; verdicts are kept in ``cache``.
    """
    rejected: list[str] = []
    for driver in candidates:
        probe = await driver.probe()
        if probe.usable:
            probe = await _verdict(driver, probe, image, state_dir, cache, timeout_seconds)
        if probe.usable:
            return Choice(driver=driver, probe=probe, rejected=tuple(rejected))
        rejected.append(f"{title(driver, probe)} can't be used: {probe.reason}")
    raise HostError("no VM can be run on this host: " + "; ".join(rejected))


def title(driver: Driver, probe: Probe) -> str:
    return f"{driver.name} {'with KVM' if probe.accelerator == 'kvm' else 'without KVM'}"


async def _verdict(
    driver: Driver, probe: Probe, image: Image, state_dir: Path, cache: Path, timeout_seconds: float
) -> Probe:
    """``probe``, not usable if the driver can't boot the image to userspace. Cached, unless it was the host that could
    not (no space, no descriptors): that may be mended in a minute."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    depends = [boot_id, driver.name, probe.accelerator, probe.version, image.digest]
    file = cache / hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]
    try:
        return Probe(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        pass
    try:
        verdict = await _boot(driver, probe, image, state_dir, timeout_seconds)
    except HostError as error:
        return _rejected(probe, driver, f"it could not be tried: {error}")
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(dataclasses.asdict(verdict)))
    partial.rename(file)
    return verdict


def _rejected(probe: Probe, driver: Driver, reason: str) -> Probe:
    log.info("driver rejected", driver=driver.name, accelerator=probe.accelerator, reason=reason)
    return dataclasses.replace(probe, usable=False, snapshots=False, reason=f"{probe.reason}, but {reason}")


async def _boot(driver: Driver, probe: Probe, image: Image, state_dir: Path, timeout_seconds: float) -> Probe:
    def no(reason: str) -> Probe:
        return _rejected(probe, driver, reason)

    spec = VmSpec(image=image, memory_mb=_PROBE_MEMORY_MB, disk_mb=64)
    state_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    async with undoing() as undo:
        place = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix=PROBE_PREFIX, dir=state_dir)))
        # For as long as we live: by this a sweep knows what it must not touch.
        undo.callback(os.close, lock := os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            vm = await driver.boot(spec, None, place)
        except HostError:
            raise
        except SwarmError as error:
            return no(f"no guest starts: {error}")
        undo.push_async_callback(vm.kill)

        async def up() -> str:
            await vm.printed(_USERSPACE)
            return ""

        try:
            async with asyncio.timeout(timeout_seconds):
                ended = await first(up(), vm.wait())
        except TimeoutError:
            return no(f"a guest did not reach userspace in {timeout_seconds:g} s")
    return no(f"the guest's VM ended before userspace: {ended}") if ended else probe

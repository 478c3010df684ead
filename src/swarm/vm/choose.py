"""Chooses the driver that runs VMs on this host: the first that has booted a guest to userspace.

It proves nothing that `/dev/kvm` exists or that a VMM starts: on some hosts no kernel boots on KVM. So each candidate
boots the image once, without a network. The result is cached until something that it depends on changes: the host's
boot, the VMM's version, the image.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.base import files
from swarm.base.aio import first, undoing
from swarm.base.log import logger
from swarm.base.process import boot_id
from swarm.base.progress import Progress, silent
from swarm.errors import HostError, SwarmError
from swarm.vm.driver import Driver, Image, Probe, VmSpec

log = logger(__name__)

# The guest's init prints this once userspace is up; its error messages begin differently.
_USERSPACE = b"swarm-init: up after"
_PROBE_MEMORY_MB = 192
PROBE_PREFIX = "probe-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """``rejected``: for each candidate before the chosen one, a sentence why it isn't used."""

    driver: Driver
    probe: Probe
    rejected: tuple[str, ...] = ()

    def describe(self) -> str:
        """'qemu (QEMU 7.2.22 without KVM), because qemu with KVM can't be used: …'."""
        chosen = f"{self.driver.name} ({self.probe.reason})"
        return f"{chosen}, because {'; '.join(self.rejected)}" if self.rejected else chosen


async def choose(
    candidates: Sequence[Driver],
    image: Image,
    *,
    state_dir: Path,
    cache: Path,
    timeout_seconds: float = 60.0,
    progress: Progress = silent,
) -> Choice:
    """The first usable candidate. Raises HostError with the reasons of all candidates if none is usable.

    Test boots happen in ``state_dir``. Each may take ``timeout_seconds``; it fails at once if its VM ends. Results are
    stored in ``cache``.
    """
    rejected: list[str] = []
    for driver in candidates:
        probe = await driver.probe()
        if probe.usable:
            probe = await _cached_test_boot(driver, probe, image, state_dir, cache, timeout_seconds, progress)
        if probe.usable:
            return Choice(driver=driver, probe=probe, rejected=tuple(rejected))
        rejected.append(f"{_title(driver, probe)} can't be used: {probe.reason}")
    raise HostError("this host can't run VMs: " + "; ".join(rejected))


def _title(driver: Driver, probe: Probe) -> str:
    return f"{driver.name} {'with KVM' if probe.accelerator == 'kvm' else 'without KVM'}"


async def _cached_test_boot(
    driver: Driver,
    probe: Probe,
    image: Image,
    state_dir: Path,
    cache: Path,
    timeout_seconds: float,
    progress: Progress,
) -> Probe:
    """``probe``, but not usable if the driver can't boot the image to userspace.

    Cached, unless the host itself failed (no space, no descriptors): that may be fixed soon.
    """
    depends = [boot_id(), driver.name, probe.accelerator, probe.version, image.digest]
    file = cache / hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]
    try:
        return Probe(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        pass
    progress(f"trying {_title(driver, probe)}, once after each boot of this host", 0.0)
    try:
        result = await _test_boot(driver, probe, image, state_dir, timeout_seconds)
    except HostError as error:
        return _rejected(probe, driver, f"it could not be tested: {error}")
    files.make_directory(cache)
    files.write_atomically(file, json.dumps(dataclasses.asdict(result)))
    return result


def _rejected(probe: Probe, driver: Driver, reason: str) -> Probe:
    log.info("driver rejected", driver=driver.name, accelerator=probe.accelerator, reason=reason)
    return dataclasses.replace(probe, usable=False, snapshots=False, reason=f"{probe.reason}, but {reason}")


async def _test_boot(driver: Driver, probe: Probe, image: Image, state_dir: Path, timeout_seconds: float) -> Probe:
    def no(reason: str) -> Probe:
        return _rejected(probe, driver, reason)

    spec = VmSpec(image=image, memory_mb=_PROBE_MEMORY_MB, disk_mb=64)
    files.make_directory(state_dir)
    async with undoing() as undo:
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix=PROBE_PREFIX, dir=state_dir)))
        # Held until the boot is over or this process dies: a sweep leaves locked directories alone.
        undo.enter_context(files.locked(directory, shared=True))
        try:
            vm = await driver.boot(spec, None, directory)
        except HostError:
            raise
        except SwarmError as error:
            return no(f"its VM did not start: {error}")
        undo.push_async_callback(vm.kill)

        async def up() -> str:
            await vm.printed(_USERSPACE)
            return ""

        try:
            async with asyncio.timeout(timeout_seconds):
                ended = await first(up(), vm.wait())
        except TimeoutError:
            return no(f"its guest did not reach userspace within {timeout_seconds:g} s")
    return no(f"its VM ended before the guest reached userspace: {ended}") if ended else probe

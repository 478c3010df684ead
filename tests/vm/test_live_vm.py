"""VMs that end while they are used: how the error explains it. Real VMs, by the launcher."""

from __future__ import annotations

import pytest

from swarm.app import wiring
from swarm.base.clock import Timeline
from swarm.config import Settings
from swarm.errors import BootFailed, OutcomeUnknown
from swarm.model import FailureReason
from swarm.vm.driver import Image, VmSpec
from swarm.vm.launcher import Assignment

pytestmark = pytest.mark.needs("qemu")


async def test_a_kernel_panic_is_named(settings: Settings, image: Image) -> None:
    launcher = wiring.launcher(settings, await wiring.choice(settings))
    with pytest.raises(OutcomeUnknown, match="panicked") as caught:
        async with launcher.vm(VmSpec(image=image), Assignment(ticket_id="panic"), Timeline()) as live:
            panic = live.channel.run(
                ["/bin/sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger"],
                user="root", timeout_seconds=60,
            )  # fmt: skip
            await live.while_alive(panic)
    assert caught.value.reason is FailureReason.GUEST_PANIC
    assert "sysrq" in str(caught.value)
    assert wiring.inventory(settings).records() == []


async def test_a_guest_that_powers_off_is_a_dead_vm(settings: Settings, image: Image) -> None:
    launcher = wiring.launcher(settings, await wiring.choice(settings))
    with pytest.raises(OutcomeUnknown, match="died while it was in use") as caught:
        async with launcher.vm(VmSpec(image=image), Assignment(), Timeline()) as live:
            off = live.channel.run(["/bin/busybox", "reboot", "-f"], user="root", timeout_seconds=60)
            await live.while_alive(off)
    assert caught.value.reason is FailureReason.VM_DIED


async def test_a_vm_that_never_answers_is_a_failed_boot(settings: Settings, image: Image) -> None:
    """The timeout is too short for any guest; nothing of the VM stays."""
    hasty = settings.model_copy(update={"boot_timeout_seconds": 0.001})
    launcher = wiring.launcher(hasty, await wiring.choice(hasty))
    with pytest.raises(BootFailed, match="did not come up"):
        async with launcher.vm(VmSpec(image=image, memory_mb=200), Assignment(), Timeline()):
            raise AssertionError("it answered")
    assert wiring.inventory(settings).records() == []

"""What the Firecracker tests need on this host: the programs, a guest kernel that runs here, an image, a template.

On a host with hardware virtualisation the kernel is the distribution's. On one whose KVM is paging-based (see
tools/firecracker-test-kernel) it is the test kernel: `SWARM_TEST_KERNEL`, else the fixture beside the checkout. There a
cold boot takes minutes, so the template is made once and kept in the cache, by digest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import lzma
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm import config
from swarm.app import wiring
from swarm.config import Settings
from swarm.vm.driver import Image, Template, VmSpec

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "tools" / "firecracker-test-kernel"
FIXTURE = ROOT.parent / "shared" / "fixtures" / "firecracker-test-kernel" / "vmlinux.xz"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm"
PROGRAMS = CACHE / "firecracker" / "1.12.1"
TEMPLATES = CACHE / "templates-fc"
PROBES = CACHE / "probes-fc"
BOOT_TIMEOUT_SECONDS = 900.0


def lacks() -> str:
    """Why real Firecracker guests can't run here; '' when they can."""
    if not Path("/dev/kvm").exists():
        return "needs /dev/kvm"
    for name in ("firecracker", "jailer"):
        if not (PROGRAMS / name).exists():
            return f"needs {name}: run tools/fetch-firecracker"
    if not has_hardware() and _given() is None:
        return (
            "this KVM runs no stock kernel: build one that it does with tools/firecracker-test-kernel/build, and name "
            "it in SWARM_TEST_KERNEL"
        )
    return ""


def has_hardware() -> bool:
    """Does the CPU show VMX or SVM?"""
    return bool(re.search(r"^flags\s*:.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.M))


slow_where_emulated = pytest.mark.skipif(
    not has_hardware() and "SWARM_TEST_LIMITS" not in os.environ,
    reason="takes two minutes where kernel mode is emulated: set SWARM_TEST_LIMITS",
)


def _given() -> Path | None:
    named = os.environ.get("SWARM_TEST_KERNEL")
    if named:
        return Path(named)
    return FIXTURE if FIXTURE.exists() else None


@functools.cache
def kernel() -> Path | None:
    """The ELF to boot instead of the distribution's kernel; None to boot that."""
    given = _given()
    if given is None or (has_hardware() and "SWARM_TEST_KERNEL" not in os.environ):
        return None
    if given.suffix != ".xz":
        return given
    data = lzma.decompress(given.read_bytes())
    unpacked = CACHE / "firecracker" / f"vmlinux-{hashlib.sha256(data).hexdigest()[:16]}"
    if not unpacked.exists():
        partial = unpacked.with_name(f"{unpacked.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.rename(unpacked)
    return unpacked


def boot_args() -> str | None:
    return (RECIPE / "boot-args").read_text().strip() if kernel() else None


@contextlib.contextmanager
def on_path() -> Iterator[None]:
    """Firecracker on PATH for the length of a block: elsewhere `auto` must not meet it."""
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{PROGRAMS}:{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


async def image(settings: Settings) -> Image:
    return await wiring.images(settings).build(kernel=kernel(), boot_args=boot_args())


def with_firecracker(settings: Settings, image: Image) -> Settings:
    """The same home, with Firecracker, its image, and the templates that outlive the test run."""
    return config.load(
        home=settings.home,
        state_dir=settings.state_dir,
        images_dir=settings.images,
        templates_dir=TEMPLATES,
        driver="firecracker",
        image=image.digest,
        boot_timeout_seconds=BOOT_TIMEOUT_SECONDS,
        firecracker_holes_allowed=True,
    )


async def template(settings: Settings) -> Template:
    """The template of `with_firecracker`, built if need be; those that no test has used for a day are removed."""
    chosen = await wiring.choice(settings)
    found = await wiring.launcher(settings, chosen).template(spec(await wiring.images(settings).find()))
    assert found
    await wiring.templates(settings).collect(unused_seconds=86_400)
    return found


def spec(image: Image) -> VmSpec:
    """Of every test that restores: the shape that the engine gives the echo agent, and `swarm-spawn-ns` a VM."""
    return VmSpec(image=image)

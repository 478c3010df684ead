"""Templates on disk: what may go wrong while one is built, stored and used."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from swarm.app import wiring
from swarm.base import files, process
from swarm.base.aio import stoppable, undoing
from swarm.config import Settings
from swarm.errors import BootFailed, HostError, NotFound
from swarm.vm.driver import Image, Probe, Template, VmSpec
from swarm.vm.drivers.qemu import QemuDriver
from swarm.vm.drivers.qemu_vm import MEMORY_FILE, STATE_FILE
from swarm.vm.launcher import Launcher
from swarm.vm.template import MANIFEST, Templates, key_of, shape
from tests.conftest import PATIENCE_SECONDS

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

TOKEN = b"t" * 32


def a_spec(**fields: object) -> VmSpec:
    nowhere = Path("/nowhere")
    image = Image(
        digest="d" * 64,
        dir=nowhere,
        kernel=nowhere,
        kernel_elf=nowhere,
        root=nowhere,
        initramfs=None,
        boot_args="quiet",
    )
    return replace(VmSpec(image=image), **fields)  # type: ignore[arg-type]


def a_shape(spec: VmSpec, **probe: object) -> dict[str, object]:
    driver = QemuDriver(accelerator="tcg", disk_cache=Path("/nowhere"))
    fields: dict[str, object] = {"usable": True, "reason": "", "accelerator": "tcg", "version": "7.2.22", **probe}
    return shape(spec, driver=driver, probe=Probe(**fields))  # type: ignore[arg-type]


class Builder:
    """Fills a template's directory with two files, and counts how often."""

    def __init__(self) -> None:
        self.built = 0

    async def __call__(self, dir: Path) -> bytes:
        self.built += 1
        (dir / "memory").write_bytes(bytes(range(256)) * 1000)
        (dir / "state").write_bytes(b"state")
        return TOKEN


@pytest.fixture
def templates(tmp_path: Path) -> Templates:
    return Templates(dir=tmp_path / "templates")


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"vcpus": 2},
        {"memory_mb": 512},
        {"disk_mb": 64},
        {"preload": ("json",)},
        {"interpreter": True},
        {"entropy": False},
        {"image": replace(a_spec().image, digest="e" * 64)},
        {"image": replace(a_spec().image, boot_args="debug")},
    ],
)
def test_everything_that_shapes_a_vm_is_in_the_key(fields: dict[str, object]) -> None:
    assert key_of(a_shape(a_spec(**fields))) != key_of(a_shape(a_spec()))


@pytest.mark.parametrize("probe", [{"version": "9.0.0"}, {"accelerator": "kvm"}])
def test_another_vmm_is_another_template(probe: dict[str, object]) -> None:
    assert key_of(a_shape(a_spec(), **probe)) != key_of(a_shape(a_spec()))


def test_what_does_not_shape_a_vm_is_not_in_the_key() -> None:
    """The host applies limits of disk and network; the order of preloads does not matter."""
    limited = a_spec(disk_mb_per_second=10.0, network_mb_per_second=1.0, preload=("a", "b"))
    assert key_of(a_shape(limited)) == key_of(a_shape(a_spec(preload=("b", "a"))))


# --- kept and verified ------------------------------------------------------------------------------------------------


async def test_it_is_built_once_and_found_after(templates: Templates) -> None:
    build, parts = Builder(), a_shape(a_spec())
    first = await templates.get(a_spec(), parts, build)
    again = await templates.get(a_spec(), parts, build)
    assert (first, build.built, first.token) == (again, 1, TOKEN)
    [info] = templates.all()
    assert (info.key, info.driver, info.memory_mb, info.disk_mb) == (first.key, "qemu", 256, 2048)


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(70_000)
        byte = file.read(1)
        file.seek(70_000)
        file.write(bytes([byte[0] ^ 1]))


def lose(path: Path) -> None:
    path.unlink()


def tear_manifest(path: Path) -> None:
    manifest = path.with_name(MANIFEST)
    manifest.write_bytes(manifest.read_bytes()[:-20])


def other_format(path: Path) -> None:
    manifest = path.with_name(MANIFEST)
    data = json.loads(manifest.read_bytes())
    del data["files"], data["token"]
    manifest.write_text(json.dumps(data))


@pytest.mark.parametrize("harm", [truncate, flip, lose, tear_manifest, other_format])
async def test_a_damaged_template_is_built_again(templates: Templates, harm: object) -> None:
    build, parts = Builder(), a_shape(a_spec())
    template = await templates.get(a_spec(), parts, build)
    harm(template.dir / "memory")  # type: ignore[operator]
    whole = await templates.get(a_spec(), parts, build)
    assert build.built == 2
    assert (whole.dir / "memory").read_bytes() == bytes(range(256)) * 1000


async def test_a_huge_disk_of_holes_costs_nothing(templates: Templates) -> None:
    """An agent chooses it, with `disk_mb`: up to a terabyte."""
    spec = a_spec(disk_mb=1 << 20)

    async def build(dir: Path) -> bytes:
        with (dir / "work").open("xb") as file:
            file.truncate(1 << 40)
        return TOKEN

    built = await templates.get(spec, a_shape(spec), build)
    (built.dir / "verified.json").unlink()  # so that it is hashed again
    assert await templates.find(spec, a_shape(spec)) == built


async def test_hashing_ends_when_it_is_cancelled() -> None:
    """The thread too: what it reads is removed after it."""
    loop, begun, ended = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def hash_for_ever(check: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(begun.set)
        try:
            while True:
                check()
        finally:
            ended.set()

    hashing = asyncio.create_task(stoppable(hash_for_ever))
    await begun.wait()
    hashing.cancel()
    await asyncio.wait([hashing])
    assert hashing.cancelled() and ended.is_set()


async def test_the_wrong_version_is_not_found(templates: Templates) -> None:
    build = Builder()
    await templates.get(a_spec(), a_shape(a_spec()), build)
    await templates.get(a_spec(), a_shape(a_spec(), version="7.2.23"), build)
    assert build.built == 2
    assert len(templates.all()) == 2


async def test_remove_and_collect(templates: Templates) -> None:
    for memory_mb in (128, 256):
        spec = a_spec(memory_mb=memory_mb)
        await templates.get(spec, a_shape(spec), Builder())
    old, new = templates.all()
    os.utime(templates.dir / old.key / "verified.json", (time.time() - 9000,) * 2)
    assert await templates.collect(unused_seconds=3600) == [old.key]
    assert await templates.remove(new.key[:8]) == new.key
    assert templates.all() == []
    with pytest.raises(NotFound):
        await templates.remove("abc")
    assert [p.name for p in templates.dir.iterdir() if not p.name.endswith(".lock")] == []


async def test_a_template_just_removed_or_used_is_not_collected(templates: Templates) -> None:
    """Two builders look for unused templates at once, while a third makes a clone."""
    spec = a_spec(memory_mb=128)
    old = await templates.get(spec, a_shape(spec), Builder())
    stamp = templates.dir / old.key / "verified.json"
    os.utime(stamp, (time.time() - 9000,) * 2)
    both = await asyncio.gather(*(Templates(dir=templates.dir).collect(unused_seconds=3600) for _ in range(2)))
    assert sorted(both) == [[], [old.key]]
    await templates.get(spec, a_shape(spec), Builder())
    os.utime(stamp, (time.time() - 9000,) * 2)
    async with files.locked_async(templates.dir / f".{old.key}.lock", poll_seconds=0.01):
        assert await templates.collect(unused_seconds=3600) == [], "locked by another"
        os.utime(stamp)
    assert await templates.collect(unused_seconds=3600) == []
    assert len(templates.all()) == 1


async def test_torn_templates_and_those_of_dead_builders_are_collected(templates: Templates) -> None:
    """Also if their shapes are never requested again: after an update, say."""
    torn, left = "a" * 32, "b" * 32
    (templates.dir / torn).mkdir(parents=True)
    (templates.dir / torn / MANIFEST).write_text("{")
    (templates.dir / f".{left}.building").mkdir()
    (templates.dir / f".{left}.building" / "memory").write_bytes(b"m" * 1000)
    await templates.get(a_spec(), a_shape(a_spec()), Builder())
    assert not (templates.dir / f".{left}.building").exists()
    assert (templates.dir / torn).exists(), "it is young: a process may be looking into it"
    os.utime(templates.dir / torn, (time.time() - 9000,) * 2)
    assert await templates.collect(unused_seconds=3600) == [torn]
    (templates.dir / torn).mkdir()
    assert await templates.remove(torn[:6]) == torn


async def test_a_template_is_removed_by_its_name_alone(templates: Templates) -> None:
    await templates.get(a_spec(), a_shape(a_spec()), Builder())
    with pytest.raises(NotFound):
        await templates.remove("")
    assert len(templates.all()) == 1


@pytest.mark.needs("root", "netns")
async def test_a_good_template_is_used_where_nothing_can_be_written(templates: Templates) -> None:
    """After a boot of the host with a full disk, say."""
    build, parts = Builder(), a_shape(a_spec())
    template = await templates.get(a_spec(), parts, build)
    (template.dir / "verified.json").unlink()
    await process.run(["mount", "--bind", str(templates.dir), str(templates.dir)])
    try:
        await process.run(["mount", "-o", "remount,bind,ro", str(templates.dir)])
        assert await templates.find(a_spec(), parts) == template
        with pytest.raises(HostError, match="Read-only file system"):
            await templates.remove(template.key)
        with pytest.raises(HostError, match="Read-only file system"):
            await templates.get(a_spec(vcpus=2), a_shape(a_spec(vcpus=2)), build)
    finally:
        await process.run(["umount", str(templates.dir)])
    [info] = templates.all()
    assert (info.key, build.built) == (template.key, 1)


async def test_clones_verify_a_template_at_once(templates: Templates) -> None:
    """As after a boot of the host: none may read a stamp that another has half written."""
    build, parts = Builder(), a_shape(a_spec())
    template = await templates.get(a_spec(), parts, build)
    for _ in range(20):
        (template.dir / "verified.json").unlink()
        found = await asyncio.gather(*(templates.find(a_spec(), parts) for _ in range(16)))
        assert found == [template] * 16
    assert sorted(p.name for p in template.dir.iterdir()) == ["memory", "state", MANIFEST, "verified.json"]


async def test_a_host_without_descriptors_does_not_damage_a_template(templates: Templates) -> None:
    build, parts = Builder(), a_shape(a_spec())
    template = await templates.get(a_spec(), parts, build)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.open("/dev/null", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(HostError, match="Too many open files"):
            await templates.get(a_spec(), parts, build)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert await templates.get(a_spec(), parts, build) == template
    assert build.built == 1


async def test_a_place_that_is_not_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HostError, match="can't use"):
        await Templates(dir=tmp_path / "file").get(a_spec(), a_shape(a_spec()), Builder())
    with pytest.raises(HostError, match="can't look into"):
        Templates(dir=tmp_path / "file").all()


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "small", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.needs("root", "netns")
async def test_a_full_disk_while_building_leaves_nothing(small_disk: Path) -> None:
    templates = Templates(dir=small_disk / "templates")
    with pytest.raises(HostError, match="no space left"):
        await templates.get(a_spec(), a_shape(a_spec()), Builder())
    assert templates.all() == []
    assert [p for p in templates.dir.iterdir() if p.is_dir()] == []


STEPS = ("empty", "half a file", "all files", "manifest")
# A process of its own, which kills itself at a given step.
BUILDER = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_template import a_shape, a_spec
from swarm.vm.template import Templates

where, step = Path(sys.argv[1]), sys.argv[2]
def die(): os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    if step == "manifest" and event == "os.rename" and str(arguments[0]).endswith(".building"): die()

sys.addaudithook(watch)

async def build(dir):
    if step == "empty": die()
    (dir / "memory").write_bytes(bytes(range(256)) * 500)
    if step == "half a file": die()
    (dir / "memory").write_bytes(bytes(range(256)) * 1000)
    (dir / "state").write_bytes(b"state")
    if step == "all files": die()
    return b"t" * 32

asyncio.run(Templates(dir=where).get(a_spec(), a_shape(a_spec()), build))
"""


@pytest.mark.parametrize("step", STEPS)
async def test_a_build_that_is_killed_leaves_nothing_that_is_used(templates: Templates, step: str) -> None:
    argv = [sys.executable, "-c", dedent(BUILDER), str(templates.dir), step, str(Path(__file__).parent)]
    ended = await asyncio.to_thread(subprocess.run, argv, check=False, timeout=300, stdin=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL
    assert templates.all() == []
    build = Builder()
    await templates.get(a_spec(), a_shape(a_spec()), build)
    assert build.built == 1
    assert [p.name for p in templates.dir.iterdir() if p.name.endswith(".building")] == []


TWICE = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_template import a_shape, a_spec
from swarm.vm.template import Templates

async def build(dir):
    with open(Path(sys.argv[1]) / "built", "a") as file:
        file.write("once\\n")
    (dir / "memory").write_bytes(b"m" * 4_000_000)
    return b"t" * 32

async def main():
    await asyncio.gather(*(Templates(dir=Path(sys.argv[1])).get(a_spec(), a_shape(a_spec()), build) for _ in range(3)))

asyncio.run(main())
"""


async def test_two_processes_build_once(templates: Templates) -> None:
    templates.dir.mkdir(parents=True)
    argv = [sys.executable, "-c", dedent(TWICE), str(templates.dir), str(Path(__file__).parent)]
    processes = [await asyncio.create_subprocess_exec(*argv, stdin=subprocess.DEVNULL) for _ in range(2)]
    assert [await process.wait() for process in processes] == [0, 0]
    assert (templates.dir / "built").read_text() == "once\n"


# --- real ones --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def real(launcher: Launcher, image: Image) -> Template:
    template = await launcher.template(VmSpec(image=image, memory_mb=192, disk_mb=64))
    assert template is not None
    return template


def copy(template: Template, place: Path) -> Template:
    """A copy of the template, to be damaged."""
    subprocess.run(["cp", "-a", "--sparse=always", str(template.dir), str(place)], check=True)
    return replace(template, dir=place)


@pytest.mark.needs("qemu")
async def test_a_torn_state_is_a_boot_failure(launcher: Launcher, real: Template, tmp_path: Path) -> None:
    torn = copy(real, tmp_path / "torn")
    os.truncate(torn.dir / STATE_FILE, 20_000)
    with pytest.raises(BootFailed, match="could not restore the VM"):
        async with undoing() as undo:
            await launcher.clone(torn, undo)


@pytest.mark.needs("qemu")
async def test_a_restore_that_hangs_is_given_up(launcher: Launcher, real: Template, tmp_path: Path) -> None:
    """The state is a pipe that is never written to."""
    stuck = copy(real, tmp_path / "stuck")
    (stuck.dir / STATE_FILE).unlink()
    os.mkfifo(stuck.dir / STATE_FILE)
    writer = os.open(stuck.dir / STATE_FILE, os.O_RDWR)
    try:
        with pytest.raises(BootFailed, match="did not run within"):
            async with undoing() as undo:
                await launcher.clone(stuck, undo)
    finally:
        os.close(writer)


@pytest.mark.needs("qemu")
async def test_a_vm_that_dies_right_after_its_restore_is_not_waited_for(
    launcher: Launcher, real: Template, tmp_path: Path
) -> None:
    """All its memory is zeros: the guest's CPU shuts down at its first fault, and QEMU ends."""
    blank = copy(real, tmp_path / "blank")
    size = (blank.dir / MEMORY_FILE).stat().st_size
    os.truncate(blank.dir / MEMORY_FILE, 0)
    os.truncate(blank.dir / MEMORY_FILE, size)
    async with asyncio.timeout(PATIENCE_SECONDS):  # not the boot timeout
        with pytest.raises(BootFailed, match=r"did not come up|died|ended"):
            async with undoing() as undo:
                await launcher.clone(blank, undo)


@pytest.mark.needs("qemu")
async def test_a_killed_build_is_swept_and_done_again(settings: Settings, image: Image, tmp_path: Path) -> None:
    """SIGKILL to the whole builder while its VM boots: nothing stays, and the next one builds it."""
    own = {
        "SWARM_TEMPLATES_DIR": str(tmp_path / "templates"),
        "SWARM_STATE_DIR": str(settings.state_dir),
        "SWARM_IMAGES_DIR": str(settings.images),
        "SWARM_HOME": str(settings.home),
        "PATH": os.environ["PATH"],
    }
    code = """
    import asyncio
    from swarm import config
    from swarm.app import wiring
    from swarm.vm.driver import VmSpec
    async def main():
        settings = config.load()
        launcher = wiring.launcher(settings, await wiring.choice(settings))
        await launcher.template(VmSpec(image=await wiring.images(settings).find(), memory_mb=192, disk_mb=64))
    asyncio.run(main())
    """
    inventory = wiring.inventory(settings)
    before = set(inventory.numbers())
    builder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", dedent(code), env=own, stdin=subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    assert builder.stdout
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for line in builder.stdout:
            if b"share=on" in line:  # the log's line that says how QEMU is started
                break
    builder.kill()
    await builder.communicate()
    [ours] = set(inventory.numbers()) - before
    async with asyncio.timeout(PATIENCE_SECONDS):
        # A child that was just being forked holds its parent's locks until it executes its program.
        while set(inventory.numbers()) != before:
            await wiring.sweep(settings)
    assert not Path(f"/run/netns/vm{ours}").exists()
    assert Templates(dir=tmp_path / "templates").all() == []

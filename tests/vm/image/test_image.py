"""Images: built whole or not at all, the same each time, verified before use, and bootable."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarm.base import files
from swarm.base.process import run
from swarm.config import Settings
from swarm.errors import ImageError, NotFound
from swarm.vm.driver import Image, host_tsc_khz
from swarm.vm.image import build, staging
from swarm.vm.image import image as image_module
from swarm.vm.image.image import Images
from tests.conftest import PATIENCE_SECONDS

pytestmark = pytest.mark.needs("root", "qemu")

# Prints each step once, so that its parent can stop it there.
BUILD = """
import asyncio, sys
from pathlib import Path
from swarm.vm.image.image import Images
said = set()
def progress(label, fraction):
    if label not in said:
        said.add(label)
        print(label, flush=True)
asyncio.run(Images(dir=Path(sys.argv[1]), cache=Path(sys.argv[2]), guest=Path(sys.argv[3])).build(progress=progress))
"""
STEPS = ("unpacking the base", "writing the root file system", "writing the kernel")
# Replaces agentd: prints on the console what it finds, then ends.
LOOK_ROUND = """
import os, socket, subprocess, sys
def show(name, value): print(f"{name}={value}", flush=True)
open("/etc/written", "w").write("yes")
show("mounts", ",".join(line.split()[1] for line in open("/proc/mounts")))
show("root", open("/proc/mounts").readline().split()[2])
show("links", ",".join(os.readlink(f"/dev/{n}") for n in ("fd", "stdin", "stdout", "stderr")))
show("hostname", socket.gethostname())
show("sshd", os.path.isdir("/run/sshd"))
show("parent", os.getppid())
show("work", os.stat("/work").st_uid)
show("entropy", open("/proc/sys/kernel/random/entropy_avail").read().strip())
if os.fork() == 0:
    if os.fork() == 0: os._exit(0)
    os._exit(0)
os.wait()
show("end", "of-list")
sys.exit(7)
"""


def base_cache(settings: Settings) -> Path:
    return settings.images.parent / "base"


@pytest.fixture
def store(image: Image, settings: Settings, tmp_path: Path) -> Images:
    """A store of our own with the image in it. Its files are links: a test that changes one replaces it."""
    shutil.copytree(image.dir, tmp_path / "images" / image.digest, copy_function=os.link)
    return Images(dir=tmp_path / "images", cache=base_cache(settings))


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Guest files of our own, with another agentd."""
    place = tmp_path_factory.mktemp("guest") / "files"
    shutil.copytree(image_module.GUEST, place)
    (place / "agentd.py").write_text(LOOK_ROUND)
    return place


@pytest.fixture(scope="module")
def other(image: Image, settings: Settings, guest: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image with `guest` in it. No network here: the base comes from the cache."""
    images = Images(dir=tmp_path_factory.mktemp("other"), cache=base_cache(settings), guest=guest)
    return asyncio.run(images.build())


async def test_same_inputs_same_digest_and_two_at_once_build_once(
    image: Image, other: Image, settings: Settings, guest: Path, tmp_path: Path
) -> None:
    assert other.digest != image.digest
    cache = tmp_path / "cache"  # the base's files on other inodes
    shutil.copytree(base_cache(settings), cache)
    images = Images(dir=tmp_path / "images", cache=cache, guest=guest)
    old_base = cache / "0123abcd"
    old_base.mkdir()
    (old_base / "base.json").write_text("{}")
    aged(old_base / "base.json")
    shutil.copytree(image.dir, images.dir / image.digest, copy_function=os.link)
    aged(images.dir / image.digest)
    steps: list[str] = []
    one, two = await asyncio.gather(*(images.build(progress=lambda label, _: steps.append(label)) for _ in "ab"))
    assert one == two and one.digest == other.digest
    assert steps.count("unpacking the base") == 1 and "waiting for another build" in steps
    assert [info.digest for info in images.list()] == [one.digest], "the old image was removed"
    assert not old_base.exists()
    manifests = [json.loads((i.dir / "manifest.json").read_text()) for i in (other, one)]
    assert manifests[0]["parts"] == manifests[1]["parts"]
    assert set(manifests[0]["parts"]) == {"kernel", "vmlinux", "initramfs", "root"}
    assert {"openssh-server", "python3-minimal"} <= set(manifests[0]["packages"])


async def test_an_image_that_is_there_is_not_built_again(store: Images, image: Image) -> None:
    steps: list[str] = []
    assert (await store.build(progress=lambda label, _: steps.append(label))).digest == image.digest
    assert not steps
    assert (await store.find()).digest == image.digest
    assert (await store.find(image.digest[:10])).digest == image.digest
    (info,) = store.list()
    assert info.digest == image.digest and info.size_bytes > 100 << 20 and info.packages["python3-minimal"]


async def test_no_image_says_how_to_get_one(tmp_path: Path) -> None:
    empty = Images(dir=tmp_path / "none", cache=tmp_path / "cache")
    assert empty.list() == []
    with pytest.raises(ImageError, match="run `swarm image build`"):
        await empty.find()
    with pytest.raises(NotFound, match="no image 'abc'"):
        await empty.find("abc")
    with pytest.raises(NotFound):
        empty.remove("abc")


def aged(path: Path) -> None:
    then = time.time() - 1.5 * image_module.UNUSED_SECONDS
    os.utime(path, (then, then))


async def test_only_unused_images_are_collected(store: Images, image: Image, tmp_path: Path) -> None:
    place = tmp_path / "images" / image.digest
    assert store.collect(()) == (), "just made"
    aged(place)
    assert store.collect({image.digest}) == (), "a template's"
    assert Images(dir=store.dir, cache=tmp_path, default=image.digest[:12]).collect(()) == (), "the settings' own"
    found = await store.find()
    assert store.collect(()) == (), "just used"
    aged(store.dir / ".verified" / image.digest)
    with store.used(found):
        assert Images(dir=store.dir, cache=tmp_path).collect(()) == (), "in use by a live process"
    assert await store.find() == found
    assert store.collect(()) == (), "used again, with nothing to hash"
    aged(store.dir / ".verified" / image.digest)
    assert store.collect(()) == (image.digest,)
    assert store.list() == []


def test_a_lock_of_anybody_does_not_keep_an_image_from_being_used(tmp_path: Path) -> None:
    """Images are open to every user, and so are their locks."""
    place = tmp_path / "image"
    place.mkdir()
    aged(place)
    with files.locked(place), staging.used(place):
        assert not staging.unused(place, place / "stamp", seconds=1), "nobody can remove it meanwhile"


async def test_remove(store: Images, image: Image, tmp_path: Path) -> None:
    assert store.remove(image.digest[:12]) == image.digest
    assert store.list() == []
    assert [p.name for p in (tmp_path / "images").iterdir() if p.name != ".verified"] == []


def test_remove_by_command(store: Images, image: Image, tmp_path: Path) -> None:
    """Only the image is removed; a second removal fails."""
    env = os.environ | {"SWARM_IMAGES_DIR": str(tmp_path / "images"), "SWARM_HOME": str(tmp_path / "home")}

    def swarm(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "swarm.cli.main", "image", *argv]
        return subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)

    assert image.digest[:12] in swarm("list").stdout
    done = swarm("rm", image.digest[:12])
    assert (done.returncode, done.stdout) == (0, f"removed {image.digest[:12]}\n"), done.stderr
    assert not (tmp_path / "images" / image.digest).exists() and image.root.exists()
    assert swarm("list").stdout.startswith("no image")
    again = swarm("rm", image.digest[:12])
    assert again.returncode == 2 and f"no image '{image.digest[:12]}'" in again.stderr


@pytest.mark.parametrize("part", ["kernel", "initramfs", "root"])
async def test_a_changed_byte_is_found(part: str, store: Images, image: Image, tmp_path: Path) -> None:
    await store.find()  # hashed once, and remembered
    path = tmp_path / "images" / image.digest / getattr(image, part).name
    data = bytearray(path.read_bytes())
    path.unlink()
    path.write_bytes(data)
    await store.find()  # same bytes in another file
    data[len(data) // 2] ^= 1
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the change time still tells
    with pytest.raises(ImageError, match=rf"damaged.*{path.name}.*sha256.*swarm image build"):
        await store.find()
    path.write_bytes(data[:-1])
    with pytest.raises(ImageError, match=r"damaged.*bytes instead of"):
        await store.find()
    path.unlink()
    with pytest.raises(ImageError, match=r"damaged.*No such file"):
        await store.find()


async def test_a_damaged_image_is_built_again(store: Images, image: Image, tmp_path: Path) -> None:
    path = tmp_path / "images" / image.digest / image.kernel.name
    path.unlink()
    path.write_bytes(b"torn")
    assert (await store.build()).digest == image.digest
    assert (await store.find()).digest == image.digest


async def test_an_image_with_a_changed_manifest_is_not_listed(store: Images, image: Image, tmp_path: Path) -> None:
    path = tmp_path / "images" / image.digest / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["boot_args"] += " init=/bin/sh"
    path.unlink()
    path.write_text(json.dumps(manifest))
    assert store.list() == []
    path.write_text("{")
    assert store.list() == []


async def test_killed_at_any_step_nothing_is_taken_for_an_image(
    image: Image, settings: Settings, guest: Path, tmp_path: Path
) -> None:
    images = Images(dir=tmp_path / "images", cache=base_cache(settings), guest=guest)
    for step in STEPS:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", BUILD, str(tmp_path / "images"), str(base_cache(settings)), str(guest),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert child.stdout is not None
        while (line := await child.stdout.readline()).decode().strip() != step:
            assert line
        child.send_signal(signal.SIGKILL)
        await child.wait()
        assert images.list() == []
        assert len(list((tmp_path / "images").glob(".building-*"))) == 1  # this one's; the one before was swept
    built = await images.build()
    assert [i.digest for i in images.list()] == [built.digest]
    assert not list((tmp_path / "images").glob(".building-*"))


async def test_a_cancelled_build_leaves_nothing(image: Image, settings: Settings, guest: Path, tmp_path: Path) -> None:
    images = Images(dir=tmp_path / "images", cache=base_cache(settings), guest=guest)
    reached = asyncio.Event()
    task = asyncio.create_task(
        images.build(progress=lambda label, _: reached.set() if label == "installing guest files" else None)
    )
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [p.name for p in (tmp_path / "images").iterdir()] == [".lock"]


async def test_no_network_is_one_clear_error(tmp_path: Path) -> None:
    """The sandbox has none: a base that isn't cached can't be fetched."""
    images = Images(dir=tmp_path / "images", cache=tmp_path / "cache")
    with pytest.raises(ImageError, match="can't reach the package registry"):
        await images.build()
    for place in ("images", "cache"):
        assert [p.name for p in (tmp_path / place).iterdir()] == [".lock"]


async def test_a_full_disk_and_a_missing_program_are_reported_before_anything_is_done(
    settings: Settings, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    await run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(small)])
    try:
        with pytest.raises(ImageError, match="1 GB"):
            await Images(dir=small, cache=base_cache(settings)).build()
    finally:
        await run(["umount", str(small)])
    # A file that can't be executed, over the program, in a mount namespace of its own.
    check = (
        "import subprocess, sys; from pathlib import Path\n"
        "from swarm.base.process import which; from swarm.vm.image import build\n"
        "subprocess.run(['mount', '--bind', sys.argv[1], which('mkfs.erofs')], check=True)\n"
        "build.check_host(for_base=False, where=Path('/'))"
    )
    plain = tmp_path / "plain"
    plain.touch(mode=0o644)
    done = await run(["unshare", "--mount", "--", sys.executable, "-c", check, str(plain)], check=False)
    assert "HostError: building an image needs programs that are missing here: apt-get install erofs-utils" in (
        done.stderr.decode()
    )


async def test_what_is_in_the_root(image: Image, tmp_path: Path) -> None:
    root = tmp_path / "root"
    await run(["fsck.erofs", f"--extract={root}", str(image.root)])
    for absent in ("etc/ssh/ssh_host_ed25519_key", "etc/ssh/sshd_config.d", "etc/apt", "var/lib/dbus/machine-id"):
        assert not (root / absent).exists(), absent
    for empty in ("etc/machine-id", "etc/resolv.conf"):
        assert (root / empty).read_bytes() == b"", empty
    assert [p for p in (root / "var/log").rglob("*") if p.is_file()] == []
    assert [p for p in (root / "var/cache").rglob("*") if p.is_file()] == []
    accounts = {line.split(":")[0]: line.split(":") for line in (root / "etc/passwd").read_text().splitlines()}
    assert accounts["agent"][2:4] == ["1000", "1000"] and accounts["agent"][5] == "/work"
    locked = [line.split(":")[1] for line in (root / "etc/shadow").read_text().splitlines()]
    assert not [word for word in locked if word not in ("*", "!", "!*")]
    for path in root.rglob("*"):
        info = path.lstat()
        if not stat.S_ISLNK(info.st_mode):
            assert not (stat.S_ISREG(info.st_mode) and info.st_mode & 0o6000), f"{path} is set-uid or set-gid"
            writable = info.st_mode & stat.S_IWOTH and not stat.S_ISCHR(info.st_mode)
            assert not writable or info.st_mode & stat.S_ISVTX, f"anyone may write {path}"
    # Compiled, and valid: the time stamp in each is that of its source (PEP 3147, PEP 552).
    compiled = list((root / "usr/lib").glob("python3.*/__pycache__/*.pyc"))
    assert len(compiled) > 150
    for file in compiled:
        head = file.read_bytes()[:12]
        assert (int.from_bytes(head[4:8], "little"), int.from_bytes(head[8:], "little")) == (0, build.EPOCH), file
    assert (root / "usr/lib/swarm/agentd.pyc").stat().st_size > 1000
    (modules,) = (root / "usr/lib/modules").iterdir()
    assert {file.stem for file in modules.glob("*.ko")} >= {*build.ON_DEMAND}
    assert (root / "usr/sbin/modprobe").resolve() == (root / "usr/bin/busybox").resolve()


def test_initramfs_is_what_cpio_reads(tmp_path: Path) -> None:
    archive = build.initramfs(b"#!/init", b"\x7fELFbusybox", {"00-b.ko": b"b" * 5, "01-a.ko": b""})
    assert archive == build.initramfs(b"#!/init", b"\x7fELFbusybox", {"00-b.ko": b"b" * 5, "01-a.ko": b""})
    names = ["bin", "bin/busybox", "dev", "dev/console", "init", "modules", "modules/00-b.ko", "modules/01-a.ko"]
    found, at = [], 0
    while True:
        assert archive[at : at + 6] == b"070701" and at % 4 == 0
        size, length = (int(archive[at + i : at + i + 8], 16) for i in (54, 94))
        name = archive[at + 110 : at + 110 + length - 1].decode()
        at += -(-(110 + length) // 4) * 4
        if name == "TRAILER!!!":
            break
        found.append(name)
        if name == "modules/order":
            assert archive[at : at + size] == b"00-b.ko\n01-a.ko\n"
        at += -(-size // 4) * 4
    assert found == [*names, "modules/order", "root"]


async def console_of(image: Image, *args: str, acpi: str = "on") -> list[str]:
    """Boot an image without a network until its init ends it; return its console."""
    tsc = f"tsc_early_khz={host_tsc_khz()}" if host_tsc_khz() else ""
    disk = f"driver=raw,node-name=root,read-only=on,file.driver=file,file.locking=off,file.filename={image.root}"
    done = await run(
        [
            "qemu-system-x86_64", "-M", f"microvm,acpi={acpi}", "-accel", "tcg,thread=single", "-cpu", "max",
            "-m", "256", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
            "-serial", "stdio", "-kernel", str(image.kernel),
            *(("-initrd", str(image.initramfs)) if image.initramfs else ()),
            "-append", " ".join([image.boot_args, "console=ttyS0 reboot=t", tsc, *args]),
            "-blockdev", disk, "-device", "virtio-blk-device,drive=root",
            "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-device,rng=rng",
        ],
        timeout_seconds=120,
    )  # fmt: skip
    return [line.strip() for line in done.stdout.decode(errors="replace").splitlines()]


def assert_looked_round(console: list[str]) -> None:
    told = dict(line.split("=", 1) for line in console if "=" in line and " " not in line)
    assert told["root"] == "overlay"
    mounts = "/ /proc /sys /dev /run /tmp /agent /dev/pts /dev/shm /sys/fs/cgroup"
    assert told["mounts"].split(",") == mounts.split()
    assert told["links"] == "/proc/self/fd,fd/0,fd/1,fd/2"
    assert (told["hostname"], told["sshd"], told["parent"], told["work"]) == ("swarm", "True", "1", "1000")
    assert told["end"] == "of-list"
    assert "swarm-init: agentd ended with status 7; ending the VM" in console


async def test_it_boots_and_init_does_its_work(other: Image) -> None:
    console = await console_of(other)
    assert_looked_round(console)
    assert "entropy=256" in console


async def test_a_guest_without_a_root_ends_and_says_why(image: Image, other: Image, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0" * 4096)
    unbootable = Image(
        digest=other.digest, dir=other.dir, kernel=other.kernel, kernel_elf=other.kernel_elf, root=broken,
        initramfs=other.initramfs, boot_args=other.boot_args,
    )  # fmt: skip
    console = await console_of(unbootable)
    assert "swarm-initramfs: can't mount the root file system (/dev/vda)" in console
    assert any("Kernel panic" in line for line in console)


def own_kernel() -> Path:
    """The test kernel, everything built in: SWARM_TEST_KERNEL, else the fixture beside the checkout."""
    fixture = Path(__file__).resolve().parents[4] / "shared/fixtures/firecracker-test-kernel/vmlinux.xz"
    path = Path(os.environ.get("SWARM_TEST_KERNEL") or fixture)
    if not path.exists():
        pytest.skip("needs a kernel with its drivers built in: SWARM_TEST_KERNEL=…/vmlinux")
    return path


async def test_a_kernel_of_the_users_own_mounts_the_root_itself(
    other: Image, settings: Settings, guest: Path, tmp_path: Path
) -> None:
    """The test kernel is made for Firecracker on odd hosts, and runs in plain QEMU too."""
    images = Images(dir=other.dir.parent, cache=base_cache(settings), guest=guest)
    args = "quiet loglevel=4 acpi=off mitigations=off clearcpuid=smap,smep panic=-1"
    own = await images.build(kernel=own_kernel(), boot_args=args)
    assert own.digest != other.digest and own.initramfs is None
    assert own.kernel_elf.read_bytes()[:4] == b"\x7fELF" and own.kernel == own.kernel_elf
    assert own.boot_args == f"{args} root=/dev/vda rootfstype=erofs ro init=/sbin/swarm-init"
    assert await images.find() == other
    assert await images.find(own.digest) == own
    assert await images.build(kernel=own_kernel(), boot_args=args) == own
    with pytest.raises(ImageError, match="can't read"):
        await images.build(kernel=Path("/nowhere/vmlinux"))
    assert_looked_round(await console_of(own, acpi="off"))


async def test_a_file_that_is_not_a_kernel_is_refused_and_leaves_nothing(settings: Settings, tmp_path: Path) -> None:
    images = Images(dir=tmp_path / "images", cache=base_cache(settings))
    with pytest.raises(ImageError, match="neither bzImage nor ELF"):
        await images.build(kernel=Path("/etc/passwd"))
    assert [p.name for p in (tmp_path / "images").iterdir()] == [".lock"]


async def test_a_killed_builder_takes_its_package_tools_along(tmp_path: Path) -> None:
    """The way base.py starts mmdebstrap: when its parent is killed, everything below dies."""
    fifo = tmp_path / "up"
    os.mkfifo(fifo)
    program = (
        "import asyncio, sys; from pathlib import Path; from swarm.base.process import spawn\n"
        "async def main():\n"
        "    argv = 'unshare --mount --pid --fork --kill-child --mount-proc -- sh -c'.split()\n"
        "    shell = 'echo > $0; sleep 1000 & wait'\n"
        "    child = await spawn([*argv, shell, sys.argv[1]], output=Path('/dev/null'))\n"
        "    print('pid', child.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(fifo), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    while not (said := await parent.stdout.readline()).startswith(b"pid "):
        assert said
    unshare = int(said.split()[1])
    assert await asyncio.to_thread(fifo.read_text) == "\n"  # the innermost program runs
    fd = os.pidfd_open(unshare)
    parent.kill()
    await parent.wait()
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, gone.set)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await gone.wait()
    asyncio.get_running_loop().remove_reader(fd)
    os.close(fd)

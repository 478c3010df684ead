"""Clone safety: of eight VMs cloned from one template at once, nothing is equal that must differ."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from structlog.testing import capture_logs

from swarm.app import wiring
from swarm.base.clock import Timeline
from swarm.base.process import run
from swarm.channel import Channel, Identity
from swarm.config import Settings
from swarm.errors import BootFailed, ChannelError
from swarm.vm import launcher as launchers
from swarm.vm.driver import Image, Template, VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm

pytestmark = pytest.mark.needs("qemu")

CLONES = 8
# Preloaded, so their state is the template's. The states of OpenSSL and `random` must be renewed all the same.
PRELOAD = ("random", "secrets", "ssl", "uuid")

PROBE = """
import json, os, random, secrets, socket, ssl, sys, time, uuid
def read(path):
    with open(path) as file:
        return file.read().strip()
print(json.dumps({
    "preloaded": sorted({"random", "secrets", "ssl", "uuid"} - {"json"}),
    "urandom": os.urandom(32).hex(),
    "getrandom": os.getrandom(32).hex(),
    "uuid4": str(uuid.uuid4()),
    "secrets": secrets.token_hex(16),
    "random": random.getrandbits(256),
    "random_state": hash(random.getstate()),
    "openssl": ssl.RAND_bytes(32).hex(),
    "kernel_uuid": read("/proc/sys/kernel/random/uuid"),
    "machine_id": read("/etc/machine-id"),
    "hostname": socket.gethostname(),
    "etc_hostname": read("/etc/hostname"),
    "wall": time.time(),
    "monotonic": time.monotonic(),
    "established": [line.split()[1:4] for line in open("/proc/net/tcp").readlines()[1:] if line.split()[3] != "0A"],
    "files": sorted(os.listdir("/work")),
}))
"""
MUST_DIFFER = (
    "urandom", "getrandom", "uuid4", "secrets", "random", "random_state", "openssl", "kernel_uuid", "machine_id",
    "hostname", "etc_hostname",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Twin:
    live: LiveVm
    said: dict[str, Any]
    began: float  # host's clock before it was made, and after its answer
    until: float
    host_key: str


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def launcher(settings: Settings, image: Image, loop: asyncio.Runner) -> Launcher:
    return loop.run(_launcher(settings))


async def _launcher(settings: Settings) -> Launcher:
    return wiring.launcher(settings, await wiring.choice(settings))


@pytest.fixture(scope="module")
def spec(image: Image) -> VmSpec:
    return VmSpec(image=image, memory_mb=192, disk_mb=256, preload=PRELOAD)


@pytest.fixture(scope="module")
def template(launcher: Launcher, spec: VmSpec, loop: asyncio.Runner) -> Template:
    found = loop.run(launcher.template(spec))
    assert found is not None
    return found


async def probe(live: LiveVm) -> dict[str, Any]:
    said = bytearray()
    await live.channel.put({"probe.py": PROBE.encode()}, dest="/agent", owner="root")
    ended = await live.channel.run(
        ["/agent/probe.py"], warm=True, timeout_seconds=60, on_output=lambda _, data: said.extend(data)
    )
    assert ended.code == 0, said.decode()
    return dict(json.loads(said))


async def host_key(address: str) -> str:
    """The host key that the guest's sshd presents."""
    key = await asyncssh.get_server_host_key(address, config=None)
    assert key is not None
    return key.export_public_key().decode()


@asynccontextmanager
async def twins(launcher: Launcher, spec: VmSpec, count: int) -> AsyncIterator[list[Twin]]:
    async with AsyncExitStack() as stack:

        async def one() -> Twin:
            began = time.time()
            live = await stack.enter_async_context(launcher.vm(spec, Assignment(), Timeline()))
            said = await probe(live)
            return Twin(live=live, said=said, began=began, until=time.time(), host_key="")

        born = await asyncio.gather(*(one() for _ in range(count)))
        # One after the other: eight key exchanges at once take longer than ssh waits.
        yield [replace(twin, host_key=await host_key(twin.live.vm.endpoint.host)) for twin in born]


@pytest.fixture(scope="module")
def eight(launcher: Launcher, spec: VmSpec, template: Template, loop: asyncio.Runner) -> Iterator[list[Twin]]:
    context = twins(launcher, spec, CLONES)
    yield loop.run(context.__aenter__())
    loop.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("what", MUST_DIFFER)
def test_no_two_clones_share(eight: list[Twin], what: str) -> None:
    values = [twin.said[what] for twin in eight]
    assert all(a != b for a, b in itertools.combinations(values, 2)), values


def test_generations_and_host_keys_differ_and_are_what_the_host_gave(eight: list[Twin]) -> None:
    assert len({twin.host_key for twin in eight}) == CLONES
    assert len({twin.live.renewed.generation for twin in eight}) == CLONES
    for twin in eight:
        identity, renewed = twin.live.identity, twin.live.renewed
        assert (renewed.generation, renewed.machine_id) == (identity.generation, identity.machine_id)
        assert twin.said["machine_id"] == identity.machine_id
        assert twin.said["hostname"] == twin.said["etc_hostname"] == identity.hostname == f"vm{twin.live.n}"
        given = asyncssh.import_private_key(identity.ssh_host_key).export_public_key().decode()
        assert twin.host_key.split()[:2] == given.split()[:2]
        assert set(renewed.done) >= {"seed", "clock", "interpreter"}


def test_every_clock_is_right(eight: list[Twin]) -> None:
    for twin in eight:
        assert twin.began <= twin.said["wall"] <= twin.until + 0.1  # it was set meanwhile, by the host's
        assert twin.said["monotonic"] > 0


def test_no_connection_of_the_template_survives(eight: list[Twin]) -> None:
    for twin in eight:
        [[local, remote, state]] = twin.said["established"]  # the channel's own
        assert local.endswith(f":{1024:04X}")
        assert remote.startswith("0100000A"), "the host, not the template's"  # 10.0.0.1, as /proc writes it
        assert state == "01"


def test_a_clone_starts_with_an_empty_disk_of_its_own(eight: list[Twin]) -> None:
    assert all(twin.said["files"] == ["out"] for twin in eight)


def test_hard_writing_clones_change_neither_the_template_nor_each_other(
    eight: list[Twin], template: Template, loop: asyncio.Runner
) -> None:
    files = sorted(path for path in template.dir.iterdir() if path.name not in ("template.json", "verified.json"))
    assert {path.name for path in files} == {"memory", "state", "work"}
    before = {path.name: digest(path) for path in files}
    program = b"""
import os, sys
mine = os.uname().nodename.encode() * 1000
hoard = [bytearray(os.urandom(1 << 20)) for _ in range(24)]
with open("/work/blob", "wb") as file:
    for part in hoard:
        file.write(part)
    os.fsync(file.fileno())
with open("/work/mine", "wb") as file:
    file.write(mine)
os.sync()
print(open("/work/mine", "rb").read() == mine)
"""

    async def write(live: LiveVm) -> str:
        said = bytearray()
        await live.channel.put({"write.py": program}, dest="/agent", owner="root")
        await live.channel.run(
            ["/agent/write.py"], warm=True, timeout_seconds=120, on_output=lambda _, data: said.extend(data)
        )
        return said.decode()

    async def all_write() -> list[str]:
        return await asyncio.gather(*(write(twin.live) for twin in eight))

    assert loop.run(all_write()) == ["True\n"] * CLONES
    assert {path.name: digest(path) for path in files} == before


def test_preloaded_modules_are_there_before_the_agent_asks(eight: list[Twin], loop: asyncio.Runner) -> None:
    hello = loop.run(eight[0].live.channel.hello())
    assert hello.preload_failed == {}

    async def modules() -> str:
        said = bytearray()
        channel = eight[0].live.channel
        code = b"import sys\nprint([m in sys.modules for m in ('ssl', 'uuid', 'secrets', 'sqlite3')])"
        await channel.put({"m.py": code}, dest="/agent", owner="root")
        await channel.run(["/agent/m.py"], warm=True, timeout_seconds=60, on_output=lambda _, data: said.extend(data))
        return said.decode()

    assert loop.run(modules()) == "[True, True, True, False]\n"


async def test_templates_on_another_file_system(settings: Settings, image: Image, tmp_path: Path) -> None:
    """Built where VMs' files are, stored elsewhere: /var and /opt may be two disks."""
    await run(["mount", "-t", "tmpfs", "none", str(tmp_path)])
    try:
        own = settings.model_copy(update={"templates_dir": tmp_path / "templates"})
        vms = wiring.launcher(own, await wiring.choice(own))
        async with vms.vm(VmSpec(image=image, memory_mb=192, disk_mb=64), Assignment(), Timeline()) as live:
            assert (await live.channel.run(["/bin/true"], timeout_seconds=120)).code == 0
    finally:
        await run(["umount", str(tmp_path)])


async def test_what_cannot_be_preloaded_is_named(settings: Settings, image: Image, tmp_path: Path) -> None:
    launcher = await _launcher(settings)
    spec = VmSpec(image=image, memory_mb=192, disk_mb=64, preload=("no_such_module",))
    with pytest.raises(BootFailed, match=r"can't be imported: no_such_module: .*No module named 'no_such_module'"):
        async with launcher.vm(spec, Assignment(), Timeline()):
            pytest.fail("no template may be made")


async def test_a_clone_that_does_not_become_itself_is_killed(settings: Settings, image: Image) -> None:
    """The guest can't take its host name: the renewal fails, and the VM is removed before any use."""
    before = wiring.inventory(settings).numbers()
    launcher = _BadIdentity(settings, await wiring.choice(settings))
    spec = VmSpec(image=image, memory_mb=192, disk_mb=64)
    with pytest.raises((BootFailed, ChannelError)):
        async with launcher.vm(spec, Assignment(), Timeline()):
            pytest.fail("it must not be used")
    assert launcher.seen, "a VM was there"
    assert wiring.inventory(settings).numbers() == before
    assert all(not Path(f"/proc/{pid}").exists() for pid in launcher.seen)


class _BadIdentity(Launcher):
    """Gives each VM an identity that its guest refuses."""

    def __init__(self, settings: Settings, choice: Any) -> None:
        sound = wiring.launcher(settings, choice)
        self.__dict__.update(sound.__dict__)
        self.seen: list[int] = []
        self.inventory = wiring.inventory(settings)

    def new_identity(self, n: int, *, seeded: bool = True, sshd_ready: bool = False) -> tuple[Identity, str]:
        self.seen += [record.pid for record in self.inventory.records() if record.n == n]
        identity, key = super().new_identity(n, seeded=seeded, sshd_ready=sshd_ready)
        return replace(identity, hostname="x" * 65), key  # longer than Linux takes


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"generation": "other"}, "generation"),
        ({"hostname": "other"}, "host name"),
        ({"machine_id": "f" * 32}, "machine id"),
        ({"crng_ready": False}, "random pool"),
    ],
)
def test_a_guest_that_reports_another_identity_is_refused(
    eight: list[Twin], fields: dict[str, Any], named: str
) -> None:
    live = eight[0].live
    launchers.check_renewed(live.renewed, live.identity)
    with pytest.raises(BootFailed, match=named):
        launchers.check_renewed(replace(live.renewed, **fields), live.identity)


def test_a_guest_may_not_say_that_it_skipped_its_identity(eight: list[Twin]) -> None:
    live = eight[0].live
    names = ("generation", "hostname", "host_name", "machine_id", "machineid")
    lies = replace(live.renewed, generation="other", hostname="other", machine_id="f" * 32, skipped=names)
    with pytest.raises(BootFailed, match="generation, host name, machine id"):
        launchers.check_renewed(lies, live.identity)


def test_the_templates_token_opens_no_clone(eight: list[Twin], template: Template, loop: asyncio.Runner) -> None:
    async def try_it() -> None:
        async with Channel.connect(eight[0].live.vm.endpoint, token=template.token, timeout_seconds=120):
            pass

    with pytest.raises(ChannelError, match="wrong token"):
        loop.run(try_it())


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


HIJACK = """
import mmap, os, sys
way, path = sys.argv[1:]
before = os.stat(path)
fd = os.open(path, os.O_RDWR)
if way == "write":
    os.pwrite(fd, b"evil", 1 << 20)
else:
    with mmap.mmap(fd, 4096, offset=1 << 20) as memory:
        memory[:4] = b"evil"
try:
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    print("hid it")
except PermissionError:
    print("could not hide it")
"""


@pytest.mark.parametrize("way", ["write", "mmap"])
def test_a_vmm_that_writes_into_its_template_is_detected(
    settings: Settings, spec: VmSpec, template: Template, loop: asyncio.Runner, tmp_path: Path, way: str
) -> None:
    """QEMU 7.2 opens the template's memory for writing, so a QEMU that its guest took over can write to it. Here a
    process with that VMM's uid does so, through the VMM's open descriptor: it can do all that the VMM could."""
    own = settings.model_copy(update={"templates_dir": tmp_path})
    shutil.copytree(template.dir, tmp_path / template.key)

    async def hijack() -> None:
        launcher = await _launcher(own)
        async with launcher.vm(spec, Assignment(), Timeline()) as live:
            pid = live.vm.pid
            fds = [path for path in Path(f"/proc/{pid}/fd").iterdir() if path.readlink().name == "memory"]
            uid = Path(f"/proc/{pid}").stat().st_uid
            rights = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"]
            done = await run([*rights, sys.executable, "-I", "-S", "-c", HIJACK, way, str(fds[0])])
            assert done.stdout == b"could not hide it\n"
        with capture_logs() as logs:
            assert await launcher.template(spec, build=False) is None, "the next clone gets a new template"
        reason = f"{tmp_path / template.key / 'memory'} is not what was built (its sha256 differs)"
        assert {"event": "template is rebuilt", "reason": reason}.items() <= logs[-1].items()

    loop.run(hijack())

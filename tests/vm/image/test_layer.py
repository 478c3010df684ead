"""Layers: what is built, what a guest finds, and what may go wrong during a build."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.base.clock import Timeline
from swarm.base.process import run
from swarm.config import Settings
from swarm.errors import BootFailed, ImageError, LayerMissing, NotFound, SwarmError, UsageError
from swarm.model import Agent, FailureReason
from swarm.vm.driver import Image, Layer, VmSpec
from swarm.vm.drivers import firecracker
from swarm.vm.image.layer import HostLayers, Layers
from swarm.vm.launcher import Assignment
from tests.vm.npm_here import npm_from, npm_package, npm_registry, served
from tests.vm.packages_here import archive, deb, shared_object, wheel, wheels_from

pytestmark = pytest.mark.needs("qemu")


def an_agent(*requirements: str, packages: tuple[str, ...] = (), **more: object) -> Agent:
    values: dict[str, object] = {
        "id": "a",
        "name": "mine",
        "version": "1.0.0",
        "path": Path("/"),
        "entry": ("main.py",),
    }
    return Agent(**{**values, "requirements": requirements, "packages": packages, **more})  # type: ignore[arg-type]


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


WANTS = an_agent("greet==1.0", packages=("greeter",), preload=("greet",))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("wheels")
    guests = image.packages["python3-minimal"].partition("-")[0]
    wheel(
        place,
        "greet",
        files={
            "greet/__init__.py": "import os\nfrom marked import WORD\nPID = os.getpid()\n\n\ndef main(): print(WORD)\n",
            "greet/fast.so": shared_object("libc.so.6", "libstdc++.so.6", "libbrought-1a.so.2", "libGL.so.1"),
            "greet.libs/libbrought-1a.so.2": shared_object("libstdc++.so.6"),
        },
        scripts={"greet": "greet:main"},
        # The guest's Python decides, not the one that Swarm runs on.
        requires=[f'marked==1.0; python_full_version == "{guests}"'],
    )
    wheel(place, "marked", files={"marked.py": "WORD = 'hello'\n"})
    (place / "sources-1.0.tar.gz").write_bytes(b"")
    with wheels_from(place):
        yield place


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Layers:
    """A store of layers, and an archive with one package, whose script does what such scripts do."""
    place = tmp_path_factory.mktemp("debian")
    script = (
        "#!/bin/sh\nset -e\nadduser --system --quiet --no-create-home greeter\nrm /etc/issue\necho more >> /etc/hosts\n"
        "[ -e /proc/self ] && [ $$ -lt 1000 ] && ip route show > /var/lib/greeter\n"
    )

    async def make() -> Path:
        package = await deb(place, "greeter", files={"usr/bin/greeter": "#!/bin/sh\nid -u\n"}, postinst=script)
        return await archive(place, [package], release="bookworm")

    return Layers(dir=tmp_path_factory.mktemp("layers"), sources=asyncio.run(make()))


@pytest.fixture(scope="module")
def layer(layers: Layers, wheels: Path, image: Image) -> Layer:
    found = asyncio.run(layers.build(WANTS, image))
    assert found is not None
    return found


@pytest.mark.needs("oci")  # for npm
async def test_npm_packages(image: Image, tmp_path: Path) -> None:
    """With Debian's Node, unless another is named; without their scripts."""
    debian = tmp_path / "debian"
    debian.mkdir()
    node = await deb(debian, "nodejs", files={"usr/bin/node": "#!/bin/sh\n"}, postinst="#!/bin/sh\n")
    layers = Layers(dir=tmp_path / "layers", sources=await archive(debian, [node], release="bookworm"))
    hello = npm_package(
        "hello", "1.0.0", {"cli.js": "1\n"}, programs={"hello": "cli.js"}, requires={"words": "1"}, script="touch /ran"
    )
    words = npm_package("words", "1.2.3", {"index.js": "2\n"})
    with served(tmp_path) as address, npm_from(f"http://{address}/npm/", tmp_path):
        npm_registry(tmp_path / "npm", f"http://{address}/npm", [hello, words])
        layer = await layers.build(an_agent(npm=("hello@1.0.0",)), image)
        with pytest.raises(UsageError, match=r"can't be installed: No matching version found for hello@9\.0\.0"):
            await layers.build(an_agent(npm=("hello@9.0.0",)), image)
    assert layer is not None and layer == await layers.find(an_agent(npm=("hello@1.0.0",)), image)
    await run(["fsck.erofs", f"--extract={tmp_path / 'found'}", "--no-preserve", str(layer.path)])
    found = tmp_path / "found"
    assert names(found / "node_modules") == [".bin", ".package-lock.json", "hello", "words"]
    assert (found / "usr/local/bin/hello").readlink() == Path("/node_modules/hello/cli.js")
    assert (found / "usr/bin/node").exists() and not (found / "ran").exists() and not Path("/ran").exists()
    (info,) = layers.list()
    assert info.npm == ("hello@1.0.0",) and info.installed == {"hello": "1.0.0", "words": "1.2.3", "nodejs": "1.0"}

    (tmp_path / "npm-cache").rename(tmp_path / "cache")
    with npm_from(f"http://{address}/npm/", tmp_path), pytest.raises(ImageError, match="can't reach the registry"):
        await layers.build(an_agent(npm=("hello@1.0.0",)), image, force=True)  # which is gone
    assert await layers.find(an_agent(npm=("hello@1.0.0",)), image) == layer


PROBE = """
import greet, json, os, pwd, subprocess
def said(*argv):
    return subprocess.run(argv, capture_output=True, text=True).stdout.strip()
print(json.dumps({
    "preloaded": greet.PID != os.getpid(),
    "compiled": os.path.exists(greet.__cached__),
    "where": greet.__file__,
    "system": said("python3", "-c", "import greet; print(greet.WORD)"),
    "script": said("greet"),
    "program": said("greeter"),
    "set_id": oct(os.stat("/usr/bin/greeter").st_mode),
    "users": [pwd.getpwnam(name).pw_uid for name in ("agent", "greeter")][:1],
    "issue": os.path.exists("/etc/issue"),
    "routes": open("/var/lib/greeter").read(),
    "known": said("dpkg-query", "--show", "greeter"),
    "noise": [name for name in ("/usr/sbin/policy-rc.d", "/var/tmp/swarm-layer") if os.path.exists(name)],
}))
"""


async def test_what_a_guest_finds(settings: Settings, image: Image, layer: Layer) -> None:
    launcher = wiring.launcher(settings, await wiring.choice(settings))
    spec = VmSpec(image=image, layer=layer, memory_mb=192, disk_mb=256, preload=("greet",))
    said = bytearray()
    async with launcher.vm(spec, Assignment(), Timeline()) as live:
        await live.channel.put({"probe.py": PROBE.encode()}, dest="/agent", owner="root")
        ended = await live.channel.run(
            ["/agent/probe.py"], warm=True, timeout_seconds=120, on_output=lambda _, data: said.extend(data)
        )
    assert ended.code == 0, said.decode()
    assert json.loads(said) == {
        "preloaded": True,
        "compiled": True,
        "where": "/usr/local/lib/python3.11/dist-packages/greet/__init__.py",
        "system": "hello",
        "script": "hello",
        "program": "1000",
        "set_id": "0o100755",
        "users": [1000],
        "issue": False,  # what a package removes of the image is gone
        "routes": "",  # its scripts had no network
        "known": "greeter\t1.0",
        "noise": [],
    }


async def test_a_preload_that_is_in_no_layer_is_named(settings: Settings, image: Image) -> None:
    launcher = wiring.launcher(settings, await wiring.choice(settings))
    with pytest.raises(BootFailed, match="can't be imported: greet: ModuleNotFoundError") as caught:
        await launcher.template(VmSpec(image=image, memory_mb=192, disk_mb=256, preload=("greet",)))
    assert not caught.value.retryable


async def test_built_once_listed_found_and_removed(layers: Layers, layer: Layer, image: Image, wheels: Path) -> None:
    same = an_agent("greet==1.0", "greet==1.0", packages=("greeter",), name="another")
    assert await layers.find(same, image) == layer == await layers.build(same, image)
    assert await layers.find(an_agent(), image) is None
    (info,) = layers.list()
    assert (info.digest, info.installed) == (layer.digest, {"greet": "1.0", "marked": "1.0", "greeter": "1.0"})
    assert layers.named(layer.digest) == layer
    # Debian packages are laid over the very packages of the image; wheels outlive its updates.
    updated = replace(image, packages={**image.packages, "dash": "9"})
    with pytest.raises(LayerMissing, match=r"mine@1\.0\.0.*run `swarm agent build mine@1\.0\.0`") as caught:
        await layers.find(WANTS, updated)
    with pytest.raises(LayerMissing, match="does not say which Debian"):
        await layers.find(WANTS, replace(image, packages={}))
    assert caught.value.reason is FailureReason.LAYER_MISSING and not caught.value.retryable
    wheels_only = an_agent("greet==1.0")
    assert layers.key(wheels_only, image) == layers.key(wheels_only, updated) != layers.key(WANTS, image)
    assert not list(layers.dir.glob(".building-*"))


async def test_libraries_that_nobody_brings_are_named(layers: Layers, layer: Layer, image: Image) -> None:
    """Once it is built and whenever it is found; libstdc++, which most compiled wheels need, is in the guest."""
    said = "neither the guest nor the layer has libGL.so.1, which %s needs: try `packages: [libgl1]`"
    [lack] = layer.lacks
    assert re.fullmatch(re.escape(said) % r"usr/local/lib/python3\.\d+/dist-packages/greet/fast\.so", lack)
    assert await layers.find(WANTS, image) == layer


async def test_an_agents_own_module_comes_with_its_layer(
    layers: Layers, wheels: Path, image: Image, tmp_path: Path
) -> None:
    """A template is made before an agent's files are in a VM. Agents with the same module share the layer."""
    for place, text in (("a", "N = 1\n"), ("b", "N = 1\n"), ("c", "N = 2\n")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "own.py").write_text(text)
    wanted = {"preload": ("json", "os.path", "own", "marked")}
    a, b, c = (an_agent("marked==1.0", path=tmp_path / place, name=place, **wanted) for place in "abc")
    assert layers.key(a, image) == layers.key(b, image) != layers.key(c, image)
    assert layers.key(an_agent("marked==1.0"), image) not in (layers.key(a, image), layers.key(c, image))
    layer = await layers.build(a, image)
    assert layer is not None and await layers.find(b, image) == layer
    with pytest.raises(LayerMissing):
        await layers.find(c, image)
    await run(["fsck.erofs", f"--extract={tmp_path / 'seen'}", str(layer.path)])
    there = tmp_path / "seen/usr/lib/python3/dist-packages"
    assert (there / "own.py").read_text() == "N = 1\n" and list(there.glob("__pycache__/own.*.pyc"))


@pytest.mark.parametrize("umask", [0, 0o077], ids=oct)
async def test_agents_can_read_it_and_nobody_change_it_whatever_the_umask(
    layers: Layers, wheels: Path, image: Image, tmp_path: Path, umask: int
) -> None:
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent/own.py").write_text(f"N = {umask}\n")
    agent = an_agent("marked==1.0", packages=("greeter",), path=tmp_path / "agent", preload=("own", "marked"))
    before = os.umask(umask)
    try:
        store = Layers(dir=tmp_path / "deep" / "layers", sources=layers._sources)
        layer = await store.build(agent, image)
    finally:
        os.umask(before)
    assert layer is not None
    seen = tmp_path / "seen"
    await run(["fsck.erofs", f"--extract={seen}", str(layer.path)])
    places = [path for root in (seen, tmp_path / "deep") for path in (root, *root.rglob("*"))]
    modes = {path: path.lstat().st_mode for path in places if path.is_dir() or path.is_file()}
    assert any(path.name == "own.py" for path in modes) and any(path.name == "greeter" for path in modes)
    wrong = {path.name: oct(mode) for path, mode in modes.items() if mode & 0o022 or not mode & 0o004}
    assert set(wrong) <= {".lock", "Lock", "shadow", "gshadow"}, wrong  # ours; dpkg's, and Debian's


async def test_two_at_once_then_damaged_then_removed(layers: Layers, wheels: Path, image: Image) -> None:
    other, before = an_agent("marked==1.0"), len(layers.list())
    one, two = await asyncio.gather(layers.build(other, image), layers.build(other, image))
    assert one is not None and one == two and len(layers.list()) == before + 1
    data = bytearray(one.path.read_bytes())
    data[len(data) // 2] ^= 1
    one.path.chmod(0o644)
    one.path.write_bytes(data)
    with pytest.raises(LayerMissing, match=r"can't be used: .*sha256.*swarm agent build"):
        await layers.find(other, image)
    assert await layers.build(other, image) == one, "the same again, to the byte"
    assert layers.remove(layers.key(other, image)[:10]) == layers.key(other, image)
    with pytest.raises(NotFound):
        layers.remove(layers.key(other, image))


@pytest.mark.parametrize(
    ("agent", "error", "said"),
    [
        (
            an_agent("sources==1.0"),
            UsageError,
            r"no wheel fits the requirement sources==1\.0.*none exists .*source only",
        ),
        (an_agent("marked==2.0"), UsageError, r"no wheel fits.*marked==2\.0.*there are 1\.0"),
        (an_agent("-r/etc/passwd"), UsageError, "not pinned"),
        (an_agent("git+https://evil.test/x==1"), UsageError, "not pinned"),
        (an_agent("./marked==1.0"), UsageError, "not pinned"),
        (an_agent(packages=("--allow-unauthenticated",)), UsageError, "not a Debian package name"),
        (an_agent(packages=("nosuch",)), ImageError, "Unable to locate package nosuch"),
    ],
    ids=lambda value: "" if isinstance(value, Agent) else None,
)
async def test_what_does_not_exist(
    layers: Layers, wheels: Path, image: Image, agent: Agent, error: type[SwarmError], said: str
) -> None:
    before = sorted(layers.dir.iterdir())
    with pytest.raises(error, match=said):
        await layers.build(agent, image)
    assert sorted(layers.dir.iterdir()) == before, "nothing half built stays"


async def test_without_a_network(layers: Layers, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ImageError, match="can't reach the package index"):
        await layers.build(an_agent("marked==1.0"), image)


async def test_a_hostile_wheel_stays_in_its_root(image: Image, tmp_path: Path) -> None:
    target = tmp_path / "evil"
    wheel(tmp_path / "w", "evil", files={f"../../../../../../../../..{target}": "x", "evil.py": ""})
    with wheels_from(tmp_path / "w"), pytest.raises(UsageError, match="outside the target directory"):
        await Layers(dir=tmp_path / "layers").build(an_agent("evil==1.0"), image)
    assert not target.exists()
    assert names(tmp_path / "layers") == [".lock"]
    # Code that Python would run by itself must not run as root, in a chroot of this host.
    wheel(tmp_path / "w3", "sly", files={"sly.py": "", "sly.pth": "import os; open('/usr/local/ran', 'w').close()\n"})
    with wheels_from(tmp_path / "w3"):
        layer = await Layers(dir=tmp_path / "layers").build(an_agent("sly==1.0"), image)
    assert layer is not None
    await run(["fsck.erofs", f"--extract={tmp_path / 'seen'}", str(layer.path)])
    assert list((tmp_path / "seen").glob("usr/local/lib/*/dist-packages/sly.pth"))
    assert names(tmp_path / "seen/usr/local") == ["lib"]


async def test_stopped_midway_nothing_stays(layers: Layers, wheels: Path, image: Image, tmp_path: Path) -> None:
    store = Layers(dir=tmp_path)
    reached = asyncio.Event()

    def progress(label: str, fraction: float) -> None:
        if label == "installing requirements":
            reached.set()

    task = asyncio.create_task(store.build(an_agent("greet==1.0"), image, progress=progress))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(tmp_path) == [".lock"]


async def test_a_full_disk(wheels: Path, image: Image, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    await run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(small)])
    try:
        with pytest.raises(ImageError, match="1 GB"):
            await Layers(dir=small).build(an_agent("marked==1.0"), image)
    finally:
        await run(["umount", str(small)])


def test_firecracker_gets_one_more_drive(image: Image, tmp_path: Path) -> None:
    plain, spec = VmSpec(image=image), VmSpec(image=image, layer=Layer(digest="d", path=tmp_path))
    before, after = (firecracker.configuration(one, networked=True) for one in (plain, spec))
    assert list(after) == ["/machine-config", "/boot-source", "/drives/root", "/drives/work", "/drives/layer",
                           "/network-interfaces/eth0", "/entropy"]  # fmt: skip
    assert after["/drives/layer"] == {
        "drive_id": "layer", "path_on_host": "layer.erofs", "is_root_device": False, "is_read_only": True
    }  # fmt: skip
    assert "swarm_layer=vdc" in after["/boot-source"]["boot_args"]
    assert "swarm_layer" not in before["/boot-source"]["boot_args"]


async def test_for_a_plain_process_a_directory_of_modules(image: Image, tmp_path: Path) -> None:
    wheel(tmp_path / "w", "marked", files={"marked.py": "WORD = 'hello'\n"})
    store, agent = HostLayers(dir=tmp_path / "modules"), an_agent("marked==1.0", packages=("git",))
    with pytest.raises(LayerMissing, match="swarm agent build mine"):
        await store.find(agent, image)
    with wheels_from(tmp_path / "w"):
        layer = await store.build(agent, image)
        assert layer is not None and layer == await store.build(agent, image) == await store.find(agent, image)
        assert (layer.path / "marked.py").is_file()
        with pytest.raises(UsageError, match="no wheel fits"):
            await store.build(an_agent("nosuch==1.0"), image)
    assert not list((tmp_path / "modules").glob(".building-*"))

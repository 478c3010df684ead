"""What an agent adds to an imported image: by the image's own apt and pip, and by npm."""

from __future__ import annotations

import asyncio
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swarm.base import process
from swarm.base.process import run
from swarm.errors import HostError, ImageError, NotFound, UsageError
from swarm.vm.driver import Image
from swarm.vm.image.oci import additions
from swarm.vm.image.oci.additions import Additions
from swarm.vm.image.oci.store import Imported
from tests.vm.image.oci_images import Layout, entry, layer, static, with_apt
from tests.vm.image.test_oci_build import files_of
from tests.vm.npm_here import npm_from, npm_package, npm_registry
from tests.vm.npm_here import served as files_served
from tests.vm.packages_here import archive, deb, wheel

pytestmark = pytest.mark.needs("oci", "qemu")  # qemu: for Swarm's own image
ADDRESS = "192.0.2.7"  # of this host; what a build's programs can reach
SECRET = "correct-horse-battery"
PATH = "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
WANTED = Additions(base="debian:test", requirements=["greet==1.0"], packages=["greeter"], npm=["hello@1.0.0"])
NAME = "agents/mine:1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("additions")


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[str]:
    """What is below ``place``, by HTTP."""
    subprocess.run(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"], check=True)
    with files_served(place, ADDRESS) as address:
        yield address
    subprocess.run(["ip", "address", "del", f"{ADDRESS}/32", "dev", "lo"], check=True)


@pytest.fixture(scope="module", autouse=True)
def registries(place: Path, served: str) -> Iterator[None]:
    """Of wheels and of npm's packages; pip and npm see nothing else. The address of the wheels has a password."""
    wheel(place / "wheels", "greet", files={"greet.py": "def main(): print('hi')\n"}, scripts={"greet": "greet:main"})
    (project := place / "project").mkdir()  # of this host
    (project / "package.json").write_text('{"name": "project", "version": "1.0.0"}')
    (place / "project.tgz").write_bytes(npm_package("project", "1.0.0", {".env": SECRET}).data)
    elsewhere = [
        npm_package(name, "1.0.0", {}, requires={"x": source})
        for name, source in {
            "directory": f"file:{project}", "packed": f"file:{place}/project.tgz",
            "address": f"http://{served}/project.tgz", "git": f"git+file://{project}",
        }.items()
    ]  # fmt: skip
    deep = npm_package("deep", "1.0.0", {}, requires={"packed": "1"})
    odd = npm_package("odd", "1.0.0", {"cli.js": ""}, programs={"../sh": "cli.js", "odd": "../../../../etc/passwd"})
    hello = npm_package(
        "hello", "1.0.0", {"index.js": "module.exports = require('words')\n", "cli.js": "#!/usr/bin/env node\n"},
        programs={"hello": "cli.js"}, requires={"words": "^1.2.0"}, script="touch /npm-ran",
    )  # fmt: skip
    words = npm_package("words", "1.2.3", {"index.js": "module.exports = 'hi'\n"}, programs={"words": "index.js"})
    npm_registry(place / "npm", f"http://{served}/npm", [hello, words, odd, deep, *elsewhere])
    with pytest.MonkeyPatch.context() as patch, npm_from(f"http://{served}/npm/", place):
        for name, value in {
            "NO_INDEX": "1", "FIND_LINKS": f"http://me:{SECRET}@{served}/wheels/", "CONFIG_FILE": "/dev/null",
            "TRUSTED_HOST": ADDRESS,
        }.items():  # fmt: skip
            patch.setenv(f"PIP_{name}", value)
        yield


@pytest.fixture(scope="module")
def debian(place: Path, image: Image, served: str) -> str:
    script = "#!/bin/sh\nset -e\n[ -e /proc/self ]; id -u > /greeter-ran\n"

    async def make() -> None:
        package = await deb(place, "greeter", files={"usr/bin/greeter": "#!/bin/sh\nid -u\n"}, postinst=script)
        await archive(place, [package], release="bookworm")

    asyncio.run(make())
    source = f"deb [trusted=yes] http://{served}/archive bookworm main\n"
    return with_apt(image, place, source=source, Env=[PATH], User="daemon", Cmd=["/bin/true"])


@pytest.fixture(scope="module")
def imported(place: Path, debian: str) -> Imported:
    images = Imported(dir=place / "oci")
    asyncio.run(images.import_(debian, name="debian:test"))
    return images


async def add(imported: Imported, wanted: Additions) -> None:
    await additions.add(imported, wanted, name=NAME, progress=lambda *_: None)


async def test_what_is_added(imported: Imported, debian: str, tmp_path: Path) -> None:
    assert not await additions.here(imported, WANTED, name=NAME)
    await add(imported, WANTED)
    assert await additions.here(imported, WANTED, name=NAME)
    found = await files_of(imported, NAME, tmp_path / "found")
    assert (found / "greeter-ran").read_text() == "0\n"
    assert "Package: greeter" in (found / "var/lib/dpkg/status").read_text()
    assert len(list(found.glob("usr/local/lib/python3*/*-packages/greet.py"))) == 1
    assert (found / "usr/local/bin/greet").exists()
    assert (found / "usr/local/bin/hello").readlink() == Path("/node_modules/hello/cli.js")
    assert not (found / "usr/local/bin/words").is_symlink()  # a dependency's
    listed = json.loads((found / "node_modules/.package-lock.json").read_text())["packages"]
    assert {name: one["version"] for name, one in listed.items()} == {
        "node_modules/hello": "1.0.0", "node_modules/words": "1.2.3"
    }  # fmt: skip
    assert not (found / "npm-ran").exists() and not Path("/npm-ran").exists()
    root = (await imported.layer(NAME)).root
    assert root is not None and root.user[:2] == (1, 1) and root.entry == ("/bin/true",)
    for top in (imported.dir, found):
        assert (await run(["grep", "-rlF", SECRET, str(top)], check=False)).stdout == b""

    moved = await imported.import_(Layout(tmp_path / "other").add("other", [static()]), name="debian:test")
    assert moved[1] and not await additions.here(imported, WANTED, name=NAME)
    await imported.import_(debian, name="debian:test")
    assert await additions.here(imported, WANTED, name=NAME)


@pytest.mark.parametrize(
    ("lists", "error", "said"),
    [
        ({"requirements": ["greet==2.0"]}, ImageError, "No matching distribution found for greet==2.0"),
        ({"packages": ["nothing-such"]}, ImageError, "Unable to locate package nothing-such"),
        ({"npm": ["hello@2.0.0"]}, UsageError, "No matching version found for hello@2.0.0"),
        ({"npm": ["nothing-such@1.0.0"]}, UsageError, "'nothing-such@1.0.0' is not in this registry"),
        ({"npm": ["hello@file:/etc"]}, UsageError, "is not pinned as name@1.2.3"),
        ({"npm": ["hello@1.0"]}, UsageError, "is not pinned as name@1.2.3"),
        ({"npm": ["hello@1.0.0", "hello@2.0.0"]}, UsageError, "hello is wanted as 1.0.0 and as 2.0.0"),
        ({"npm": ["directory@1.0.0"]}, UsageError, "which is not the registry|can't be installed"),
        ({"npm": ["packed@1.0.0"]}, UsageError, "which is not the registry|can't be installed"),
        ({"npm": ["deep@1.0.0"]}, UsageError, "which is not the registry|can't be installed"),
        ({"npm": ["address@1.0.0"]}, UsageError, "which is not the registry|can't be installed"),
        ({"npm": ["git@1.0.0"]}, UsageError, "which is not the registry|can't be installed"),
        ({"packages": ["greeter; id"]}, UsageError, "is not a Debian package name"),
        ({"base": "none:1"}, NotFound, "`swarm image import none:1` fetches it"),
    ],
)
async def test_what_can_not_be_had(
    imported: Imported, lists: dict[str, list[str]], error: type[Exception], said: str
) -> None:
    wanted = replace(WANTED, requirements=[], packages=[], npm=[])
    with pytest.raises(error, match=said):
        await add(imported, replace(wanted, **lists))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"packages": ["git"]}, "the image has no apt-get, and `packages` are Debian's"),
        ({"requirements": ["greet==1.0"]}, "has no Python 3.8 or newer in its PATH"),
        ({"shell": [], "packages": ["git"]}, "the image has no /bin/sh, which RUN needs"),
    ],
)
async def test_an_image_of_another_kind(tmp_path: Path, lists: dict[str, list[str]], said: str) -> None:
    """As Alpine is."""
    images, layout = Imported(dir=tmp_path / "oci"), Layout(tmp_path / "layout")
    shell = [layer(entry("bin/sh", kind=tarfile.SYMTYPE, link="busybox"))] if "shell" not in lists else []
    lists = {name: one for name, one in lists.items() if name != "shell"}
    await images.import_(layout.add("alpine", [static(), *shell], Cmd=["/bin/busybox"]), name="alpine:3")
    with pytest.raises((ImageError, UsageError), match=said):
        await add(images, Additions(base="alpine:3", **{"requirements": [], "packages": [], "npm": [], **lists}))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"OnBuild": ["RUN cat /run/secrets/pip > /stolen"]}, "it has instructions for builds of its own"),
        ({"Env": ["PATH=/x\nADD 1 /stolen\n:/bin"]}, "its Python is '/x"),
        ({"Volumes": {"/usr/local": {}}}, "what is written to its volume '/usr/local' is not kept"),
    ],
)
async def test_what_a_base_says_becomes_no_instruction(tmp_path: Path, said: dict[str, Any], why: str) -> None:
    images, layout = Imported(dir=tmp_path / "oci"), Layout(tmp_path / "layout")
    files = [
        one
        for place in ("x\nADD 1 /stolen\n", "bin")
        for one in (
            entry(f"{place}/python3.11", b"#!/bin/sh\n", mode=0o755),
            entry(f"{place}/python3", kind=tarfile.SYMTYPE, link="python3.11"),
        )
    ]
    config = {"Env": ["PATH=/bin"], **said}
    await images.import_(layout.add("base", [static(), layer(*files)], **config), name="base:1")
    wanted = Additions(base="base:1", requirements=["greet==1.0"], packages=[], npm=["hello@1.0.0"])
    with pytest.raises(ImageError, match=f"nothing can be added to the image 'base:1': {why}"):
        await add(images, wanted)


async def test_what_the_images_programs_see_and_tell(tmp_path: Path) -> None:
    """An address with a password is seen by the step that needs it, and is in no message."""
    images, layout = Imported(dir=tmp_path / "oci"), Layout(tmp_path / "layout")
    liar = b"#!/bin/sh\nbusybox env\nbusybox ls /run/secrets\nexit 3"
    files = [entry(f"bin/{name}", kind=tarfile.SYMTYPE, link="busybox") for name in ("sh", "rm", "cat")]
    files += [entry(f"bin/{name}", liar, mode=0o755) for name in ("apt-get", "python3.11")]
    files.append(entry("bin/python3", kind=tarfile.SYMTYPE, link="python3.11"))
    await images.import_(layout.add("liar", [static(), layer(*files)], Env=["PATH=/bin"]), name="liar:1")
    nothing = Additions(base="liar:1", requirements=[], packages=[], npm=[])
    with pytest.raises(ImageError, match="ended with status 3") as caught:
        await add(images, replace(nothing, packages=["git"]))
    assert "PIP_" not in str(caught.value) and "| apt" in str(caught.value) and "| pip" not in str(caught.value)
    with pytest.raises(ImageError, match="ended with status 3") as caught:
        await add(images, replace(nothing, requirements=["greet==1.0"]))
    assert SECRET not in str(caught.value) and "| pip" in str(caught.value)
    assert "Error: building" not in str(caught.value) and "--mount" not in str(caught.value)


async def test_what_is_damaged_is_built_again(tmp_path: Path) -> None:
    images = Imported(dir=tmp_path / "oci")
    await images.import_(Layout(tmp_path / "layout").add("bare", [static()], Cmd=["/bin/busybox"]), name="bare:1")
    wanted = Additions(base="bare:1", requirements=[], packages=[], npm=["hello@1.0.0"])
    await add(images, wanted)
    file = (await images.layer(NAME)).path
    file.chmod(0o644)
    with file.open("r+b") as damaged:
        damaged.seek(5000)
        damaged.write(b"xxxx")
    assert not await additions.here(images, wanted, name=NAME)
    await add(images, wanted)
    assert await additions.here(images, wanted, name=NAME)
    with pytest.raises(UsageError, match="are of images that are built for agents"):
        await images.import_(Layout(tmp_path / "other").add("x", [static()]), name=NAME)


async def test_npm_packages_need_nothing_of_the_image(tmp_path: Path) -> None:
    images = Imported(dir=tmp_path / "oci")
    await images.import_(Layout(tmp_path / "layout").add("bare", [static()], Cmd=["/bin/busybox"]), name="bare:1")
    await add(images, Additions(base="bare:1", requirements=[], packages=[], npm=["hello@1.0.0", "odd@1.0.0"]))
    found = await files_of(images, NAME, tmp_path / "found")
    assert (found / "node_modules/words/index.js").exists()
    assert sorted(one.name for one in (found / "usr/local/bin").iterdir()) == ["hello", "sh"]


async def test_without_npm(imported: Imported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(process, "_SYSTEM_PATH", "")
    with pytest.raises(HostError, match="npm packages are fetched by npm, which this host lacks"):
        await add(imported, replace(WANTED, requirements=[], packages=[]))


async def test_a_base_without_its_layers(tmp_path: Path) -> None:
    """As one that came from another host."""
    images = Imported(dir=tmp_path / "oci")
    await images.import_(Layout(tmp_path / "layout").add("bare", [static()], Cmd=["/bin/busybox"]), name="bare:1")
    wanted = Additions(base="bare:1", requirements=[], packages=[], npm=["hello@1.0.0"])
    for blob in (images.dir / ".blobs/sha256").iterdir():
        blob.unlink()
    with pytest.raises(ImageError, match=r"nothing can be added to the image .* another host: import it again"):
        await add(images, wanted)
    await images.import_(f"oci:{tmp_path / 'layout'}:bare", name="bare:1")
    await add(images, wanted)

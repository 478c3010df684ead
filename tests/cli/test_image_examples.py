"""The examples of docs/images.md, run: real programs in images, from their build to a ticket's outputs, in VMs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm import agents
from swarm.base.process import run
from swarm.vm.driver import Image
from swarm.vm.image.oci.build import Recipe
from swarm.vm.image.oci.fetch import Access
from swarm.vm.image.oci.store import Imported
from tests import oci_here
from tests.cli.test_images import Swarm, agent, env, place, swarm, ticket
from tests.vm.image.oci_images import Layout, entry, folder, layer, static, with_apt
from tests.vm.npm_here import npm_from, npm_package, npm_registry, served
from tests.vm.packages_here import archive, deb
from tests.workflow.test_docs import blocks

__all__ = ["env", "place", "swarm"]  # fixtures

pytestmark = pytest.mark.needs("oci", "qemu")
ADDRESS = "192.0.2.7"  # of this host; what a build's programs can reach


@pytest.fixture(scope="module")
def files(place: Path) -> Iterator[str]:
    """What is below ``place``, by HTTP."""
    subprocess.run(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"], check=True)
    with served(place, ADDRESS) as address:
        yield address
    subprocess.run(["ip", "address", "del", f"{ADDRESS}/32", "dev", "lo"], check=True)


@pytest.fixture(scope="module")
def debian(place: Path, image: Image, files: str) -> Iterator[str]:
    """The address of a Debian in a registry, whose apt knows two packages, with the real programs."""

    async def packages() -> None:
        node = await deb(place, "nodejs", files={"usr/bin/node": oci_here.NODE.read_bytes()})
        ffmpeg = await deb(place, "ffmpeg", files={"usr/bin/ffmpeg": oci_here.ffmpeg().read_bytes()})
        await archive(place, [node, ffmpeg], release="bookworm")

    asyncio.run(packages())
    source = f"deb [trusted=yes] http://{files}/archive bookworm main\n"
    ref = with_apt(image, place, source=source, python=False, Env=["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"])
    with oci_here.running(place / "registry", tls=False) as registry:
        name = f"{registry.address}/debian:bookworm-slim"
        asyncio.run(run(["skopeo", "copy", "--quiet", "--dest-tls-verify=false", ref, f"docker://{name}"]))
        yield name


def example(language: str, containing: str) -> str:
    (found,) = [text for text in blocks("images.md", language) if re.search(containing, text)]
    return found


def test_node_and_ffmpeg(swarm: Swarm, env: dict[str, str], place: Path, debian: str) -> None:
    """The address of the base, which is asked for without TLS, is the only difference."""
    dockerfile = example("dockerfile", "ffmpeg nodejs && rm -rf /var/lib/apt/lists/\\*\n$")
    assert dockerfile.startswith("FROM debian:bookworm-slim\n")
    source = agent(
        place, "poster", manifest_of("poster"),
        Dockerfile=dockerfile.replace("debian:bookworm-slim", debian), main_js=example("js", "ffmpeg"),
    )  # fmt: skip
    name = str(agents.read(Path(source)).image)
    images = Imported(dir=Path(env["SWARM_IMAGES_DIR"], "oci"))
    recipe = Recipe(dockerfile=Path(source, "Dockerfile"), context=Path(source))
    asyncio.run(images.build(recipe, name=name, access=Access(plain_http=True)))
    swarm("agent", "add", source)
    swarm("ticket", "add", "a poster", "--agent", "poster", "--input", "seconds=2", "--id", "poster-1", "--wait")
    shown = swarm("ticket", "show", "poster-1", "--json")
    assert json.loads(shown)["ticket"]["outputs"]["pictures"] == ["1.png", "2.png"], shown
    assert "2.png" in swarm("ticket", "files", "poster-1")


def test_npm_packages_upon_an_image(swarm: Swarm, env: dict[str, str], place: Path, files: str) -> None:
    words = npm_package("words", "1.2.3", {"index.js": '{"inputs": "moo"}\n'})
    cowsay = npm_package(
        "cowsay", "1.6.0", {"cli.sh": "#!/bin/sh\ncat /node_modules/words/index.js\n"},
        programs={"cowsay": "cli.sh"}, requires={"words": "1"},
    )  # fmt: skip
    npm_registry(place / "npm", f"http://{files}/npm", [cowsay, words])
    shell = [entry(f"bin/{name}", kind=tarfile.SYMTYPE, link="busybox") for name in ("sh", "cat")]
    swarm("image", "import", Layout(place / "cow-layout").add("cow", [static(), layer(*shell)]), "--name", "cow:1")
    with npm_from(f"http://{files}/npm/", place), pytest.MonkeyPatch.context() as patch:
        for variable in ["PATH", *(one for one in os.environ if one.startswith("npm_config_"))]:
            patch.setitem(env, variable, os.environ[variable])
        manifest = "image: cow:1\nentry: [/bin/sh, -c, 'cowsay > output.json']\nruntime: exec\nnpm: [cowsay@1.6.0]\n"
        swarm("agent", "add", agent(place, "cow", manifest))
    assert ticket(swarm, env, "cow") == ("moo", "")
    listed = swarm("image", "list")
    assert "agents/cow:" in listed and "cow@1.0.0" in listed


PROGRAM = """
#include <stdio.h>
int main(void) {
    char text[4096];
    FILE *from = fopen("/work/input.json", "r"), *to = fopen("/work/output.json", "w");
    size_t size = fread(text, 1, sizeof text, from);
    fwrite(text, 1, size, to);
    return fclose(to);
}
"""


def manifest_of(name: str) -> str:
    return example("yaml", f"name: {name}\n").partition("version: 1.0.0\n")[2]


def test_a_program_alone(swarm: Swarm, env: dict[str, str], place: Path) -> None:
    source = agent(place, "alone", manifest_of("alone"), Dockerfile=example("dockerfile", "COPY program"))
    subprocess.run(["cc", "-static", "-x", "c", "-o", f"{source}/program", "-"], input=PROGRAM.encode(), check=True)
    swarm("agent", "add", source)
    assert ticket(swarm, env, "alone") == ({"x": 1}, "")


def for_musl(program: Path) -> None:
    """It needs musl's loader and library."""
    own, shared = oci_here.MUSL / "usr/lib/x86_64-linux-musl", oci_here.MUSL / "lib/x86_64-linux-musl"
    argv = [
        "gcc", "-nostdinc", "-isystem", str(oci_here.MUSL / "usr/include/x86_64-linux-musl"), "-fno-stack-protector",
        "-nostdlib", "-no-pie", "-o", str(program), str(own / "crt1.o"), str(own / "crti.o"),
        "-x", "c", "-", "-x", "none", f"-L{shared}", "-lc", str(own / "crtn.o"),
        "-Wl,-dynamic-linker,/lib/ld-musl-x86_64.so.1",
    ]  # fmt: skip
    subprocess.run(argv, input=PROGRAM.encode(), check=True)


def test_programs_for_musl(swarm: Swarm, env: dict[str, str], place: Path) -> None:
    """As Alpine has them: its C library, and none of glibc."""
    libc = (oci_here.MUSL / "lib/x86_64-linux-musl/libc.so").read_bytes()
    ref = Layout(place / "musl-layout").add("musl", [layer(
        folder("lib"), folder("etc"), entry("lib/ld-musl-x86_64.so.1", libc, mode=0o755),
        entry("lib/libc.musl-x86_64.so.1", kind=tarfile.SYMTYPE, link="ld-musl-x86_64.so.1"),
    )], Cmd=["/bin/sh"])  # fmt: skip
    swarm("image", "import", ref, "--name", "alpine:3")
    source = agent(place, "musl", manifest_of("musl"))
    for_musl(Path(source, "program"))
    swarm("agent", "add", source)
    assert ticket(swarm, env, "musl") == ({"x": 1}, "")

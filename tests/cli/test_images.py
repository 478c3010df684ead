"""Agents on imported images, from `swarm image import` to a ticket's outputs, in VMs; and the upkeep of images."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path

import pytest

from swarm.config import Settings
from swarm.vm.driver import Image
from tests.vm.image.oci_images import Layout, busybox, entry, folder, layer, static

pytestmark = pytest.mark.needs("oci", "qemu")
BIN = Path(sys.executable).parent
Swarm = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def env(settings: Settings, image: Image, place: Path) -> dict[str, str]:
    """A home of its own, with Swarm's image of all tests."""
    (place / "images").mkdir()
    (place / "images" / image.digest).symlink_to(image.dir)
    own = {"SWARM_HOME": str(place / "home"), "SWARM_IMAGES_DIR": str(place / "images"), "SWARM_DRIVER": "qemu"}
    env = os.environ | own
    subprocess.run([BIN / "swarm", "init", "--no-image"], check=True, env=env, capture_output=True)
    return env


@pytest.fixture(scope="module")
def swarm(env: dict[str, str]) -> Swarm:
    def run(*argv: str, status: int = 0) -> str:
        done = subprocess.run([BIN / "swarm", *argv], capture_output=True, text=True, timeout=600, env=env)
        assert done.returncode == status, (argv, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stdout if status == 0 else done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def layout(place: Path) -> Layout:
    return Layout(place / "layout")


@pytest.fixture(scope="module")
def debian(image: Image, place: Path, layout: Layout) -> str:
    """A Debian with Python, as a base image has it: that of Swarm's own guests."""
    root = place / "debian"
    subprocess.run(["fsck.erofs", f"--extract={root}", str(image.root)], check=True, capture_output=True)
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("bin", "lib", "lib64", "usr/bin", "usr/lib", "usr/lib64", "etc"):
            tar.add(root / name, name)
    own = layer(entry("etc/passwd", b"root:x:0:0::/root:/bin/sh\nme:x:1234:77::/srv:/bin/sh\n"), folder("srv"))
    return layout.add("debian", [out.getvalue(), own], User="me", Env=["GREETING=hello from", "PATH=/usr/bin:/bin"])


_DOCKERFILE = """
FROM scratch
COPY busybox /bin/
SHELL ["/bin/busybox", "sh", "-c"]
ARG TO
WORKDIR /srv/app
RUN echo "busybox sed 's/1/$TO/' \\$SWARM_WORK/input.json > \\$SWARM_WORK/output.json && busybox ls here" > /bin/run
RUN > here
ENTRYPOINT ["busybox", "sh"]
CMD ["/bin/run"]
"""


def folder_of(place: Path, **files: bytes) -> Path:
    place.mkdir()
    for name, data in files.items():
        (place / name).write_bytes(data)
        (place / name).chmod(0o755)
    return place


def agent(place: Path, name: str, manifest: str, **files: str) -> str:
    directory = place / "agents" / name
    directory.mkdir(parents=True)
    (directory / "agent.yaml").write_text(f"name: {name}\nversion: 1.0.0\n{manifest}")
    for file, text in files.items():
        (directory / file.replace("_", ".")).write_text(text)
    return str(directory)


def ticket(swarm: Swarm, env: dict[str, str], name: str, *, status: int = 0) -> tuple[object, str]:
    """Its outputs, or the inputs that it handed back, and its error."""
    title = f"{name} {status}"
    swarm("ticket", "add", title, "--agent", name, "--input", "x=1", "--wait", status=status)
    with closing(sqlite3.connect(Path(env["SWARM_HOME"], "data/swarm.db"))) as db:
        ((outputs, error),) = db.execute("SELECT outputs, error FROM tickets WHERE title = ?", (title,))
    outputs = json.loads(outputs or "null")
    return outputs["inputs"] if isinstance(outputs, dict) else outputs, error or ""


def test_one_static_program(swarm: Swarm, env: dict[str, str], layout: Layout, place: Path) -> None:
    source = agent(place, "static", "image: tool:1\n")
    told = swarm("agent", "add", source, status=2)
    assert "the image 'tool:1' is not on this host: `swarm image import tool:1` fetches it" in told
    nothing = layout.add("empty", [static()])
    swarm("image", "import", nothing, "--name", "tool:1")
    assert "has no Entrypoint and no Cmd: `entry` must say what runs" in swarm("agent", "add", source, status=2)
    context = folder_of(place / "context", busybox=busybox(), Dockerfile=_DOCKERFILE.encode())
    build = ["image", "build", "--dockerfile", f"{context}/Dockerfile", "--no-network", "--name", "tool:1"]
    assert swarm(*build, "--build-arg", "TO=2").startswith("tool:1 sha256:")
    assert swarm(*build, "--build-arg", "TO=2").endswith(", which was here\n")
    assert "tool:1 can't be built: " in swarm(*build, "--target", "none", status=1)
    assert "goes with --name, and not with --force" in swarm(*build, "--force", status=2)
    assert "needs --dockerfile" in swarm("image", "build", "--build-arg", "TO=2", status=2)
    assert "was built: `swarm image build --name tool:1` builds it again" in swarm("image", "pull", "tool:1", status=2)
    swarm("agent", "add", source)
    assert ticket(swarm, env, "static") == ({"x": 2}, "")
    assert "static@1.0.0" in swarm("image", "list") and "/bin/busybox sh /bin/run" in swarm("image", "show", "tool:1")

    swarm("image", "rm", "tool:1")
    outputs, error = ticket(swarm, env, "static", status=1)
    assert outputs is None
    assert "the image 'tool:1' is not on this host: `swarm image import tool:1` fetches it" in error


def test_dynamic_programs_and_python(swarm: Swarm, env: dict[str, str], debian: str, place: Path) -> None:
    swarm("image", "import", debian, "--name", "debian:test")
    assert "1234:77, home /srv" in swarm("image", "show", "debian:test")
    script = '#!/bin/sh\n[ "$(id -u) $HOME $GREETING" = "1234 /srv hello from" ] && tee output.json < input.json\n'
    source = agent(place, "dash", "image: debian:test\nruntime: exec\nentry: [main.sh]\n", main_sh=script)
    Path(source, "main.sh").chmod(0o755)
    swarm("agent", "add", source)
    program = "import json, os, sys\njson.dump([os.getuid(), sys.executable], open('output.json', 'w'))\n"
    swarm("agent", "add", agent(place, "python", "image: debian:test\nentry: [main.py]\n", main_py=program))
    for name, outputs in (("dash", {"x": 1}), ("python", [1234, "/usr/bin/python3"])):
        assert ticket(swarm, env, name) == (outputs, "")
    assert "which takes a VM" in swarm("agent", "run", "dash", "--no-vm", status=2)


def test_an_agent_with_its_dockerfile(swarm: Swarm, env: dict[str, str], place: Path) -> None:
    manifest = "build: {args: {TO: '2'}}\n"
    source = agent(place, "own", manifest, Dockerfile=_DOCKERFILE)
    (Path(source) / "busybox").write_bytes(busybox())
    (Path(source) / "busybox").chmod(0o755)
    archive = place / "own.tar.gz"
    subprocess.run(["tar", "-czf", str(archive), "-C", source, "."], check=True)
    told = swarm("agent", "add", str(archive), status=2)
    assert "building the image of own runs its author's programs on this host, in containers: unpack it" in told
    swarm("agent", "add", source)
    assert ticket(swarm, env, "own") == ({"x": 2}, "")
    (named,) = [one for one in json.loads(swarm("image", "list", "--json")) if "own@1.0.0" in one.get("agents", ())]
    assert named["name"].startswith("agents/own:")
    swarm("agent", "add", str(archive))  # the same files: its image is here
    swarm("image", "rm", named["name"])
    assert "`swarm agent build own` builds it" in ticket(swarm, env, "own", status=1)[1]
    assert "own@1.0.0: " in swarm("agent", "build", "own")
    assert named["name"] in swarm("image", "list")


def test_upkeep(swarm: Swarm, layout: Layout, env: dict[str, str]) -> None:
    ref = layout.add("kept", [static(), layer(entry("a"))], Cmd=["/bin/busybox"])
    swarm("image", "import", ref, "--name", "kept:1")
    swarm("image", "import", ref, "--name", "kept:2")
    listed = {one["name"]: one for one in json.loads(swarm("image", "list", "--json")) if "name" in one}
    assert listed["kept:1"]["key"] == listed["kept:2"]["key"]
    assert "kept:1 is as it was imported" in swarm("image", "verify", "kept:1")
    swarm("image", "rm", "kept:1")
    assert "kept:2" in swarm("image", "list")
    swarm("image", "import", layout.add("other", [static()]), "--name", "kept:2")
    assert listed["kept:1"]["key"] in swarm("image", "prune") and "kept:2" in swarm("image", "list")
    assert "removed kept:2" in swarm("image", "prune", "--all")
    file = Path(env["SWARM_IMAGES_DIR"], "oci", listed["kept:1"]["key"])
    assert not file.exists()
    assert (
        "no image was imported from a registry"
        in subprocess.run([BIN / "swarm", "image", "pull"], env=env, capture_output=True, text=True).stderr
    )


def test_what_a_manifest_may_not_say(swarm: Swarm, place: Path) -> None:
    for number, (manifest, why) in enumerate(
        {
            "image: a:b\nrequirements: [x==1]\n": "the image 'a:b' is not on this host: `swarm image import a:b`",
            "image: a:b\nruntime: python\n": "entry is missing",
            "description: x\n": "entry: is missing",
            "build: .\nimage: a:b\n": "image and build both say what its root is",
            "build: ..\n": "build.context: '..' is not in the agent's directory",
            "build: .\n": "build.dockerfile: 'Dockerfile' is not a file of this agent",
            f"build: {'x' * 300}\n": "is not a directory of this agent",
            "build: .\nrequirements: [x==1]\n": "can't be used with `build`: the Dockerfile installs them",
        }.items()
    ):
        assert why in swarm("agent", "add", agent(place, f"bad{number}", manifest), status=2)

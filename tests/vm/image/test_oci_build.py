"""Images built from a Dockerfile: what goes in, what its programs can reach, what is kept, and how it fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.base import process
from swarm.base.process import run
from swarm.errors import HostError, ImageError, UsageError
from swarm.vm.image.oci import build
from swarm.vm.image.oci.build import Recipe
from swarm.vm.image.oci.fetch import Access
from swarm.vm.image.oci.store import Imported
from swarm.vm.image.oci.unpack import Limits
from tests import oci_here
from tests.vm.image.oci_images import Layout, busybox, entry, layer, static

pytestmark = pytest.mark.needs("oci")
SECRET = "correct horse battery"
SHELL = 'FROM scratch\nCOPY busybox /bin/\nSHELL ["/bin/busybox", "sh", "-ec"]\n'
Made = Callable[..., Recipe]


@pytest.fixture
def imported(tmp_path: Path) -> Imported:
    return Imported(dir=tmp_path / "oci")


@pytest.fixture
def recipe(tmp_path: Path) -> Made:
    """Of the Dockerfile's text. The context has a busybox."""
    context = tmp_path / "context"
    context.mkdir()
    (context / "busybox").write_bytes(busybox())
    (context / "busybox").chmod(0o755)
    (tmp_path / "secret").write_text(SECRET)

    def make(text: str) -> Recipe:
        (context / "Dockerfile").write_text(text)
        return Recipe(dockerfile=context / "Dockerfile", context=context, network=False)

    return make


async def files_of(imported: Imported, name: str, place: Path) -> Path:
    found = await imported.layer(name)
    await run(["fsck.erofs", f"--extract={place}", "--no-preserve", str(found.path)])
    return place


def has_secret(place: Path) -> list[Path]:
    return [one for one in place.rglob("*") if one.is_file() and SECRET.encode() in one.read_bytes()]


async def test_what_goes_in_and_that_it_is_built_once(tmp_path: Path, imported: Imported, recipe: Made) -> None:
    text = f"""{SHELL.replace("scratch", "scratch AS tools")}
    COPY . /all/
    RUN for i in $(/bin/busybox find /all); do echo $i; done | /bin/busybox sort > /list
    FROM tools AS other
    RUN exit 1
    FROM tools
    ARG VERSION=1
    COPY --from=tools /list /list
    RUN --mount=type=secret,id=token test "$(/bin/busybox wc -c < /run/secrets/token)" = {len(SECRET)}
    RUN echo $VERSION > /version; /bin/busybox cat /proc/sys/kernel/random/uuid > /once
    USER 5:6
    ENTRYPOINT ["busybox"]
    """
    context = recipe("").context
    for name in ("kept", "ignored"):
        (context / name).write_text(name)
    (context / ".dockerignore").write_text("ignored\nbusybox*\n!busybox\n")
    first = replace(recipe(text), args=["VERSION=2"], secrets=[("token", tmp_path / "secret")])
    steps: list[str] = []
    made, new = await imported.build(first, name="tool", progress=lambda step, _: steps.append(step))
    assert new and made.name == "tool:latest" and any(step.startswith("step ") for step in steps)
    root = (await imported.layer("tool")).root
    assert root is not None and root.entry == ("/bin/busybox",) and root.user[:2] == (5, 6)
    found = await files_of(imported, "tool", tmp_path / "found")
    assert (found / "list").read_text().split() == [
        "/all", "/all/.dockerignore", "/all/Dockerfile", "/all/busybox", "/all/kept"
    ]  # fmt: skip
    assert (found / "version").read_text() == "2\n"
    assert has_secret(imported.dir) == has_secret(found) == []

    (context / "kept").touch()
    same, new = await imported.build(first, name="again")
    assert not new and (same.key, same.digest) == (made.key, made.digest)
    (context / "kept").write_text("changed")
    other, new = await imported.build(replace(first, target="tools", args=["VERSION=3"]), name="tool")
    assert new and other.key != made.key

    _, freed = await imported.prune(keep=(), unused=["tool:latest", "again:latest"])
    assert freed > len(busybox()) and imported.list() == []
    assert not list((imported.dir / ".blobs/sha256").iterdir()) and not (imported.dir / ".builds").exists()
    with pytest.raises(
        UsageError, match="tool:latest was built: `swarm image build --name tool:latest` builds it again"
    ):
        await imported.is_behind(made)


@contextlib.asynccontextmanager
async def services(tmp_path: Path) -> AsyncIterator[int]:
    """The port on which this host answers: on its loopback, and at 192.0.2.7, which is an address like any other."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"reached\n")
        writer.close()

    await run(["ip", "address", "add", "192.0.2.7/32", "dev", "lo"])
    try:
        async with (
            await asyncio.start_server(answer, "127.0.0.1", 0) as one,
            await asyncio.start_server(answer, "192.0.2.7", one.sockets[0].getsockname()[1]),
        ):
            yield one.sockets[0].getsockname()[1]
    finally:
        await run(["ip", "address", "del", "192.0.2.7/32", "dev", "lo"])


async def test_what_its_programs_can_reach(tmp_path: Path, imported: Imported, recipe: Made) -> None:
    lines = [
        "busybox grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status > /rights",
        "busybox ls / /run /proc > /seen; busybox cat /proc/mounts /etc/hosts > /told",
        *(f"busybox nc -w 20 {to} PORT < /dev/null > /{to} || true" for to in ("127.0.0.1", "10.0.2.2", "192.0.2.7")),
    ]
    async with services(tmp_path) as port:
        text = SHELL + "".join(
            f"RUN {line.replace('busybox', '/bin/busybox').replace('PORT', str(port))}\n" for line in lines
        )
        await imported.build(replace(recipe(text), network=True), name="open")
        await imported.build(recipe(text.replace("RUN ", "RUN : ;")), name="closed")
    found = await files_of(imported, "open", tmp_path / "open")
    assert (found / "192.0.2.7").read_text() == "reached\n"
    assert (found / "127.0.0.1").read_text() == (found / "10.0.2.2").read_text() == ""
    assert (await files_of(imported, "closed", tmp_path / "closed") / "192.0.2.7").read_text() == ""
    rights = dict(line.split() for line in (found / "rights").read_text().splitlines())
    # containers.conf(5), default_capabilities; without NET_RAW, MKNOD, SYS_ADMIN
    assert rights == {"CapEff:": "00000000800405fb", "CapBnd:": "00000000800405fb", "NoNewPrivs:": "1", "Seccomp:": "2"}
    assert "bin" in (found / "seen").read_text().split()
    assert not {"stage", "builds", "context", "usr"} & set((found / "seen").read_text().split())
    assert "192.0.2" not in (found / "told").read_text()


async def test_a_base_image_of_a_registry(tmp_path: Path, imported: Imported, recipe: Made) -> None:
    layout = Layout(tmp_path / "layout")
    with oci_here.running(tmp_path / "registry", tls=False) as registry:
        name = f"{registry.address}/base:1"
        text = f'FROM {name}\nRUN ["/bin/busybox", "touch", "/made"]\n'
        keys = []
        for content in ("a", "b", "b"):
            base = layout.add("base", [static(), layer(entry("content", content.encode()))], Cmd=["busybox"])
            await run(["skopeo", "copy", "--dest-tls-verify=false", base, f"docker://{name}"])
            keys.append((await imported.build(recipe(text), name="x", access=Access(plain_http=True)))[0].key)
        assert keys[0] != keys[1] == keys[2]
        # A base that is kept is used when its registry doesn't answer; here is none.
        with pytest.raises(ImageError, match=r"can't fetch .*/none:1: the registry has no TLS: --plain-http"):
            await imported.build(recipe(text.replace("base", "none")), name="x")
        with pytest.raises(ImageError, match=r"can't fetch .*/none:1: the registry has no such image or tag"):
            await imported.build(recipe(text.replace("base", "none")), name="x", access=Access(plain_http=True))
    found = await files_of(imported, "x", tmp_path / "found")
    assert (found / "content").read_text() == "b" and (found / "made").exists()


async def test_what_can_not_be_built(tmp_path: Path, imported: Imported, recipe: Made) -> None:
    leak = "RUN --mount=type=secret,id=token /bin/busybox cat /run/secrets/token; echo one; echo two >&2; exit 7\n"
    for text, why in {
        SHELL + leak: r"RUN /bin/busybox cat .* ended with status 7: \*\*\*(one \| two|two \| one)$",
        SHELL + "RUN /bin/busybox sh -c 'kill -9 $$'; :\n": "ended with status 137",
        "FROM scratch\nCOPY busybox /bin/\nRUN ls\n": "the image has no /bin/sh, which RUN needs",
        "FROM scratch\nFETCH x\n": 'Unknown instruction: "FETCH"$',
        "FROM scratch\nCOPY none /\n": "/none.*no such file",
        "FROM scratch\nCOPY ../../etc/passwd /\n": "no such file",
        "FROM scratch\nCOPY --from=none a /\n": "no stage or image found with that name",
        "RUN x\n": "no FROM statement found",
    }.items():
        with pytest.raises(ImageError, match=f"x:latest can't be built: .*{why}") as caught:
            await imported.build(replace(recipe(text), secrets=[("token", tmp_path / "secret")]), name="x")
        assert SECRET not in str(caught.value)
    with pytest.raises(ImageError, match=r"x:latest can't be built: .*none.* was not found"):
        await imported.build(replace(recipe(SHELL), target="none"), name="x")
    assert not imported.knows("x") and has_secret(imported.dir) == []

    good = recipe(SHELL)
    for wrong, why in {
        replace(good, dockerfile=tmp_path): "is no file",
        replace(good, context=tmp_path / "none"): "is no directory",
        replace(good, args=("x",)): "the build argument 'x' is not given as NAME=VALUE",
        replace(good, secrets=(("a", tmp_path / "none"),)): "the secret 'a' is to be .*, which is no file",
    }.items():
        with pytest.raises(UsageError, match=why):
            await imported.build(wrong, name="x")
    small = Imported(dir=imported.dir, limits=replace(Limits(), files=1))
    with pytest.raises(UsageError, match=r"has 2 files and .*, and at most 1"):
        await small.build(good, name="x")
    assert build.secret("id=a,src=b/c") == ("a", Path("b/c"))
    for text in (SECRET, "id=a", "id=a b,src=c", "id=a,src=b,x=y"):
        with pytest.raises(UsageError, match="given as id=ID,src=FILE") as refused:
            build.secret(text)
        assert text not in str(refused.value)


async def test_a_full_disk(tmp_path: Path, recipe: Made) -> None:
    (tmp_path / "small").mkdir()
    await run(["mount", "-t", "tmpfs", "-o", "size=280m", "tmpfs", str(tmp_path / "small")])
    try:
        imported = Imported(dir=tmp_path / "small" / "oci")
        with pytest.raises(ImageError, match=r"no space left in .*the image was not imported"):
            await imported.build(recipe(SHELL + "RUN /bin/busybox dd if=/dev/zero of=/x bs=1M count=400\n"), name="x")
        assert not imported.knows("x") and not (imported.dir / ".builds").exists()
    finally:
        await run(["umount", "--lazy", str(tmp_path / "small")])  # the kernel may still end mounts of the build


_BUILD = """
import asyncio, sys
from pathlib import Path
from swarm.vm.image.oci.build import Recipe
from swarm.vm.image.oci.store import Imported
def say(step, share): print(step, flush=True)
dir, context, secret = map(Path, sys.argv[1:])
recipe = Recipe(dockerfile=context / "Dockerfile", context=context, secrets=[("token", secret)])
asyncio.run(Imported(dir=dir).build(recipe, name="x", progress=say))
"""


async def test_killed_in_mid_build(tmp_path: Path, imported: Imported, recipe: Made) -> None:
    made = recipe(SHELL + "RUN --mount=type=secret,id=token while :; do /bin/busybox sleep 1; done\n")
    argv = [sys.executable, "-c", _BUILD, str(imported.dir), str(made.context), str(tmp_path / "secret")]
    child = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    async for line in child.stdout:
        if b": RUN" in line:
            child.kill()
            break
    await child.communicate()
    assert not imported.knows("x") and has_secret(imported.dir) == []
    assert (await imported.build(recipe(SHELL + "RUN : ok\n"), name="x"))[1]
    assert not list(imported.dir.glob(".building-*"))


async def test_without_its_programs(
    monkeypatch: pytest.MonkeyPatch, imported: Imported, recipe: Made, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for program in ("mkfs.erofs", "skopeo", "umoci", "crun"):
        (tmp_path / "bin" / program).symlink_to(process.path_of(program))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(process, "_SYSTEM_PATH", "")
    with pytest.raises(
        HostError, match=r"needs buildah and slirp4netns, which this host lacks: apt-get install .*buildah"
    ):
        await imported.build(recipe(SHELL), name="x")


def test_credentials_of_all_files_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As skopeo looks for them: what `swarm registry login` keeps hides nothing that Docker has."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    (stage := tmp_path / "stage").mkdir()
    ours, none = ".config/containers/auth.json", build._auth_file(stage)
    for place, auths in {
        ours: {"a": 1},
        ".docker/config.json": {"a": 2, "b": 3},
        "run/containers/auth.json": [],
    }.items():
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(json.dumps({"auths": auths}))
    found = Path(build._auth_file(stage))
    assert none == "" and json.loads(found.read_text()) == {"auths": {"a": 1, "b": 3}}
    assert found.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / ".docker/config.json"))
    assert json.loads(Path(build._auth_file(stage)).read_text()) == {"auths": {"a": 2, "b": 3}}

"""Imported images: what is kept of one, what a registry may answer, and what a hostile one can't do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.base import process
from swarm.base.process import run
from swarm.errors import HostError, ImageError, NotFound, UsageError
from swarm.vm.image.oci import config, reference
from swarm.vm.image.oci.fetch import Access
from swarm.vm.image.oci.store import Imported
from swarm.vm.image.oci.unpack import Limits
from tests import oci_here
from tests.vm.image.oci_images import NET_RAW, Layout, entry, folder, inventory, layer, static

pytestmark = pytest.mark.needs("oci")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def imported(tmp_path: Path) -> Imported:
    return Imported(dir=tmp_path / "oci")


@contextlib.contextmanager
def mounted(file: Path, place: Path) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "erofs", "-o", "loop,ro", str(file), str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this kernel mounts no erofs file: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def left(imported: Imported) -> list[str]:
    """What a failed import leaves: the lock and blobs, which the next one uses."""
    return sorted(one.name for one in imported.dir.iterdir() if one.name not in (".lock", ".blobs", ".verified"))


# --- what is kept -----------------------------------------------------------------------------------------------------


async def test_all_that_a_file_system_can_hold_is_kept(tmp_path: Path, layout: Layout, imported: Imported) -> None:
    below = layer(
        folder("etc"), folder("gone"), entry("gone/a"), folder("opaque"), entry("opaque/old"), entry("etc/removed"),
        folder("bin"), entry("bin/tool", b"tool", mode=0o4755, uid=2**31 - 2, gid=70000),
        entry("bin/same", kind=tarfile.LNKTYPE, link="bin/tool"),
        entry("bin/ping", b"ping", mode=0o755, xattrs={"security.capability": NET_RAW, "user.note": "kept"}),
        entry("null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666), entry("pipe", kind=tarfile.FIFOTYPE),
        entry("link", kind=tarfile.SYMTYPE, link="/etc/nowhere"), entry(os.fsdecode(b"not\xffutf8"), b"x"),
        folder("sticky", 0o1777), entry("n" * 250, b"long"), folder("/".join(["d" * 60] * 30)),
    )  # fmt: skip
    above = layer(
        entry("etc/.wh.removed"), entry(".wh.gone"), entry("opaque/.wh..wh..opq"), entry("opaque/new", b"new"),
    )  # fmt: skip
    await imported.import_(layout.add("all", [below, above]), name="all")
    found = await imported.layer("all")
    with mounted(found.path, tmp_path / "mnt") as root:
        there = inventory(root)
        assert there[b"bin/tool"][:3] == (stat.S_IFREG | 0o4755, 2**31 - 2, 70000)
        assert (root / "bin/tool").stat().st_ino == (root / "bin/same").stat().st_ino
        assert (root / "bin/tool").stat().st_mtime == 1_600_000_000
        assert os.getxattr(root / "bin/ping", "security.capability") == NET_RAW.encode("latin-1")
        assert os.getxattr(root / "bin/ping", "user.note") == b"kept"
        assert there[b"null"][3] == os.makedev(1, 3) and stat.S_ISFIFO(int(str(there[b"pipe"][0])))
        assert there[b"link"][4] == b"/etc/nowhere" and b"not\xffutf8" in there and b"n" * 250 in there
        assert there[b"sticky"][0] == stat.S_IFDIR | 0o1777 and b"/".join([b"d" * 60] * 30) in there
        assert not {b"gone", b"gone/a", b"etc/removed", b"opaque/old"} & set(there) and b"opaque/new" in there
        assert not any(b".wh." in name for name in there)
    assert left(imported) == sorted([found.path.parent.name, "names.json"])


async def test_a_hundred_layers(layout: Layout, imported: Imported) -> None:
    many = layout.add("many", [layer(entry(f"f{n}", b"%d" % n)) for n in range(100)])
    await imported.import_(many, name="many")
    assert imported.info("many").layers == 100


async def test_what_an_image_says_about_its_programs(layout: Layout, imported: Imported) -> None:
    files = layer(
        folder("etc"), folder("usr"), folder("usr/bin"), folder("opt"), folder("opt/bin"), folder("srv"),
        entry("etc/passwd", b"root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv/web:/bin/sh\n"),
        entry("etc/group", b"web:x:34:\nlogs:x:4:web\nmore:x:70000:a,web\n"),
        entry("usr/bin/python3.11", b"#!", mode=0o755),
        entry("opt/bin/python3", kind=tarfile.SYMTYPE, link="../../../../usr/bin/python3.11"),
        entry("opt/bin/serve", b"#!", mode=0o755), entry("usr/bin/serve", b"#!", mode=0o644),
    )  # fmt: skip
    said: dict[str, Any] = {"Env": ["PATH=/usr/bin:/opt/bin", "A=b=c"], "Entrypoint": ["serve"], "Cmd": ["--now"]}
    ref = layout.add("web", [files], User="web", WorkingDir="/srv", StopSignal="SIGQUIT", **said)
    await imported.import_(ref, name="web")
    root = (await imported.layer("web")).root
    assert root is not None and root.user == (33, 34, (4, 70000), "/srv/web") and root.cwd == "/srv"
    assert root.env == {"PATH": "/usr/bin:/opt/bin", "A": "b=c"} and root.entry == ("/opt/bin/serve", "--now")
    assert root.python == "/opt/bin/python3" and root.stop_signal == signal.SIGQUIT
    assert imported.named((await imported.layer("web")).digest) == await imported.layer("web")


async def test_a_directory_that_an_image_names_and_does_not_have(layout: Layout, imported: Imported) -> None:
    """Its program starts all the same: in /work. A link counts by where it leads in the image."""
    files = layer(
        folder("srv"), entry("file"), entry("in", kind=tarfile.SYMTYPE, link="/srv"),
        entry("out", kind=tarfile.SYMTYPE, link="../../../usr"),
    )  # fmt: skip
    for named, found in {"/srv": "/srv", "srv": "/srv", "/in": "/in", "/none": "/", "/file": "/", "/out": "/"}.items():
        await imported.import_(layout.add("x", [files], WorkingDir=named), name="x")
        root = (await imported.layer("x")).root
        assert root is not None and root.cwd == found, named


async def test_one_file_system_with_two_configs_is_two_layers(layout: Layout, imported: Imported) -> None:
    """A template, and a snapshot, know a layer by its digest alone."""
    for name in ("a", "b"):
        await imported.import_(layout.add(name, [static()], Cmd=[name]), name=name)
    assert (await imported.layer("a")).digest != (await imported.layer("b")).digest


async def test_layers_are_kept_once(layout: Layout, imported: Imported) -> None:
    shared = layer(entry("big", os.urandom(1 << 20)))
    await imported.import_(layout.add("one", [shared, layer(entry("1"))]), name="one")
    await imported.import_(layout.add("two", [shared, layer(entry("2"))]), name="two")
    blobs = list((imported.dir / ".blobs" / "sha256").iterdir())
    assert len(blobs) == 7  # two manifests, two configs, three layers
    await imported.remove("one")
    assert len(list((imported.dir / ".blobs" / "sha256").iterdir())) == 4
    with pytest.raises(NotFound, match=r"the image 'one' is not on this host: `swarm image import one` fetches it"):
        await imported.layer("one")
    assert await imported.layer("two")
    await imported.remove("two")
    assert left(imported) == ["names.json"] and not list((imported.dir / ".blobs" / "sha256").iterdir())


async def test_an_image_that_was_changed_is_not_used(layout: Layout, imported: Imported) -> None:
    ref = layout.add("x", [static()])
    await imported.import_(ref, name="x")
    file = (await imported.layer("x")).path
    with file.open("r+b") as opened:
        opened.seek(5000)
        opened.write(b"changed")
    with pytest.raises(ImageError, match=r"damaged.*`swarm image import x` fetches it again"):
        await imported.layer("x")
    assert "sha256" in imported.damage(imported.info("x"))
    made, new = await imported.import_(ref, name="x")
    assert new and await imported.layer("x") and not imported.damage(imported.info(made.key))


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name", "source"),
    [
        ("python:3.12-slim", "python:3.12-slim", "docker://python:3.12-slim"),
        ("docker://python", "python:latest", "docker://python:latest"),
        ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest", "docker://127.0.0.1:5000/a/b:latest"),
        ("oci-archive:/tmp/x.tar:a", "oci-archive:/tmp/x.tar:a", "oci-archive:/tmp/x.tar:a"),
        ("docker-daemon:a:b", "docker-daemon:a:b", "docker-daemon:a:b"),
    ],
)
def test_references(given: str, name: str, source: str) -> None:
    assert reference.parse(given) == reference.Reference(name=name, source=source)
    assert reference.known_as(given) == name


@pytest.mark.parametrize("given", ["", "-x", "--authfile=/etc/passwd", "http://a/b", "a b", "oci:", "a\nb", "x" * 2000])
def test_what_is_no_reference(given: str) -> None:
    with pytest.raises(UsageError):
        reference.parse(given)


async def test_a_name_and_a_digest_mean_the_same(layout: Layout, imported: Imported) -> None:
    made, _ = await imported.import_(layout.add("x", [static()]), name="mine:1")
    assert await imported.layer("mine:1") == await imported.layer(made.digest) == await imported.layer(made.digest[:30])
    assert not imported.knows("mine:2") and not imported.knows(made.digest[:12])


# --- registries -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[oci_here.Registry]:
    with oci_here.running(tmp_path_factory.mktemp("registry") / "tls", tls=True) as one:
        yield one


async def push(ref: str, to: str, registry: oci_here.Registry, *options: str) -> None:
    way = [f"--dest-cert-dir={registry.cert_dir}", f"--dest-creds={oci_here.USER}:{oci_here.PASSWORD}"]
    way = way if registry.cert_dir else ["--dest-tls-verify=false"]
    await run(["skopeo", "copy", *options, *way, ref, f"docker://{to}"])


def credentials(place: Path, registry: oci_here.Registry, password: str = oci_here.PASSWORD) -> str:
    import base64

    word = base64.b64encode(f"{oci_here.USER}:{password}".encode()).decode()
    file = place / f"auth-{len(password)}.json"
    file.write_text(json.dumps({"auths": {registry.address: {"auth": word}}}))
    return str(file)


async def test_a_registry_with_tls_and_a_password(
    tmp_path: Path, layout: Layout, imported: Imported, registry: oci_here.Registry
) -> None:
    name = f"{registry.address}/team/tool:1"
    await push(layout.add("x", [static()], Cmd=["one"]), name, registry)
    access = Access(cert_dir=registry.cert_dir, auth_file=credentials(tmp_path, registry))
    first, new = await imported.import_(name, access=access)
    assert new and first.name == name and first.digest.startswith("sha256:")
    assert (await imported.import_(name, access=access))[1] is False
    assert not await imported.is_behind(first)

    await push(layout.add("x", [static()], Cmd=["two"]), name, registry)
    assert await imported.is_behind(first)
    assert (await imported.layer(name)).root.entry == ("one",)  # type: ignore[union-attr]
    second, _ = await imported.import_(name, access=access)
    assert second.key != first.key and (await imported.layer(name)).root.entry == ("two",)  # type: ignore[union-attr]
    old = f"{registry.address}/team/tool@{first.digest}"
    pinned, new = await imported.import_(old, access=access)
    assert pinned.key == first.key and not new and (await imported.layer(first.digest)).root.entry == ("one",)  # type: ignore[union-attr]

    for bad, said in {
        Access(cert_dir=access.cert_dir): "other credentials",
        Access(cert_dir=access.cert_dir, auth_file=credentials(tmp_path, registry, "wrong")): "other credentials",
        Access(auth_file=access.auth_file): "certificate is not trusted here: give its authority by --cert-dir",
    }.items():
        with pytest.raises(ImageError, match=f"can't fetch .*{said}"):
            await imported.import_(name, access=bad)
    with pytest.raises(ImageError, match="no such image or tag"):
        await imported.import_(f"{registry.address}/team/tool:none", access=access)
    assert len(left(imported)) == 3


async def test_credentials_that_are_kept(
    tmp_path: Path, layout: Layout, imported: Imported, registry: oci_here.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(variable, raising=False)
    name = f"{registry.address}/team/kept:1"
    await push(layout.add("x", [static()], Cmd=["one"]), name, registry)
    swarm = [str(Path(sys.executable).with_name("swarm")), "registry"]
    argv = [*swarm, "login", registry.address, "-u", oci_here.USER, "--cert-dir", registry.cert_dir]
    wrong = await run(argv, input=b"wrong\n", check=False)
    assert wrong.returncode == 2 and b"it refuses these credentials" in wrong.stderr
    assert (await run(argv, input=b"", check=False)).returncode == 2
    with pytest.raises(ImageError, match="`swarm registry login` keeps them"):
        await imported.import_(name, access=Access(cert_dir=registry.cert_dir))
    await run(argv, input=f"{oci_here.PASSWORD}\n".encode())
    kept = tmp_path / ".config/containers/auth.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert (await imported.import_(name, access=Access(cert_dir=registry.cert_dir)))[1]
    await run([*swarm, "logout", registry.address])
    assert registry.address not in kept.read_text()


async def test_an_image_for_several_machines(
    tmp_path: Path, layout: Layout, imported: Imported, registry: oci_here.Registry
) -> None:
    """Its name stays that of all of them; this machine's part is what is kept."""
    name = f"{registry.address}/team/many:1"
    access = Access(cert_dir=registry.cert_dir, auth_file=credentials(tmp_path, registry))
    layout.add("other", [layer(entry("other"))], architecture="s390x")
    for command in ("one", "two"):
        layout.add("here", [static()], Cmd=[command])
        await push(layout.index("many", s390x="other", amd64="here"), name, registry, "--all")
        image, new = await imported.import_(name, access=access)
        assert new and not await imported.is_behind(image)
        assert (await imported.import_(name, access=access))[1] is False
        assert (await imported.layer(name)).root.entry == (command,)  # type: ignore[union-attr]
    pinned, new = await imported.import_(f"{registry.address}/team/many@{image.digest}", access=access)
    assert (pinned.key, new) == (image.key, False)
    await push(layout.index("many", s390x="other"), name, registry, "--all")
    with pytest.raises(ImageError, match=r"s390x|linux/amd64|architecture"):
        await imported.import_(name, access=access)


async def test_what_the_hosts_policy_does_not_allow(
    tmp_path: Path, layout: Layout, imported: Imported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """policy.json: only what is signed, or nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    policy = tmp_path / ".config" / "containers" / "policy.json"
    policy.parent.mkdir(parents=True)
    key = tmp_path / "key.gpg"
    key.write_bytes(b"")
    ref = layout.add("x", [static()])
    for requirement in ({"type": "reject"}, {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(key)}):
        policy.write_text(json.dumps({"default": [requirement]}))
        with pytest.raises(ImageError, match="this host's policy of signatures refuses it"):
            await imported.import_(ref)
        assert left(imported) == []
    policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    assert (await imported.import_(ref))[1]


async def test_a_registry_without_tls_only_when_asked(tmp_path: Path, layout: Layout, imported: Imported) -> None:
    with oci_here.running(tmp_path / "plain", tls=False) as registry:
        name = f"{registry.address}/tool:1"
        await push(layout.add("x", [static()]), name, registry)
        with pytest.raises(ImageError, match="the registry has no TLS: --plain-http"):
            await imported.import_(name)
        assert (await imported.import_(name, access=Access(plain_http=True)))[1]
    with pytest.raises(ImageError, match="the registry can't be reached"):
        await imported.import_(name, access=Access(plain_http=True))
    assert await imported.layer(name)


async def test_files_of_docker_and_of_oci(tmp_path: Path, layout: Layout, imported: Imported) -> None:
    ref = layout.add("x", [static(), layer(entry("a"))], Cmd=["busybox"], Env=["PATH=/bin"])
    for kind in ("docker-archive", "oci-archive"):
        file = f"{kind}:{tmp_path / kind}.tar"
        await run(["skopeo", "copy", ref, file if kind == "oci-archive" else f"{file}:tool:1"])
        await imported.import_(file)
        assert (await imported.layer(file)).root.entry == ("/bin/busybox",)  # type: ignore[union-attr]
    with pytest.raises(ImageError, match="there is no such file"):
        await imported.import_(f"oci-archive:{tmp_path}/none.tar")


async def test_layers_that_umoci_cannot_read(tmp_path: Path, layout: Layout, imported: Imported) -> None:
    ref = layout.add("x", [static()])
    await run(["skopeo", "copy", "--dest-decompress", ref, f"dir:{tmp_path}/plain"])
    assert (await imported.import_(f"dir:{tmp_path}/plain", name="plain"))[1]
    ref = layout.add("z", [static(), layer(entry("other"))], Cmd=["busybox"], Env=["PATH=/bin"])
    await run(["skopeo", "copy", "--dest-compress-format=zstd", ref, f"oci:{tmp_path}/zstd:z"])
    (entry_,) = json.loads((tmp_path / "zstd/index.json").read_text())["manifests"]
    described = (tmp_path / "zstd/blobs" / entry_["digest"].replace(":", "/")).read_text()
    assert described.count("tar+zstd") == 2
    name, is_new = await imported.import_(f"oci:{tmp_path}/zstd:z")
    assert is_new and name.digest == entry_["digest"]
    assert (await imported.layer(name.name)).root.entry == ("/bin/busybox",)  # type: ignore[union-attr]
    assert not (await imported.import_(f"oci:{tmp_path}/zstd:z"))[1]
    with pytest.raises(ImageError, match="can't be unpacked"):
        await imported.import_(layout.add("lies", [layer(entry("third"))], compressed="zstd"))


async def test_another_architecture(layout: Layout, imported: Imported) -> None:
    with pytest.raises(ImageError, match=r"is for linux/s390x, and this machine runs linux/"):
        await imported.import_(layout.add("x", [static()], architecture="s390x"))
    assert left(imported) == []


# --- hostile images ---------------------------------------------------------------------------------------------------


async def test_no_layer_reaches_the_host(tmp_path: Path, layout: Layout, imported: Imported) -> None:
    target = tmp_path / "host"
    target.mkdir()
    (target / "file").write_text("mine")
    before = inventory(tmp_path / "host")
    up = "../" * 12
    tricks = [
        [entry(f"{up}{target}/made", b"x")],
        [entry(f"{target}/made", b"x")],
        [entry("out", kind=tarfile.SYMTYPE, link=str(target)), entry("out/made", b"x"), entry("out/file", b"x")],
        [entry("out", kind=tarfile.SYMTYPE, link=f"{up}{target}"), entry("out/made", b"x")],
        [entry("hard", kind=tarfile.LNKTYPE, link=f"{target}/file"), entry("hard", b"x")],
        [entry("hard", kind=tarfile.LNKTYPE, link=f"{up}{target}/file")],
        [entry("out", kind=tarfile.SYMTYPE, link=str(target)), entry("out/.wh.file"), entry("out/.wh..wh..opq")],
        [entry(f".wh.{'../' * 3}file")],
        [entry("a/.wh...")],
        [entry("etc", kind=tarfile.SYMTYPE, link="/"), entry("etc/passwd", b"x")],
        [entry("", kind=tarfile.SYMTYPE, link=str(target)), entry("made", b"x")],
        [entry(".", kind=tarfile.SYMTYPE, link=str(target)), entry("made", b"x")],
        [entry("/stage/layout", kind=tarfile.SYMTYPE, link="/"), entry("../layout/x", b"x")],
    ]
    for number, trick in enumerate(tricks):
        with contextlib.suppress(ImageError):  # it is refused, or it stays inside
            ref = layout.add(f"t{number}", [layer(folder("a")), layer(*trick), layer(*trick)])
            await imported.import_(ref, name=f"trick:{number}")
    assert inventory(target) == before


async def test_a_bomb_costs_its_limit_and_a_sentence(tmp_path: Path, layout: Layout) -> None:
    small = Limits(layers=3, bytes=20 << 20, files=1000, ratio=20, small_bytes=10 << 20)
    imported = Imported(dir=tmp_path / "small", limits=small)
    zeros = [layer(entry(f"z{n}", bytes(9 << 20))) for n in range(2)]
    noise = layer(*(entry(f"n{n}", os.urandom(1 << 20)) for n in range(15)))
    for layers, said in (
        ([layer()] * 4, "has 4 layers, and at most 3 are allowed"),
        (zeros, r"takes more than 0.0105 GB when it is unpacked, 20 times what was fetched"),
        ([layer(entry("one", bytes(11 << 20)))], r"has a file of more than 0.0105 GB"),
        ([noise, *zeros], r"takes more than 0.021 GB when it is unpacked"),
        ([noise, layer(entry("more", os.urandom(10 << 20)))], r"is larger than 0.021 GB"),
        ([layer(*(entry(f"{n}") for n in range(2000)))], "has more than 1000 files"),
    ):
        with pytest.raises(ImageError, match=said):
            await imported.import_(layout.add("bomb", layers))
        assert left(imported) == []
    await imported.prune(())
    assert not list((imported.dir / ".blobs" / "sha256").iterdir())


async def test_a_torn_layer_is_fetched_again(layout: Layout, imported: Imported) -> None:
    ref = layout.add("x", [static()])
    made, _ = await imported.import_(ref, name="x")
    await run(["rm", "-r", str(imported.dir / made.key)])
    largest = max((imported.dir / ".blobs" / "sha256").iterdir(), key=lambda blob: blob.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(1000)
        file.write(b"torn by a power failure")
    assert (await imported.import_(ref, name="x"))[1] and await imported.layer("x")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"User": "nobody-here"}, "which its /etc/passwd doesn't have"),
        ({"User": "4294967296"}, "which its /etc/passwd doesn't have"),
        ({"User": "0:nogroup"}, "which its /etc/group doesn't have"),
        ({"Env": ["A"]}, "is not NAME=VALUE"),
        ({"Env": ["A=" + "x" * 40000]}, "Env has what is not a text of at most"),
        ({"Env": ["A=\0"]}, "without NUL"),
        ({"Entrypoint": ["x"] * 300}, "not a list of at most 256"),
        ({"Cmd": [1]}, "not a text"),
        ({"StopSignal": "SIGNOTHING"}, "is not a signal"),
        ({"WorkingDir": ["/"]}, "not a text"),
    ],
)
def test_a_config_is_hostile_text(tmp_path: Path, said: dict[str, object], why: str) -> None:
    with pytest.raises(ImageError, match=f"tool:1 can't be used: .*{why}"):
        config.root_of({"config": said}, tmp_path, "tool:1")


def test_names_in_a_config_are_looked_up_inside(tmp_path: Path) -> None:
    outside, root = tmp_path / "passwd", tmp_path / "root"
    outside.write_text("evil:x:0:0::/:/\n")
    (root / "etc").mkdir(parents=True)
    for link in (str(outside), "../../passwd", "passwd", "../../../../../../etc/passwd"):
        (root / "etc/passwd").unlink(missing_ok=True)
        (root / "etc/passwd").symlink_to(link)
        with pytest.raises(ImageError, match="doesn't have"):
            config.root_of({"config": {"User": "evil"}}, root, "x")
    (root / "etc/passwd").unlink()
    os.mkfifo(root / "etc/passwd")
    assert config.root_of({}, root, "x").user == (0, 0, (), "/root")
    (root / "a").symlink_to("/b")
    (root / "b").symlink_to("a")
    assert config.find(root, "/a/x") is None and config.find(root, "/../../etc") == root / "etc"
    assert config.find(root, f"/{'x' * 5000}") is None


# --- failure ----------------------------------------------------------------------------------------------------------


async def test_a_full_disk(tmp_path: Path, layout: Layout) -> None:
    place = tmp_path / "small"
    place.mkdir()
    await run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)])
    try:
        imported = Imported(dir=place / "oci")
        ref = layout.add("x", [layer(entry("noise", os.urandom(30 << 20)))])
        with pytest.raises(
            (ImageError, HostError), match=r"no space left in .*the image was not imported|disk is full"
        ):
            await imported.import_(ref)
        assert left(imported) == []
    finally:
        await run(["umount", str(place)])


_IMPORT = """
import asyncio, sys
from pathlib import Path
from swarm.vm.image.oci.store import Imported
def say(step, share): print(step, flush=True)
asyncio.run(Imported(dir=Path(sys.argv[1])).import_(sys.argv[2], name="x", progress=say))
"""


@pytest.mark.parametrize("step", ["fetching", "unpacking", "packing"])
async def test_killed_in_mid_import(layout: Layout, imported: Imported, step: str) -> None:
    noise = [layer(*(entry(f"{n}-{m}", os.urandom(1 << 19)) for m in range(10))) for n in range(4)]
    ref = layout.add("x", noise)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _IMPORT, str(imported.dir), ref, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    async for line in child.stdout:
        if line.decode().startswith(step):
            child.kill()
            break
    await child.wait()
    assert not imported.knows("x") or await imported.layer("x")  # it was killed too late
    await imported.import_(ref, name="x")
    assert await imported.layer("x") and len(left(imported)) == 2


async def test_without_its_programs(monkeypatch: pytest.MonkeyPatch, imported: Imported, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mkfs.erofs").symlink_to(process.path_of("mkfs.erofs"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(process, "_SYSTEM_PATH", "")
    with pytest.raises(HostError, match="needs skopeo and umoci, which this host lacks: apt-get install skopeo umoci"):
        await imported.import_("python:3.12-slim")

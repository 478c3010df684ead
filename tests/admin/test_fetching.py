"""Images and layers that another host has: fetched from its real server, by HTTP, and what may go wrong with that."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import psutil
import pytest

from swarm import config
from swarm.admin.fetching import OtherHosts
from swarm.app import doctor_wiring, sharing, wiring
from swarm.base import host
from swarm.base.files import is_full, make_directory, sha256_of
from swarm.config import Settings
from swarm.errors import ImageError, LayerMissing, NotFound, UsageError
from swarm.model import Agent
from swarm.store.hosts import Machine
from swarm.store.store import Store
from swarm.vm.driver import Image, Layer
from swarm.vm.image import elsewhere, staging
from swarm.vm.image.elsewhere import LAYER, PREFIX, token
from swarm.vm.image.layer import Layers, _shape
from swarm.vm.image.layer_build import Installed
from swarm.vm.image.oci import others
from swarm.vm.image.oci.reference import known_as
from tests.conftest import PATIENCE_SECONDS
from tests.engine.test_faults import small_disk
from tests.store.databases import Outside, database_of_hosts
from tests.vm.image.oci_images import Layout, entry, layer

pytestmark = [pytest.mark.slow, pytest.mark.needs("root", "netns")]

AGENT = Agent(id="a", name="far", version="1.0.0", path=Path("/"), entry=("main.py",), requirements=("greet==1.0",))
IMAGE = Image(
    digest="0" * 64, dir=Path("/"), kernel=Path("/"), kernel_elf=Path("/"), root=Path("/"), initramfs=None,
    boot_args="", packages={"python3-minimal": "3.11.2-1", "libc6": "2.36-9"},
)  # fmt: skip
SIZE = 6_000_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Relay:
    """Between a host that fetches and the server of another. ``cut_at``: of an answer so many bytes go through, once;
    then ``cut`` is set, and it breaks off when ``go_on`` is. ``flip``: the byte there is another one."""

    to: int
    cut_at: int | None = None
    flip: int | None = None
    heads: list[str] = field(default_factory=list)
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def files(self) -> list[str]:
        return [head.split()[1] for head in self.heads]

    @property
    def ranges(self) -> list[int]:
        found = [re.search(r"range: bytes=(\d+)-", head, re.IGNORECASE) for head in self.heads]
        return [int(one[1]) for one in found if one]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, to = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.close()
            return
        there_and_back = [asyncio.create_task(self._asked(reader, to)), asyncio.create_task(self._told(there, writer))]
        try:
            await asyncio.wait(there_and_back, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in there_and_back:
                one.cancel()
            await asyncio.gather(*there_and_back, return_exceptions=True)
            writer.close()
            to.close()

    async def _asked(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head.decode())
                to.write(head)
                await to.drain()

    async def _told(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = 0
        while data := await there.read(65536):
            if self.flip is not None and sent <= self.flip < sent + len(data):
                at = self.flip - sent
                data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            writer.write(data)
            await writer.drain()
            sent += len(data)
            if self.cut_at is not None and sent > self.cut_at:
                self.cut_at = None
                self.cut.set()
                await self.go_on.wait()
                return


@dataclass
class Hosts:
    """Two homes, and one database."""

    first: Settings
    second: Settings
    outside: Outside
    place: Path

    @property
    def port(self) -> int:
        return int(self.first.share_address.rpartition(":")[2])

    @asynccontextmanager
    async def store(self, of: Settings | None = None) -> AsyncIterator[Store]:
        """Of a host that lives. The first one's name is `first`."""
        own = of or self.first
        name = "first" if own is self.first else "second"
        make_directory(own.state_dir)
        id = host.make_host_id(own.state_dir)
        async with wiring.store(own) as store:
            await store.register_host(
                Machine(id=id, name=name, machine_id=name, boot_id="b", labels={}, capacity={}, versions={})
            )
            self.lives(name)
            yield store

    def lives(self, name: str, *, ms: int = 1 << 50) -> None:
        """It needs no engine that says so again and again."""
        self.outside.execute("UPDATE hosts SET seen_at = :ms WHERE name = :name", {"ms": ms, "name": name})

    @asynccontextmanager
    async def sharing(self, *, key_seconds: float = 600.0) -> AsyncIterator[Store]:
        """The first one hands out what it has."""
        async with self.store() as store, sharing.sharing(self.first, store, key_seconds=key_seconds):
            await until(lambda: self.announced("first") is not None)
            yield store

    def announced(self, name: str) -> str | None:
        found = self.outside.execute("SELECT files_at FROM hosts WHERE name = :name", {"name": name})
        return found[0][0] if found else None

    def at(self, address: str) -> None:
        """Where the others believe the first one to be."""
        self.outside.execute("UPDATE hosts SET files_at = :at WHERE name = 'first'", {"at": address})

    def key(self) -> str:
        return str(self.outside.execute("SELECT files_key FROM hosts WHERE name = 'first'")[0][0])

    def names(self) -> list[str]:
        return [str(name) for (name,) in self.outside.execute("SELECT name FROM host_files WHERE host = 'first'")]

    @asynccontextmanager
    async def layers(self, dir: Path | None = None) -> AsyncIterator[Layers]:
        """Of the second host."""
        async with self.store(self.second) as store:
            yield Layers(dir=dir or self.second.layers, others=OtherHosts(store))

    def left(self) -> list[str]:
        """What is in the second host's directory of layers."""
        found = [str(path.relative_to(self.second.layers)) for path in self.second.layers.rglob("*") if path.is_file()]
        return sorted(name for name in found if name != ".lock" and not name.startswith(staging.VERIFIED))


def make_layer(settings: Settings, agent: Agent = AGENT, *, size: int = SIZE) -> Path:
    """As a build leaves it, but for its content."""
    layers, shape = Layers(dir=settings.layers), _shape(agent, IMAGE)
    stage = settings.layers / f"{staging.BUILDING}test"
    make_directory(stage)
    (stage / "layer.erofs").write_bytes(os.urandom(size))
    key = layers.key(agent, IMAGE)
    layers._move_in(stage, key, shape, Installed(python={"greet": "1.0"}, npm={}, debian={}, lacks={}))
    return settings.layers / key


async def until(reached: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            found = reached()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.02)


def server() -> psutil.Process | None:
    """The process that hands out files."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "swarm.api.shared_files" in child.cmdline():
                return child
    return None


async def _migrate(first: Settings) -> None:
    make_directory(first.data_dir, 0o700)
    async with wiring.store(first) as store:
        await store.migrate()


def _hosts(settings: Settings, place: Path, url: str, open_outside: Callable[[str], Outside]) -> Iterator[Hosts]:
    given = {**settings.model_dump(), "driver": "process", "database_url": url}

    def one(number: int) -> Settings:
        own = {"home": place / str(number), "state_dir": place / f"state{number}", "images_dir": None}
        return config.load(**{**given, **own, "share_address": f"127.0.0.1:{free_port()}"})

    first, second = one(1), one(2)
    asyncio.run(_migrate(first))
    with contextlib.closing(open_outside(url)) as outside:
        yield Hosts(first, second, outside, place)


@pytest.fixture
def hosts(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Iterator[Hosts]:
    yield from _hosts(settings, tmp_path, *database_of_hosts(request, "sqlite", tmp_path))


@pytest.fixture(params=["sqlite", "postgresql"])
def both(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Iterator[Hosts]:
    yield from _hosts(settings, tmp_path, *database_of_hosts(request, request.param, tmp_path))


def check(layer: Layer | None, original: Path) -> None:
    assert layer is not None
    assert layer.path.read_bytes() == (original / "layer.erofs").read_bytes()
    assert stat.S_IMODE(layer.path.stat().st_mode) == 0o444
    assert stat.S_IMODE(layer.path.parent.stat().st_mode) == 0o755
    assert (layer.path.parent / "layer.json").read_bytes() == (original / "layer.json").read_bytes()


async def test_a_layer_comes_from_the_host_that_has_it(both: Hosts) -> None:
    original = make_layer(both.first)
    async with both.sharing(), both.layers() as layers:
        check(await layers.find(AGENT, IMAGE), original)
        assert both.left() == [f"{original.name}/layer.erofs", f"{original.name}/layer.json"]
    async with both.layers() as layers:
        check(await layers.find(AGENT, IMAGE), original)  # and stays, without the other host


async def test_what_is_made_and_removed_is_told(both: Hosts) -> None:
    async with both.sharing():
        assert both.names() == []
        original = make_layer(both.first)
        await until(lambda: both.names() == [original.name])
        Layers(dir=both.first.layers).remove(original.name)
        await until(lambda: both.names() == [])
        key, digest = both.key(), "0" * 64
        async with httpx.AsyncClient(base_url=f"http://{both.first.share_address}") as client:
            answer = await client.get(PREFIX + digest, headers={"authorization": f"Bearer {token(key, digest)}"})
        assert answer.status_code == 404
    assert both.announced("first") == both.first.share_address, "an engine that ended may be back soon"
    own = both.first.model_copy(update={"share_address": ""})
    async with both.store() as store, sharing.sharing(own, store):
        assert both.announced("first") is None


async def test_it_is_fetched_once(hosts: Hosts) -> None:
    make_layer(hosts.first)
    relay = Relay(hosts.port)
    async with hosts.sharing(), relay.listening() as address, AsyncExitStack() as stack:
        hosts.at(address)
        several = [await stack.enter_async_context(hosts.layers()) for _ in range(2)]
        found = await asyncio.gather(*(layers.find(AGENT, IMAGE) for layers in several for _ in range(3)))
    assert len({one.digest for one in found if one is not None}) == 1
    assert len(relay.files) == len(set(relay.files)) == 2, "the manifest and the layer"


async def test_a_server_that_is_killed_in_the_middle(hosts: Hosts) -> None:
    """Its engine starts another one, and what was fetched is not fetched again."""
    original = make_layer(hosts.first)
    relay = Relay(hosts.port, cut_at=3_000_000)
    async with hosts.sharing(), relay.listening() as address, hosts.layers() as layers:
        hosts.at(address)
        finding = asyncio.create_task(layers.find(AGENT, IMAGE))
        await relay.cut.wait()
        process = server()
        assert process is not None
        process.kill()
        relay.go_on.set()
        check(await finding, original)
        assert relay.ranges and 1_000_000 < relay.ranges[-1] < 3_100_000
        assert len(relay.files) >= 3 and len(set(relay.files)) == 2


async def test_who_comes_next_goes_on_where_another_was_stopped(hosts: Hosts) -> None:
    original = make_layer(hosts.first)
    relay = Relay(hosts.port, cut_at=3_000_000)
    async with hosts.sharing(), relay.listening() as address, hosts.layers() as layers:
        hosts.at(address)
        finding = asyncio.create_task(layers.find(AGENT, IMAGE))
        await relay.cut.wait()
        partial = hosts.second.layers / ".fetched" / sha256_of(original / "layer.erofs")
        await until(lambda: partial.exists() and partial.stat().st_size >= 1_000_000)
        finding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finding
        assert hosts.left() == [f".fetched/{partial.name}"]
        relay.go_on.set()
        check(await layers.find(AGENT, IMAGE), original)
        assert relay.ranges[-1] >= 1_000_000
        assert [name for name in hosts.left() if name.startswith(".")] == []


async def test_keys_change_and_a_fetch_goes_on(hosts: Hosts) -> None:
    original = make_layer(hosts.first)
    relay = Relay(hosts.port, cut_at=3_000_000)
    async with hosts.sharing(key_seconds=0.3), relay.listening() as address, hosts.layers() as layers:
        hosts.outside.script(
            "CREATE TRIGGER relayed AFTER UPDATE OF files_at ON hosts WHEN NEW.name = 'first' AND NEW.files_at <> "
            f"'{address}' BEGIN UPDATE hosts SET files_at = '{address}' WHERE name = 'first'; END"
        )
        hosts.at(address)
        first, digest = hosts.key(), sha256_of(original / "layer.erofs")
        headers = {"authorization": f"Bearer {token(first, digest)}"}
        finding = asyncio.create_task(layers.find(AGENT, IMAGE))
        await relay.cut.wait()
        async with httpx.AsyncClient() as client:

            async def refused() -> bool:
                answer = await client.head(f"http://{hosts.first.share_address}{PREFIX}{digest}", headers=headers)
                return answer.status_code == 401

            await until(refused)
        relay.go_on.set()
        check(await finding, original)
        assert relay.ranges[-1] > 1_000_000


async def test_other_bytes_are_refused(hosts: Hosts) -> None:
    make_layer(hosts.first)
    relay = Relay(hosts.port, flip=3_000_000)
    async with hosts.sharing(), relay.listening() as address, hosts.layers() as layers:
        hosts.at(address)
        with pytest.raises(LayerMissing) as caught:
            await layers.find(AGENT, IMAGE)
        said = str(caught.value)
        assert f"from the host 'first' ('{address}'): it sent other bytes than were announced" in said
        assert "run `swarm agent build far@1.0.0`" in said
        assert hosts.left() == []


async def test_a_row_of_another_layer_is_refused(hosts: Hosts) -> None:
    """Its files are as they were announced, but it is not made of what this agent requires."""
    other = make_layer(hosts.first, replace(AGENT, requirements=("other==1.0",)))
    async with hosts.sharing(), hosts.layers() as layers:
        key = layers.key(AGENT, IMAGE)
        hosts.outside.execute("UPDATE host_files SET name = :key, made_of = :key", {"key": key})
        with pytest.raises(LayerMissing, match="it is of another layer"):
            await layers.find(AGENT, IMAGE)
        assert hosts.left() == [] and other.exists()


LIES = {
    "HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n": "it has a manifest of 99999999 bytes",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffff\r\n": "it does not say its size",
    "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1/\r\ncontent-length: 0\r\n\r\n": "answers with status 302",
    "HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n": "answers with status 500",
    "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello": "other bytes than were announced",
    "what is this": "can't be reached",
    "": "can't be reached",
}


@pytest.mark.parametrize("answer", LIES)
async def test_a_server_that_lies(hosts: Hosts, answer: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer.encode())
        writer.close()

    make_layer(hosts.first)
    async with hosts.sharing(), await asyncio.start_server(serve, "127.0.0.1", 0) as lying, hosts.layers() as layers:
        hosts.at(f"127.0.0.1:{lying.sockets[0].getsockname()[1]}")
        with pytest.raises(LayerMissing, match=LIES[answer]):
            await layers.find(AGENT, IMAGE)
        assert hosts.left() == []


@pytest.mark.parametrize("size", [SIZE + 1, SIZE - 1, 0])
async def test_a_file_that_was_changed_over_there(hosts: Hosts, size: int) -> None:
    original = make_layer(hosts.first)
    async with hosts.sharing(), hosts.layers() as layers:
        os.truncate(original / "layer.erofs", size)
        with pytest.raises(LayerMissing, match=f"it has a file of {size} bytes where {SIZE} are announced"):
            await layers.find(AGENT, IMAGE)
        assert [name for name in hosts.left() if not name.endswith(sha256_of(original / "layer.json"))] == []


async def test_who_may_ask_for_what(hosts: Hosts) -> None:
    original = make_layer(hosts.first)
    digest, other = sha256_of(original / "layer.erofs"), sha256_of(original / "layer.json")
    async with hosts.sharing(), httpx.AsyncClient(base_url=f"http://{hosts.first.share_address}") as client:
        key = hosts.key()

        async def status(path: str, bearer: str | None = None, method: str = "GET", **headers: str) -> httpx.Response:
            given = [(name.encode(), text.encode()) for name, text in headers.items()]
            given += [(b"authorization", f"Bearer {bearer}".encode())] if bearer is not None else []
            return await client.request(method, path, headers=given)

        good = token(key, digest)
        await until(lambda: server() is not None)
        assert (await status(PREFIX + digest)).status_code == 401
        for bad in ("x", good[:-1], token(key, other), token("k" * 64, digest), "é", key):
            assert (await status(PREFIX + digest, bad)).status_code == 401
        assert (await status(PREFIX + digest, good, "POST")).status_code == 405
        no_file = "ab" * 32
        assert (await status(PREFIX + no_file, good)).status_code == 401
        assert (await status(PREFIX + no_file, token(key, no_file))).status_code == 404
        for trick in (
            "/", "/healthz", "/v1/files/", "/v1/files/../../etc/passwd", "/v1/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
            f"{PREFIX}{digest}/", f"{PREFIX}{digest.upper()}", f"{PREFIX}{digest}%00", f"{PREFIX}/etc/passwd",
            f"{PREFIX}{digest}%0a", f"{PREFIX}layers/{original.name}/layer.erofs",
        ):  # fmt: skip
            assert (await status(trick, good)).status_code == 404, trick
        head = await status(PREFIX + digest, good, "HEAD")
        assert (head.status_code, head.headers["content-length"], head.content) == (200, str(SIZE), b"")
        whole = (original / "layer.erofs").read_bytes()
        part = await status(PREFIX + digest, good, range=f"bytes={SIZE - 10}-")
        assert (part.status_code, part.content) == (206, whole[-10:])
        assert part.headers["content-range"] == f"bytes {SIZE - 10}-{SIZE - 1}/{SIZE}"
        assert (await status(PREFIX + digest, good, range=f"bytes={SIZE}-")).status_code == 416
        assert (await status(PREFIX + digest, good, range="bytes=-5")).content == whole  # as if it had not asked for it


async def test_the_server_has_no_rights(hosts: Hosts) -> None:
    make_layer(hosts.first)
    async with hosts.sharing(), hosts.layers() as layers:
        assert await layers.find(AGENT, IMAGE) is not None
        process = server()
        assert process is not None
        told = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Uid:\s+65533\s+65533\s+65533", told, re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", told, re.MULTILINE) and re.search(r"^NoNewPrivs:\s+1$", told, re.MULTILINE)
    assert server() is None


@pytest.mark.parametrize("kib", [3000, 12_000])
async def test_a_disk_without_room(hosts: Hosts, kib: int) -> None:
    """Its ticket waits for room, like any other: the cause says that it is full."""
    make_layer(hosts.first)
    with small_disk(hosts.place / "disk", kib) as disk:
        async with hosts.sharing(), hosts.layers(disk / "layers") as layers:
            with pytest.raises(
                LayerMissing, match=r"no space left in .* the layer of the host 'first' has 5 MB"
            ) as caught:
                await layers.find(AGENT, IMAGE)
            cause: BaseException | None = caught.value
            while cause is not None and not is_full(cause):
                cause = cause.__cause__
            assert isinstance(cause, OSError) and cause.errno == errno.ENOSPC
            assert [path.name for path in (disk / "layers").iterdir() if path.name.startswith(staging.BUILDING)] == []


async def test_hosts_that_are_gone_are_skipped(hosts: Hosts) -> None:
    """One is silent, one lives and is not to be reached, one hands out none now; then there is one that has it."""
    original = make_layer(hosts.first)
    async with hosts.sharing() as store, hosts.layers() as layers:
        key = layers.key(AGENT, IMAGE)
        assert await store.offered_files(LAYER, key) == [], "only those of other hosts"
        others = {"silent": (0, "127.0.0.1:9"), "closed": (1 << 50, f"127.0.0.1:{free_port()}"), "shy": (1 << 50, "")}
        for name, (seen, address) in others.items():
            hosts.outside.execute(
                "INSERT INTO hosts (id, name, seen_at, files_at, files_key) VALUES (:id, :id, :seen, :at, 'k')",
                {"id": name, "seen": seen, "at": address},
            )
            hosts.outside.execute(
                "INSERT INTO host_files (host, kind, name, made_of, digest, built_at) SELECT :id, kind, name, made_of, "
                "digest, built_at || :id FROM host_files WHERE host = 'first'",
                {"id": name},
            )
        hosts.lives("first", ms=0)
        with pytest.raises(LayerMissing) as caught:
            await layers.find(AGENT, IMAGE)
        said = str(caught.value)
        for words in (
            "the host 'silent' gives no sign of life", "from the host 'closed' (", "it can't be reached: ",
            "the host 'shy' hands out none now", "the host 'first' gives no sign of life",
        ):  # fmt: skip
            assert words in said, said
        hosts.lives("first")
        check(await layers.find(AGENT, IMAGE), original)


async def test_rows_that_others_may_write_count_for_nothing(hosts: Hosts) -> None:
    make_layer(hosts.first)
    file = hosts.first.data_dir / "swarm.db"
    async with hosts.sharing(), hosts.layers() as layers:
        file.chmod(0o666)
        with pytest.raises(LayerMissing, match="is not built for this guest image: run `swarm agent build"):
            await layers.find(AGENT, IMAGE)
        file.chmod(0o600)
        assert await layers.find(AGENT, IMAGE) is not None


async def test_what_no_host_has_is_told_as_ever(hosts: Hosts) -> None:
    async with hosts.sharing(), hosts.layers() as layers:
        with pytest.raises(LayerMissing, match="is not built for this guest image: run `swarm agent build"):
            await layers.find(AGENT, IMAGE)
        assert not hosts.second.layers.exists()


async def test_doctor_tells_of_the_address(hosts: Hosts) -> None:
    async def told(settings: Settings) -> tuple[str, str]:
        (check,) = [one for one in await doctor_wiring.examine(settings) if one.name == "files for other hosts"]
        return check.status, check.detail

    assert await told(hosts.first) == (
        "ok", f"{hosts.first.share_address} is free: engines hand out images and layers there",
    )  # fmt: skip
    async with hosts.sharing():
        await until(lambda: server() is not None)
        said = f"images and layers are handed out at {hosts.first.share_address}"
        assert await told(hosts.first) == ("ok", said)
    with socket.socket() as another:
        another.bind(("127.0.0.1", hosts.port))
        another.listen()
        status, said = await told(hosts.first)
        assert status == "fail" and "choose another SWARM_SHARE_ADDRESS" in said
    for address, words in (("192.0.2.1:7717", "can't listen on 192.0.2.1"), ("0.0.0.0:7717", "say an address of this")):
        status, said = await told(hosts.first.model_copy(update={"share_address": address}))
        assert status == "fail" and words in said


async def test_a_second_engine_of_the_host_takes_over(hosts: Hosts) -> None:
    make_layer(hosts.first)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(hosts.store())
        async with sharing.sharing(hosts.first, store):
            await until(lambda: hosts.announced("first") is not None)
            key = hosts.key()
            await stack.enter_async_context(sharing.sharing(hosts.first, store))
        await until(lambda: hosts.key() != key)
        async with hosts.layers() as layers:
            assert await layers.find(AGENT, IMAGE) is not None


async def test_a_host_that_is_removed_has_no_files(both: Hosts) -> None:
    make_layer(both.first)
    async with both.sharing() as store:
        assert len(both.names()) == 1
        await store.remove_host("first", by="p", force=True)
        assert both.names() == []


# --- imported images --------------------------------------------------------------------------------------------------


@pytest.mark.needs("oci")
async def test_an_imported_image_comes_from_the_host_that_has_it(both: Hosts, tmp_path: Path) -> None:
    """Under each of its names, and by its digests; a name stays what it became here."""
    layout, ours = Layout(tmp_path / "layout"), wiring.imported(both.first)
    ref = layout.add("x", [layer(entry("a", b"one"))], Env=["A=1"], Entrypoint=["/a"], User="7", WorkingDir="/srv")
    for name in ("tool:1", "team/tool", "at-home:5000/tool@sha256:" + "5" * 64):
        await ours.import_(ref, name=name)
    (info,) = ours.list()
    async with both.sharing(), both.store(both.second) as second:
        await until(lambda: len(both.names()) == 5)
        for image in ("tool:1", "docker://team/tool", "at-home:5000/tool@sha256:" + "5" * 64, info.digest,
                      info.config_digest):  # fmt: skip
            shutil.rmtree(both.second.images, ignore_errors=True)
            theirs = wiring.imported(both.second, second)
            found = await theirs.layer(image)
            assert found == replace(await ours.layer(image), path=found.path)
            assert found.path.read_bytes() == (await ours.layer(image)).path.read_bytes()
            assert [one.name for one in theirs.list()[0].names] == (
                [] if image.startswith("sha256:") else [known_as(image)]
            )
            assert theirs.damage(theirs.list()[0]) == ""
            for one in theirs.names().values():  # a registry may have a stranger's image under that name
                assert one.source == others.SOURCE
                with pytest.raises(UsageError, match="came from another host"):
                    await theirs.is_behind(one)
        shutil.rmtree(both.second.images)
        for image in ("tool:2", info.digest[:30], "sha256:" + "0" * 64):
            with pytest.raises(NotFound, match=r"is not on this host: `swarm image import [^;]*$"):
                await theirs.layer(image)

        await theirs.layer("tool:1")
        assert (await ours.import_(layout.add("x", [layer(entry("b"))]), name="tool:1"))[1]
        assert (await theirs.layer("tool:1")).digest == found.digest
        # What was damaged here is fetched again.
        (file,) = both.second.images.glob("oci/*/root.erofs")
        file.chmod(0o644)
        file.write_bytes(b"torn")
        await until(lambda: len(both.names()) == 7)
        assert (await theirs.layer("team/tool")).digest == found.digest


@pytest.mark.needs("oci")
async def test_an_imported_image_that_can_not_be_fetched(hosts: Hosts, tmp_path: Path) -> None:
    layout, ours = Layout(tmp_path / "layout"), wiring.imported(hosts.first)
    await ours.import_(layout.add("x", [layer(entry("a", os.urandom(3 << 20)))]), name="tool:1")
    (file,) = hosts.first.images.glob("oci/*/image.json")
    async with hosts.sharing(), hosts.store(hosts.second) as second:
        await until(lambda: len(hosts.names()) == 3)
        theirs = wiring.imported(hosts.second, second)
        hosts.at(f"127.0.0.1:{free_port()}")
        with pytest.raises(NotFound, match=r"image import tool:1.*and it can't be fetched: from the host 'first'"):
            await theirs.layer("tool:1")
        async with Relay(hosts.port, flip=1 << 20).listening() as address:
            hosts.at(address)
            with pytest.raises(NotFound, match="it sent other bytes than were announced"):
                await theirs.layer("tool:1")
        hosts.at(hosts.first.share_address)
        assert list(hosts.second.images.glob("oci/*/root.erofs")) == []
        found = await asyncio.gather(*(theirs.layer("tool:1") for _ in range(3)))
        assert len({one.digest for one in found}) == 1
    for told in (b"{}", b"[]", file.read_bytes().replace(b'"config_digest": "sha256:', b'"config_digest": "sha256:0')):
        with pytest.raises(ImageError, match=r"its manifest can't be read|another version"):
            elsewhere.read(told, f"{file.parent.name}.0", others.parts)

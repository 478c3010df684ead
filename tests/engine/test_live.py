"""An engine's live socket: real conversations with a real agentd pass through it, as over its own connection."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from swarm import config
from swarm.app import manual_vm
from swarm.channel import frames, processes
from swarm.channel.conversation import Conversation
from swarm.channel.dial import Endpoint
from swarm.channel.guest import Guest
from swarm.channel.processes import Order
from swarm.cli.ui import sandbox_view
from swarm.engine import live
from swarm.engine.conversing import Told
from swarm.engine.egress import AttemptEgress, Grant
from swarm.engine.held import Ending, Held
from swarm.errors import ChannelError, Conflict, GuestRefused, NoSpace, SwarmError, UsageError
from swarm.gateway import policy
from swarm.gateway.process import GatewayProcess
from swarm.ledger import Account
from swarm.live.client import Live
from swarm.live.wire import NotHeld
from swarm.model import Agent, Event, Sandbox, SandboxClaim, SandboxState
from tests.channel.agentd_here import TOKEN, running
from tests.conftest import PATIENCE_SECONDS

AGENT = Agent(id="a", name="a", version="1", path=Path("/"), entry=("x",))


class Holder:
    """One that holds a single sandbox, 'box', and nothing else of an engine."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.asked: list[tuple[object, ...]] = []
        self.talks = 0

    @asynccontextmanager
    async def converse(
        self, id: str, op: str, fields: Mapping[str, object], payload: bytes, *, by: str
    ) -> AsyncIterator[Conversation]:
        if id != "box":
            raise NotHeld(f"the sandbox {id} is not held here")
        self.talks += 1
        try:
            async with self.guest.open(op, fields, payload) as conversation:
                yield conversation
        finally:
            self.talks -= 1

    async def pause(self, id: str, *, by: str) -> None:
        self.asked.append(("pause", id, by))
        raise NoSpace("no room for its snapshot")

    async def snapshot(
        self, id: str, *, by: str, name: str | None, keep_seconds: float | None, without_secrets: bool
    ) -> str:
        self.asked.append(("snapshot", id, by, name, keep_seconds, without_secrets))
        return "snap-1"

    async def fork(self, id: str, *, by: str, count: int, name: str | None) -> Sequence[str]:
        self.asked.append(("fork", id, by, count, name))
        return [f"f{number}" for number in range(count)]

    async def end(self, id: str, *, by: str) -> None:
        self.asked.append(("end", id, by))
        raise RuntimeError("a bug")


@pytest.fixture
async def held(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Holder, Path]]:
    directory = tmp_path_factory.mktemp("v")
    async with running(directory) as it:
        guest = Guest(it.vm.endpoint, TOKEN)
        holder = Holder(guest)
        async with live.serving(holder, directory / "live") as path:
            yield holder, path
        await guest.close()


async def test_a_program_by_the_engine_is_as_one_by_its_own_connection(held: tuple[Holder, Path]) -> None:
    holder, path = held
    box = Live(path, "box", by="anna")
    script = "cat; echo err >&2; exit 3"
    argv = ["/bin/sh", "-c", script, "more than a header holds", "x" * 100_000]
    order = Order(argv=argv, open_stdin=True, user="agent")
    async with processes.start(box.open, order) as process:
        big = os.urandom(3 << 20)  # more than any window and buffer: both ways are paced

        async def feed() -> None:
            await process.write(big)
            await process.close_stdin()

        feeding = asyncio.create_task(feed())
        done = await process.collect(16 << 20)
        await feeding
    assert (done.stdout, done.stderr, done.ended.code) == (big, b"err\n", 3)
    listed = await processes.processes(box.open)
    assert [(one.process, one.ended.code) for one in listed if one.ended] == [(order.process, 3)]
    with pytest.raises(GuestRefused, match="No such file") as refused:
        await processes.run(box.open, Order(argv=["/nothing-there"]))
    assert refused.value.kind == "CannotStart"
    assert holder.talks == 0


async def test_an_engine_that_dies_is_called_by_its_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    """And not taken for the guest, of which nothing is known then."""

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await frames.read(reader)
        writer.write(frames.encode({"id": asked.head["id"]}, b""))
        writer.close()
        await writer.wait_closed()

    path = tmp_path_factory.mktemp("v") / "s"
    async with await asyncio.start_unix_server(die, path):
        with pytest.raises(ChannelError, match="the engine that held the sandbox has ended"):
            await processes.run(Live(path, "box", by="anna").open, Order(argv=["true"]))


async def test_who_goes_away_ends_what_they_started(held: tuple[Holder, Path]) -> None:
    holder, path = held
    box = Live(path, "box", by="anna")
    async with processes.start(box.open, Order(argv=["/bin/sleep", "1000"], process="left")) as process:
        assert process.pid and holder.talks == 1
    async with asyncio.timeout(PATIENCE_SECONDS):
        while holder.talks or not (await processes.processes(box.open))[0].ended:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    async with processes.start(box.open, Order(argv=["/bin/sleep", "1000"], process="stays", background=True)):
        pass
    (stays,) = [one for one in await processes.processes(box.open) if one.process == "stays"]
    assert stays.ended is None
    await processes.signal(box.open, "stays", "KILL")


async def test_a_client_that_takes_nothing_holds_the_program_up(held: tuple[Holder, Path]) -> None:
    """And nothing is kept for it but what pipes and sockets hold."""
    holder, path = held
    box = Live(path, "box", by="anna")
    fields = {"process": "flood", "argv": ["/usr/bin/yes"], "env": {}, "user": "agent"}
    async with box.open("exec", fields) as conversation:
        while not (await conversation.receive()).payload:
            pass
        before = -1
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (now := await _written(box)) != before:
                before = now
                await asyncio.sleep(0.2)
        assert now < 32 << 20
    async with asyncio.timeout(PATIENCE_SECONDS):
        while holder.talks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _written(box: Live) -> int:
    return next(one.output_bytes for one in await processes.processes(box.open) if one.process == "flood")


async def test_what_an_engine_is_asked_and_what_it_refuses(held: tuple[Holder, Path]) -> None:
    holder, path = held
    box = Live(path, "box", by="anna")
    assert await box.snapshot(name="good", keep_seconds=60, without_secrets=True) == "snap-1"
    assert await box.fork(count=2, name="try") == ["f0", "f1"]
    with pytest.raises(NoSpace, match="no room"):
        await box.pause()
    with pytest.raises(SwarmError, match="unexpected RuntimeError: see the engine's log"):
        await box.end()
    assert holder.asked == [
        ("snapshot", "box", "anna", "good", 60, True), ("fork", "box", "anna", 2, "try"), ("pause", "box", "anna"),
        ("end", "box", "anna"),
    ]  # fmt: skip
    with pytest.raises(NotHeld, match="other is not held here"):
        async with Live(path, "other", by="anna").open("exec", {}):
            pass
    with pytest.raises(UsageError, match="can't dance a sandbox"):
        await box._ask("dance")
    with pytest.raises(UsageError, match="count must be a number above 0"):
        await box._ask("fork", count=-1)


async def test_only_its_user_can_open_it_and_what_is_sent_to_it_is_bounded(held: tuple[Holder, Path]) -> None:
    holder, path = held
    mode = path.stat()
    assert stat.S_IMODE(mode.st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", frames.encode({}), frames.encode({"ask": 1}), b"\xff" * 100):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(sent)
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_SECONDS):
            said = await reader.read()
        assert b'"fault"' in said, sent
        writer.close()
    assert holder.asked == [] and holder.talks == 0


async def test_an_engine_that_stops_tells_those_that_speak(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("v")
    async with running(directory) as it:
        guest = Guest(it.vm.endpoint, TOKEN)
        async with live.serving(Holder(guest), directory / "live") as path:
            box = Live(path, "box", by="anna")
            opened = processes.start(box.open, Order(argv=["/bin/sleep", "1000"]))
            process = await opened.__aenter__()
        with pytest.raises(ChannelError, match="the engine stops, and pauses its sandboxes"):
            await process.exit()
        await opened.__aexit__(None, None, None)
        await guest.close()
        with pytest.raises(NotHeld, match="the engine that held the sandbox box has ended"):
            await box.pause()
    assert list((directory / "live").iterdir()) == []


async def test_an_engine_stops_while_clients_are_slow_to_go(tmp_path_factory: pytest.TempPathFactory) -> None:
    """They have their answers, and have not closed their connections."""
    directory, faults = tmp_path_factory.mktemp("v"), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    async with running(directory) as it:
        guest = Guest(it.vm.endpoint, TOKEN)
        async with live.serving(Holder(guest), directory / "live") as path:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(frames.encode({"ask": "fork", "sandbox": "box", "by": "x", "fields": {}}))
            assert (await frames.read(reader, who="engine")).head["answer"] == ["f0"]
            await reader.read()  # its end
        writer.close()
        await guest.close()
    assert faults == []


async def test_the_socket_of_a_dead_engine_is_removed(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    dead = tmp_path / "live" / "1-x.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(dead))
    async with live.serving(Holder.__new__(Holder), tmp_path / "live") as path:
        assert [path] == list((tmp_path / "live").iterdir())


@pytest.mark.needs("netns")
async def test_swarm_cleanup_removes_it_too(tmp_path: Path) -> None:
    settings = config.load(home=tmp_path / "home", state_dir=tmp_path / "state")
    place = settings.state_dir / "live"
    place.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place / "1-x.sock"))
    async with live.serving(Holder.__new__(Holder), place) as path:
        (place / "2-x.sock").touch()
        swept = await manual_vm.cleanup(settings)
        assert f"{place / '2-x.sock'}, of an engine that was killed" in swept.removed and not swept.failed
        assert [path] == list(place.iterdir())


class Waits(Holder):
    """Its guest never begins."""

    @asynccontextmanager
    async def converse(
        self, id: str, op: str, fields: Mapping[str, object], payload: bytes, *, by: str
    ) -> AsyncIterator[Conversation]:
        self.talks += 1
        self.asked.append((op,))
        try:
            await asyncio.Event().wait()
            yield  # type: ignore[misc]
        finally:
            self.talks -= 1


async def test_who_goes_before_the_guest_has_begun_takes_no_place(tmp_path: Path) -> None:
    holder = Waits(Guest(Endpoint(unix=tmp_path / "none"), TOKEN))
    async with live.serving(holder, tmp_path / "live") as path:
        _, writer = await asyncio.open_unix_connection(path)
        writer.write(frames.encode({"open": "exec", "sandbox": "box", "by": "x", "fields": {}}))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not holder.talks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while holder.talks:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def no_gateway() -> GatewayProcess:
    raise AssertionError


def sandbox(emit: Callable[[Event], None] = lambda event: None) -> Held:
    box = Sandbox(id="box", name="b", state=SandboxState.RUNNING)
    claim = SandboxClaim(sandbox=box, hold_id="h", agent=AGENT, snapshot=None, resumes=False, memory_mb=128)
    return Held(claim, AGENT, idle_seconds=1, emit=emit)


async def test_a_guest_that_does_not_begin_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        talk = Told(Conversation(reader, writer, "exec", 1), "exec", {"process": "p"}, sandbox(), by="anna")
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await talk.begin(within_seconds=0.01)
        with pytest.raises(ChannelError, match=r"has not begun the program in 0\.01 s"):
            await talk.receive()
        await writer.wait_closed()


async def test_a_program_that_was_refused_is_no_program_in_the_background() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        held, fields = sandbox(), {"process": "p", "background": True}
        talk = Told(Conversation(reader, writer, "exec", 1), "exec", fields, held, by="anna")
        theirs.sendall(frames.encode({"id": 1, "error": {"type": "CannotStart", "message": "no such program"}}))
        assert await talk.begin()
        assert held.background == set(), "its end would never be told"
        with pytest.raises(GuestRefused, match="no such program"):
            await talk.receive()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("op", ["exec", "signal"])
async def test_what_the_guest_refused_is_told_as_such(op: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        told: list[Event] = []
        held = sandbox(told.append)
        account = Account(
            ticket_id=None, run_id="", step_execution_id="", step_id="", attempt_id="", agent_id="", agent_name=""
        )
        grant = Grant(account=account, policy=policy.parse("none"), services={}, secrets={"KEY": "hunter2-hunter2"})
        held.egress = AttemptEgress(grant, no_gateway, lambda kind, data: None)
        talk = Told(Conversation(reader, writer, op, 1), op, {"process": "p", "signal": "X"}, held, by="anna")
        error = {"type": "CannotStart", "message": "no such program: hunter2-hunter2"}
        theirs.sendall(frames.encode({"id": 1, "error": error}))
        assert await talk.begin()
        with pytest.raises(GuestRefused, match="no such program"):
            await talk.receive()
        talk.ended(None)  # who asked has heard the answer, and no error of ours
        data = told[-1].data
        assert str(data["error"]).startswith("no such program: ") and "hunter2" not in str(data)
        assert op == "exec" or sandbox_view.told(told[-1]) == f"X to p: {data['error']}"
        writer.close()
        await writer.wait_closed()


async def test_one_sandbox_does_not_take_all_places(tmp_path: Path) -> None:
    held = sandbox()
    held.guest = Guest(Endpoint(unix=tmp_path / "none"), TOKEN)
    held.started.set_result(None)
    async with AsyncExitStack() as stack:
        for _ in range(64):
            await stack.enter_async_context(held.spoken_with())
        with pytest.raises(Conflict, match="the sandbox b is in 64 uses at once already"):
            await stack.enter_async_context(held.spoken_with())
    async with held.spoken_with():
        pass


async def test_a_guest_that_never_sleeps_is_given_up() -> None:
    held, refused = sandbox(), GuestRefused("freeze", "Error", "no")
    assert [held.given_up(error) for error in (refused, ChannelError("silent"), NoSpace("full"))] == [""] * 3
    assert [held.given_up(error) for error in (refused, ChannelError("silent"))] == [""] * 2
    held.want(Ending.PAUSED, "anna")  # who is told, and may end it
    assert held.given_up(refused) == ""
    held.refuse(refused, seconds=0)
    assert held.given_up(refused) == "its guest refused 3 times to be put to sleep"

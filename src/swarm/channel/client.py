"""The client: sends requests and reads replies, none of which it trusts. The package's docstring shows its use."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from swarm.base.trees import Entry
from swarm.channel import frames
from swarm.channel.conversation import Conversation
from swarm.channel.dial import LAST_PAUSE, Endpoint, dial
from swarm.channel.files import ENTRY, MAX_NAMES_BYTES, File, batches, read_tree
from swarm.channel.frames import MAX_PAYLOAD_BYTES, Frame, printable
from swarm.channel.proof import GUEST, HOST, new_nonce, proof, shown
from swarm.channel.values import Exit, Hello, Identity, Renewed, exit_of, final, state
from swarm.errors import AgentFailed, AgentTimeout, ChannelError, GuestRefused, GuestSilent, OutputInvalid, UsageError
from swarm.model import FailureReason

PROTOCOL: Final = 4
MAX_STDIN_BYTES: Final = MAX_PAYLOAD_BYTES
_GRACE_SECONDS: Final = 25.0  # what agentd may need to kill and reap an agent after its time is up
_STREAMS: Final = ("stdout", "stderr")
_Rest = tuple[AsyncIterator[bytes], int]  # the rest of a payload, and its size


class Channel:
    """One connection to an agentd. Use `connect`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        token: bytes,
        io_timeout_seconds: float,
        *,
        tells: bool = False,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._token = token
        self._tells = tells  # the token itself: over a Unix socket, whose agentd has none yet
        self._io_seconds = io_timeout_seconds
        # Both locks are fair, so replies are awaited in the order of their requests.
        self._sending = asyncio.Lock()
        self._receiving = asyncio.Lock()
        self._last_id = 0
        self._unanswered: int | None = None  # the latest request, until it is answered
        self._broken = ""  # why this connection can't be used any more
        self.greeting: Hello

    # --- the connection

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        endpoint: Endpoint,
        *,
        token: bytes,
        timeout_seconds: float,
        io_timeout_seconds: float = 60.0,
        listening: bool = False,
    ) -> AsyncIterator[Channel]:
        """Connect and say hello, repeatedly until agentd answers; ``greeting`` is its answer.

        ``token``: 16 to 64 bytes. A VM got it at boot, and each side proves that it knows it; an agentd behind a Unix
        socket adopts the first one that it receives. ``io_timeout_seconds`` bounds every later exchange except a run.
        ``listening``: see `dial`. Raises ChannelError when the time is over, or at once when agentd refuses the token,
        or when something else answers.
        """
        channel = await cls.reach(endpoint, token, timeout_seconds, io_timeout_seconds, listening=listening)
        try:
            yield channel
        finally:
            await channel.end()

    @classmethod
    async def reach(
        cls, endpoint: Endpoint, token: bytes, timeout_seconds: float, io_seconds: float = 60.0, *, listening: bool
    ) -> Channel:
        """`connect` for a caller that will `end` it."""
        trouble = ["it is not listening"]
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    streams = await dial(endpoint, trouble, listening=listening)
                    channel = cls(*streams, token, io_seconds, tells=endpoint.unix is not None)
                    try:
                        channel.greeting = await channel.hello()
                        return channel
                    except ChannelError as error:
                        # A guest restored in the middle of an old connection resets the next one: worth a new try.
                        if not channel._broken:
                            raise
                        trouble[0] = str(error)
                        await asyncio.sleep(LAST_PAUSE)
                    finally:
                        if not hasattr(channel, "greeting"):
                            await channel.end()
        except TimeoutError:
            where = str(endpoint.unix or f"{endpoint.host}:{endpoint.port}")
            message = f"agentd at {where} did not answer in {timeout_seconds:g} s: {trouble[0]}"
            raise ChannelError(message) from None

    def close(self) -> None:
        """Close the connection; agentd then kills the agent that was started on it. Idempotent."""
        self._broken = self._broken or "it was closed"
        self._writer.transport.abort()
        # If memory ran out during a write, asyncio has left the socket registered for writing without knowing it, and
        # would never read from the next socket with the same number.
        if (number := self._writer.get_extra_info("socket").fileno()) >= 0:
            asyncio.get_running_loop().remove_writer(number)

    async def end(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    @contextlib.asynccontextmanager
    async def _call(
        self,
        op: str,
        payload: bytes,
        fields: Mapping[str, object],
        *,
        limit_seconds: float | None = None,
        rest: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[Callable[[], Awaitable[Frame]]]:
        """Send a request, and yield a function that returns the next reply, or raises GuestRefused.
        ``rest``: more of the payload, in pieces of at most 1 MiB. Left by any other exception, the block closes the
        connection, since its state is unknown."""
        request_id = 0
        try:
            async with self._sending:
                if self._broken:
                    raise ChannelError(f"the connection to the guest can't be used any more: {self._broken}")
                head = {"id": self._last_id + 1, "op": op, "after": self._unanswered, **fields}
                try:
                    first = frames.encode(head, payload[:MAX_PAYLOAD_BYTES])
                except ValueError as error:
                    raise UsageError(f"{op}: names, arguments and environment are too long: {error}") from None
                request_id = self._last_id = self._unanswered = self._last_id + 1
                await self._send(op, first, payload, limit_seconds or self._io_seconds, rest)

            conversation = Conversation(self._reader, self._writer, op, request_id)
            async with self._receiving:
                try:
                    async with asyncio.timeout(limit_seconds) as limit:
                        yield conversation.receive
                except TimeoutError:
                    if not limit.expired():
                        raise
                    raise ChannelError(f"the guest did not answer {op} within {limit_seconds:g} s") from None
        except GuestRefused:
            raise
        except BaseException as error:
            if request_id:
                self._broken = self._broken or str(error) or type(error).__name__
                self.close()
            raise
        finally:
            if self._unanswered == request_id:
                self._unanswered = None

    async def _send(
        self, op: str, first: bytes, payload: bytes, limit_seconds: float, rest: AsyncIterator[bytes] | None
    ) -> None:
        try:
            async with asyncio.timeout(limit_seconds):
                self._writer.write(first)
                for at in range(MAX_PAYLOAD_BYTES, len(payload), MAX_PAYLOAD_BYTES):
                    await self._writer.drain()
                    chunk = payload[at : at + MAX_PAYLOAD_BYTES]
                    self._writer.write(frames.encode({"id": self._last_id, "op": "data"}, chunk))
                if rest is not None:
                    async for chunk in rest:
                        await self._writer.drain()
                        self._writer.write(frames.encode({"id": self._last_id, "op": "data"}, chunk))
                await self._writer.drain()
        except TimeoutError:
            raise ChannelError(f"the guest did not take {op} within {limit_seconds:g} s") from None
        except OSError as error:
            raise ChannelError(f"the connection to the guest broke: {error}") from None

    async def _ask(self, op: str, payload: bytes = b"", *, rest: _Rest | None = None, **fields: object) -> Frame:
        """A request with one reply."""
        # A guest that takes less than 1 MiB/s counts as dead.
        limit = self._io_seconds + (len(payload) + (rest[1] if rest else 0)) / (1 << 20)
        try:
            async with self._call(op, payload, fields, limit_seconds=limit, rest=rest and rest[0]) as reply:
                return final(await reply())
        except GuestRefused as refusal:
            raise ChannelError(f"agentd refused {refusal}") from None

    @contextlib.asynccontextmanager
    async def converse(self, op: str, fields: Mapping[str, object], payload: bytes) -> AsyncIterator[Conversation]:
        """The only conversation on this connection meanwhile. Closes it, unless the conversation has ended."""
        async with self._sending, self._receiving:
            if self._broken:
                raise ChannelError(f"the connection to the guest can't be used any more: {self._broken}")
            self._last_id += 1
            conversation = Conversation(self._reader, self._writer, op, self._last_id)
            try:
                await conversation.begin(*frames.fit({"op": op, **fields}, payload))
                yield conversation
            finally:
                if not conversation.ended:
                    self.close()

    @property
    def usable(self) -> bool:
        """Whether it can take another request, as far as is known."""
        return not (self._broken or self._reader.at_eof() or self._writer.is_closing())

    # --- operations

    async def hello(self) -> Hello:
        """How the guest describes itself now."""
        nonce, token = new_nonce(), self._token
        told = token.hex() if self._tells else None
        reply = await self._ask("hello", nonce=nonce, proof=proof(token, HOST, nonce), token=told)
        if (version := reply.number("protocol")) != PROTOCOL:
            raise ChannelError(f"agentd speaks protocol {version}, not {PROTOCOL}: rebuild the image", retryable=False)
        if not shown(token, GUEST, nonce, reply.text("proof")):
            message = "what answers in the VM's place does not know its token: see the host's routes and addresses"
            raise ChannelError(message, retryable=False)
        return Hello(
            **state(reply),
            mode=reply.text("mode"),
            python=printable(reply.text("python")),
            kernel=printable(reply.text("kernel")),
            preload_failed=reply.mapping("preload_failed"),
            uptime_ms=reply.number("uptime_ms"),
        )

    async def renew(self, identity: Identity, *, image: Mapping[str, object] | None = None) -> Renewed:
        """Give the guest its identity, a random seed and the time; later connections need ``identity.token``.

        ``image``: what a guest whose agents see an imported image must know before one runs: its ``user`` ([uid, gid,
        [further groups], home directory]), which is then called 'agent', and its ``env``.
        Raises ChannelError if any part failed: such a guest must be killed, not used.
        """
        reply = await self._ask(
            "renew",
            generation=identity.generation,
            seed=identity.seed.hex(),
            hostname=identity.hostname,
            machine_id=identity.machine_id,
            ssh_host_key=identity.ssh_host_key,
            authorized_keys=identity.authorized_keys,
            token=identity.token.hex(),
            work_disk=identity.work_disk,
            sshd_ready=identity.sshd_ready,
            wall_ns=time.time_ns(),
            image=image,
        )
        renewed = Renewed(**state(reply), done=reply.texts("done"), skipped=reply.texts("skipped"))
        if renewed.generation != identity.generation:
            raise ChannelError("the guest reports a generation that it was not given")
        self._token = identity.token
        return renewed

    async def sshd_ready(self, *, timeout_seconds: float) -> bool:
        """Wait until the sshd that a renewal with ``sshd_ready`` started ahead has sent its greeting. False if it did
        not in that time."""
        deadline = time.monotonic() + timeout_seconds
        while (left := deadline - time.monotonic()) > 0:
            if (await self._ask("sshd_ready", seconds=min(left, 20.0))).head.get("ready") is True:
                return True
        return False

    async def put(self, files: Mapping[str, bytes], *, dest: str, owner: str = "agent", mode: int = 0o644) -> None:
        """Write files below ``dest`` ('/work' or '/agent'), replacing existing ones and creating directories.

        Raises UsageError for a name that is not a plain relative path, ChannelError if the guest could not (disk full).
        """
        await self._put([(name, data, mode) for name, data in files.items()], dest, owner)

    async def put_tree(self, dir: Path, *, dest: str, owner: str = "root") -> int:
        """Copy a directory's files to ``dest``; returns how many. Of their modes only the execute bit is kept;
        __pycache__ is left out. Raises UsageError for a link that leads out of it, a special file, or more than 256
        MiB."""
        files = await asyncio.to_thread(read_tree, dir)
        await self._put(files, dest, owner)
        return len(files)

    async def _put(self, files: Sequence[File], dest: str, owner: str) -> None:
        for batch in batches(files, lambda file: (file[0], len(file[1]))):
            table = [[name, len(data), mode] for name, data, mode in batch]
            await self._ask("put", b"".join(data for _, data, _ in batch), dest=dest, owner=owner, files=table)

    async def put_entries(
        self,
        entries: Sequence[Entry],
        contents: Callable[[int, int], AsyncIterator[bytes]],
        *,
        dest: str,
        owner: str = "agent",
    ) -> None:
        """`put` of files, links and directories; ``contents(offset, size)`` yields what is in them, one after the
        other, in pieces of at most 1 MiB."""
        at = 0
        for batch in batches(entries, lambda entry: (entry.name, entry.size)):
            table = [[entry.name, entry.size, entry.mode] for entry in batch]
            size = sum(entry.size for entry in batch)
            await self._ask("put", rest=(contents(at, size), size), dest=dest, owner=owner, files=table)
            at += size

    async def get_tree(self, path: str, *, limit_bytes: int, limit_entries: int, spool: BinaryIO) -> bool:
        """Receive a directory into ``spool``, a file that `Received` reads. False if there was more than the limits
        allow (2 MiB of names is one). A directory that doesn't exist is empty."""
        most = limit_bytes + MAX_NAMES_BYTES + limit_entries * ENTRY.size
        fields = {"path": path, "limit": limit_bytes, "entries": limit_entries, "names": MAX_NAMES_BYTES}
        received = 0
        try:
            async with self._call("tree", b"", fields, limit_seconds=self._io_seconds + most / (1 << 20)) as reply:
                while not (frame := await reply()).head.get("ok"):
                    received += len(frame.payload)
                    if frame.head.get("stream") != "data" or not frame.payload or received > most:
                        raise ChannelError("the guest sent more of a directory than it may")
                    await asyncio.to_thread(spool.write, frame.payload)
                return frame.flag("complete")
        except GuestRefused as refusal:
            raise ChannelError(f"agentd refused {refusal}") from None

    async def get(self, path: str, *, limit_bytes: int) -> bytes | None:
        """A regular file's contents; None if it doesn't exist.

        Raises OutputInvalid if it is larger than the limit, or a link, a device or the like.
        """
        data = bytearray()
        limit_seconds = self._io_seconds + limit_bytes / (1 << 20)
        try:
            async with self._call(
                "get", b"", {"path": path, "limit": limit_bytes}, limit_seconds=limit_seconds
            ) as reply:
                while not (frame := await reply()).head.get("ok"):
                    if frame.head.get("stream") != "data" or not frame.payload:
                        raise ChannelError("the guest sent a frame that does not belong in a get")
                    data += frame.payload
                    if len(data) > limit_bytes:
                        raise ChannelError(f"the guest sent more than the limit of {limit_bytes} bytes")
                found = frame.flag("found")
                too_large = found and frame.flag("too_large")
                size = frame.number("size") if found else 0
                if size != len(data) and not too_large:
                    raise ChannelError(f"the guest sent {len(data)} bytes of {size}")
        except GuestRefused as refusal:
            if refusal.kind == "NotRegular":
                raise OutputInvalid(refusal.said) from None
            raise ChannelError(f"agentd refused {refusal}") from None
        if too_large:
            said = f"{path} has {size} bytes; the limit is {limit_bytes}"
            raise OutputInvalid(said, reason=FailureReason.OUTPUT_TOO_LARGE)
        return bytes(data) if found else None

    async def run(
        self,
        argv: Sequence[str],
        *,
        timeout_seconds: float,
        warm: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str = "/work",
        user: str = "agent",
        stdin: bytes = b"",
        idle_timeout_seconds: float | None = None,
        on_start: Callable[[], None] | None = None,
        on_output: Callable[[str, bytes], None] | None = None,
        ready: Callable[[], Awaitable[None]] | None = None,
        max_output_bytes: int = 16 << 20,
        leaves: bool = False,
    ) -> Exit:
        """Run a program to its end. Nothing that it started outlives it, unless it ``leaves`` that and ends with 0.

        ``warm``: ``argv[0]`` is a Python file, run in a fork of the guest's interpreter; otherwise it is executed.
        ``env`` is added to PATH, HOME, USER, LOGNAME, LANG, SWARM_WORK, SWARM_AGENT. ``on_start`` is called once, when
        the program runs. ``on_output(stream, data)`` receives 'stdout' and 'stderr' as they arrive, and 'swarm' once,
        with a note, when output exceeds ``max_output_bytes`` (the rest is dropped). ``ready`` is awaited before more
        output is read. The program is also ended after ``idle_timeout_seconds`` without output.

        Raises AgentTimeout (GuestSilent, if only the host's timer ended it), ChannelError, and AgentFailed if the
        program can't be started.
        """
        if len(stdin) > MAX_STDIN_BYTES:
            raise UsageError(f"stdin has {len(stdin)} bytes; the limit is {MAX_STDIN_BYTES}: put a file instead")
        if not argv or any("\0" in text for text in (*argv, *(env or {}), *(env or {}).values())):
            raise UsageError("argv is empty, or argv or env has a NUL character in it")
        emit = on_output or (lambda stream, data: None)
        order = {"argv": list(argv), "env": dict(env or {}), "cwd": cwd, "user": user, "warm": warm, "leaves": leaves}
        limits = {"timeout": timeout_seconds, "idle_timeout": idle_timeout_seconds, "max_output": max_output_bytes}
        started_at: float | None = None
        received = 0
        truncated = False
        silence = None if idle_timeout_seconds is None else idle_timeout_seconds + _GRACE_SECONDS
        try:
            async with self._call("run", stdin, order | limits) as reply:
                async with asyncio.timeout(timeout_seconds + _GRACE_SECONDS):
                    while True:
                        async with asyncio.timeout(silence):
                            frame = await reply()
                        head = frame.head
                        if head.get("ok"):
                            break
                        if head.get("stream") in _STREAMS and frame.payload:
                            received += len(frame.payload)
                            if received > max_output_bytes:
                                raise ChannelError(f"the guest sent more than the limit of {max_output_bytes} bytes")
                            emit(str(head["stream"]), frame.payload)
                            if ready is not None:
                                await ready()
                        elif "started_ns" in head and started_at is None:
                            started_at = time.monotonic()
                            if on_start is not None:
                                on_start()
                        elif head.get("truncated") is True and not truncated:
                            truncated = True
                            silence = None  # from here on only the guest can tell silence from dropped output
                            emit("swarm", b"output truncated after %d bytes\n" % max_output_bytes)
                        else:
                            raise ChannelError("the guest sent a frame that does not belong in a run")
                timed_out = frame.optional_text("timed_out")
                ended = None if timed_out else exit_of(frame, started_at)
        except TimeoutError:
            raise GuestSilent(f"its time was up {_GRACE_SECONDS:g} s ago, and the guest did not stop it") from None
        except GuestRefused as refusal:
            if refusal.kind == "CannotStart":
                raise AgentFailed(f"{printable(argv[0])} can't be started: {refusal.said}", retryable=False) from None
            raise ChannelError(f"agentd refused {refusal}") from None
        if timed_out == "idle":
            raise AgentTimeout(f"it printed nothing for {idle_timeout_seconds or 0:g} s")
        if ended is None:
            raise AgentTimeout(f"it ran for longer than {timeout_seconds:g} s")
        return ended

    async def kill(self) -> bool:
        """Kill the agent that was started on another connection. (Closing that connection does the same.)"""
        return (await self._ask("kill")).flag("killed")

    async def poweroff(self) -> None:
        with contextlib.suppress(ChannelError):  # the connection may end before the answer
            await self._ask("poweroff")
